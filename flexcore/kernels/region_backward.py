# mypy: allow-untyped-defs, allow-incomplete-defs
"""Backward of region attention: probabilities are recomputed from the joint log-sum-exp, tile by tile.

The plain part acts like one more key, whose logit is the plain log-sum-exp and whose value is the plain output, so
with `delta = g . out` every logit's gradient is `p (g . v - delta)`, that of the plain log-sum-exp included.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .region_forward import Pages, attend, seen_tokens
from .tiles import gradient_product, outer_product, product, squashed


@triton.jit
def logit_gradients(q_tile, k_tile, v_tile, g_tile, lse, delta, seen, scaling, softcap, CAP: tl.constexpr):
    """Probabilities `[M, N]` and gradients of the unscaled logits, from `k_tile` `[D, N]` and `v_tile` `[Dv, N]`."""
    s = product(q_tile, k_tile) * scaling
    slope = scaling
    if CAP:
        t = squashed(s, softcap)
        s = t * softcap
        slope = scaling * (1.0 - t * t)
    p = tl.where(seen, tl.exp(tl.where(seen, s, 0.0) - lse[:, None]), 0.0)
    ds = p * (gradient_product(g_tile, v_tile) - delta[:, None]) * slope
    return p, tl.where(seen, ds, 0.0)  # a page that no row selected may hold NaN


# fmt: off
@triton.jit(do_not_specialize=["n_rows", "n_regions"])
def query_gradient(
    q, k, v, selected, valid, table, g, lse, delta, dq,
    q_batch, q_head, q_row, q_width,
    k_batch, k_page, k_token, k_head, k_width,
    v_batch, v_page, v_token, v_head, v_width,
    n_heads, n_rows, n_regions, page, scaling, softcap,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, VALUE: tl.constexpr, CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):
# fmt: on
    """`dq[b, h, r]` of one row tile and kv head."""
    kv_heads = n_heads // GROUPS
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = (tl.program_id(1) % kv_heads).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = m // GROUPS
    head = kv * GROUPS + m % GROUPS
    real = r < n_rows
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    at = q + b * q_batch + head[:, None] * q_head + r[:, None] * q_row + d[None, :] * q_width
    q_tile = tl.load(at, mask=real[:, None] & (d < WIDTH)[None, :], other=0)
    row = (b * n_rows + r) * n_heads + head
    g_tile = tl.load(
        g + row[:, None] * VALUE + e[None, :], mask=real[:, None] & (e < VALUE)[None, :], other=0
    )
    row_lse = tl.load(lse + row, mask=real, other=0)
    row_delta = tl.load(delta + row, mask=real, other=0)
    stop = n_regions * page
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, stop, BLOCK_N):
        t = first + tl.arange(0, BLOCK_N)
        seen, any_row, where, place = seen_tokens(
            selected, valid, table, b, r, real, t, stop, n_rows, n_regions, page
        )
        here = (
            k + b * k_batch + kv * k_head + (where * k_page + place * k_token)[None, :] + d[:, None] * k_width
        )
        k_tile = tl.load(here, mask=any_row[None, :] & (d < WIDTH)[:, None], other=0)
        here = (
            v + b * v_batch + kv * v_head + (where * v_page + place * v_token)[None, :] + e[:, None] * v_width
        )
        v_tile = tl.load(here, mask=any_row[None, :] & (e < VALUE)[:, None], other=0)
        _, ds = logit_gradients(
            q_tile, k_tile, v_tile, g_tile, row_lse, row_delta, seen, scaling, softcap, CAP
        )
        sums += gradient_product(ds, tl.trans(k_tile))
    at = dq + ((b * n_heads + head) * n_rows + r)[:, None] * WIDTH + d[None, :]
    tl.store(at, sums.to(dq.dtype.element_ty), mask=real[:, None] & (d < WIDTH)[None, :])


# fmt: off
@triton.jit(do_not_specialize=["n_rows", "n_regions"])
def page_gradients(
    q, k, v, selected, valid, table, g, lse, delta, dk, dv,
    q_batch, q_head, q_row, q_width,
    k_batch, k_page, k_token, k_head, k_width,
    v_batch, v_page, v_token, v_head, v_width,
    n_heads, n_rows, n_regions, page, scaling, softcap,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, VALUE: tl.constexpr, CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):
# fmt: on
    """`dk[b, u, p, kv]` and `dv[b, u, p, kv]` of one token tile and kv head, over all its rows."""
    kv_heads = n_heads // GROUPS
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = (tl.program_id(1) % kv_heads).to(tl.int64)
    t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    stop = n_regions * page
    inside = t < stop
    readable = inside
    if valid is not None:
        readable = inside & (tl.load(valid + b * stop + t, mask=inside, other=0) != 0)
    where = (t // page).to(tl.int64)
    if table is not None:
        where = tl.load(table + b * n_regions + t // page, mask=inside, other=0).to(tl.int64)
    place = t % page
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    at = k + b * k_batch + kv * k_head + (where * k_page + place * k_token)[None, :] + d[:, None] * k_width
    k_tile = tl.load(at, mask=readable[None, :] & (d < WIDTH)[:, None], other=0)
    at = v + b * v_batch + kv * v_head + (where * v_page + place * v_token)[None, :] + e[:, None] * v_width
    v_tile = tl.load(at, mask=readable[None, :] & (e < VALUE)[:, None], other=0)
    k_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    v_sums = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, n_rows * GROUPS, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        r = m // GROUPS
        head = kv * GROUPS + m % GROUPS
        real = r < n_rows
        seen = real[:, None] & readable[None, :]
        if selected is not None:
            here = selected + b * n_rows * n_regions + (r[:, None] * n_regions + (t // page)[None, :])
            seen = seen & (tl.load(here, mask=seen, other=0) != 0)
        here = q + b * q_batch + head[:, None] * q_head + r[:, None] * q_row + d[None, :] * q_width
        q_tile = tl.load(here, mask=real[:, None] & (d < WIDTH)[None, :], other=0)
        row = (b * n_rows + r) * n_heads + head
        here = g + row[:, None] * VALUE + e[None, :]
        g_tile = tl.load(here, mask=real[:, None] & (e < VALUE)[None, :], other=0)
        row_lse = tl.load(lse + row, mask=real, other=0)
        row_delta = tl.load(delta + row, mask=real, other=0)
        p, ds = logit_gradients(
            q_tile, k_tile, v_tile, g_tile, row_lse, row_delta, seen, scaling, softcap, CAP
        )
        v_sums += outer_product(p, g_tile, v_tile)
        k_sums += gradient_product(tl.trans(ds), q_tile)
    token = ((b * stop + t) * kv_heads + kv)[:, None]
    tl.store(
        dk + token * WIDTH + d[None, :],
        k_sums.to(dk.dtype.element_ty),
        mask=inside[:, None] & (d < WIDTH)[None, :],
    )
    tl.store(
        dv + token * VALUE + e[None, :],
        v_sums.to(dv.dtype.element_ty),
        mask=inside[:, None] & (e < VALUE)[None, :],
    )


def gradient_blocks(width: int, item: int) -> dict[str, int]:
    """Tile sizes of both backward kernels for a head so wide."""
    block_n = 32 if width * item <= 256 else 16
    return dict(BLOCK_M=16, BLOCK_N=block_n, num_warps=8 if width * item > 128 else 4, num_stages=1)


class RegionAttention(torch.autograd.Function):
    """The joint softmax's output `[B, R, Hq, Dv]` in float32, before any blending with the plain one."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plain: Tensor,
        lse: Tensor,
        selected: Tensor | None,
        valid: Tensor | None,
        table: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        batch, heads, n_rows, _ = query.shape
        out = query.new_empty(batch, n_rows, heads, value.shape[-1], dtype=torch.float32)
        joint = out.new_empty(batch, n_rows, heads)
        pages = Pages(key, value, selected, valid, table)
        attend(query, pages, plain, lse, scaling, softcap, 1.0, out, joint)
        ctx.save_for_backward(query, key, value, plain, lse, selected, valid, table, out, joint)
        ctx.scaling, ctx.softcap = scaling, softcap
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, plain, lse, selected, valid, table, out, joint = ctx.saved_tensors
        g = d_out.float().contiguous()
        delta = (g * out).sum(dim=-1)
        own = lse.float().transpose(1, 2)
        share = torch.where(joint == float("-inf"), 1.0, torch.exp(own - joint))
        d_plain = (g * share[..., None]).to(plain.dtype)
        d_lse = share * ((g * plain.float()).sum(dim=-1) - delta)
        dq = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        pages = Pages(key, value, selected, valid, table)
        batch, heads, n_rows, _ = query.shape
        shape = batch, pages.regions, pages.page, pages.kv_heads
        dk, dv = key.new_empty(*shape, key.shape[-1]), value.new_empty(*shape, value.shape[-1])
        given = pages.arguments()
        blocks = gradient_blocks(max(given["BLOCK_D"], given["BLOCK_V"]), key.element_size())
        shared = dict(
            q=query,
            g=g,
            lse=joint,
            delta=delta,
            q_batch=query.stride(0),
            q_head=query.stride(1),
            q_row=query.stride(2),
            q_width=query.stride(3),
            n_heads=heads,
            n_rows=n_rows,
            scaling=float(ctx.scaling),
            softcap=float(ctx.softcap or 0),
            GROUPS=heads // pages.kv_heads,
            CAP=ctx.softcap is not None,
            **given,
            **blocks,
        )
        lanes = batch * pages.kv_heads
        tiles = triton.cdiv(n_rows * heads // pages.kv_heads, blocks["BLOCK_M"])
        launch(query_gradient, (tiles, lanes), dq=dq, **shared)
        launch(page_gradients, (triton.cdiv(pages.tokens, blocks["BLOCK_N"]), lanes), dk=dk, dv=dv, **shared)
        if table is not None:
            dk, dv = (
                torch.zeros_like(pool).index_add_(0, table.flatten(), d.flatten(0, 1))
                for pool, d in ((key, dk), (value, dv))
            )
        return dq, dk, dv, d_plain, d_lse.transpose(1, 2).to(lse.dtype), None, None, None, None, None
