"""Region attention: rows attend to the pages of the regions they selected, merged with their plain output.

The block table is the selection: a page is read where it lies. The softmax runs over the fine keys alone and is
merged with the plain row by log-sum-exp, so the ordinary keys aren't touched again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..row_attention import RegionRows, RowMask
from .region_backward import RegionAttention
from .region_forward import Pages, attend


def region_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plain: Tensor,
    lse: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    selected: Tensor | None = None,
    valid: Tensor | None = None,
    table: Tensor | None = None,
    alpha: float | Tensor = 1.0,
) -> Tensor:
    """Rows attend to selected regions' pages, in one softmax with the ordinary keys whose output is `plain`.

    Args:
        query: `[B, Hq, R, D]`, any strides.
        key: `[B, U, P, Hkv, D]`, or the pool `[pages, P, Hkv, D]` that `table` points into; any strides.
        value: `[B, U, P, Hkv, Dv]` or `[pages, P, Hkv, Dv]`.
        plain: `[B, R, Hq, Dv]` output over the ordinary keys.
        lse: `[B, Hq, R]` log-sum-exp over the ordinary keys, sinks included.
        scaling: Factor on the logits.
        softcap: See `row_attention`.
        selected: `[B, R, U]` bool, which row selected which region; None: all rows all of them.
        valid: `[B, U, P]` bool, which of a page's tokens are real; None: all.
        table: `[B, U]` page of each region, or None if `key` has them in order.
        alpha: Weight of the joint output against the plain one.

    Returns:
        `[B, R, Hq, Dv]` in the query's dtype; `plain` to the bit for a row that sees no fine token.
    """
    leaves = (query, key, value, plain, lse)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    own = plain.float() if learns or isinstance(alpha, Tensor) else plain
    batch, heads, n_rows, _ = query.shape
    shape = batch, n_rows, heads, value.shape[-1]
    if learns:
        # `plain` counts twice where alpha blends: its gradient, too, is to be rounded once
        joint = RegionAttention.apply(query, key, value, own, lse, selected, valid, table, scaling, softcap)
    else:
        share = 1.0 if isinstance(alpha, Tensor) else alpha
        joint = query.new_empty(shape, dtype=torch.float32 if isinstance(alpha, Tensor) else query.dtype)
        pages = Pages(key, value, selected, valid, table)
        attend(query, pages, own, lse, scaling, softcap, share, joint, None)
        if not isinstance(alpha, Tensor):
            return joint
    if isinstance(alpha, Tensor) or alpha != 1.0:
        joint = own + alpha * (joint - own)
    return joint.to(query.dtype)


def read_regions(
    query: Tensor,
    fine_key: Tensor,
    fine_value: Tensor,
    fine_mask: RowMask | None,
    plain: Tensor,
    lse: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    alpha: float | Tensor,
) -> Tensor:
    """`region_attention` from the arguments of `hierarchical_attention`: keys `[B, Hkv, N, D]` as N = U * P tokens."""
    assert fine_mask is None or isinstance(fine_mask, RegionRows)
    shape = (1, fine_key.shape[2]) if fine_mask is None else fine_mask.valid.shape[1:]
    key, value = (t.unflatten(2, shape).permute(0, 2, 3, 1, 4) for t in (fine_key, fine_value))
    return region_attention(
        query,
        key,
        value,
        plain,
        lse,
        scaling=scaling,
        softcap=softcap,
        selected=None if fine_mask is None else fine_mask.selected,
        valid=None if fine_mask is None else fine_mask.valid,
        alpha=alpha,
    )
