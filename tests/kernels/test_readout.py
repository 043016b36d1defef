"""The readout kernel against one float64 softmax per head, and against `row_attention`'s torch path."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flexcore.row_attention import CausalRows, GatheredRows, RowMask, SharedMask, row_attention
from tests.helpers import Watch, dense_attention, poisoned_memory
from tests.kernels.helpers import DEVICE, DTYPES, FLOAT32, RUNS_KERNELS, gap, strided

module = pytest.importorskip("flexcore.kernels.readout", exc_type=ImportError)
readout = module.readout
pytestmark = RUNS_KERNELS

SHAPES = {
    # batch, query heads, kv heads, rows, keys, width
    "B1-H4of4-R1-S63-D32": (1, 4, 4, 1, 63, 32),
    "B2-H6of2-R3-S111-D40": (2, 6, 2, 3, 111, 40),
    "B2-H3of1-R3-S111-D24": (2, 3, 1, 3, 111, 24),
    "B1-H7of1-R5-S100-D128": (1, 7, 1, 5, 100, 128),
    "B1-H8of1-R17-S63-D80": (1, 8, 1, 17, 63, 80),
    "B2-H2of2-R1-S1-D256": (2, 2, 2, 1, 1, 256),
}
LONG = {
    "B1-H8of2-R3-S1000-D64": (1, 8, 2, 3, 1000, 64),
    "B1-H4of1-R37-S1000-D96": (1, 4, 1, 37, 1000, 96),
    "B3-H10of2-R1-S1000-D192": (3, 10, 2, 1, 1000, 192),
}
KINDS = ("none", "causal", "bool", "bool-per-head", "added", "added-bf16", "shared", "shared-added")
PLAIN, HEADS = "B2-H3of1-R3-S111-D24", "B2-H6of2-R3-S111-D40"


def seen(*shape: int) -> Tensor:
    """About half of the keys, one at least."""
    see = torch.rand(shape) < 0.5
    return see | (torch.arange(shape[-1]) == torch.randint(shape[-1], shape[:-1])[..., None])


class Case:
    """Random inputs of one shape and one kind of mask, on the kernels' device, and what they are on the CPU."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, kind: str = "none"):
        batch, heads, kv, rows, keys, width = shape
        self.q = torch.randn(batch, heads, rows, width).to(DEVICE, dtype)
        self.k = torch.randn(batch, kv, keys, width).to(DEVICE, dtype)
        self.cells = torch.randint(keys, (batch, 19)).to(DEVICE)
        self.scaling = 2 * width**-0.5
        self.see: Tensor = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        self.mask: RowMask | None = None
        if kind == "causal":
            last = torch.randint(keys, (batch, rows))
            self.see = (torch.arange(keys) <= last[..., None])[:, None]
            self.mask = CausalRows(last.to(DEVICE), keys)
        elif kind.startswith("shared"):
            see = seen(1, 1, 1, keys)
            self.see = see if kind == "shared" else torch.where(see, torch.randn(see.shape), -math.inf)
            self.mask = SharedMask(self.see.to(DEVICE))
        elif kind != "none":
            full = seen(batch, heads if kind == "bool-per-head" else 1, rows + 4, keys)
            if kind.startswith("added"):
                full = torch.where(full, torch.randn(full.shape), -math.inf)
                full = full.to(torch.bfloat16 if kind == "added-bf16" else torch.float32)
            at = torch.stack([torch.randperm(rows + 4)[:rows] for _ in range(batch)])
            self.see = torch.stack([m[:, r] for m, r in zip(full, at, strict=True)])
            self.mask = GatheredRows(full.to(DEVICE), at.to(DEVICE))

    def run(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        lse, scores = readout(self.q, self.k, self.mask, self.cells, scaling=self.scaling, **kwargs)
        assert lse.dtype == scores.dtype == torch.float32
        return lse, scores

    def exact(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        kwargs = {"scaling": self.scaling, **kwargs}
        q, k = self.q.cpu(), self.k.cpu()
        _, lse, prob = dense_attention(q, k, k, self.see, **kwargs)
        return lse, torch.stack([p.sum(0)[:, c] for p, c in zip(prob, self.cells.cpu(), strict=True)])

    def check(self, **kwargs: Any) -> None:
        for found, expected in zip(self.run(**kwargs), self.exact(**kwargs), strict=True):
            assert gap(found, expected) < FLOAT32


# ---------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, "fp32") for shape in SHAPES), *((shape, "bf16") for shape in [*SHAPES][1:5]), (HEADS, "fp16")],
)
def test_parity(shape: str, dtype: str) -> None:
    """Inputs of any dtype, computed in float32: only they are rounded."""
    Case(SHAPES[shape], DTYPES[dtype]).check()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_parity_under_masks(kind: str) -> None:
    Case(SHAPES[HEADS], kind=kind).check()


@pytest.mark.parametrize("groups", range(1, 9))
def test_grouped_queries(groups: int) -> None:
    Case((1, 2 * groups, 2, 2, 21, 16), kind="bool-per-head").check()


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
def test_softcap_and_sinks(softcap: float | None) -> None:
    """Sinks count in the probabilities, not in the log-sum-exp."""
    case = Case(SHAPES[PLAIN], kind="bool")
    sinks = torch.randn(3)
    lse, scores = case.run(softcap=softcap, sinks=sinks.to(DEVICE))
    plain, _ = case.exact(softcap=softcap)
    _, expected = case.exact(softcap=softcap, sinks=sinks)
    assert gap(lse, plain) < FLOAT32 and gap(scores, expected) < FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, *LONG])
def test_every_shape_under_every_mask(shape: str, kind: str) -> None:
    dtype = [*DTYPES.values()][KINDS.index(kind) % 3]
    case = Case({**SHAPES, **LONG}[shape], dtype, kind)
    case.check(softcap=3.0)
    case.check()


def test_the_parity_check_can_fail() -> None:
    case = Case(SHAPES[HEADS], kind="bool")
    lse, scores = case.exact()
    case.scaling *= 1.05
    assert min(map(gap, case.run(), (lse, scores))) > 1e-3
    case.scaling /= 1.05
    case.k = case.k.roll(1, 1)  # the next kv head
    assert min(map(gap, case.run(), (lse, scores))) > 1e-3


@pytest.mark.parametrize("parts", [1, 2, 4, 16])
def test_parts_of_the_keys_join(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    """Some of 16 parts of 111 keys are empty."""
    monkeypatch.setattr(module, "splits", lambda *_: parts)
    small = dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)
    monkeypatch.setattr(module, "key_blocks", lambda *_: small)
    case = Case((1, 4, 2, 3, 111, 24), kind="causal")
    case.check()
    lse, none = readout(case.q, case.k, case.mask, None, scaling=case.scaling)
    assert none is None and gap(lse, case.exact()[0]) < FLOAT32


def test_same_as_the_torch_path() -> None:
    case = Case(SHAPES[PLAIN], torch.bfloat16, "added")
    _, lse, scores = row_attention(
        case.q.float(), case.k.float(), None, case.mask, scaling=case.scaling, softcap=2.0, cells=case.cells
    )
    assert scores is not None
    for found, expected in zip(case.run(softcap=2.0), (lse, scores), strict=True):
        assert gap(found, expected) < FLOAT32


# ---------------------------------------------------------------------- rows and keys that aren't there


@pytest.mark.parametrize("sinks", [False, True], ids=["no-sinks", "sinks"])
def test_a_row_that_sees_nothing(sinks: bool) -> None:
    case = Case(SHAPES[PLAIN], kind="causal")
    assert isinstance(case.mask, CausalRows)
    case.mask.last[0, 1] = -1
    lse, scores = case.run(sinks=torch.randn(3).to(DEVICE) if sinks else None)
    assert bool((lse[0, :, 1] == -math.inf).all()) and int((lse == -math.inf).sum()) == 3
    assert not bool(scores[0, 1].any()) and bool(scores[0, 0].any())


@pytest.mark.parametrize("hidden", [math.nan, math.inf], ids=str)
def test_hidden_keys_may_hold_anything(hidden: float) -> None:
    case = Case(SHAPES[PLAIN], kind="bool")
    case.see[..., 60:] = False
    case.see[..., 0] = True
    case.mask = GatheredRows(case.see.to(DEVICE), torch.arange(3, device=DEVICE).expand(2, 3))
    before = case.run()
    case.k[:, :, 60:] = hidden
    assert all(torch.equal(a, b) for a, b in zip(case.run(), before, strict=True))


def test_no_cells() -> None:
    case = Case(SHAPES[PLAIN])
    lse, scores = readout(case.q, case.k, None, case.cells[:, :0], scaling=case.scaling)
    assert scores.shape == (2, 3, 0) and gap(lse, case.exact()[0]) < FLOAT32


# ---------------------------------------------------------------------- memory


def test_strided_inputs() -> None:
    """Views with gaps on every axis, and the layout of a projection's output, give the same bits."""
    case = Case(SHAPES[PLAIN], kind="bool")
    expected = case.run()
    assert isinstance(case.mask, GatheredRows)
    case.mask.mask = strided(case.mask.mask)
    case.q, case.k, case.cells = strided(case.q), strided(case.k), strided(case.cells)
    assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))
    case.q, case.k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (case.q, case.k))
    assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))


def test_nothing_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "splits", lambda *_: 2)
    case = Case(SHAPES[PLAIN], kind="causal")
    expected = case.run()
    with poisoned_memory():
        found = case.run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_logits_are_written() -> None:
    """No tensor as long as the keys, and none with an axis of heads and one of cells."""
    case = Case((1, 4, 1, 5, 111, 16), kind="causal")
    with Watch() as watch:
        case.run()
    assert watch.shapes and not [s for s in watch.shapes if 111 in s or (4 in s and 19 in s)]
