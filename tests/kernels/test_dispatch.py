"""Which calls go to a kernel: by the variable, by what kernels can do, and by what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch

from flexcore import kernels
from flexcore.kernels import dispatch
from flexcore.kernels.dispatch import MARGIN, TABLE, VARIABLE, Shape, wins
from flexcore.row_attention import CausalRows, RegionRows, RowMask, row_attention

SHAPE = Shape("readout", "bfloat16", 128, 1, 32, 1, 1000)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLEXCORE", "TRITON"))}
    return subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True
    )


# ---------------------------------------------------------------------- the variable


@pytest.mark.parametrize("value", ["off", "on", "auto"])
def test_the_variable(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert kernels.mode() == value
    monkeypatch.delenv(VARIABLE)
    assert kernels.mode() == "auto"


@pytest.mark.parametrize("value", ["", "1", "On", "always"])
def test_a_misspelt_value_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match=f"FLEXCORE_KERNELS must be 'off', 'on' or 'auto', got {value!r}"):
        kernels.mode()


def test_a_misspelt_value_is_heard_of_without_a_gpu() -> None:
    done = python("import flexcore.row_attention", FLEXCORE_KERNELS="yes")
    assert "ValueError: FLEXCORE_KERNELS must be 'off', 'on' or 'auto', got 'yes'" in done.stderr


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_nothing_needs_triton(interpret: str) -> None:
    """Neither the import nor, where kernels were asked for, the call; with triton there, neither imports it."""
    code = """if True:
        import sys
        if {absent}:
            sys.modules["triton"] = None
        import torch
        from flexcore.hierarchical_attention import hierarchical_attention
        q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
        out = hierarchical_attention(q, k, k, k, k, fine_mask=None, scaling=1.0)
        assert out.shape == (1, 3, 2, 8)
        assert "flexcore.kernels.readout" not in sys.modules
    """
    done = python(code.format(absent=True), FLEXCORE_KERNELS="on", TRITON_INTERPRET=interpret)
    assert done.returncode == 0, done.stderr
    if interpret == "0":
        done = python(code.format(absent=False), FLEXCORE_KERNELS="on")
        assert done.returncode == 0, done.stderr


def test_on_means_torch_where_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "on")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    assert not kernels.reads_out(q, k, None)
    assert not kernels.reads_regions(q, k, k, None)
    assert row_attention(q, k, None, None, scaling=1.0)[1].shape == (1, 2, 3)


# ---------------------------------------------------------------------- what kernels can do


class Other:
    def chunk(self, start: int, stop: int) -> torch.Tensor:
        raise AssertionError


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the interpreter, where tensors on the CPU will do; nothing is launched here."""
    pytest.importorskip("triton")
    monkeypatch.setenv(VARIABLE, "on")
    monkeypatch.setattr(dispatch, "INTERPRETED", True)


def tensors(dtype: torch.dtype = torch.float32, width: int = 64, **kwargs: Any) -> list[torch.Tensor]:
    return [torch.zeros(1, heads, n, width, dtype=dtype, **kwargs) for heads, n in ((4, 3), (2, 6), (2, 6))]


def test_which_readouts_apply(interpreted: None) -> None:
    q, k, _ = tensors()
    causal = CausalRows(torch.zeros(1, 3, dtype=torch.long), 6)
    assert kernels.reads_out(q, k, None) and kernels.reads_out(q, k, causal)
    unknown: RowMask = Other()
    assert not kernels.reads_out(q, k, unknown)
    assert not kernels.reads_out(q, k[:, :, :0], None) and not kernels.reads_out(q[:, :, :0], k, None)
    assert not kernels.reads_out(q.double(), k.double(), None)
    assert not kernels.reads_out(q.bfloat16(), k, None)
    assert not kernels.reads_out(q.to("meta"), k.to("meta"), None)
    assert not kernels.reads_out(*tensors(width=256)[:2], None)
    assert kernels.reads_out(*tensors(torch.bfloat16, 256)[:2], None)
    assert not kernels.reads_out(*tensors(torch.bfloat16, 257)[:2], None)


def test_which_reads_apply(interpreted: None) -> None:
    mask = RegionRows(torch.ones(1, 3, 2, dtype=torch.bool), torch.ones(1, 2, 3, dtype=torch.bool))
    assert kernels.reads_regions(*tensors(), mask) and kernels.reads_regions(*tensors(), None)
    assert not kernels.reads_regions(*tensors(), CausalRows(torch.zeros(1, 3, dtype=torch.long), 6))
    for dtype, width, forward, backward in (
        (torch.float32, 128, True, False),
        (torch.float32, 64, True, True),
        (torch.float16, 256, True, True),
        (torch.bfloat16, 256, True, True),
    ):
        assert kernels.reads_regions(*tensors(dtype, width), mask) == forward
        assert kernels.reads_regions(*tensors(dtype, width, requires_grad=True), mask) == backward


def test_which_projections_apply(interpreted: None) -> None:
    key, value = (torch.nn.Linear(16, 32).requires_grad_(False) for _ in range(2))
    features, table = torch.zeros(1, 5, 16), torch.zeros(1, 5, 8)
    assert kernels.projects(features, key, value, table, table)
    assert not kernels.projects(features, key.requires_grad_(), value, table, table)
    with torch.no_grad():
        assert kernels.projects(features, key, value, table, table)
        with torch.autocast("cpu"):
            assert not kernels.projects(features, key, value, table, table)
        assert not kernels.projects(features, key, torch.nn.Linear(16, 32, bias=False), table, table)
        assert not kernels.projects(features, key, value, table[..., :7], table[..., :7])
        assert not kernels.projects(features, key, value, table.double(), table.double())


def test_a_compiled_graph_keeps_to_torch(interpreted: None) -> None:
    q, k, _ = tensors()
    torch._dynamo.reset()
    run = torch.compile(
        lambda q, k: row_attention(q, k, None, None, scaling=1.0)[1], backend="eager", fullgraph=True
    )
    with torch.no_grad():
        assert run(q, k).shape == (1, 4, 3)


# ---------------------------------------------------------------------- what was measured


def test_auto_is_off_where_nothing_was_measured(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "auto")
    assert not kernels.reads_out(*tensors()[:2], None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Something Else")
    assert not dispatch._chosen("auto", SHAPE, torch.device("cuda", 0))


def test_buckets() -> None:
    """Lanes, rows and keys go by powers of two; heads are as wide and as grouped as they are."""
    assert SHAPE.bucket() == replace(SHAPE, keys=1024)
    assert replace(SHAPE, rows=33, lanes=5, width=96, groups=7).bucket() == replace(
        SHAPE, rows=64, lanes=8, width=96, groups=7, keys=1024
    )
    for keys in (513, 1024):
        assert replace(SHAPE, keys=keys).bucket().keys == 1024
    assert replace(SHAPE, keys=512).bucket().keys == 512


def test_the_table_decides() -> None:
    entry = {**asdict(SHAPE.bucket()), "ratio": 0.5}
    table = {"H": [entry]}
    assert wins(SHAPE, "H", table) and wins(replace(SHAPE, keys=513), "H", table)
    assert not wins(SHAPE, "A", table)
    for other in (
        replace(SHAPE, keys=1025),
        replace(SHAPE, keys=512),
        replace(SHAPE, dtype="float16"),
        replace(SHAPE, rows=2),
        replace(SHAPE, grad=True),
        replace(SHAPE, kernel="region_attention"),
    ):
        assert not wins(other, "H", table)
    for slow in (MARGIN + 0.01, 1.0, 3.0):
        assert not wins(SHAPE, "H", {"H": [{**entry, "ratio": slow}]})
        assert not wins(SHAPE, "H", {"H": [entry, {**entry, "ratio": slow}]}), "the worst of several"


def test_the_table_that_we_ship() -> None:
    devices = json.loads(TABLE.read_text())["devices"]
    names = {f.name for f in fields(Shape)} | {"ratio"}
    for entries in devices.values():
        for entry in entries:
            assert set(entry) == names
            shape = Shape(**{n: v for n, v in entry.items() if n != "ratio"})
            assert shape == shape.bucket() and entry["ratio"] > 0
