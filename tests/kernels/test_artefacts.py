"""What the compiler makes of the kernels for GPUs that aren't here: nothing spilled, not too much shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.kernel_cases import Case, compile_cases
from flexcore.kernels.artefacts import SHARED_LIMIT, TARGETS, Artefact, compiled, missing_tools, specialised
from flexcore.kernels.dispatch import Shape
from flexcore.kernels.launch import Launch

SMALL = [
    Case(Shape("readout", "bfloat16", 64, 1, 8, 32, 640)),
    Case(Shape("region_attention", "bfloat16", 64, 1, 8, 32, 1024, True)),
    Case(Shape("gather_project_rotate", "bfloat16", 64, 1, 8, 1024, 1024)),
]
KERNELS = {
    *("row_log_sum_exp", "coarse_scores", "region_rows", "join_parts"),
    *("query_gradient", "page_gradients", "project_pages"),
}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def launches(cases: list[Case]) -> Iterator[Launch]:
    for case in cases:
        yield from case.launches()


def check(cases: list[Case], target: int) -> list[Artefact]:
    if reason := missing_tools(target):
        pytest.skip(reason)
    found = list(compiled(launches(cases), target))
    for artefact in found:
        assert artefact.target == target and artefact.registers > 16
        assert not artefact.spilled and not artefact.stack, artefact
        assert artefact.shared <= SHARED_LIMIT, artefact
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills(target: int) -> None:
    assert {a.kernel for a in check(SMALL, target)} == KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_at_the_sizes_of_the_notes(target: int) -> None:
    """And at the widest heads that the dispatch lets through."""
    wide = [
        Case(Shape("readout", "float32", 128, 1, 8, 32, 640)),
        Case(Shape("readout", "float16", 256, 8, 2, 32, 640)),
        Case(Shape("region_attention", "float32", 128, 1, 8, 32, 1024)),
        Case(Shape("region_attention", "float16", 256, 1, 8, 32, 1024, True)),
        Case(Shape("region_attention", "bfloat16", 96, 4, 2, 8, 1024, True)),
        Case(Shape("gather_project_rotate", "float32", 256, 1, 8, 1024, 1024)),
        Case(Shape("gather_project_rotate", "bfloat16", 80, 1, 8, 1024, 100)),
        Case(Shape("gather_project_rotate", "float32", 80, 1, 8, 1024, 100)),
        Case(Shape("gather_project_rotate", "float16", 208, 1, 8, 1024, 100)),
    ]
    assert len(check([*compile_cases(), *wide], target)) > 40


def test_the_check_can_fail() -> None:
    """With 32 registers a thread, something has to go to local memory."""
    if reason := missing_tools(80):
        pytest.skip(reason)
    first = SMALL[0].launches()[0]
    (found,) = compiled([replace(first, arguments={**first.arguments, "maxnreg": 32})], 80)
    assert found.registers <= 32 and found.spilled > 0


def test_specialisation() -> None:
    """Unit strides and missing tensors become constants, sizes that change from step to step stay arguments."""
    first, second = Case(Shape("readout", "bfloat16", 64, 1, 8, 1, 641)).launches()
    signature, constants, attributes, options = specialised(first)
    names = list(signature)
    assert signature["q"] == "*bf16" and signature["lse"] == "*fp32" and signature["scaling"] == "fp32"
    assert signature["k_width"] == signature["mask"] == signature["WIDTH"] == "constexpr"
    assert constants[(names.index("k_width"),)] == 1 and constants[(names.index("mask"),)] is None
    assert signature["n_keys"] == signature["n_rows"] == "i32"
    assert (names.index("n_keys"),) not in attributes and (names.index("k_key"),) in attributes
    assert set(options) == {"num_warps", "num_stages"}
    assert specialised(second)[0]["cells"] == "*i64"
