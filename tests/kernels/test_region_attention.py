"""The region kernel against one concatenated float64 softmax, outputs and gradients, and against the torch path."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flexcore.fine_cache import FineCache
from flexcore.hierarchical_attention import hierarchical_attention
from flexcore.row_attention import RegionRows, row_attention
from tests.helpers import Watch, dense_joint, poisoned_memory
from tests.kernels.helpers import DEVICE, DTYPES, FLOAT32, RUNS_KERNELS, gap, rounding, strided

module = pytest.importorskip("flexcore.kernels.region_attention", exc_type=ImportError)
forward = pytest.importorskip("flexcore.kernels.region_forward", exc_type=ImportError)
pytestmark = RUNS_KERNELS

SHAPES = {
    # batch, query heads, kv heads, rows, regions, page, width, value width
    "B1-H4of4-R1-U3x7-D32": (1, 4, 4, 1, 3, 7, 32, 32),
    "B2-H6of2-R3-U5x9-D40-Dv24": (2, 6, 2, 3, 5, 9, 40, 24),
    "B2-H3of1-R3-U5x7-D24-Dv40": (2, 3, 1, 3, 5, 7, 24, 40),
    "B1-H7of1-R5-U1x63-D128": (1, 7, 1, 5, 1, 63, 128, 128),
    "B1-H8of1-R17-U4x16-D64-Dv80": (1, 8, 1, 17, 4, 16, 64, 80),
    "B2-H2of2-R1-U2x3-D256": (2, 2, 2, 1, 2, 3, 256, 256),
}
LONG = {
    "B1-H8of2-R3-U16x63-D64": (1, 8, 2, 3, 16, 63, 64, 64),
    "B1-H2of1-R37-U5x111-D96": (1, 2, 1, 37, 5, 111, 96, 96),
}
PLAIN, HEADS = "B2-H3of1-R3-U5x7-D24-Dv40", "B2-H6of2-R3-U5x9-D40-Dv24"
NAMES = ("query", "key", "value", "plain", "lse")
KEYS = 10


class Case:
    """Leaves on the kernels' device (pages as `FineCache` keeps them), and where they come from on the CPU."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32):
        batch, heads, kv, rows, regions, page, width, value = shape
        self.scaling = 2 * width**-0.5
        # the ordinary keys, from which plain output and log-sum-exp come
        self.own = torch.randn(batch, kv, KEYS, width).double(), torch.randn(batch, kv, KEYS, value).double()
        self.see = torch.arange(KEYS) <= torch.randint(KEYS, (batch, 1, rows, 1))
        query = torch.randn(batch, heads, rows, width).to(dtype)
        pages = (torch.randn(batch, regions, page, kv, n).to(dtype) for n in (width, value))
        out, lse, _ = row_attention(query.double(), *self.own, _Given(self.see), scaling=self.scaling)
        assert out is not None
        self.leaves = tuple(
            t.to(DEVICE).requires_grad_() for t in (query, *pages, out.transpose(1, 2).to(dtype), lse.float())
        )
        self.selected = torch.rand(batch, rows, regions) < 0.6
        self.valid = torch.arange(page) < torch.randint(1, page + 1, (batch, regions, 1))
        self.weight = torch.randn(batch, rows, heads, value)

    @property
    def masks(self) -> dict[str, Tensor]:
        return {"selected": self.selected.to(DEVICE), "valid": self.valid.to(DEVICE)}

    def run(self, *leaves: Tensor, **kwargs: Any) -> Tensor:
        query, key, value, plain, lse = leaves or self.leaves
        return module.region_attention(
            query, key, value, plain, lse, **{"scaling": self.scaling, **self.masks, **kwargs}
        )

    def torch_path(self, *leaves: Tensor, **kwargs: Any) -> Tensor:
        """`hierarchical_attention`, with the keys as a model hands them to it."""
        query, key, value, plain, lse = leaves or self.leaves
        fine = (t.permute(0, 3, 1, 2, 4).flatten(2, 3) for t in (key, value))
        mask = RegionRows(*self.masks.values())
        kwargs = {"scaling": self.scaling, "fine_mask": mask, "plain": plain, "lse": lse, **kwargs}
        return hierarchical_attention(query, None, None, *fine, **kwargs)

    def exact(self, **kwargs: Any) -> Tensor:
        """The concatenated softmax in float64; only the inputs are rounded."""
        query, key, value, _, _ = (t.detach().cpu().double() for t in self.leaves)
        fine = (t.permute(0, 3, 1, 2, 4).flatten(2, 3) for t in (key, value))
        fine_see = (self.selected[..., None] & self.valid[:, None]).flatten(2)
        kwargs = {"scaling": self.scaling, **kwargs}
        return dense_joint(query, *self.own, *fine, see=self.see, fine_see=fine_see, **kwargs)

    def gradients(self, out: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        loss = (out * self.weight.to(out)).sum()
        return torch.autograd.grad(loss, (*self.leaves, *more), retain_graph=True)

    def check_gradients(self, dtype: torch.dtype, **kwargs: Any) -> None:
        """Against those of the torch path in float64, from the same (rounded) leaves."""
        wide = [t.detach().double().requires_grad_() for t in self.leaves]
        loss = (self.torch_path(*wide, **kwargs) * self.weight.to(DEVICE).to(dtype).double()).sum()
        expected = torch.autograd.grad(loss, wide)
        for name, g, e in zip(NAMES, self.gradients(self.run(**kwargs)), expected, strict=True):
            assert gap(g, e) < 2 * rounding(dtype if name != "lse" else torch.float32), name


class _Given:
    def __init__(self, see: Tensor):
        self.see = see

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.see[:, :, start:stop]


# ---------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((HEADS, dtype) for dtype in DTYPES),
        ("B1-H4of4-R1-U3x7-D32", "fp32"),
        ("B1-H7of1-R5-U1x63-D128", "bf16"),
        ("B1-H8of1-R17-U4x16-D64-Dv80", "fp16"),
        ("B2-H2of2-R1-U2x3-D256", "fp32"),
    ],
)
def test_parity(shape: str, dtype: str) -> None:
    case = Case(SHAPES[shape], DTYPES[dtype])
    with torch.no_grad():
        out = case.run()
        assert out.dtype == DTYPES[dtype]
        # the plain output was rounded as well before it came in
        assert gap(out, case.exact()) < 2 * rounding(DTYPES[dtype])
    assert gap(case.run(), out) < rounding(DTYPES[dtype])
    case.check_gradients(DTYPES[dtype])


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["no-cap", "softcap"])
def test_softcap_and_alpha(softcap: float | None, alpha: float) -> None:
    case = Case(SHAPES[PLAIN])
    case.check_gradients(torch.float32, softcap=softcap, alpha=alpha)
    with torch.no_grad():
        for blend in (alpha, torch.tensor(alpha, device=DEVICE)):
            found = case.run(softcap=softcap, alpha=blend)
            assert gap(found, case.torch_path(softcap=softcap, alpha=alpha)) < FLOAT32


@pytest.mark.parametrize("groups", range(1, 9))
def test_grouped_queries(groups: int) -> None:
    case = Case((1, 2 * groups, 2, 1, 2, 11, 16, 16))
    assert gap(case.run(), case.exact()) < FLOAT32
    case.check_gradients(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["no-cap", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *LONG])
def test_every_shape(shape: str, dtype: str, softcap: float | None) -> None:
    case = Case({**SHAPES, **LONG}[shape], DTYPES[dtype])
    with torch.no_grad():
        found = case.run(softcap=softcap, alpha=0.4)
        assert gap(found, case.torch_path(softcap=softcap, alpha=0.4)) < 2 * rounding(DTYPES[dtype])
    case.check_gradients(DTYPES[dtype], softcap=softcap, alpha=0.4)


def test_the_parity_check_can_fail() -> None:
    case = Case(SHAPES[HEADS])
    expected = case.exact()
    query, key, value, plain, lse = case.leaves
    for wrong in (
        case.run(alpha=0.98),
        case.run(softcap=3.0),
        case.run(scaling=1.05 * case.scaling),
        case.run(selected=case.masks["selected"].roll(1, 1)),
        case.run(valid=case.masks["valid"].roll(1, 2)),
        case.run(query, key.roll(1, 3), value, plain, lse),  # the next kv head
        case.run(query, key, value, plain, lse + 0.1),
    ):
        assert gap(wrong, expected) > 1e-3


def test_alpha_as_a_tensor_with_gradient() -> None:
    case = Case(SHAPES[PLAIN])
    found, expected = (torch.tensor(0.4, device=DEVICE, requires_grad=True) for _ in range(2))
    a = case.gradients(case.run(alpha=found), found)
    b = case.gradients(case.torch_path(alpha=expected), expected)
    for x, y in zip(a, b, strict=True):
        assert gap(x, y) < 2 * FLOAT32


@pytest.mark.parametrize("leaf", range(5), ids=NAMES)
def test_one_leaf_at_a_time(leaf: int) -> None:
    case = Case(SHAPES[PLAIN])
    leaves = [t.detach().requires_grad_(i == leaf) for i, t in enumerate(case.leaves)]
    out = case.run(*leaves)
    (found,) = torch.autograd.grad((out * case.weight.to(out)).sum(), leaves[leaf])
    assert gap(found, case.gradients(case.torch_path())[leaf]) < 2 * FLOAT32


@pytest.mark.parametrize(("parts", "alpha"), [(1, 0.4), (2, 1.0), (4, 0.4)])
def test_parts_of_the_tokens_join(monkeypatch: pytest.MonkeyPatch, parts: int, alpha: float) -> None:
    monkeypatch.setattr(forward, "splits", lambda *_: parts)
    small = dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)
    monkeypatch.setattr(forward, "row_blocks", lambda *_: small)
    case = Case(SHAPES[PLAIN])
    with torch.no_grad():
        assert gap(case.run(alpha=alpha), case.exact(alpha=alpha)) < FLOAT32
    case.check_gradients(torch.float32, alpha=alpha)


# ---------------------------------------------------------------------- selections and pages


@pytest.mark.parametrize(
    ("parts", "dtype", "alpha"), [(1, "bf16", 1.0), (2, "bf16", 1.0), (1, "fp32", 0.4), (2, "fp32", 0.0)]
)
def test_rows_with_an_empty_selection_are_bit_identical(
    monkeypatch: pytest.MonkeyPatch, parts: int, dtype: str, alpha: float
) -> None:
    monkeypatch.setattr(forward, "splits", lambda *_: parts)
    case = Case(SHAPES[PLAIN], DTYPES[dtype])
    case.selected[:] = True
    case.selected[0, 2] = False
    case.selected[1, 1], case.valid[1, 0] = torch.arange(5) == 0, False  # chosen, but nothing in it is real
    plain = case.leaves[3]
    outs = [case.run(alpha=alpha)]
    with torch.no_grad():
        outs.append(case.run(alpha=alpha))
    for out in outs:
        for b, r in ((0, 2), (1, 1)):
            assert torch.equal(out[b, r], plain[b, r])
        assert torch.equal(out[0, 1], plain[0, 1]) == (alpha == 0)


def test_nothing_selected_at_all() -> None:
    case = Case(SHAPES[PLAIN])
    case.selected[:] = False
    out = case.run()
    assert torch.equal(out, case.leaves[3])
    dq, dk, dv, d_plain, d_lse = case.gradients(out)
    assert not any(bool(g.any()) for g in (dq, dk, dv, d_lse))
    assert torch.equal(d_plain.cpu(), case.weight)


def test_without_masks_everything_is_read() -> None:
    case = Case(SHAPES[PLAIN])
    case.selected[:], case.valid[:] = True, True
    assert gap(case.run(selected=None, valid=None), case.exact()) < FLOAT32
    assert torch.equal(case.run(selected=None, valid=None), case.run())


@pytest.mark.parametrize("hidden", [math.nan, math.inf], ids=str)
def test_pages_may_hold_anything_where_no_row_looks(hidden: float) -> None:
    """Padding, and a region that nobody selected; in the backward pass as well."""
    case = Case(SHAPES[PLAIN])
    case.selected[:, :, 3] = False
    before = case.run()
    expected = case.gradients(before)
    looked = (case.selected.any(1)[..., None] & case.valid)[..., None, None].to(DEVICE)
    assert not bool(looked.all())
    with torch.no_grad():
        for t in case.leaves[1:3]:
            t.copy_(torch.where(looked, t, hidden))
    out = case.run()
    assert torch.equal(out, before)
    for name, g, e in zip(NAMES, case.gradients(out), expected, strict=True):
        assert torch.equal(g, e), name


def test_pages_are_read_where_they_lie() -> None:
    """From a pool in any order, through the block table; a page of two samples gets both their gradients."""
    case = Case(SHAPES[PLAIN])
    query, key, value, plain, lse = case.leaves
    table = torch.randperm(13, device=DEVICE)[:10].view(2, 5)
    table[1, 4] = table[0, 2]
    pools = []
    for t in (key, value):
        with torch.no_grad():
            t[1, 4] = t[0, 2]
        pool = torch.full((13, *t.shape[2:]), torch.nan, device=DEVICE)
        pool[table.flatten()] = t.detach().flatten(0, 1)
        pools.append(pool.requires_grad_())
    out = case.run(query, *pools, plain, lse, table=table)
    expected = case.run()
    assert torch.equal(out, expected)
    found = torch.autograd.grad((out * case.weight.to(out)).sum(), pools)
    for g, e in zip(found, case.gradients(expected)[1:3], strict=True):
        want = torch.zeros_like(g)
        for b in range(2):
            for u in range(5):
                want[table[b, u]] += e[b, u]
        assert gap(g, want) < FLOAT32
        assert gap(g[table[0, 0]], torch.zeros_like(g[0]).cpu() + e[0, 1].cpu()) > 1e-3


def test_pages_of_a_fine_cache() -> None:
    """What `FineCache` hands out and holds: `[n, P, Hkv, D]`."""
    case = Case((1, 4, 2, 1, 4, 9, 32, 32))
    query, key, value, plain, lse = (t.detach() for t in case.leaves)
    cache = FineCache()
    order = torch.tensor([2, 0, 3])
    for regions in (torch.tensor([3]), order):
        pages = cache.get(0, 0, regions, 4, lambda r: (key[0, r], value[0, r]))
    masks = {name: m[..., order, :] if name == "valid" else m[..., order] for name, m in case.masks.items()}
    expected = case.run(query, *(t[:, order] for t in (key, value)), plain, lse, **masks)
    assert torch.equal(case.run(query, *(t[None] for t in pages), plain, lse, **masks), expected)
    table = cache._tables[0, 0]
    slots = table.slot[order].to(DEVICE)[None]
    held = (torch.cat(block) for block in zip(*table.pool.blocks, strict=True))
    assert torch.equal(case.run(query, *held, plain, lse, table=slots, **masks), expected)


# ---------------------------------------------------------------------- rows that see nothing


def test_blind_rows() -> None:
    """A row without ordinary keys reads fine ones alone; one without any keeps what it came with."""
    case = Case(SHAPES[PLAIN])
    query, key, value, plain, lse = (t.detach() for t in case.leaves)
    lse[0, :, 1] = lse[1, :, 2] = -math.inf
    case.selected[0, 1], case.selected[1, 2] = True, False
    leaves = [t.requires_grad_() for t in (query, key, value, plain, lse)]
    out, expected = case.run(*leaves), case.torch_path(*leaves)
    assert torch.equal(out[1, 2], plain[1, 2]) and gap(out, expected) < FLOAT32
    weight = case.weight.to(out)
    found = torch.autograd.grad((out * weight).sum(), leaves)
    for name, g, e in zip(NAMES, found, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        assert gap(g, e) < 2 * FLOAT32, name
    assert torch.equal(found[3][1, 2], weight[1, 2])


# ---------------------------------------------------------------------- memory


def test_strided_inputs() -> None:
    case = Case(SHAPES[PLAIN])
    expected = case.run().detach()
    with torch.no_grad():
        views = [strided(t) for t in case.leaves]
        assert torch.equal(case.run(*views), expected)
    leaves = [t.requires_grad_() for t in views]
    out = case.run(*leaves)
    found = torch.autograd.grad((out * case.weight.to(out)).sum(), leaves)
    for g, e in zip(found, case.gradients(case.run()), strict=True):
        assert torch.equal(g, e)


def test_nothing_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(SHAPES[PLAIN])
    monkeypatch.setattr(forward, "splits", lambda *_: 2)
    expected = [out := case.run(alpha=0.4), *case.gradients(out)]
    with poisoned_memory():
        found = [out := case.run(alpha=0.4), *case.gradients(out)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_logits_are_written() -> None:
    """No tensor with an axis of rows and one of tokens, in either direction."""
    case = Case((1, 2, 1, 13, 3, 37, 16, 16))
    with Watch() as watch:
        case.gradients(case.run())
    assert watch.shapes and not [s for s in watch.shapes if 13 in s and (111 in s or 37 in s)]
