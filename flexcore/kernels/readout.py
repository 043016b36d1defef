# mypy: allow-untyped-defs, allow-incomplete-defs
"""Readout kernel: log-sum-exp of a few rows over all keys, and head-summed probabilities at the coarse cells.

The first launch reads every key once and keeps a running maximum and sum per row and head. A probability needs the
finished log-sum-exp, so the second launch recomputes the logits at the coarse cells alone and sums over heads in
registers: nothing of size heads x rows x keys, or heads x rows x cells, is written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..row_attention import CausalRows, GatheredRows, RowMask, SharedMask
from .launch import launch, splits
from .tiles import ADDITIVE, BOOLEAN, CAUSAL, NO_MASK, capped, grown, log_add, log_sum, masked, product


# fmt: off
@triton.jit(do_not_specialize=["n_rows", "n_keys", "part"])
def row_log_sum_exp(
    q, k, mask, rows, last, lse,
    q_batch, q_head, q_row, q_width,
    k_batch, k_head, k_key, k_width,
    mask_batch, mask_head, mask_row, mask_key,
    n_heads, n_rows, n_keys, part, scaling, softcap,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
# fmt: on
    """`lse[split, b, h, r]` over keys `part * split ..`; one program per row tile, kv head and part of the keys."""
    kv_heads = n_heads // GROUPS
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = (tl.program_id(1) % kv_heads).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = m // GROUPS
    head = kv * GROUPS + m % GROUPS
    real = r < n_rows
    d = tl.arange(0, BLOCK_D)
    at = q + b * q_batch + head[:, None] * q_head + r[:, None] * q_row + d[None, :] * q_width
    q_tile = tl.load(at, mask=real[:, None] & (d < WIDTH)[None, :], other=0)
    limit = r
    offset = head
    if MASK == CAUSAL:
        limit = tl.load(last + b * n_rows + r, mask=real, other=-1).to(tl.int32)
    elif MASK != NO_MASK:
        offset = b * mask_batch + head * mask_head
        if rows is not None:
            offset += tl.load(rows + b * n_rows + r, mask=real, other=0) * mask_row
    start = tl.program_id(2) * part
    stop = tl.minimum(start + part, n_keys)
    keys = k + b * k_batch + kv * k_head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        here = keys + n.to(tl.int64)[None, :] * k_key + d[:, None] * k_width
        k_tile = tl.load(here, mask=(n < stop)[None, :] & (d < WIDTH)[:, None], other=0)
        s = capped(product(q_tile, k_tile) * scaling, softcap, CAP)
        s = masked(s, mask, offset, mask_key, limit, n, real[:, None] & (n < stop)[None, :], MASK)
        new, safe = grown(top, s)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(s - safe[:, None]), 1)
        top = new
    n_batch = tl.num_programs(1) // kv_heads
    out = ((tl.program_id(2) * n_batch + b) * n_heads + head) * n_rows + r
    tl.store(lse + out, log_sum(top, total), mask=real)


# fmt: off
@triton.jit(do_not_specialize=["n_rows", "n_cells", "stride_part"])
def coarse_scores(
    q, k, mask, rows, last, cells, sinks, parts, lse, scores,
    q_batch, q_head, q_row, q_width,
    k_batch, k_head, k_key, k_width,
    mask_batch, mask_head, mask_row, mask_key,
    cells_batch, cells_cell,
    n_heads, n_rows, n_cells, stride_part, scaling, softcap,
    GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr,
    CAP: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):
# fmt: on
    """`scores[b, r, cell]`, summed over all heads; also joins the parts' log-sum-exps into `lse[b, h, r]`."""
    BLOCK_M: tl.constexpr = BLOCK_R * GROUPS_PADDED
    b = tl.program_id(2).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + m // GROUPS_PADDED
    g = (m % GROUPS_PADDED).to(tl.int64)
    real = (r < n_rows) & (g < GROUPS)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.load(cells + b * cells_batch + c * cells_cell, mask=c < n_cells, other=0).to(tl.int64)
    limit = r
    if MASK == CAUSAL:
        limit = tl.load(last + b * n_rows + r, mask=real, other=-1).to(tl.int32)
    elif MASK != NO_MASK and rows is not None:
        shift = tl.load(rows + b * n_rows + r, mask=real, other=0) * mask_row
    keys = k + b * k_batch + n * k_key
    out = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for kv in range(0, n_heads // GROUPS):
        head = kv * GROUPS + g
        s = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for first in tl.static_range(0, BLOCK_D, BLOCK_K):
            d = first + tl.arange(0, BLOCK_K)
            here = q + b * q_batch + head[:, None] * q_head + r[:, None] * q_row + d[None, :] * q_width
            q_tile = tl.load(here, mask=real[:, None] & (d < WIDTH)[None, :], other=0)
            here = keys[None, :] + d[:, None] * k_width
            k_tile = tl.load(here, mask=(c < n_cells)[None, :] & (d < WIDTH)[:, None], other=0)
            s += product(q_tile, k_tile)
        s = capped(s * scaling, softcap, CAP)
        keys += k_head
        offset = head
        if MASK != NO_MASK and MASK != CAUSAL:
            offset = b * mask_batch + head * mask_head
            if rows is not None:
                offset += shift
        s = masked(s, mask, offset, mask_key, limit, n, real[:, None] & (c < n_cells)[None, :], MASK)
        place = (b * n_heads + head) * n_rows + r
        whole = tl.load(parts + place, mask=real, other=float("-inf"))
        for p in tl.static_range(1, PARTS):
            more = tl.load(parts + p * stride_part + place, mask=real, other=float("-inf"))
            whole = log_add(whole, more)
        if PARTS > 1:
            tl.store(lse + place, whole, mask=real & (tl.program_id(0) == 0))
        whole = tl.where(whole == float("-inf"), 0.0, whole)
        if sinks is not None:
            whole = log_add(whole, tl.load(sinks + head, mask=real, other=0.0).to(tl.float32))
        p_tile = tl.exp(s - whole[:, None])
        out += tl.sum(tl.reshape(p_tile, [BLOCK_R, GROUPS_PADDED, BLOCK_C]), 1)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = scores + (b * n_rows + row[:, None]) * n_cells + c[None, :]
    tl.store(at, out, mask=(row < n_rows)[:, None] & (c < n_cells)[None, :])


def readout(
    query: Tensor,
    key: Tensor,
    mask: RowMask | None,
    cells: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp `[B, Hq, R]` and probabilities at `cells` `[B, R, M]`, as `row_attention` without a value.

    Args:
        query: `[B, Hq, R, D]`, any strides.
        key: `[B, Hkv, N, D]`, any strides.
        mask: None, `CausalRows`, `GatheredRows` or `SharedMask`.
        cells: `[B, M]`, or None if only the log-sum-exp is wanted.
        scaling: Factor on the logits.
        softcap: See `row_attention`.
        sinks: `[Hq]`, counted in the probabilities only.
    """
    batch, heads, n_rows, width = query.shape
    kv_heads, n_keys = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    block_d = max(16, triton.next_power_of_2(width))
    shared = dict(
        q=query,
        k=key,
        q_batch=query.stride(0),
        q_head=query.stride(1),
        q_row=query.stride(2),
        q_width=query.stride(3),
        k_batch=key.stride(0),
        k_head=key.stride(1),
        k_key=key.stride(2),
        k_width=key.stride(3),
        n_heads=heads,
        n_rows=n_rows,
        scaling=float(scaling),
        softcap=float(softcap or 0),
        GROUPS=groups,
        WIDTH=width,
        CAP=softcap is not None,
        BLOCK_D=block_d,
        **_mask_arguments(mask, batch, heads),
    )
    blocks = key_blocks(groups * n_rows, block_d, key.element_size())
    tiles = triton.cdiv(groups * n_rows, blocks["BLOCK_M"])
    n_parts = splits(tiles * batch * kv_heads, triton.cdiv(n_keys, blocks["BLOCK_N"]), query.device)
    part = triton.cdiv(triton.cdiv(n_keys, n_parts), blocks["BLOCK_N"]) * blocks["BLOCK_N"]
    parts = query.new_empty(n_parts, batch, heads, n_rows, dtype=torch.float32)
    grid = (tiles, batch * kv_heads, n_parts)
    launch(row_log_sum_exp, grid, lse=parts, n_keys=n_keys, part=part, **shared, **blocks)
    if cells is None or not cells.shape[1]:
        none = None if cells is None else parts.new_empty(batch, n_rows, 0)
        return parts[0] if n_parts == 1 else torch.logsumexp(parts, dim=0), none
    lse = parts[0] if n_parts == 1 else torch.empty_like(parts[0])
    scores = parts.new_empty(batch, n_rows, cells.shape[1])
    blocks = cell_blocks(groups, n_rows, block_d, key.element_size())
    launch(
        coarse_scores,
        (triton.cdiv(cells.shape[1], blocks["BLOCK_C"]), triton.cdiv(n_rows, blocks["BLOCK_R"]), batch),
        cells=cells,
        sinks=sinks,
        parts=parts,
        lse=lse,
        scores=scores,
        cells_batch=cells.stride(0),
        cells_cell=cells.stride(1),
        n_cells=cells.shape[1],
        stride_part=parts.stride(0),
        PARTS=n_parts,
        **shared,
        **blocks,
    )
    return lse, scores


def _mask_arguments(mask: RowMask | None, batch: int, heads: int) -> dict[str, Any]:
    """What the kernels need to know of a mask: kind, memory, and where each row's part of it begins."""
    none = dict.fromkeys(("mask_batch", "mask_head", "mask_row", "mask_key"), 0)
    if mask is None:
        return dict(mask=None, rows=None, last=None, MASK=NO_MASK.value, **none)
    if isinstance(mask, CausalRows):
        return dict(mask=None, rows=None, last=mask.last.contiguous(), MASK=CAUSAL.value, **none)
    assert isinstance(mask, (GatheredRows, SharedMask))
    values = mask.mask.expand(batch, heads, -1, -1)
    boolean = values.dtype == torch.bool
    at = values.stride()
    return dict(
        mask=values.view(torch.uint8) if boolean else values,
        rows=mask.rows.contiguous() if isinstance(mask, GatheredRows) else None,
        last=None,
        MASK=BOOLEAN.value if boolean else ADDITIVE.value,
        mask_batch=at[0],
        mask_head=at[1],
        mask_row=at[2],
        mask_key=at[3],
    )


def key_blocks(rows: int, width: int, item: int) -> dict[str, int]:
    """Tile sizes of `row_log_sum_exp`: as many rows as there are, keys by what fits beside them."""
    block_m = min(64 if item == 2 else 16, max(16, triton.next_power_of_2(rows)))
    block_n = max(16, min(128, (32768 if item == 2 else 16384) // (width * item)))
    warps = 8 if block_m * width * item >= 16384 else 4
    stages = 3 if item == 2 and block_m < 64 else 2
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages)


def cell_blocks(groups: int, n_rows: int, width: int, item: int) -> dict[str, int]:
    """Tile sizes of `coarse_scores`: few cells a program, for the loop over heads leaves no other parallelism."""
    padded = triton.next_power_of_2(groups)
    rows = min(max(16, triton.next_power_of_2(n_rows * padded)), 32 if item == 2 else 16)
    block_c = max(16, min(32, 8192 // (width * item)))
    return dict(
        GROUPS_PADDED=padded,
        BLOCK_R=max(1, rows // padded),
        BLOCK_C=block_c,
        BLOCK_K=width if item == 2 else min(width, 64),
        num_warps=8 if width * item >= 512 else 4,
        num_stages=3 if item == 2 else 2,
    )
