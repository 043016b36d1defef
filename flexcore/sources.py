"""FineSource: where fine features come from, asked for region by region.

Asking by region is what lets cost follow what is looked at: a source may hold everything in a tensor, or encode a
piece of the medium the first time one of its regions is chosen. Both give the same numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .grid import Grid


class FineSource(ABC):
    """The features of one medium's fine tokens, by region.

    Subclasses set `grid`, `width`, `dtype` and `device`, and implement `features`.
    """

    grid: Grid
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def lengths(self) -> Tensor:
        """Fine tokens per region, `[n_regions]`; the rest of a region's rows are zero padding."""
        return self.grid.region_lengths

    @abstractmethod
    def features(self, regions: Tensor) -> Tensor:
        """Features of the given regions.

        Args:
            regions: `[n]` flat region indices, in any order.

        Returns:
            `[n, P, C]` with P the largest region's tokens, zero where a region is smaller.

        Raises:
            ValueError: A region is outside the grid.
        """

    def readable(self, regions: Tensor) -> Tensor:
        """`[n]` bool: False for regions that turned out to be unreadable and must not be attended to."""
        return torch.ones(len(regions), dtype=torch.bool)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FineSource:
        """The same source with its features elsewhere; sources that hold no tensor return themselves."""
        return self


class TensorSource(FineSource):
    """All fine features in one tensor.

    Args:
        features: `[n_fine, C]` in raster order; may require grad.
        grid: The lattice they lie on.

    Raises:
        ValueError: The tensor doesn't hold one row per fine token.
    """

    def __init__(self, features: Tensor, grid: Grid):
        if features.ndim != 2 or features.shape[0] != grid.n_fine:
            raise ValueError(
                f"features must be [n_fine={grid.n_fine}, C] for a fine grid of {grid.fine}, "
                f"got {list(features.shape)}"
            )
        if not features.is_floating_point():
            raise ValueError(f"features must be floating point, got {features.dtype}")
        self.tensor = features
        self.grid = grid
        self.width = features.shape[1]
        self.dtype = features.dtype
        self.device = features.device

    def features(self, regions: Tensor) -> Tensor:
        tokens = self.grid.tokens(regions).to(self.tensor.device)
        if self.grid.even:
            return self.tensor.index_select(0, tokens.flatten()).view(*tokens.shape, self.width)
        out = self.tensor[tokens.clamp(min=0)]
        return out.masked_fill((tokens < 0)[..., None], 0)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TensorSource:
        moved = self.tensor.to(device=self.device if device is None else device, dtype=dtype or self.dtype)
        return self if moved is self.tensor else TensorSource(moved, self.grid)


class OnDemandSource(FineSource):
    """Features encoded the first time their region is asked for, then kept.

    Args:
        encode: Called with `[n]` region indices it hasn't been given before; returns `[n, P, C]`. What it leaves
            in the rows past a region's end is zeroed here: `0 * NaN` would still reach the attention's output.
        grid: The lattice the regions belong to.
        width: C.
        dtype: Of what `encode` returns.
        device: Of what `encode` returns.

    `encoded` lists the regions in the order in which they were encoded.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        grid: Grid,
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.encode = encode
        self.grid = grid
        self.width = width
        self.dtype = dtype
        self.device = torch.device(device)
        self.encoded: list[int] = []
        self._held: dict[int, Tensor] = {}

    def features(self, regions: Tensor) -> Tensor:
        wanted = self.grid.check_regions(regions).tolist()
        missing = sorted({r for r in wanted if r not in self._held})
        if missing:
            fresh = self.encode(torch.tensor(missing))
            expected = (len(missing), self.grid.region_tokens, self.width)
            if tuple(fresh.shape) != expected:
                raise ValueError(
                    f"encode must return {expected} for {len(missing)} regions, got {tuple(fresh.shape)}"
                )
            ends = self.lengths[missing].to(fresh.device)
            past = torch.arange(fresh.shape[1], device=fresh.device) >= ends[:, None]
            self._held.update(zip(missing, fresh.masked_fill(past[..., None], 0), strict=True))
            self.encoded += missing
        if not wanted:
            return torch.zeros(0, self.grid.region_tokens, self.width, dtype=self.dtype, device=self.device)
        return torch.stack([self._held[r] for r in wanted])
