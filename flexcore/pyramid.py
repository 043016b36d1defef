"""Pyramids: a medium at more than two resolutions, each level opened by what was read of the level before.

Ours, and not the paper's. At zoom 27 one coarse cell covers 729 fine tokens, and its attention says little about which
of them matter. With a level between, a row reads regions of it first, and the attention that these tokens then get
says which regions of the next level, their children, to open for the layer after. All levels share one budget: what
the selector spends on the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .grid import Grid
from .selection import Selector


def child_grid(parent: Grid, child: Grid) -> Grid:
    """The lattice on which a level's fine tokens, as cells, meet the regions of the next level."""
    return Grid(parent.fine, child.fine, child.edges, child.padding)


def open_children(
    selector: Selector, attention: Tensor, tokens: Tensor, grid: Grid, selectable: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose regions of a level by the attention that the tokens read of the level before have got.

    Only children can be chosen: regions that a token touches which the row has read.

    Args:
        selector: What chooses, as for the first level.
        attention: `[R, n, P]` float32 head-summed probabilities of the tokens read, 0 where a row doesn't see one.
        tokens: `[n, P]` flat indices of these tokens in their own level, -1 for padding.
        grid: See `child_grid`.
        selectable: `[n_regions]` bool.
        keys: `[R, 2]`, see `Selector.choose`.

    Returns:
        `[R, n_regions]` bool, what is chosen, and `[R, n_regions]`, the score of each region.
    """
    scores = attention.new_zeros(len(attention), grid.n_coarse)
    real = (tokens >= 0).to(scores.device)
    scores[:, tokens.to(scores.device)[real]] = attention[:, real]
    pooled = grid.pool(scores)
    eligible = selectable.to(scores.device) & (pooled > 0)
    return selector.select(scores, grid, eligible, keys), pooled


def share_budget(chosen: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
    """Let the levels share what the selector spent on the first.

    Of `b` regions, every further level that has any gets an equal share and keeps its best; the first keeps its best
    of what is left. Ties go to the lower index.

    Args:
        chosen: `[R, n_regions]` bool per level, the first level's first.
        scores: `[R, n_regions]` per level.

    Returns:
        The same masks, `b` regions in all per row at most.
    """
    counts = [mask.sum(dim=1, keepdim=True) for mask in chosen]
    levels = torch.cat(counts, dim=1).gt(0).sum(dim=1, keepdim=True)
    share = counts[0] // levels.clamp(min=1)
    kept = [_best(mask, score, share) for mask, score in zip(chosen[1:], scores[1:], strict=True)]
    spent = sum((mask.sum(dim=1, keepdim=True) for mask in kept), torch.zeros_like(share))
    return [_best(chosen[0], scores[0], counts[0] - spent), *kept]


def _best(chosen: Tensor, scores: Tensor, most: Tensor) -> Tensor:
    """The `most` `[R, 1]` highest-scoring regions among those chosen."""
    order = scores.masked_fill(~chosen, -1.0).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return chosen & (rank < most)
