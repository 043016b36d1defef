"""The finer levels of a pyramid inside a forward pass: opened by what a layer's readout rows attended to."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..pyramid import child_grid, open_children, share_budget
from ..row_attention import RowMask, row_attention
from ..selection import Selector

if TYPE_CHECKING:
    from .state import SampleState

Attention = dict[
    int, tuple[Tensor, Tensor]
]  # by stream: probabilities [R, n, P] of the tokens read, and [n] regions


def attention_by_level(
    sample: SampleState,
    regions: Tensor,
    query: Tensor,
    key: Tensor,
    mask: RowMask | None,
    scaling: float,
    softcap: float | None,
) -> Attention:
    """How much the readout rows attend to the fine tokens that they read in this layer.

    Args:
        sample: Whose media they are.
        regions: `[n]` the regions read, on the CPU.
        query: `[1, Hq, R, D]`.
        key: `[1, Hkv, n * page, D]`, the regions' fine keys.
        mask: What each row sees of them.
        scaling: Factor on the logits.
        softcap: As the model has it.
    """
    cells = torch.arange(key.shape[2], device=key.device)[None]
    with torch.no_grad():
        _, _, scores = row_attention(query, key, None, mask, scaling=scaling, softcap=softcap, cells=cells)
    assert scores is not None
    by_region = scores[0].unflatten(1, (len(regions), -1))
    return {
        m: (by_region[:, where.to(scores.device), : sample.streams[m].grid.region_tokens], local)
        for m, where, local in sample.by_medium(regions)
    }


def open_levels(
    sample: SampleState,
    medium: int,
    selector: Selector,
    scores: Tensor,
    chosen: Tensor,
    attention: Attention,
    keys: Tensor,
) -> dict[int, Tensor]:
    """What a medium's readout rows read next, level by level.

    Args:
        sample: Whose medium it is.
        medium: Its index; it has finer levels.
        selector: What chose and chooses.
        scores: `[R, n_coarse]` attention on the coarse cells.
        chosen: `[R, n_regions]` what was chosen of the first level.
        attention: What `attention_by_level` found; empty in the first layer that selects.
        keys: `[R, 2]`, see `Selector.choose`.

    Returns:
        `[R, n_regions]` bool by index into `sample.streams`, within one budget.
    """
    chain = sample.chains[medium]
    first = sample.streams[medium].grid
    masks, pooled = [chosen], [first.pool(Selector.margins(scores.float(), first))]
    for m, finer in pairwise(chain):
        grid = child_grid(sample.streams[m].grid, sample.streams[finer].grid)
        if m in attention:
            weights, local = attention[m]
            tokens = sample.streams[m].grid.tokens(local)
            mask, score = open_children(selector, weights, tokens, grid, sample.selectable(finer), keys)
        else:
            score = scores.new_zeros(len(scores), grid.n_regions)
            mask = score > 0
        masks.append(mask)
        pooled.append(score)
    return dict(zip(chain, share_budget(masks, pooled), strict=True))
