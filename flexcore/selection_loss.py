"""A training loss that teaches a layer's coarse attention to choose what the next layer will read.

This is ours and not the paper's. Selection is a hard choice, so no gradient tells a layer that it looked in the wrong
place. Where the next layer did read is known, though: its attention over the fine tokens it was given. The loss is the
cross-entropy between the two, over the regions that were visible:

    loss = - sum_r a_r * log(s_r / sum_visible s)

with `a_r` the share of the reading row's attention that went to region r (mean over heads, detached), and `s_r` the
selecting layer's score of that region, the largest head-summed probability among the cells it touches. Regions that
weren't visible say nothing either way, and a row that found nothing worth reading weighs little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .row_attention import RowMask

_FLOOR = 1e-9


def cell_scores(
    query: Tensor,
    key: Tensor,
    cells: Tensor,
    scores: Tensor,
    lse: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """The head-summed probabilities that `row_attention` gave out detached, once more and differentiable.

    Args:
        query: `[B, Hq, R, D]` rotated queries of the rows.
        key: `[B, Hkv, S, D]`.
        cells: `[B, M]` key indices.
        scores: `[B, R, M]`, what `row_attention` made of them; zero where a row doesn't see a cell.
        lse: `[B, Hq, R]` log-sum-exp of the rows, sinks included.
        scaling: Factor on the logits.
        softcap: See `row_attention`.

    Returns:
        `[B, R, M]` float32.
    """
    exact = lse.dtype
    index = cells[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    keys = key.gather(2, index).to(exact).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = torch.matmul(query.to(exact), keys.transpose(2, 3)) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # a hidden cell's logit may be anything: exp of it must not even be computed, for inf * 0 is NaN in the gradient
    hidden = (scores <= 0)[:, None]
    return (logits - lse[..., None]).masked_fill(hidden, float("-inf")).exp().sum(dim=1)


@torch.no_grad()
def region_attention(
    query: Tensor,
    fine_key: Tensor,
    fine_mask: RowMask | None,
    lse: Tensor,
    regions: int,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """The share of a reading row's attention that went to each region, mean over heads.

    Args:
        query: `[1, Hq, R, D]` rotated queries of one sample's rows.
        fine_key: `[1, Hkv, regions * P, D]`.
        fine_mask: What each row sees of the fine keys; None sees all.
        lse: `[1, Hq, R]` log-sum-exp over the ordinary keys, sinks included.
        regions: Regions that the fine keys belong to.
        scaling: Factor on the logits.
        softcap: See `row_attention`.

    Returns:
        `[R, regions]` float32.
    """
    exact = lse.dtype
    keys = fine_key.to(exact).repeat_interleave(query.shape[1] // fine_key.shape[1], dim=1)
    logits = torch.matmul(query.to(exact), keys.transpose(2, 3)) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if fine_mask is not None:
        logits = logits.masked_fill(~fine_mask.chunk(0, query.shape[2]), float("-inf"))
    joint = torch.logaddexp(lse, torch.logsumexp(logits, dim=-1))
    share = (logits - joint[..., None]).exp().mean(dim=1)[0]
    return share.unflatten(1, (regions, -1)).sum(dim=2)


def selection_loss(scores: Tensor, attention: Tensor, visible: Tensor) -> Tensor:
    """The loss of each row.

    Args:
        scores: `[R, n_regions]` the selecting layer's score of every region, differentiable.
        attention: `[R, n_regions]` share of the row's attention that each region got in the reading layer.
        visible: `[R, n_regions]` bool, what the row could read.

    Returns:
        `[R]`; zero for a row that read nothing.
    """
    seen = scores.masked_fill(~visible, 0.0)
    share = seen / seen.sum(dim=1, keepdim=True).clamp(min=_FLOOR)
    return -(attention.detach() * share.clamp(min=_FLOOR).log()).masked_fill(~visible, 0.0).sum(dim=1)
