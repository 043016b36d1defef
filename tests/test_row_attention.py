"""Row attention against one float64 softmax per head: outputs, log-sum-exps, probabilities and gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flexcore import row_attention as module
from flexcore.row_attention import CausalRows, GatheredRows, RegionRows, RowMask, row_attention, with_sinks
from tests.helpers import Watch, dense_attention, gap, poisoned_memory

SHAPES = {
    # batch, query heads, kv heads, rows, keys, width, value width
    "B1-H4of4-R1-N63-D40": (1, 4, 4, 1, 63, 40, 40),
    "B2-H6of2-R7-N100-D40-Dv24": (2, 6, 2, 7, 100, 40, 24),
    "B1-H8of1-R129-N111-D32": (1, 8, 1, 129, 111, 32, 32),
    "B1-H2of1-R300-N63-D33-Dv65": (1, 2, 1, 300, 63, 33, 65),
    "B3-H5of5-R3-N1-D7": (3, 5, 5, 3, 1, 7, 7),
    "B1-H2of2-R5-N100-D256": (1, 2, 2, 5, 100, 256, 256),
}
FLOAT32 = 2e-6


class Given:
    """A row mask that is already there; notes which chunks were asked for."""

    def __init__(self, see: Tensor):
        self.see = see
        self.asked: list[tuple[int, int]] = []

    def chunk(self, start: int, stop: int) -> Tensor:
        self.asked.append((start, stop))
        return self.see[:, :, start:stop]


def random_see(*shape: int) -> Tensor:
    """A bool mask that leaves every row about half of its keys, and one at least."""
    see = torch.rand(shape) < 0.5
    return see | (torch.arange(shape[-1]) == torch.randint(shape[-1], shape[:-1])[..., None])


def tensors(shape: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv, rows, keys, width, value = SHAPES[shape]
    made = (
        torch.randn(batch, heads, rows, width),
        torch.randn(batch, kv, keys, width),
        torch.randn(batch, kv, keys, value),
    )
    return tuple(t.to(dtype).requires_grad_() for t in made)  # type: ignore[return-value]


def copies(given: tuple[Tensor, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(t.detach().to(dtype).requires_grad_() for t in given)


def backward(
    loss_of: tuple[Tensor, ...], weights: tuple[Tensor, ...], leaves: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    loss = sum((t * w.to(t.dtype)).sum() for t, w in zip(loss_of, weights, strict=True))
    return torch.autograd.grad(loss, leaves)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- parity


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("shape", SHAPES)
def test_parity_with_one_softmax_per_head(shape: str, softcap: float | None) -> None:
    batch, heads, _, rows, n_keys, width, _ = SHAPES[shape]
    given = tensors(shape)
    exact = copies(given)
    see, sinks, cells = (
        random_see(batch, 1, rows, n_keys),
        torch.randn(heads),
        torch.randint(n_keys, (batch, 5)),
    )
    kwargs: dict[str, Any] = {"scaling": 2 * width**-0.5, "softcap": softcap}
    out, lse, scores = row_attention(*given, Given(see), cells=cells, sinks=sinks, **kwargs)
    e_out, e_lse, _ = dense_attention(*exact, see, **kwargs)
    _, _, prob = dense_attention(*exact, see, sinks=sinks, **kwargs)
    expected = torch.stack([p.sum(0)[:, c] for p, c in zip(prob, cells, strict=True)])
    assert out is not None and scores is not None
    assert gap(out, e_out) < FLOAT32 and gap(lse, e_lse) < FLOAT32 and gap(scores, expected) < FLOAT32
    assert {out.dtype, lse.dtype, scores.dtype} == {torch.float32} and not scores.requires_grad
    weights = torch.randn_like(out), torch.randn_like(lse)
    found = backward((out, lse), weights, given)
    for g, e in zip(found, backward((e_out, e_lse), weights, exact), strict=True):
        assert gap(g, e) < FLOAT32
    # the same without a graph, and without the parts that nobody wants
    with torch.no_grad():
        again = row_attention(*given, Given(see), cells=cells, sinks=sinks, **kwargs)
        assert all(torch.equal(a, b) for a, b in zip(again, (out, lse, scores), strict=True))  # type: ignore[arg-type]
        nothing, only_lse, none = row_attention(given[0], given[1], None, Given(see), **kwargs)
    assert nothing is None and none is None and torch.equal(only_lse, lse)


def test_the_parity_check_can_fail() -> None:
    """What a slip would look like: the next kv head, a mask off by one, the cap after the mask's scale."""
    q, k, v = tensors("B2-H6of2-R7-N100-D40-Dv24")
    see = random_see(2, 1, 7, 100)
    right, _, _ = dense_attention(q, k, v, see, scaling=0.3)
    for wrong in (
        dense_attention(q, k.roll(1, 1), v, see, scaling=0.3),
        dense_attention(q, k, v, see.roll(1, -1), scaling=0.3),
        dense_attention(q, k, v, see, scaling=0.3, softcap=1.5),
        dense_attention(q, k, v, see, scaling=0.3, sinks=torch.zeros(6)),
    ):
        assert gap(wrong[0], right) > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_parity_with_sdpa(shape: str) -> None:
    q, k, v = tensors(shape)
    out, _, _ = row_attention(q, k, v, None, scaling=0.2)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.2, enable_gqa=True)
    assert out is not None and gap(out, expected) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["B2-H6of2-R7-N100-D40-Dv24", "B1-H8of1-R129-N111-D32"])
def test_half_precision_is_computed_in_float32(shape: str, dtype: torch.dtype) -> None:
    """Only the inputs are rounded, and the gradients once at the end."""
    batch, _, _, rows, n_keys, width, _ = SHAPES[shape]
    given = tensors(shape, dtype)
    exact = copies(given)
    see = random_see(batch, 1, rows, n_keys)
    out, lse, _ = row_attention(*given, Given(see), scaling=width**-0.5)
    e_out, e_lse, _ = dense_attention(*exact, see, scaling=width**-0.5)
    assert out is not None and out.dtype == lse.dtype == torch.float32
    assert gap(out, e_out) < FLOAT32 and gap(lse, e_lse) < FLOAT32
    weights = torch.randn_like(out), torch.randn_like(lse)
    for g, e in zip(
        backward((out, lse), weights, given), backward((e_out, e_lse), weights, exact), strict=True
    ):
        assert g.dtype == dtype
        assert gap(g, e.to(dtype)) < torch.finfo(dtype).eps


def test_logits_too_large_to_exponentiate() -> None:
    """Logits in the hundreds: exp overflows in float32, and their own rounding is all that may remain."""
    given = tensors("B2-H6of2-R7-N100-D40-Dv24")
    exact = copies(given)
    out, lse, _ = row_attention(*given, None, scaling=20.0)
    e_out, e_lse, _ = dense_attention(*exact, torch.ones(1, 1, 1, 1, dtype=torch.bool), scaling=20.0)
    assert 100 < float(e_lse.detach().max()) < 700
    assert out is not None and gap(out, e_out) < 2e-4 and gap(lse, e_lse) < FLOAT32
    weights = torch.randn_like(out), torch.randn_like(lse)
    for g, e in zip(
        backward((out, lse), weights, given), backward((e_out, e_lse), weights, exact), strict=True
    ):
        assert gap(g, e) < 2e-4


def test_float64_stays_float64() -> None:
    given = tensors("B2-H6of2-R7-N100-D40-Dv24", torch.float64)
    out, lse, _ = row_attention(*given, None, scaling=0.2)
    e_out, e_lse, _ = dense_attention(*given, torch.ones(1, 1, 1, 1, dtype=torch.bool), scaling=0.2)
    assert out is not None and out.dtype == lse.dtype == torch.float64
    assert gap(out, e_out) < 1e-14 and gap(lse, e_lse) < 1e-14


@pytest.mark.parametrize("softcap", [None, 0.7], ids=["plain", "softcap"])
@pytest.mark.parametrize("blind", [False, True], ids=["all-see", "one-blind"])
def test_gradcheck(softcap: float | None, blind: bool) -> None:
    q = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 2, 5, 2, dtype=torch.float64, requires_grad=True)
    see = random_see(1, 1, 3, 5)
    see[:, :, 1] &= not blind

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _ = row_attention(q, k, v, Given(see), scaling=0.9, softcap=softcap)
        assert out is not None
        return out, lse.clamp(min=-1e3)

    assert torch.autograd.gradcheck(run, (q, k, v))
    assert torch.autograd.gradcheck(
        lambda q, k: row_attention(q, k, None, Given(see), scaling=0.9, softcap=softcap)[1].clamp(min=-1e3),
        (q, k),
    )


@pytest.mark.parametrize("leaf", ["query", "key", "value"])
def test_one_leaf_at_a_time(leaf: str) -> None:
    given = {
        n: t.detach()
        for n, t in zip(("query", "key", "value"), tensors("B2-H6of2-R7-N100-D40-Dv24"), strict=True)
    }
    exact = {n: t.double() for n, t in given.items()}
    given[leaf].requires_grad_()
    exact[leaf].requires_grad_()
    out, lse, _ = row_attention(**given, mask=None, scaling=0.3)
    e_out, e_lse, _ = dense_attention(**exact, see=torch.ones(1, 1, 1, 1, dtype=torch.bool), scaling=0.3)
    (out.square().sum() + lse.square().sum()).backward()  # type: ignore[union-attr]
    (e_out.square().sum() + e_lse.square().sum()).backward()
    assert gap(given[leaf].grad, exact[leaf].grad) < FLOAT32  # type: ignore[arg-type]


# ---------------------------------------------------------------------- masks


def test_causal_rows() -> None:
    last = torch.tensor([[0, 3, 3, -1], [9, 8, 0, 5]])
    mask = CausalRows(last, 10)
    for start, stop in itertools.combinations(range(5), 2):
        expected = [
            [[key <= int(last[b, r]) for key in range(10)] for r in range(start, stop)] for b in range(2)
        ]
        assert mask.chunk(start, stop)[:, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_gathered_rows(batch: int, heads: int, kind: str) -> None:
    full = torch.rand(batch, heads, 6, 7) < 0.5
    mask = full if kind == "bool" else torch.where(full, 0.25, -math.inf)
    rows = torch.tensor([[5, 0, 0], [2, 3, 1], [4, 4, 4]])
    for start, stop in itertools.combinations(range(4), 2):
        found = GatheredRows(mask, rows).chunk(start, stop)
        assert found.shape == (3, heads, stop - start, 7) and found.dtype == mask.dtype
        for b, h, r in itertools.product(range(3), range(heads), range(start, stop)):
            assert torch.equal(found[b, h, r - start], mask[b % batch, h % heads, rows[b, r]])


def test_region_rows() -> None:
    selected, valid = torch.rand(2, 5, 3) < 0.5, torch.rand(2, 3, 4) < 0.7
    for start, stop in itertools.combinations(range(6), 2):
        found = RegionRows(selected, valid).chunk(start, stop)
        for b, r, u, p in itertools.product(range(2), range(start, stop), range(3), range(4)):
            assert bool(found[b, 0, r - start, u * 4 + p]) == bool(selected[b, r, u] and valid[b, u, p])


@pytest.mark.parametrize("heads", [1, 6], ids=["shared", "per-head"])
@pytest.mark.parametrize("kind", ["bool", "float", "bfloat16"])
def test_attention_under_gathered_masks(monkeypatch: pytest.MonkeyPatch, heads: int, kind: str) -> None:
    """Additive masks count as they are: an offset on a key is an offset on its logit."""
    monkeypatch.setattr(module, "CHUNK_ROWS", 3)
    given = tensors("B2-H6of2-R7-N100-D40-Dv24")
    exact = copies(given)
    see = random_see(2, heads, 9, 100)
    if kind == "bool":
        mask = see
    else:
        offset = torch.randn(2, heads, 9, 100)
        mask = torch.where(see, offset, -math.inf).to(torch.float32 if kind == "float" else torch.bfloat16)
    rows = torch.stack([torch.randperm(9)[:7], torch.tensor([8, 8, 0, 3, 3, 1, 8])])
    per_row = torch.stack([mask[b][:, rows[b]] for b in range(2)])
    out, lse, _ = row_attention(*given, GatheredRows(mask, rows), scaling=0.3)
    e_out, e_lse, _ = dense_attention(*exact, per_row, scaling=0.3)
    assert out is not None and gap(out, e_out) < FLOAT32 and gap(lse, e_lse) < FLOAT32
    weights = torch.randn_like(out), torch.randn_like(lse)
    for g, e in zip(
        backward((out, lse), weights, given), backward((e_out, e_lse), weights, exact), strict=True
    ):
        assert gap(g, e) < FLOAT32


# ---------------------------------------------------------------------- rows and keys that aren't there


def test_a_row_that_sees_nothing() -> None:
    given = tensors("B2-H6of2-R7-N100-D40-Dv24")
    see = random_see(2, 1, 7, 100)
    see[0, 0, 2] = see[1, 0, 6] = False
    cells = torch.randint(100, (2, 9))
    for sinks in (None, torch.randn(6)):
        out, lse, scores = row_attention(*given, Given(see), scaling=0.3, cells=cells, sinks=sinks)
        assert out is not None and scores is not None
        for b, r in ((0, 2), (1, 6)):
            assert bool((out[b, :, r] == 0).all()) and bool((scores[b, r] == 0).all())
            assert bool((lse[b, :, r] == -math.inf).all())
        assert int((lse == -math.inf).sum()) == 12 and bool(out.isfinite().all())
        assert bool((scores[0, 3] > 0).any())
        grads = torch.autograd.grad((out.square().sum() + lse.exp().sum()), given)
        assert all(bool(g.isfinite().all()) for g in grads)
        assert bool((grads[0][0, :, 2] == 0).all()) and bool((grads[0][0, :, 3] != 0).all())


def test_keys_nobody_sees_get_no_gradient() -> None:
    given = tensors("B2-H6of2-R7-N100-D40-Dv24")
    see = random_see(2, 1, 7, 100)
    see[..., 40:] = False
    see[..., 0] = True
    out, lse, _ = row_attention(*given, Given(see), scaling=0.3)
    assert out is not None
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), given)
    for g in grads[1:]:
        assert bool((g[:, :, 40:] == 0).all()) and bool((g[:, :, 0] != 0).all())


@pytest.mark.parametrize("hidden", [math.nan, math.inf], ids=str)
def test_a_hidden_key_stays_out_of_the_log_sum_exp(hidden: float) -> None:
    """What a static cache has not written yet: its keys may be anything, if a bool mask hides them."""
    q, k, _ = (t.detach() for t in tensors("B2-H6of2-R7-N100-D40-Dv24"))
    see = random_see(2, 1, 7, 100)
    see[..., 60:] = False
    see[..., 0] = True
    _, lse, scores = row_attention(
        q, k, None, Given(see), scaling=0.3, cells=torch.tensor([[0, 70], [1, 99]])
    )
    k[:, :, 60:] = hidden
    _, again, scores_again = row_attention(
        q, k, None, Given(see), scaling=0.3, cells=torch.tensor([[0, 70], [1, 99]])
    )
    assert torch.equal(lse, again) and torch.equal(scores, scores_again)  # type: ignore[arg-type]
    assert bool((scores[..., 1] == 0).all())  # type: ignore[index]


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_no_keys_and_no_rows(grad: bool) -> None:
    q, k, v = (t.detach().requires_grad_(grad) for t in tensors("B2-H6of2-R7-N100-D40-Dv24"))
    out, lse, _ = row_attention(q, k[:, :, :0], v[:, :, :0], None, scaling=0.3)
    assert out is not None and out.shape == (2, 6, 7, 24) and not bool(out.any())
    assert bool((lse == -math.inf).all())
    cells = torch.zeros(2, 5, dtype=torch.long)
    out, lse, scores = row_attention(q[:, :, :0], k, v, None, scaling=0.3, cells=cells)
    assert out is not None and scores is not None
    assert (out.shape, lse.shape, scores.shape) == ((2, 6, 0, 24), (2, 6, 0), (2, 0, 5))
    if grad:
        assert not bool(torch.autograd.grad(out.sum(), q)[0].any())


# ---------------------------------------------------------------------- sinks


def test_sinks_are_keys_without_a_value() -> None:
    q, k, v = tensors("B2-H6of2-R7-N100-D40-Dv24", torch.float64)
    sinks = torch.randn(6, dtype=torch.float64, requires_grad=True)
    see = random_see(2, 1, 7, 100)
    expected, lse, _ = dense_attention(q, k, v, see, scaling=0.3, sinks=sinks)
    out, own, _ = row_attention(q, k, v, Given(see), scaling=0.3)
    joint = with_sinks(own, sinks)
    assert gap(joint, (lse.exp() + sinks.exp()[None, :, None]).log()) < 1e-14
    found = out * (own - joint).exp()[..., None]  # type: ignore[operator]
    assert gap(found, expected) < 1e-14
    weight = torch.randn_like(found)
    leaves = (q, k, v, sinks)
    for g, e in zip(
        backward((found,), (weight,), leaves), backward((expected,), (weight,), leaves), strict=True
    ):
        assert gap(g, e) < 1e-12
    assert with_sinks(own, None) is own
    blind = torch.full((1, 6, 1), -math.inf, dtype=torch.float64)
    assert torch.equal(with_sinks(blind, sinks)[0, :, 0], sinks)


# ---------------------------------------------------------------------- chunks


@pytest.mark.parametrize(
    ("rows", "size", "step"),
    [
        (1, 1 << 40, 1),
        (7, 1 << 40, 7),
        (50, 1 << 40, 50),
        (1000, 1 << 40, 129),
        (1000, 1, 1),
        (1000, 8 * 63 * 4 * 13, 13),
    ],
    ids=["1-row", "7-rows", "50-rows", "all-rows", "1-byte", "13-rows-of-bytes"],
)
def test_chunks_cover_every_row_once(
    monkeypatch: pytest.MonkeyPatch, rows: int, size: int, step: int
) -> None:
    monkeypatch.setitem(SHAPES, "chunked", (2, 4, 2, 129, 63, 9, 5))
    given = tensors("chunked")
    see, cells = random_see(2, 1, 129, 63), torch.randint(63, (2, 5))

    def run() -> tuple[list[Tensor], list[tuple[int, int]]]:
        mask = Given(see)
        out, lse, scores = row_attention(*given, mask, scaling=0.4, softcap=2.0, cells=cells)
        assert out is not None and scores is not None
        grads = torch.autograd.grad(out.square().sum() + lse.square().sum(), given)
        return [out, lse, scores, *grads], mask.asked

    whole, _ = run()
    monkeypatch.setattr(module, "CHUNK_ROWS", rows)
    monkeypatch.setattr(module, "CHUNK_BYTES", size)
    pieces, asked = run()
    expected = [(a, min(a + step, 129)) for a in range(0, 129, step)]
    assert asked == expected * 2, "once forward, once backward"
    for a, b in zip(pieces, whole, strict=True):
        assert gap(a, b) < FLOAT32


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_no_square_of_rows_and_keys(grad: bool) -> None:
    """1,000 causal rows over 1,024 keys: no tensor has both as its last two sizes."""
    q, k = torch.randn(1, 2, 1000, 8), torch.randn(1, 2, 1024, 8)
    v = torch.randn(1, 2, 1024, 8)
    last = torch.arange(24, 1024)[None]
    leaves = [t.requires_grad_(grad) for t in (q, k, v)]
    with Watch() as watch:
        out, lse, _ = row_attention(
            *leaves, CausalRows(last, 1024), scaling=0.3, cells=torch.arange(99)[None]
        )
        if grad:
            torch.autograd.grad(out.square().sum() + lse.sum(), leaves)  # type: ignore[union-attr]
    assert watch.shapes and not [s for s in watch.shapes if len(s) > 1 and min(s[-2:]) >= 1000]
    assert any(s[-1] == 1024 for s in watch.shapes)
    with Watch() as watch:
        torch.softmax(q @ k.transpose(2, 3), dim=-1)
    assert [s for s in watch.shapes if len(s) > 1 and min(s[-2:]) >= 1000]


# ---------------------------------------------------------------------- surroundings


def whole_run(shape: str) -> list[Tensor]:
    torch.manual_seed(5)
    batch, _, _, rows, n_keys, _, _ = SHAPES[shape]
    given = tensors(shape)
    see, cells = random_see(batch, 1, rows, n_keys), torch.randint(n_keys, (batch, 5))
    out, lse, scores = row_attention(*given, Given(see), scaling=0.3, softcap=3.0, cells=cells)
    assert out is not None and scores is not None
    with torch.no_grad():
        again = row_attention(*given, Given(see), scaling=0.3, softcap=3.0, cells=cells)
        assert all(torch.equal(a, b) for a, b in zip(again, (out, lse, scores), strict=True))  # type: ignore[arg-type]
    return [out, lse, scores, *torch.autograd.grad(out.square().sum() + lse.square().sum(), given)]


@pytest.mark.parametrize("shape", ["B2-H6of2-R7-N100-D40-Dv24", "B1-H2of1-R300-N63-D33-Dv65"])
def test_autocast_changes_nothing(shape: str) -> None:
    expected = whole_run(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = torch.randn(4, 4)
        assert (a @ a).dtype == torch.bfloat16
        found = whole_run(shape)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", ["B2-H6of2-R7-N100-D40-Dv24", "B1-H2of1-R300-N63-D33-Dv65"])
def test_nothing_is_read_before_it_is_written(shape: str) -> None:
    expected = whole_run(shape)
    with poisoned_memory():
        found = whole_run(shape)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(module._FLASH is None, reason="this torch has no such operation")
@pytest.mark.parametrize("shape", SHAPES)
def test_torchs_own_attention_for_cpus_gives_the_same(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, heads, kv_heads, rows, keys, width, value_width = SHAPES[shape]
    q, k = torch.randn(batch, heads, rows, width), 3 * torch.randn(batch, kv_heads, keys, width)
    v, calls, flash = torch.randn(batch, kv_heads, keys, value_width), [], module._FLASH
    monkeypatch.setattr(module, "_FLASH", lambda *a, **kw: (calls.append(1), flash(*a, **kw))[1])
    found = row_attention(q, k, v, None, scaling=0.2)
    assert len(calls) == (width == value_width)
    monkeypatch.setattr(module, "_FLASH", None)
    for here, there in zip(found[:2], row_attention(q, k, v, None, scaling=0.2)[:2], strict=True):
        assert here.shape == there.shape and gap(here, there) < 5 * FLOAT32


def test_inputs_are_left_alone() -> None:
    given = tensors("B2-H6of2-R7-N100-D40-Dv24")
    strided = tuple(t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in given)
    before = copies(given, torch.float32)
    mask: RowMask = CausalRows(torch.arange(7)[None] * 16, 100)
    out, lse, _ = row_attention(*given, mask, scaling=0.3)
    found = torch.autograd.grad(out.square().sum() + lse.sum(), given)  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    again, _, _ = row_attention(*strided, mask, scaling=0.3)
    assert gap(again, out) < FLOAT32  # type: ignore[arg-type]
    assert all(g.shape == t.shape and g.dtype == t.dtype for g, t in zip(found, given, strict=True))


@pytest.mark.skipif(module._FLASH is None, reason="this torch has no such operation")
@pytest.mark.parametrize("groups, rows", [(1, 1), (1, 5), (3, 1), (3, 4)])
def test_a_log_sum_exp_alone_is_one_operation(
    groups: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = torch.randn(2, 2 * groups, rows, 8), torch.randn(2, 2, 33, 8)
    expected = torch.logsumexp(0.3 * q @ k.repeat_interleave(groups, 1).transpose(2, 3), dim=-1)
    out, lse, scores = row_attention(q, k, None, None, scaling=0.3)
    assert out is None and scores is None and gap(lse, expected) < 5 * FLOAT32
    monkeypatch.setattr(module, "_FLASH", None)
    assert gap(row_attention(q, k, None, None, scaling=0.3)[1], expected) < 5 * FLOAT32
