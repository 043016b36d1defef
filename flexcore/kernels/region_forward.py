# mypy: allow-untyped-defs, allow-incomplete-defs
"""Forward of region attention: rows over the pages they selected, merged with their plain output.

A tile of rows reads a token of a page if any of its rows may see it, and not at all otherwise, so pages may hold
anything (NaN too) where no row looks. Few rows leave most of a GPU idle, so the tokens are then split into parts with
an output and a log-sum-exp each, which a second launch joins.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, splits
from .tiles import capped, grown, log_add, log_sum, product, split_product


@triton.jit
def seen_tokens(selected, valid, table, b, r, real, t, stop, n_rows, n_regions, page):
    """Which rows see which of the tokens `t`, `[M, N]`, whether any does, `[N]`, and each token's page and place."""
    u = t // page
    place = t % page
    seen = real[:, None] & (t < stop)[None, :]
    if selected is not None:
        at = selected + b * n_rows * n_regions + (r[:, None] * n_regions + u[None, :])
        seen = seen & (tl.load(at, mask=seen, other=0) != 0)
    if valid is not None:
        at = valid + b * n_regions * page + t
        seen = seen & (tl.load(at, mask=t < stop, other=0) != 0)[None, :]
    any_row = tl.max(seen.to(tl.int32), 0) != 0
    where = u.to(tl.int64)
    if table is not None:
        where = tl.load(table + b * n_regions + u, mask=any_row, other=0).to(tl.int64)
    return seen, any_row, where, place


@triton.jit
def merged(fine, fine_lse, plain, plain_lse, alpha):
    """The joint softmax's output and log-sum-exp; `plain` to the bit where the row saw no fine key."""
    joint = log_add(plain_lse, fine_lse)
    empty = fine_lse == float("-inf")
    own = tl.where(empty, 1.0, tl.exp(plain_lse - joint))
    share = tl.where(empty, 0.0, tl.exp(fine_lse - joint))
    out = plain * own[:, None] + fine * share[:, None]
    if alpha != 1.0:
        out = plain + alpha * (out - plain)
    return out, joint


# fmt: off
@triton.jit(do_not_specialize=["n_rows", "n_regions", "part"])
def region_rows(
    q, k, v, selected, valid, table, plain, plain_lse, out, lse,
    q_batch, q_head, q_row, q_width,
    k_batch, k_page, k_token, k_head, k_width,
    v_batch, v_page, v_token, v_head, v_width,
    plain_batch, plain_row, plain_head, plain_width,
    lse_batch, lse_head, lse_row,
    n_heads, n_rows, n_regions, page, part, scaling, softcap, alpha,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, VALUE: tl.constexpr, CAP: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):
# fmt: on
    """One row tile, kv head and part of the tokens.

    With one part, writes the merged `out[b, r, h]` and (if asked for) the joint `lse[b, r, h]`; with several, the
    part's own output and log-sum-exp, `out[part, b, r, h]` and `lse[part, b, r, h]`.
    """
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
    keys = k + b * k_batch + kv * k_head
    values = v + b * v_batch + kv * v_head
    start = tl.program_id(2) * part
    stop = tl.minimum(start + part, n_regions * page)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for first in range(start, stop, BLOCK_N):
        t = first + tl.arange(0, BLOCK_N)
        seen, any_row, where, place = seen_tokens(
            selected, valid, table, b, r, real, t, stop, n_rows, n_regions, page
        )
        here = keys + (where * k_page + place * k_token)[None, :] + d[:, None] * k_width
        k_tile = tl.load(here, mask=any_row[None, :] & (d < WIDTH)[:, None], other=0)
        s = capped(product(q_tile, k_tile) * scaling, softcap, CAP)
        s = tl.where(seen, s, float("-inf"))
        new, safe = grown(top, s)
        p = tl.exp(s - safe[:, None])
        shrink = tl.exp(top - safe)
        here = values + (where * v_page + place * v_token)[:, None] + e[None, :] * v_width
        v_tile = tl.load(here, mask=any_row[:, None] & (e < VALUE)[None, :], other=0)
        sums = sums * shrink[:, None] + split_product(p, v_tile)
        total = total * shrink + tl.sum(p, 1)
        top = new
    fine = sums / tl.where(total > 0, total, 1.0)[:, None]
    fine_lse = log_sum(top, total)
    inside = real[:, None] & (e < VALUE)[None, :]
    to = (b * n_rows + r) * n_heads + head
    if PARTS == 1:
        at = plain + b * plain_batch + r[:, None] * plain_row + head[:, None] * plain_head
        own = tl.load(at + e[None, :] * plain_width, mask=inside, other=0).to(tl.float32)
        at = plain_lse + b * lse_batch + head * lse_head + r * lse_row
        own_lse = tl.load(at, mask=real, other=0).to(tl.float32)
        fine, fine_lse = merged(fine, fine_lse, own, own_lse, alpha)
    else:
        to += tl.program_id(2).to(tl.int64) * (tl.num_programs(1) // kv_heads) * n_rows * n_heads
    tl.store(out + to[:, None] * VALUE + e[None, :], fine.to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        tl.store(lse + to, fine_lse, mask=real)


# fmt: off
@triton.jit(do_not_specialize=["n_rows"])
def join_parts(
    parts, parts_lse, plain, plain_lse, out, lse,
    plain_batch, plain_row, plain_head, plain_width,
    lse_batch, lse_head, lse_row,
    n_heads, n_rows, n_batch, alpha,
    VALUE: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):
# fmt: on
    """Joins the parts of a row and merges them with its plain output."""
    at_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_batch * n_rows * n_heads
    real = at_row < n
    head = at_row % n_heads
    r = at_row // n_heads % n_rows
    b = (at_row // n_heads // n_rows).to(tl.int64)
    e = tl.arange(0, BLOCK_V)
    inside = real[:, None] & (e < VALUE)[None, :]
    whole = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for p in tl.static_range(0, PARTS):
        whole = log_add(whole, tl.load(parts_lse + p * n + at_row, mask=real, other=float("-inf")))
    safe = tl.where(whole == float("-inf"), 0.0, whole)
    fine = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for p in tl.static_range(0, PARTS):
        share = tl.exp(tl.load(parts_lse + p * n + at_row, mask=real, other=float("-inf")) - safe)
        here = parts + (p * n + at_row).to(tl.int64)[:, None] * VALUE + e[None, :]
        fine += tl.load(here, mask=inside, other=0) * share[:, None]
    at = plain + b[:, None] * plain_batch + r[:, None] * plain_row + head[:, None] * plain_head
    own = tl.load(at + e[None, :] * plain_width, mask=inside, other=0).to(tl.float32)
    at = plain_lse + b * lse_batch + head * lse_head + r * lse_row
    own_lse = tl.load(at, mask=real, other=0).to(tl.float32)
    fine, whole = merged(fine, whole, own, own_lse, alpha)
    at = out + at_row.to(tl.int64)[:, None] * VALUE + e[None, :]
    tl.store(at, fine.to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        tl.store(lse + at_row, whole, mask=real)


class Pages:
    """Keys and values of selected regions, where they lie.

    Args:
        key: `[B, U, P, Hkv, D]`, or the pool `[pages, P, Hkv, D]` that `table` points into.
        value: `[B, U, P, Hkv, Dv]` or `[pages, P, Hkv, Dv]`.
        selected: `[B, R, U]` bool, which row selected which region; None: all rows all of them.
        valid: `[B, U, P]` bool, which of a page's tokens are real; None: all.
        table: `[B, U]` page of each region, or None if `key` has them in order.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        selected: Tensor | None,
        valid: Tensor | None,
        table: Tensor | None,
    ):
        self.key, self.value = key, value
        self.selected = None if selected is None else selected.contiguous().view(torch.uint8)
        self.valid = None if valid is None else valid.contiguous().view(torch.uint8)
        self.table = None if table is None else table.contiguous()
        self.regions = key.shape[1] if table is None else table.shape[1]
        self.page, self.kv_heads, self.width = key.shape[-3:]

    @property
    def tokens(self) -> int:
        """Tokens of all regions of a sample, padding included."""
        return self.regions * self.page

    def arguments(self) -> dict[str, Any]:
        """What every kernel that reads pages is handed."""
        out: dict[str, Any] = dict(selected=self.selected, valid=self.valid, table=self.table)
        for name, tensor in (("k", self.key), ("v", self.value)):
            batch = tensor.stride(0) if self.table is None else 0
            page, token, head, width = tensor.stride()[-4:]
            out[name] = tensor
            out |= {
                f"{name}_batch": batch,
                f"{name}_page": page,
                f"{name}_token": token,
                f"{name}_head": head,
                f"{name}_width": width,
            }
        return out | dict(
            n_regions=self.regions,
            page=self.page,
            WIDTH=self.width,
            VALUE=self.value.shape[-1],
            BLOCK_D=max(16, triton.next_power_of_2(self.width)),
            BLOCK_V=max(16, triton.next_power_of_2(self.value.shape[-1])),
        )


def attend(
    query: Tensor,
    pages: Pages,
    plain: Tensor,
    lse: Tensor,
    scaling: float,
    softcap: float | None,
    alpha: float,
    out: Tensor,
    joint: Tensor | None,
) -> None:
    """Fill `out` `[B, R, Hq, Dv]` and, if given, `joint` `[B, R, Hq]`; arguments as in `region_attention`."""
    batch, heads, n_rows, _ = query.shape
    groups = heads // pages.kv_heads
    given = pages.arguments()
    blocks = row_blocks(groups * n_rows, max(given["BLOCK_D"], given["BLOCK_V"]), pages.key.element_size())
    tiles = triton.cdiv(groups * n_rows, blocks["BLOCK_M"])
    n_parts = splits(
        tiles * batch * pages.kv_heads, triton.cdiv(pages.tokens, blocks["BLOCK_N"]), query.device
    )
    part = triton.cdiv(triton.cdiv(pages.tokens, n_parts), blocks["BLOCK_N"]) * blocks["BLOCK_N"]
    beside = dict(
        plain=plain,
        plain_lse=lse,
        plain_batch=plain.stride(0),
        plain_row=plain.stride(1),
        plain_head=plain.stride(2),
        plain_width=plain.stride(3),
        lse_batch=lse.stride(0),
        lse_head=lse.stride(1),
        lse_row=lse.stride(2),
        n_heads=heads,
        n_rows=n_rows,
        alpha=float(alpha),
        PARTS=n_parts,
    )
    rows, rows_lse = out, joint
    if n_parts > 1:
        rows = out.new_empty(n_parts, batch, n_rows, heads, out.shape[3], dtype=torch.float32)
        rows_lse = rows.new_empty(n_parts, batch, n_rows, heads)
    launch(
        region_rows,
        (tiles, batch * pages.kv_heads, n_parts),
        q=query,
        q_batch=query.stride(0),
        q_head=query.stride(1),
        q_row=query.stride(2),
        q_width=query.stride(3),
        out=rows,
        lse=rows_lse,
        part=part,
        scaling=float(scaling),
        softcap=float(softcap or 0),
        GROUPS=groups,
        CAP=softcap is not None,
        **beside,
        **given,
        **blocks,
    )
    if n_parts > 1:
        block_m = 16 if given["BLOCK_V"] <= 64 else 8
        launch(
            join_parts,
            (triton.cdiv(batch * n_rows * heads, block_m),),
            parts=rows,
            parts_lse=rows_lse,
            out=out,
            lse=joint,
            n_batch=batch,
            VALUE=given["VALUE"],
            BLOCK_M=block_m,
            BLOCK_V=given["BLOCK_V"],
            num_warps=4,
            num_stages=1,
            **beside,
        )


def row_blocks(rows: int, width: int, item: int) -> dict[str, int]:
    """Tile sizes of `region_rows` for so many rows and a head so wide."""
    block_m = min(32 if item == 2 else 16, max(16, triton.next_power_of_2(rows)))
    block_n = max(16, min(64, 8192 // (width * item)))
    warps = 8 if block_m * width * item >= 8192 else 4
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=2)
