"""Attention of a few rows over many keys: exact log-sum-exp, optional output, optional head-summed probabilities.

Only readout rows come through here, a bounded chunk of them at a time, so that neither the N x N map nor a
rows x all-keys matrix beyond `CHUNK_BYTES` ever exists; the backward pass recomputes its chunk's probabilities.
Where no output is wanted, a kernel may do the forward pass on CUDA (`flexcore/kernels`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from . import kernels

CHUNK_BYTES = 32 << 20
CHUNK_ROWS = 128


class RowMask(Protocol):
    """Which keys each row may see, made a chunk of rows at a time."""

    def chunk(self, start: int, stop: int) -> Tensor:
        """`[B|1, H|1, stop - start, N]`: bool (True sees) or an additive float mask."""
        ...


class CausalRows:
    """Row r sees keys `0..last[b, r]`: for backends that are told "causal" instead of given a mask."""

    def __init__(self, last: Tensor, n_keys: int):
        self.last = last
        self.keys = torch.arange(n_keys, device=last.device)

    def chunk(self, start: int, stop: int) -> Tensor:
        return (self.keys <= self.last[:, start:stop, None])[:, None]


class SharedMask:
    """One mask `[B|1, H|1, 1, N]` for every row: a decode step's own."""

    def __init__(self, mask: Tensor):
        self.mask = mask

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.mask


class GatheredRows:
    """Rows `rows[b, r]` of an existing `[B|1, H|1, Q, N]` mask."""

    def __init__(self, mask: Tensor, rows: Tensor):
        self.mask = mask.expand(rows.shape[0], -1, -1, -1)
        self.rows = rows
        self.batch = torch.arange(rows.shape[0], device=rows.device)[:, None]

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.mask[self.batch, :, self.rows[:, start:stop]].transpose(1, 2)


class RegionRows:
    """Row r sees the valid tokens of the regions it selected.

    Args:
        selected: `[B, R, U]` bool over the U regions whose keys are given, in that order.
        valid: `[B, U, P]` bool, which of a region's padded tokens are real.
    """

    def __init__(self, selected: Tensor, valid: Tensor):
        self.selected = selected
        self.valid = valid

    def chunk(self, start: int, stop: int) -> Tensor:
        return (self.selected[:, start:stop, :, None] & self.valid[:, None]).flatten(2)[:, None]


def _logits(
    q: Tensor, k: Tensor, mask: RowMask | None, start: int, stop: int, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Masked logits `[B, Hq, c, N]` of one chunk, and tanh's value where there is a softcap."""
    batch, heads, _, width = q.shape
    groups = heads // k.shape[1]
    rows = q if stop - start == q.shape[2] else q[:, :, start:stop]
    rows = rows.to(k.dtype).reshape(batch * k.shape[1], groups * (stop - start), width)
    # one operation that scales as it multiplies: `torch.matmul` on four axes makes six, and the scaling one more
    s = torch.baddbmm(rows.new_empty(()), rows, k.flatten(0, 1).transpose(1, 2), beta=0, alpha=scaling)
    s = s.view(batch, heads, stop - start, k.shape[2])
    squashed = None
    if softcap is not None:
        squashed = torch.tanh(s / softcap)
        s = squashed * softcap
    if mask is not None:
        part = mask.chunk(start, stop)
        s = s.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else s + part.to(s.dtype)
    return s, squashed


def _chunks(q: Tensor, n_keys: int) -> list[tuple[int, int]]:
    per_row = max(1, q.shape[0] * q.shape[1] * n_keys * 4)
    step = max(1, min(CHUNK_ROWS, CHUNK_BYTES // per_row))
    return [(a, min(a + step, q.shape[2])) for a in range(0, q.shape[2], step)]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: RowMask | None,
    cells: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    known: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    if v is None and (q.is_cuda or kernels.INTERPRETED) and kernels.reads_out(q, k, mask):
        from .kernels.readout import readout

        return None, *readout(q, k, mask, cells, scaling=scaling, softcap=softcap, sinks=sinks)
    batch, heads = q.shape[:2]
    groups = heads // k.shape[1]
    # for a log-sum-exp alone the keys stand for the values: they are in the cache, and it is one operation of nine
    values = k if v is None else v
    if known is not None and cells is None and v is None:
        return None, known, None
    if cells is None and mask is None and softcap is None and _fits_flash(q, k, values):
        assert _FLASH is not None
        if groups == 1:
            out, lse = _FLASH(q, k, values, scale=scaling)
            return None if v is None else out, lse, None
        rows = q.reshape(batch, k.shape[1], groups * q.shape[2], q.shape[3])
        out, lse = _FLASH(rows, k, values, scale=scaling)
        lse = lse.reshape(batch, heads, q.shape[2])
        return None if v is None else out.reshape(batch, heads, q.shape[2], -1), lse, None
    exact = torch.promote_types(q.dtype, torch.float32)
    k = k.to(exact)
    outs, lses, scores = [], [], []
    for start, stop in _chunks(q, k.shape[2]):
        s, _ = _logits(q, k, mask, start, stop, scaling, softcap)
        # one fused softmax instead of a log-sum-exp and an exponential: where it peaks it is 1 / sum(exp(s - max))
        p = torch.softmax(s, dim=-1)
        if known is None:
            top = _largest(s)
            lse = top - _largest(p).log_()
        else:
            top = lse = known if stop - start == q.shape[2] else known[:, :, start:stop]
        if mask is not None or not s.shape[3]:  # a row that sees nothing
            nothing = top == float("-inf")
            lse, p = lse.masked_fill_(nothing, float("-inf")), p.masked_fill_(nothing[..., None], 0.0)
        lses.append(lse)
        if cells is not None:
            seen = p
            if sinks is not None:
                seen = p * (lse - torch.logaddexp(lse, sinks.to(exact)[None, :, None])).exp_()[..., None]
            index = cells[:, None]
            index = index if stop - start == 1 else index.expand(batch, stop - start, -1)
            scores.append(seen.sum(dim=1).gather(2, index))
        if v is not None:
            p = p.view(batch, k.shape[1], groups * (stop - start), k.shape[2])
            outs.append(torch.matmul(p, v.to(exact)).view(batch, heads, stop - start, v.shape[3]))
    if not lses:
        empty = q.new_zeros(batch, heads, 0, dtype=exact)
        out = None if v is None else q.new_zeros(batch, heads, 0, v.shape[3], dtype=exact)
        return out, empty, None if cells is None else empty.new_zeros(batch, 0, cells.shape[1])
    return (
        _join(outs, 2) if outs else None,
        _join(lses, 2),
        _join(scores, 1) if scores else None,
    )


# What torch's own attention runs on a CPU: one operation, and it hands out the log-sum-exp. It has no public name.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def cpu_flash(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The operation that torch's own attention runs on a CPU, if it takes these tensors; else None."""
    return _FLASH if _fits_flash(q, k, v) else None


def _fits_flash(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        _FLASH is not None
        and q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype == torch.float32
        and k.shape == v.shape
        and q.numel() > 0
        and k.numel() > 0
    )


def _largest(x: Tensor) -> Tensor:
    """`[...]` the largest entry of each row `[..., N]`; -inf of none."""
    return x.amax(dim=-1) if x.shape[-1] else x.new_full(x.shape[:-1], float("-inf"))


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


class _RowAttention(torch.autograd.Function):
    """`_forward` with a backward that recomputes probabilities chunk by chunk; scores are not differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        mask: RowMask | None,
        cells: Tensor | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        with torch.autocast(q.device.type, enabled=False):
            out, lse, scores = _forward(q, k, v, mask, cells, scaling, softcap, sinks)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scaling, ctx.softcap = mask, scaling, softcap
        if scores is not None:
            ctx.mark_non_differentiable(scores)
        return out, lse, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        batch, heads, _, width = q.shape
        exact = lse.dtype
        groups = heads // k.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            kf, vf = k.to(exact), None if v is None else v.to(exact)
            dq = torch.zeros(q.shape, dtype=exact, device=q.device)
            dk = torch.zeros_like(kf)
            dv = None if vf is None else torch.zeros_like(vf)
            for start, stop in _chunks(q, k.shape[2]):
                rows = stop - start
                s, squashed = _logits(q, kf, ctx.mask, start, stop, ctx.scaling, ctx.softcap)
                row_lse = lse[:, :, start:stop, None]
                p = (s - row_lse.masked_fill(row_lse == float("-inf"), 0.0)).exp_()
                ds = d_lse[:, :, start:stop, None].to(exact).expand_as(p)
                if vf is not None and dv is not None and d_out is not None:
                    g = d_out[:, :, start:stop].to(exact)
                    g_rows = g.reshape(batch, k.shape[1], groups * rows, -1)
                    p_rows = p.view(batch, k.shape[1], groups * rows, -1)
                    dv += torch.matmul(p_rows.transpose(2, 3), g_rows)
                    delta = (g * out[:, :, start:stop]).sum(dim=-1, keepdim=True)
                    ds = ds + torch.matmul(g_rows, vf.transpose(2, 3)).view_as(p) - delta
                ds = p * ds * ctx.scaling
                if squashed is not None:
                    ds = ds * (1 - squashed * squashed)
                ds = ds.view(batch, k.shape[1], groups * rows, -1)
                dq[:, :, start:stop] = torch.matmul(ds, kf).view(batch, heads, rows, width)
                q_rows = q[:, :, start:stop].to(exact).reshape(batch, k.shape[1], groups * rows, width)
                dk += torch.matmul(ds.transpose(2, 3), q_rows)
        return (
            dq.to(q.dtype),
            dk.to(k.dtype),
            None if dv is None else dv.to(v.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: RowMask | None,
    *,
    scaling: float,
    softcap: float | None = None,
    cells: Tensor | None = None,
    sinks: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Attend a few rows to many keys, in float32 whatever the inputs' dtype.

    Args:
        query: `[B, Hq, R, D]` rotated queries of the rows.
        key: `[B, Hkv, N, D]`; head h uses kv head `h // (Hq / Hkv)`.
        value: `[B, Hkv, N, Dv]`, or None if only the log-sum-exp is wanted.
        mask: What each row sees, or None for all keys.
        scaling: Factor on the logits.
        softcap: `cap * tanh(logits / cap)` before the mask (Gemma 2).
        cells: `[B, M]` key indices whose probabilities are wanted, summed over heads.
        sinks: `[Hq]` attention sinks, counted in the probabilities at `cells` only; add them to the log-sum-exp
            with `with_sinks`.
        known: `[B, Hq, R]` float32, the log-sum-exp, where the rows see all keys and something else worked it out. It
            is handed back.

    Returns:
        Output `[B, Hq, R, Dv]` or None (zero for a row that sees nothing), log-sum-exp `[B, Hq, R]` (-inf for such
        a row), and `[B, R, M]` probabilities or None (detached). All float32.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value)):
        return _RowAttention.apply(query, key, value, mask, cells, scaling, softcap, sinks)
    with torch.autocast(query.device.type, enabled=False):
        return _forward(query, key, value, mask, cells, scaling, softcap, sinks, known)


def with_sinks(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Add attention sinks `[Hq]` to a log-sum-exp `[B, Hq, R]`: keys without a value, as GPT-OSS has them."""
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
