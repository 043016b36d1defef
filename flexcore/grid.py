"""Grid: the lattice arithmetic between coarse cells, regions and fine tokens.

A medium is an n-d lattice seen at two resolutions. Coarse cells sit in the language model's sequence, fine tokens
wait outside it, and regions are axis-aligned blocks of fine tokens: the unit of selection, fetching and caching.
Flat indices are in raster order throughout (last axis fastest).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
OFFICIAL_LATTICE = 9  # the official code pools every coarse map to 9x9, whatever its size


def _kept(method: Callable[[Any], T]) -> cached_property[T]:
    """A cached property that holds ordinary tensors, whatever mode it is first asked for in.

    A tensor made under inference_mode would be refused by autograd in a later call.
    """
    return cached_property(torch.inference_mode(False)(method))


def _ints(name: str, value: Sequence[int], least: int = 1) -> tuple[int, ...]:
    try:
        out = tuple(operator.index(v) for v in value)
    except TypeError:
        raise ValueError(f"{name} must be a sequence of integers, got {value!r}") from None
    if not out or min(out) < least:
        raise ValueError(f"{name} must hold integers >= {least}, got {value!r}")
    return out


def _shares(padding: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    try:
        return tuple((float(before), float(after)) for before, after in padding)
    except (TypeError, ValueError):
        raise ValueError(f"padding must be a pair of shares per axis, got {padding!r}") from None


# Entries that a table may have; the tables of huge pictures would take more than they save.
_TABLE_TOKENS = 1 << 16


@dataclass(frozen=True)
class Grid:
    """One medium's coarse cells, fine tokens and regions.

    Args:
        coarse: Coarse cells per axis: `(H, W)` image, `(T, H, W)` video, `(T,)` or `(T, F)` audio.
        fine: Fine tokens per axis.
        edges: Region edges per axis, in fine tokens: rising from 0 to `fine[axis]`. Blocks may differ in size.
        padding: Share of each axis that is padding, before and after the content, in `[0, 1)`.
        lattice: Set by `Grid.official` only: regions per axis of a lattice that need not line up with the fine
            tokens. Its regions may be empty and its margins keep their fine tokens, as in the official code.

    Raises:
        ValueError: An axis is missing, a region is empty or outside the grid, or padding leaves no content.
    """

    coarse: tuple[int, ...]
    fine: tuple[int, ...]
    edges: tuple[tuple[int, ...], ...]
    padding: tuple[tuple[float, float], ...] = ()
    lattice: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "coarse", _ints("coarse", self.coarse))
        object.__setattr__(self, "fine", _ints("fine", self.fine))
        rising = tuple(_ints(f"edges[{axis}]", e, least=0) for axis, e in enumerate(self.edges))
        object.__setattr__(self, "edges", rising)
        object.__setattr__(self, "padding", _shares(self.padding or [(0.0, 0.0)] * len(self.coarse)))
        if not len(self.coarse) == len(self.fine) == len(self.edges) == len(self.padding):
            raise ValueError(
                "coarse, fine, edges and padding must have one entry per axis, got "
                f"{len(self.coarse)}, {len(self.fine)}, {len(self.edges)} and {len(self.padding)}"
            )
        for axis, (edges, size) in enumerate(zip(self.edges, self.fine, strict=True)):
            if len(edges) < 2 or edges[0] != 0 or edges[-1] != size:
                raise ValueError(
                    f"edges[{axis}] must run from 0 to fine[{axis}]={size} so that no region lies outside the "
                    f"grid, got {edges}"
                )
            steps = [b - a for a, b in pairwise(edges)]
            if min(steps) < (0 if self.lattice else 1):
                raise ValueError(f"edges[{axis}] must rise strictly (no empty region), got {edges}")
        for axis, (before, after) in enumerate(self.padding):
            if not (0 <= before < 1 and 0 <= after < 1 and before + after < 1):
                raise ValueError(
                    f"padding[{axis}] must be two shares >= 0 that leave some content, got {(before, after)}"
                )

    # ------------------------------------------------------------------ construction

    @classmethod
    def blocks(
        cls,
        coarse: Sequence[int],
        fine: Sequence[int],
        region: int | Sequence[int] = 8,
        tile: int | Sequence[int] | None = None,
        padding: Sequence[tuple[float, float]] = (),
    ) -> Grid:
        """Lay out regions as fixed blocks, restarting at every tile so that a tile is a whole number of regions.

        Args:
            coarse: Coarse cells per axis.
            fine: Fine tokens per axis.
            region: Block side in fine tokens, one for all axes or one per axis; the last block may be smaller.
            tile: Tile side in fine tokens (what the encoder sees at once), or None for one tile.
            padding: Share of padding before and after, per axis.

        >>> Grid.blocks((24, 24), (72, 72), region=8, tile=24).region_shape
        (9, 9)
        """
        fine = _ints("fine", fine)
        sides = _ints("region", [region] * len(fine) if isinstance(region, int) else region)
        tiles = fine if tile is None else _ints("tile", [tile] * len(fine) if isinstance(tile, int) else tile)
        if len(sides) != len(fine) or len(tiles) != len(fine):
            raise ValueError(f"region and tile must have one entry per axis of fine={fine}")
        edges = []
        for size, side, step in zip(fine, sides, tiles, strict=True):
            starts = [at for t in range(0, size, step) for at in range(t, min(t + step, size), side)]
            edges.append((*starts, size))
        return cls(_ints("coarse", coarse), fine, tuple(edges), _shares(padding))

    @classmethod
    def official(cls, coarse: int, fine: int, size: tuple[int, int] | None = None) -> Grid:
        """The official code's square grid: always 9x9 regions, margins of a centred square padding.

        Args:
            coarse: Coarse side g.
            fine: Fine side F.
            size: Original image `(width, height)` before padding to a square, or None for a square one.

        Semantics section 3, steps 2, 5 and 6. The region of fine row `a` is computed as torch's nearest upsampling
        does, in float32, because it differs from `floor(9 a / F)` for a handful of sizes.
        """
        (coarse,), (fine,) = _ints("coarse", [coarse]), _ints("fine", [fine])
        scale = torch.tensor(float(OFFICIAL_LATTICE)) / torch.tensor(float(fine))
        owner = (torch.arange(fine, dtype=torch.float32) * scale).floor().clamp(max=OFFICIAL_LATTICE - 1)
        edges = torch.searchsorted(owner, torch.arange(OFFICIAL_LATTICE + 1, dtype=torch.float32))
        padding = [(0.0, 0.0), (0.0, 0.0)]
        if size is not None:
            if len(_ints("size", size)) != 2:
                raise ValueError(f"size must be (width, height), got {size!r}")
            width, height = size
            share = (abs(width - height) // 2) / max(width, height)
            padding[0 if width > height else 1] = (share, share)
        axis = tuple(int(e) for e in edges)
        lattice = (OFFICIAL_LATTICE, OFFICIAL_LATTICE)
        return cls((coarse, coarse), (fine, fine), (axis, axis), tuple(padding), lattice)

    # ------------------------------------------------------------------ sizes

    @property
    def n_coarse(self) -> int:
        """Coarse cells in all."""
        return math.prod(self.coarse)

    @property
    def n_fine(self) -> int:
        """Fine tokens in all."""
        return math.prod(self.fine)

    @cached_property
    def region_shape(self) -> tuple[int, ...]:
        """Regions per axis."""
        return tuple(len(e) - 1 for e in self.edges)

    @cached_property
    def n_regions(self) -> int:
        """Regions in all."""
        return math.prod(self.region_shape)

    @_kept
    def _extents(self) -> tuple[Tensor, ...]:
        """Per axis `[regions, 2]`: first fine token of each region and its length."""
        out = []
        for edges in self.edges:
            e = torch.tensor(edges)
            out.append(torch.stack([e[:-1], e[1:] - e[:-1]], dim=1))
        return tuple(out)

    @_kept
    def everything(self) -> Tensor:
        """`[n_regions]` bool, all True. What is this very tensor leaves nothing out, and nobody need look."""
        return torch.ones(self.n_regions, dtype=torch.bool)

    @cached_property
    def even(self) -> bool:
        """Whether all regions are of one size, so that no page is padded."""
        return self.n_regions * self.region_tokens == self.n_fine

    @_kept
    def region_lengths(self) -> Tensor:
        """Fine tokens per region, `[n_regions]`."""
        lengths = torch.ones(1, dtype=torch.long)
        for extent in self._extents:
            lengths = (lengths[:, None] * extent[None, :, 1]).reshape(-1)
        return lengths

    @cached_property
    def region_tokens(self) -> int:
        """P: fine tokens of the largest region; every region is padded to it."""
        return math.prod(int(e[:, 1].max()) for e in self._extents)

    # ------------------------------------------------------------------ indices

    def check_regions(self, regions: Tensor) -> Tensor:
        """Return `regions` as an int64 vector on the CPU, or raise ValueError if one is not in the grid."""
        regions = torch.as_tensor(regions)
        if regions.numel() and (regions.dtype == torch.bool or regions.is_floating_point()):
            raise ValueError(f"regions must be integer indices, got {regions.dtype}")
        regions = regions.to("cpu", torch.long).reshape(-1)
        if regions.numel() and (int(regions.min()) < 0 or int(regions.max()) >= self.n_regions):
            raise ValueError(
                f"regions must lie in [0, {self.n_regions}), got {int(regions.min())}..{int(regions.max())}"
            )
        return regions

    def tokens(self, regions: Tensor) -> Tensor:
        """Fine tokens of the given regions, raster order within a region.

        Args:
            regions: `[n]` flat region indices.

        Returns:
            `[n, P]` flat fine indices, -1 where a region is smaller than the largest one.
        """
        regions = self.check_regions(regions)
        if self.n_regions * self.region_tokens <= _TABLE_TOKENS:
            return self._token_table[regions]
        return self._tokens(regions)

    @_kept
    def _token_table(self) -> Tensor:
        # small lattices are asked for over and over, in training by every sample of every layer
        return self._tokens(torch.arange(self.n_regions))

    def _tokens(self, regions: Tensor) -> Tensor:
        flat = torch.zeros(len(regions), 1, dtype=torch.long)
        rank = torch.zeros(len(regions), 1, dtype=torch.long)
        ok = torch.ones(len(regions), 1, dtype=torch.bool)
        for size, extent, where in zip(self.fine, self._extents, self.unravel(regions), strict=True):
            start, length = extent[where, 0], extent[where, 1]
            offset = torch.arange(int(extent[:, 1].max()))
            inside = offset[None] < length[:, None]
            token = start[:, None] + offset[None]
            flat = (flat[:, :, None] * size + token[:, None, :]).flatten(1)
            rank = (rank[:, :, None] * length[:, None, None] + offset[None, None]).flatten(1)
            ok = (ok[:, :, None] & inside[:, None, :]).flatten(1)
        # real tokens come first, in raster order; the padding goes to the end of the row
        order = torch.where(ok, rank, torch.full_like(rank, self.n_fine)).argsort(dim=1, stable=True)
        return torch.where(ok, flat, torch.full_like(flat, -1)).gather(1, order)

    def unravel(self, regions: Tensor) -> tuple[Tensor, ...]:
        """Split flat region indices into one index per axis."""
        out = []
        for size in reversed(self.region_shape):
            out.append(regions % size)
            regions = regions // size
        return tuple(reversed(out))

    def coordinates(self, tokens: Tensor) -> Tensor:
        """Where fine tokens lie on the coarse grid, in cells: cell u has its centre at u.

        Args:
            tokens: `[...]` flat fine indices.

        Returns:
            `[..., axes]` float32 in `[-0.5, coarse - 0.5]`.
        """
        out = []
        for fine, coarse in zip(reversed(self.fine), reversed(self.coarse), strict=True):
            # exact up to the last rounding: in float32 a long axis would lose whole cells
            out.append((((2 * (tokens % fine) + 1) * coarse).double() / (2 * fine) - 0.5).float())
            tokens = tokens // fine
        return torch.stack(out[::-1], dim=-1)

    def parents(self, tokens: Tensor) -> Tensor:
        """Flat index of the coarse cell that holds the centre of each fine token, same shape as `tokens`.

        A centre on the edge between two cells belongs to the later one.
        """
        if self.n_fine <= _TABLE_TOKENS:
            return self._parent_table.to(tokens.device)[tokens]
        return self._parents(tokens)

    @_kept
    def _parent_table(self) -> Tensor:
        return self._parents(torch.arange(self.n_fine))

    def _parents(self, tokens: Tensor) -> Tensor:
        flat, stride = torch.zeros_like(tokens), 1
        for fine, coarse in zip(reversed(self.fine), reversed(self.coarse), strict=True):
            flat = flat + (2 * (tokens % fine) + 1) * coarse // (2 * fine) * stride
            tokens, stride = tokens // fine, stride * coarse
        return flat

    # ------------------------------------------------------------------ incidence

    @_kept
    def _windows(self) -> tuple[Tensor, ...]:
        """Per axis `[regions, m]`: the cells each region touches, the last one repeated as padding."""
        out = []
        for edges, cells, size in zip(self.edges, self.coarse, self.fine, strict=True):
            n = len(edges) - 1
            if self.lattice is not None:
                spans = [(p * cells // n, -((p + 1) * cells // -n)) for p in range(n)]
            else:
                spans = [(edges[p] * cells // size, -(edges[p + 1] * cells // -size)) for p in range(n)]
            width = max(b - a for a, b in spans)
            out.append(torch.tensor([[min(a + i, b - 1) for i in range(width)] for a, b in spans]))
        return tuple(out)

    def pool(self, cells: Tensor) -> Tensor:
        """Largest value among the cells that each region touches (for masks: any).

        A cell that straddles several regions counts for all of them, so this is a relation and not a map.

        Args:
            cells: `[..., n_coarse]`, numbers or bools.

        Returns:
            `[..., n_regions]`, same dtype.
        """
        # a step of decoding is made of small operations: one gather takes a quarter of them, but more memory
        if cells[..., 0].numel() * self._touches <= _TABLE_TOKENS:
            touched = self._touched.to(cells.device)
            x = cells.index_select(-1, touched.flatten()).unflatten(-1, touched.shape)
            return x.any(-1) if cells.dtype == torch.bool else x.amax(-1)
        return self._pool_by_axis(cells)

    @cached_property
    def _touches(self) -> int:
        return self.n_regions * math.prod(window.shape[1] for window in self._windows)

    @_kept
    def _touched(self) -> Tensor:
        """`[n_regions, m]` the cells that each region touches, some repeated as padding."""
        flat = torch.zeros(1, 1, dtype=torch.long)
        for size, window in zip(self.coarse, self._windows, strict=True):
            flat = (flat[:, None, :, None] * size + window[None, :, None, :]).flatten(0, 1).flatten(1, 2)
        return flat

    def _pool_by_axis(self, cells: Tensor) -> Tensor:
        lead = cells.shape[:-1]
        x = cells.reshape(-1, *self.coarse)
        for axis, window in enumerate(self._windows):
            window = window.to(cells.device)
            x = x.index_select(axis + 1, window.reshape(-1)).unflatten(axis + 1, window.shape)
            x = x.any(axis + 2) if cells.dtype == torch.bool else x.amax(axis + 2)
        return x.reshape(*lead, self.n_regions)

    # ------------------------------------------------------------------ margins

    def _content(self, sizes: tuple[int, ...]) -> Tensor:
        inside = torch.ones(1, dtype=torch.bool)
        # the official code truncates the float; elsewhere 15 / 44 * 44 = 14.999... must count as 15
        slack = 0.0 if self.lattice is not None else 1e-9
        for size, (before, after) in zip(sizes, self.padding, strict=True):
            at = torch.arange(size)
            axis = (at >= int(before * size + slack)) & (at < size - int(after * size + slack))
            inside = (inside[:, None] & axis[None]).reshape(-1)
        return inside

    @cached_property
    def has_margin(self) -> bool:
        """Whether any coarse cell is wholly padding."""
        return any(
            int(share * size + 1e-9)
            for size, pair in zip(self.coarse, self.padding, strict=True)
            for share in pair
        )

    @_kept
    def coarse_valid(self) -> Tensor:
        """`[n_coarse]` bool: cells that are not wholly padding."""
        return self._content(self.coarse)

    @_kept
    def fine_valid(self) -> Tensor:
        """`[n_fine]` bool: fine tokens that are not wholly padding (the official code keeps them all)."""
        if self.lattice is not None:
            return torch.ones(self.n_fine, dtype=torch.bool)
        return self._content(self.fine)

    def box(self, region: int) -> tuple[tuple[float, float], ...]:
        """A region's extent per axis as shares of the (padded) medium, `((start, stop), ...)` in `[0, 1]`."""
        index = self.check_regions(torch.tensor([region]))
        out = []
        for extent, size, where in zip(self._extents, self.fine, self.unravel(index), strict=True):
            start, length = (int(v) for v in extent[int(where)])
            out.append((start / size, (start + length) / size))
        return tuple(out)
