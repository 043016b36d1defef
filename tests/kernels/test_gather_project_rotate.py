"""The projection kernel against the same in float64 torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import poisoned_memory
from tests.kernels.helpers import DEVICE, DTYPES, RUNS_KERNELS, gap, rounding, strided

module = pytest.importorskip("flexcore.kernels.gather_project_rotate", exc_type=ImportError)
pytestmark = RUNS_KERNELS

SHAPES = {
    # features, tokens, width of features, kv heads, head width, value width
    "T70-N63-C100-H3-D32": (70, 63, 100, 3, 32, 32),
    "T20-N1-C64-H2-D40-Dv24": (20, 1, 64, 2, 40, 24),
    "T200-N111-C96-H1-D128": (200, 111, 96, 1, 128, 128),
    "T9-N3-C33-H2-D256": (9, 3, 33, 2, 256, 256),
}
LONG = {"T1000-N1000-C200-H2-D64": (1000, 1000, 200, 2, 64, 64)}
PLAIN = "T20-N1-C64-H2-D40-Dv24"


def case(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool = True, gather: bool = True
) -> dict[str, Any]:
    total, tokens, wide, heads, width, value = shape
    made: dict[str, Any] = {
        "features": torch.randn(total if gather else tokens, wide),
        "key_weight": torch.randn(heads * width, wide) * wide**-0.5,
        "value_weight": torch.randn(heads * value, wide) * wide**-0.5,
        "cos": torch.randn(tokens, width),
        "sin": torch.randn(tokens, width),
    }
    if bias:
        made |= {"key_bias": torch.randn(heads * width), "value_bias": torch.randn(heads * value)}
    made = {name: t.to(DEVICE, dtype) for name, t in made.items()}
    if gather:
        made["tokens"] = torch.randint(-1, total, (tokens,)).to(DEVICE)
    return made | {"heads": heads}


def exact(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    given = {n: t.cpu() if isinstance(t, Tensor) else t for n, t in given.items()}
    given = {
        n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in given.items()
    }
    return module.gather_project_rotate_reference(**given)


def check(given: dict[str, Any]) -> None:
    dtype = given["features"].dtype
    for found, expected in zip(module.gather_project_rotate(**given), exact(given), strict=True):
        assert found.dtype == dtype and found.is_contiguous()
        assert gap(found, expected) < rounding(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape: str, dtype: str) -> None:
    check(case(SHAPES[shape], DTYPES[dtype]))


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("gather", [False, True], ids=["in-order", "gather"])
def test_bias_and_gather(gather: bool, bias: bool) -> None:
    check(case(SHAPES[PLAIN], torch.float32, bias, gather))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LONG)
def test_parity_of_long_ones(shape: str, dtype: str) -> None:
    check(case(LONG[shape], DTYPES[dtype]))


def test_the_parity_check_can_fail() -> None:
    given = case(SHAPES["T70-N63-C100-H3-D32"], torch.float32)
    key, value = module.gather_project_rotate(**given)
    for name, wrong in (
        ("sin", -given["sin"]),
        ("tokens", given["tokens"].roll(1)),
        ("key_weight", given["key_weight"].unflatten(0, (3, 2, 16)).transpose(1, 2).flatten(0, 2)),
    ):
        assert gap(key, exact({**given, name: wrong})[0]) > 1e-2
    assert gap(value, exact({**given, "value_bias": given["value_bias"].roll(1)})[1]) > 1e-2


def test_padding_is_what_zero_features_give() -> None:
    given = case(SHAPES["T70-N63-C100-H3-D32"], torch.float32)
    given["tokens"][5:9] = -1
    given["features"][0] = torch.nan  # nobody asks for it
    given["tokens"][given["tokens"] == 0] = 1
    check(given)
    _, value = module.gather_project_rotate(**given)
    assert torch.equal(value[6], given["value_bias"].unflatten(0, (3, 32)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_poisoned_memory(dtype: str) -> None:
    given = case(SHAPES["T70-N63-C100-H3-D32"], DTYPES[dtype])
    expected = module.gather_project_rotate(**given)
    for name in ("features", "key_weight", "value_weight", "cos", "sin"):
        given[name] = strided(given[name])
    with poisoned_memory():
        found = module.gather_project_rotate(**given)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
