"""Rotary positions of fine tokens: a true rotation at some position, or the official blend of tables."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .grid import Grid


def fine_positions(coarse: Tensor, grid: Grid, tokens: Tensor, mode: str) -> Tensor:
    """Positions of fine tokens from those of their medium's coarse tokens.

    Args:
        coarse: `[..., n_coarse]` positions that the model gave the coarse tokens; leading axes for multi-axis rotary.
        grid: The medium's lattice.
        tokens: `[n, P]` flat fine indices, all >= 0.
        mode: `parent` takes the coarse cell's position as it is, `fractional` interpolates linearly between cells.

    Returns:
        `[..., n, P]`: integers for `parent`, float32 for `fractional`.

    Raises:
        ValueError: Unknown mode.
    """
    if mode == "parent":
        return coarse[..., grid.parents(tokens)]
    if mode != "fractional":
        raise ValueError(f"mode must be 'parent' or 'fractional', got {mode!r}")
    at = grid.coordinates(tokens)
    weight = torch.ones(tokens.shape)
    corners = [(torch.zeros_like(tokens), weight)]
    for axis, size in enumerate(grid.coarse):
        x = at[..., axis].clamp(0, size - 1)
        low = x.floor().long()
        high = (low + 1).clamp(max=size - 1)
        share = x - low
        corners = [
            (index * size + cell, w * part)
            for index, w in corners
            for cell, part in ((low, 1 - share), (high, share))
        ]
    return torch.stack([coarse[..., index].float() * w for index, w in corners]).sum(dim=0)


def official_tables(cos: Tensor, sin: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The official code's rotary tables for fine tokens: the coarse tables, resized bicubically (semantics section 4).

    The result is no rotation (its norm varies), which is why this is offered for parity only.

    Args:
        cos: `[n_coarse, D]` table of the coarse tokens, float32.
        sin: The same for the sine.
        grid: A two-axis lattice.

    Returns:
        Two `[n_fine, D]` tables.

    Raises:
        ValueError: The grid isn't two-dimensional.
    """
    if len(grid.coarse) != 2:
        raise ValueError(f"official tables need a grid of two axes, got {len(grid.coarse)}")

    def resize(table: Tensor) -> Tensor:
        image = table.t().reshape(1, -1, *grid.coarse)
        return F.interpolate(image, size=grid.fine, mode="bicubic", align_corners=False)[0].flatten(1).t()

    return resize(cos), resize(sin)
