"""The op, its readable twin and a concatenated float64 softmax give the same outputs and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from flexcore import row_attention as rows_module
from flexcore.hierarchical_attention import (
    hierarchical_attention,
    hierarchical_attention_reference,
    merge,
)
from flexcore.row_attention import CausalRows, GatheredRows, RegionRows, row_attention, with_sinks
from tests.helpers import Watch, dense_joint, gap, poisoned_memory

SHAPES = {
    # batch, query heads, kv heads, rows, keys, regions, page, width, value width
    "B1-H4of4-R1-S63-U3x7-D40": (1, 4, 4, 1, 63, 3, 7, 40, 40),
    "B2-H6of2-R7-S100-U5x9-D40-Dv24": (2, 6, 2, 7, 100, 5, 9, 40, 24),
    "B1-H8of1-R129-S63-U11x10-D32": (1, 8, 1, 129, 63, 11, 10, 32, 32),
    "B1-H2of1-R300-S111-U1x100-D33-Dv65": (1, 2, 1, 300, 111, 1, 100, 33, 65),
    "B1-H2of2-R5-S9-U2x3-D256": (1, 2, 2, 5, 9, 2, 3, 256, 256),
}
PLAIN = "B2-H6of2-R7-S100-U5x9-D40-Dv24"
NAMES = ("query", "key", "value", "fine_key", "fine_value")
FLOAT32 = 2e-6


class Case:
    """Random inputs of one shape: leaves, causal-like ordinary mask, per-row region selection, ragged pages."""

    def __init__(self, shape: str, dtype: torch.dtype = torch.float32):
        batch, heads, kv, rows, keys, regions, page, width, value = SHAPES[shape]
        sizes = ((heads, rows, width), (kv, keys, width), (kv, keys, value))
        sizes += ((kv, regions * page, width), (kv, regions * page, value))
        self.leaves = tuple(torch.randn(batch, *s).to(dtype).requires_grad_() for s in sizes)
        self.last = torch.randint(keys, (batch, rows))
        self.see = (torch.arange(keys) <= self.last[..., None])[:, None]
        self.selected = torch.rand(batch, rows, regions) < 0.6
        self.valid = torch.arange(page) < torch.randint(1, page + 1, (batch, regions, 1))
        self.scaling = 2 * width**-0.5
        self.weight = torch.randn(batch, rows, heads, value)

    @property
    def fine_see(self) -> Tensor:
        return (self.selected[..., None] & self.valid[:, None]).flatten(2)

    @property
    def masks(self) -> dict[str, Any]:
        keys = self.see.shape[-1]
        return {"mask": CausalRows(self.last, keys), "fine_mask": RegionRows(self.selected, self.valid)}

    def exact(self, alpha: float | Tensor = 1.0, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output and leaves of the concatenated float64 softmax."""
        leaves = tuple(t.detach().double().requires_grad_() for t in self.leaves)
        kwargs = {"scaling": self.scaling, **kwargs}
        return dense_joint(*leaves, see=self.see, fine_see=self.fine_see, alpha=alpha, **kwargs), leaves

    def fast(self, **kwargs: Any) -> Tensor:
        return hierarchical_attention(*self.leaves, **{"scaling": self.scaling, **self.masks, **kwargs})

    def twin(self, **kwargs: Any) -> Tensor:
        kwargs = {"mask": self.see, "fine_mask": self.fine_see, "scaling": self.scaling, **kwargs}
        return hierarchical_attention_reference(*self.leaves, **kwargs)

    def merged(self, **kwargs: Any) -> Tensor:
        """As a model calls it: the output of its own backend and the rows' log-sum-exp come from outside."""
        query, key, value, fine_key, fine_value = self.leaves
        own, lse, _ = row_attention(query, key, None, self.masks["mask"], scaling=self.scaling)
        assert own is None
        plain = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.see, scale=self.scaling, enable_gqa=True
        )
        return hierarchical_attention(
            query,
            None,
            None,
            fine_key,
            fine_value,
            fine_mask=self.masks["fine_mask"],
            scaling=self.scaling,
            plain=plain.transpose(1, 2),
            lse=lse,
            **kwargs,
        )

    def gradients(self, out: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * self.weight.to(out.dtype)).sum(), leaves, retain_graph=True)


def check(
    case: Case, out: Tensor, exact: tuple[Tensor, tuple[Tensor, ...]], tolerance: float = FLOAT32
) -> None:
    expected, leaves = exact
    assert gap(out, expected) < tolerance
    found = case.gradients(out, case.leaves)
    for name, g, e in zip(NAMES, found, case.gradients(expected, leaves), strict=True):
        assert gap(g, e) < tolerance, name


# ---------------------------------------------------------------------- parity


@pytest.mark.parametrize("alpha", [0.4, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_three_agree(shape: str, alpha: float) -> None:
    case = Case(shape)
    exact = case.exact(alpha)
    for out in (case.twin(alpha=alpha), case.fast(alpha=alpha), case.merged(alpha=alpha)):
        assert out.dtype == torch.float32
        check(case, out, exact)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("sinks", [False, True], ids=["no-sinks", "sinks"])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["no-cap", "softcap"])
def test_softcap_and_sinks(softcap: float | None, sinks: bool, alpha: float) -> None:
    case = Case(PLAIN)
    sink = torch.randn(6).requires_grad_() if sinks else None
    twin_sink = None if sink is None else sink.detach().double().requires_grad_()
    expected, leaves = case.exact(alpha, softcap=softcap, sinks=twin_sink)
    for run in (case.twin, case.fast):
        out = run(alpha=alpha, softcap=softcap, sinks=sink)
        check(case, out, (expected, leaves))
        if sink is not None:
            found = case.gradients(out := run(alpha=alpha, softcap=softcap, sinks=sink), (sink,))
            assert gap(found[0], case.gradients(expected, (twin_sink,))[0]) < FLOAT32  # type: ignore[arg-type]
            assert gap(out, case.exact(alpha, softcap=softcap)[0]) > 1e-2


def test_the_parity_check_can_fail() -> None:
    """Every slip that the op could make is far outside the tolerance."""
    case = Case(PLAIN)
    expected, _ = case.exact()
    kinds = case.masks
    other = RegionRows(case.selected.roll(1, 1), case.valid)
    one_more = RegionRows(case.selected, case.valid.roll(1, 2))
    for wrong in (
        case.fast(alpha=0.99),
        case.fast(softcap=3.0),
        case.fast(sinks=torch.zeros(6)),
        case.fast(fine_mask=other),
        case.fast(fine_mask=one_more),
        case.fast(mask=CausalRows((case.last - 1).clamp(min=0), 100)),
        case.fast(scaling=1.05 * case.scaling),
        hierarchical_attention(*case.leaves[:4], case.leaves[4].roll(1, 1), scaling=case.scaling, **kinds),
    ):
        assert gap(wrong, expected) > 1e-3


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_alpha_as_a_tensor_with_gradient(value: float) -> None:
    case = Case(PLAIN)
    exact_alpha = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    expected, leaves = case.exact(exact_alpha)
    slope = case.gradients(expected, (exact_alpha,))[0]
    for run in (case.twin, case.fast, case.merged):
        alpha = torch.tensor(value, requires_grad=True)
        check(case, run(alpha=alpha), (expected, leaves), 4e-6)
        assert gap(case.gradients(run(alpha=alpha), (alpha,))[0], slope) < 2e-5
        assert torch.equal(run(alpha=alpha), run(alpha=alpha.detach()))
    assert float(slope.abs()) > 1


def test_alpha_zero_is_plain_and_gives_fine_weights_no_gradient() -> None:
    """Semantics section 6."""
    case = Case(PLAIN)
    query, key, value, fine_key, fine_value = case.leaves
    own, _, _ = row_attention(query, key, value, case.masks["mask"], scaling=case.scaling)
    for alpha in (0.0, torch.tensor(0.0)):
        out = case.fast(alpha=alpha)
        assert torch.equal(out, own.transpose(1, 2))  # type: ignore[union-attr]
        assert not any(bool(g.any()) for g in case.gradients(out, (fine_key, fine_value)))
    assert all(bool(g.any()) for g in case.gradients(case.fast(alpha=0.01), (fine_key, fine_value)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [PLAIN, "B1-H8of1-R129-S63-U11x10-D32"])
def test_half_precision_is_rounded_once(shape: str, dtype: torch.dtype) -> None:
    case = Case(shape, dtype)
    expected, leaves = case.exact(0.4)
    step = torch.finfo(dtype).eps
    for out in (case.fast(alpha=0.4), case.twin(alpha=0.4)):
        assert out.dtype == dtype
        assert gap(out, expected) <= step / 2 + FLOAT32
        for g, e in zip(case.gradients(out, case.leaves), case.gradients(expected, leaves), strict=True):
            # the incoming gradient is rounded, then the outgoing one
            assert g.dtype == dtype and gap(g, e) < 2 * step
    # one more rounding where the plain output was half precision already
    assert gap(case.merged(alpha=0.4), expected) < 2 * step


@pytest.mark.parametrize("softcap", [None, 0.7], ids=["plain", "softcap"])
def test_gradcheck(softcap: float | None) -> None:
    leaves = [(1, 4, 3, 3), (1, 2, 4, 3), (1, 2, 4, 2), (1, 2, 5, 3), (1, 2, 5, 2)]
    made = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in leaves]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    see = torch.tensor([[[True] * 4, [True, False, True, False], [False] * 4]])[:, None]
    pick = torch.tensor([[[True], [False], [True]]])
    valid = torch.tensor([[[True, True, False, True, True]]])

    def run(*t: Tensor) -> Tensor:
        return hierarchical_attention(
            *t[:5],
            mask=GatheredRows(see, torch.arange(3)[None]),
            fine_mask=RegionRows(pick, valid),
            scaling=0.8,
            softcap=softcap,
            sinks=t[5],
            alpha=t[6],
        )

    assert torch.autograd.gradcheck(run, (*made, sinks, alpha))


def test_everything_selected_is_dense_attention() -> None:
    """Against torch's own attention over all keys (invariant I2)."""
    case = Case(PLAIN)
    case.selected[:], case.valid[:] = True, True
    query, key, value, fine_key, fine_value = (t.detach().double() for t in case.leaves)
    see = torch.cat([case.see, torch.ones(2, 1, 7, 45, dtype=torch.bool)], dim=-1)
    expected = F.scaled_dot_product_attention(
        query,
        torch.cat([key, fine_key], 2),
        torch.cat([value, fine_value], 2),
        attn_mask=see,
        scale=case.scaling,
        enable_gqa=True,
    )
    for run in (case.fast, case.twin, case.merged):
        assert gap(run(), expected.transpose(1, 2)) < FLOAT32


def test_the_order_of_regions_does_not_matter() -> None:
    case = Case(PLAIN)
    order = torch.randperm(5)
    query, key, value, *fine = case.leaves
    shuffled = [t.unflatten(2, (5, 9))[:, :, order].flatten(2, 3) for t in fine]
    masks = {**case.masks, "fine_mask": RegionRows(case.selected[..., order], case.valid[:, order])}
    out = hierarchical_attention(query, key, value, *shuffled, scaling=case.scaling, **masks)
    assert gap(out, case.fast()) < FLOAT32


# ---------------------------------------------------------------------- rows that read nothing


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_with_an_empty_selection_are_bit_identical(dtype: torch.dtype, alpha: float) -> None:
    case = Case(PLAIN, dtype)
    case.selected[0, 2] = case.selected[1, 5] = False
    case.selected[1, 3], case.valid[1, 0] = (
        torch.arange(5) == 0,
        False,
    )  # chosen, but nothing in it is readable
    case.selected[0, 4], case.valid[0, 0, 0] = True, True
    query = case.leaves[0].detach()
    plain = torch.randn(2, 7, 6, 24).to(dtype)
    lse = torch.randn(2, 6, 7)
    out = hierarchical_attention(
        query,
        None,
        None,
        *(t.detach() for t in case.leaves[3:]),
        fine_mask=case.masks["fine_mask"],
        scaling=case.scaling,
        plain=plain,
        lse=lse,
        alpha=alpha,
    )
    for b, r in ((0, 2), (1, 5), (1, 3)):
        assert torch.equal(out[b, r], plain[b, r])
    assert torch.equal(out[0, 4], plain[0, 4]) == (alpha == 0)


def test_no_fine_keys_at_all() -> None:
    case = Case(PLAIN)
    none = torch.zeros(2, 2, 0, 40), torch.zeros(2, 2, 0, 24)
    empty = RegionRows(torch.zeros(2, 7, 0, dtype=torch.bool), torch.zeros(2, 0, 9, dtype=torch.bool))
    out = hierarchical_attention(
        *case.leaves[:3], *none, scaling=case.scaling, mask=case.masks["mask"], fine_mask=empty
    )
    own, _, _ = row_attention(*case.leaves[:3], case.masks["mask"], scaling=case.scaling)
    assert torch.equal(out, own.transpose(1, 2))  # type: ignore[union-attr]


def blind(case: Case) -> None:
    """Row (0, 1) sees no ordinary key, row (1, 2) nothing at all."""
    case.last[0, 1] = case.last[1, 2] = -1
    case.see = (torch.arange(100) <= case.last[..., None])[:, None]
    case.selected[0, 1], case.selected[1, 2] = True, False


@pytest.mark.parametrize("sinks", [False, True], ids=["no-sinks", "sinks"])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_rows_that_see_nothing_are_zero_and_finite(alpha: float, sinks: bool) -> None:
    case = Case(PLAIN)
    blind(case)
    sink = torch.randn(6).requires_grad_() if sinks else None
    out = case.fast(alpha=alpha, sinks=sink)
    assert bool(out.isfinite().all()) and not bool(out[1, 2].any())
    fine_only, _, _ = row_attention(
        case.leaves[0], *case.leaves[3:], case.masks["fine_mask"], scaling=case.scaling
    )
    if sink is None:
        assert gap(out[0, 1], alpha * fine_only[0, :, 1]) < FLOAT32  # type: ignore[index]
    leaves = case.leaves if sink is None else (*case.leaves, sink)
    found = case.gradients(out, leaves)
    assert all(bool(g.isfinite().all()) for g in found)
    assert not bool(found[0][1, :, 2].any()) and bool(found[0][0, :, 1].any())


def test_a_blind_row_keeps_the_output_it_came_with() -> None:
    """Whatever the backend wrote into a padding row."""
    case = Case(PLAIN)
    blind(case)
    plain = torch.randn(2, 7, 6, 24, requires_grad=True)
    lse = torch.randn(2, 6, 7)
    lse[1, :, 2] = -math.inf
    lse.requires_grad_()
    out = hierarchical_attention(
        case.leaves[0],
        None,
        None,
        *case.leaves[3:],
        fine_mask=case.masks["fine_mask"],
        scaling=case.scaling,
        plain=plain,
        lse=lse,
    )
    assert torch.equal(out[1, 2], plain[1, 2])
    assert not torch.equal(out[1, 3], plain[1, 3])
    found = case.gradients(out, (plain, lse, case.leaves[0], *case.leaves[3:]))
    assert all(bool(g.isfinite().all()) for g in found)
    assert torch.equal(found[0][1, 2], case.weight[1, 2])


def test_merge_is_the_softmax_over_both_parts() -> None:
    """With very uneven shares too: 1e-30 of the mass on one side."""
    plain, fine = torch.randn(2, 1, 3, 5, 4, dtype=torch.float64)
    a, b = torch.randn(2, 1, 3, 5, dtype=torch.float64) * 40
    share = (a.exp() / (a.exp() + b.exp()))[..., None]
    assert gap(merge(plain, a, fine, b), share * plain + (1 - share) * fine) < 1e-13
    for alpha in (0.25, torch.tensor(0.25)):
        expected = plain + 0.25 * (share * plain + (1 - share) * fine - plain)
        assert gap(merge(plain, a, fine, b, alpha), expected) < 1e-13
    never = torch.full_like(b, -math.inf)
    assert torch.equal(merge(plain, a, fine, never), plain)
    assert torch.equal(merge(plain, never, fine, b), fine)
    assert torch.equal(merge(plain, never, torch.zeros_like(fine), never), plain)


# ---------------------------------------------------------------------- what is given and what is computed


@pytest.mark.parametrize("sinks", [False, True], ids=["no-sinks", "sinks"])
def test_given_parts_are_used_and_missing_ones_computed(sinks: bool) -> None:
    case = Case(PLAIN)
    query, key, value, fine_key, fine_value = (t.detach() for t in case.leaves)
    sink = torch.randn(6) if sinks else None
    plain, _, _ = row_attention(query, key, value, case.masks["mask"], scaling=case.scaling)
    _, own, _ = row_attention(query, key, None, case.masks["mask"], scaling=case.scaling)
    lse = with_sinks(own, sink)
    if sinks:
        plain = plain * (own - lse).exp()[..., None]  # type: ignore[operator]
    plain = plain.transpose(1, 2)  # type: ignore[union-attr]
    kwargs: dict[str, Any] = {"scaling": case.scaling, "sinks": sink, **case.masks}
    fine = {"fine_key": fine_key, "fine_value": fine_value}
    expected = hierarchical_attention(query, key, value, **fine, **kwargs)
    for given in (
        {"key": key, "value": value, "lse": lse},
        {"key": key, "value": None, "plain": plain},
        {"key": None, "value": None, "plain": plain, "lse": lse},
    ):
        assert gap(hierarchical_attention(query, **given, **fine, **kwargs), expected) < FLOAT32
    marked = hierarchical_attention(query, key, None, **fine, **kwargs, plain=plain + 1)
    assert gap(marked, expected) > 1e-2
    marked = hierarchical_attention(query, key, value, **fine, **kwargs, lse=lse + 1)
    assert gap(marked, expected) > 1e-2


@pytest.mark.parametrize("given", [(), ("plain",), ("lse",), ("key",), ("key", "lse")], ids="+".join)
def test_missing_parts_are_an_error(given: tuple[str, ...]) -> None:
    case = Case(PLAIN)
    parts: dict[str, Any] = {
        "key": case.leaves[1],
        "value": None,
        "plain": torch.zeros(2, 7, 6, 24),
        "lse": torch.zeros(2, 6, 7),
    }
    parts = {name: t if name in given else None for name, t in parts.items()}
    with pytest.raises(ValueError, match=r"key .*must be given unless both plain and lse are"):
        hierarchical_attention(
            case.leaves[0],
            fine_key=case.leaves[3],
            fine_value=case.leaves[4],
            scaling=1.0,
            **case.masks,
            **parts,
        )


# ---------------------------------------------------------------------- chunks, memory, surroundings


@pytest.mark.parametrize(
    ("rows", "size"), [(1, 1 << 40), (50, 1 << 40), (128, 1)], ids=["1-row", "50-rows", "1-byte"]
)
def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch, rows: int, size: int) -> None:
    case = Case("B1-H8of1-R129-S63-U11x10-D32")
    exact = case.exact(0.4)
    monkeypatch.setattr(rows_module, "CHUNK_ROWS", rows)
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", size)
    check(case, case.fast(alpha=0.4), exact)
    check(case, case.merged(alpha=0.4), exact)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_no_square_of_rows_and_fine_keys(grad: bool) -> None:
    """1,000 rows over 1,024 ordinary and 1,024 fine keys."""
    with FakeTensorMode():
        leaves = [torch.randn(1, 2, n, 8).requires_grad_(grad) for n in (1000, 1024, 1024, 1024, 1024)]
        causal = CausalRows(torch.arange(24, 1024)[None], 1024)
        regions = RegionRows(torch.rand(1, 1000, 16) < 0.3, torch.ones(1, 16, 64, dtype=torch.bool))
        with Watch() as watch:
            out = hierarchical_attention(*leaves, scaling=0.3, mask=causal, fine_mask=regions)
            if grad:
                torch.autograd.grad(out.square().sum(), leaves)
        assert any(s[-1] == 1024 for s in watch.shapes)
        assert not [s for s in watch.shapes if len(s) > 1 and min(s[-2:]) >= 1000]
        see = {"mask": causal.chunk(0, 1000), "fine_mask": regions.chunk(0, 1000)[:, 0]}
        with Watch() as watch:
            hierarchical_attention_reference(*leaves, scaling=0.3, **see)
        assert [s for s in watch.shapes if len(s) > 1 and min(s[-2:]) >= 1000]


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_rows_by_fine_tokens_stays_small(grad: bool) -> None:
    """512 rows, 32 heads, 20,000 fine tokens: all at once would be 1.2 GiB, a chunk stays within 64 MiB."""
    with FakeTensorMode():  # shapes only: nothing is computed
        sizes = ((32, 512), (8, 99), (8, 99), (8, 20_000), (8, 20_000))
        leaves = [torch.randn(1, heads, n, 40).requires_grad_(grad) for heads, n in sizes]
        regions = RegionRows(torch.rand(1, 512, 400) < 0.5, torch.ones(1, 400, 50, dtype=torch.bool))
        with Watch() as watch:
            out = hierarchical_attention(*leaves, fine_mask=regions, scaling=0.3)
            if grad:
                torch.autograd.grad(out.square().sum(), leaves)
        assert 8 << 20 < watch.largest <= 64 << 20
        see = regions.chunk(0, 512)[:, 0]
        with Watch() as watch:
            hierarchical_attention_reference(*leaves, mask=None, fine_mask=see, scaling=0.3)
        assert watch.largest > 512 * 32 * 20_000 * 4


def whole_run(case: Case) -> list[Tensor]:
    out = []
    for alpha in (0.4, torch.tensor(0.7)):
        for run in (case.fast, case.merged):
            found = run(alpha=alpha)
            out += [found, *case.gradients(found, case.leaves)]
    return out


def test_autocast_changes_nothing() -> None:
    """The merged path's plain output comes from SDPA, which autocast does change: it is left out."""
    case = Case(PLAIN)
    expected = case.fast(alpha=0.4, sinks=torch.ones(6), softcap=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.fast(alpha=0.4, sinks=torch.ones(6), softcap=2.0)
        gradients = case.gradients(found, case.leaves)
        assert (case.leaves[0] @ case.leaves[0].transpose(2, 3)).dtype == torch.bfloat16
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    for a, b in zip(gradients, case.gradients(expected, case.leaves), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_read_before_it_is_written() -> None:
    case = Case(PLAIN)
    expected = whole_run(case)
    with poisoned_memory():
        found = whole_run(case)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inputs_are_left_alone() -> None:
    case = Case(PLAIN)
    before = [t.detach().clone() for t in case.leaves]
    plain, lse = torch.randn(2, 7, 6, 24), torch.randn(2, 6, 7)
    kept = plain.clone(), lse.clone()
    with torch.no_grad():
        case.fast(alpha=0.4)
        out = hierarchical_attention(
            case.leaves[0], None, None, *case.leaves[3:], scaling=1.0, plain=plain, lse=lse, **case.masks
        )
    assert not torch.equal(out, plain)
    assert all(torch.equal(a, b) for a, b in zip(case.leaves, before, strict=True))
    assert torch.equal(plain, kept[0]) and torch.equal(lse, kept[1])


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_finite_padding_never_shows(grad: bool) -> None:
    """The padding of a page may hold any number; sources zero it, so that it is never NaN."""
    case = Case(PLAIN)
    query, key, value, *fine = case.leaves
    hidden = ~case.valid.flatten(1)[:, None, :, None].expand(-1, 2, -1, 1)
    assert bool(hidden.any())
    loud = [t.detach().masked_fill(hidden, 1e4).requires_grad_(grad) for t in fine]
    out = hierarchical_attention(query, key, value, *loud, scaling=case.scaling, **case.masks)
    assert torch.equal(out, case.fast())
    if grad:
        expected = case.gradients(case.fast(), case.leaves)
        found = case.gradients(out, (query, key, value, *loud))
        for g, e in zip(found, expected, strict=True):
            assert gap(g, e) < FLOAT32
        for g in found[3:]:
            assert not bool(g[hidden.expand_as(g)].any())
