"""FineStream and StreamBatch: what one batch's media look like. Plain immutable data that travels with the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .errors import StreamError
from .grid import Grid
from .sources import FineSource, TensorSource


@dataclass(frozen=True, eq=False)
class FineStream:
    """One medium: where its coarse tokens sit in the sequence and where its fine features come from.

    Args:
        grid: Lattice of coarse cells, regions and fine tokens.
        coarse_positions: `[n_coarse]` indices into the sample's (padded) sequence, raster order; None until the
            text is known, see `at`.
        valid: `[n_fine]` bool, False for fine tokens that must never be read; None takes the grid's margins.
        source: The fine features, by region.
        coarse_embeds: `[n_coarse, C]` input embeddings of the coarse tokens, for a model that has no way of its own
            to take the medium: they replace the embeddings of whatever tokens are there. None: the model makes them.
        finer: The same medium at a higher resolution still, over the same coarse cells: the next level of a pyramid,
            see `flexcore.pyramid`. Of it only `grid`, `valid`, `source` and `finer` count.

    Raises:
        ValueError: Sizes that don't fit the grid, or nothing left to select.
    """

    grid: Grid
    coarse_positions: Tensor | None
    valid: Tensor | None
    source: FineSource
    coarse_embeds: Tensor | None = None
    finer: FineStream | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, FineSource):
            raise StreamError(f"source must be a FineSource, got {type(self.source).__name__}")
        if self.source.grid.fine != self.grid.fine or self.source.grid.edges != self.grid.edges:
            raise StreamError(
                f"source.grid must have the stream's fine tokens and regions: {self.grid.fine}, "
                f"got {self.source.grid.fine} (or other region edges)"
            )
        positions = self.coarse_positions
        if positions is not None:
            positions = torch.as_tensor(positions).detach().to("cpu", torch.long)
            if positions.shape != (self.grid.n_coarse,):
                raise StreamError(
                    f"coarse_positions must hold one index per coarse cell, [{self.grid.n_coarse}] for a coarse "
                    f"grid of {self.grid.coarse}, got {list(positions.shape)}"
                )
            if int(positions.min()) < 0:
                raise StreamError(f"coarse_positions must be >= 0, got {int(positions.min())}")
            object.__setattr__(self, "coarse_positions", positions)
        valid = (
            self.grid.fine_valid if self.valid is None else torch.as_tensor(self.valid).to("cpu", torch.bool)
        )
        if valid.shape != (self.grid.n_fine,):
            raise StreamError(f"valid must be [n_fine={self.grid.n_fine}], got {list(valid.shape)}")
        if not bool(valid.any()):
            raise StreamError("valid must leave at least one fine token to read, got none")
        object.__setattr__(self, "valid", valid)
        expected = (self.grid.n_coarse, self.source.width)
        if self.coarse_embeds is not None and tuple(self.coarse_embeds.shape) != expected:
            raise StreamError(
                f"coarse_embeds must be {list(expected)}, an embedding per coarse cell as wide as the source's "
                f"features, got {list(self.coarse_embeds.shape)}"
            )
        if self.finer is not None:
            self._check_finer(self.finer)

    def _check_finer(self, finer: FineStream) -> None:
        if not isinstance(finer, FineStream):
            raise StreamError(f"finer must be a FineStream or None, got {type(finer).__name__}")
        if finer.grid.coarse != self.grid.coarse:
            raise StreamError(
                f"finer.grid.coarse must be the medium's own coarse cells {self.grid.coarse}, got {finer.grid.coarse}"
            )
        if any(more < own for own, more in zip(self.grid.fine, finer.grid.fine, strict=True)):
            raise StreamError(
                f"finer.grid.fine must be at least {self.grid.fine} on every axis, got {finer.grid.fine}"
            )
        if self.grid.lattice is not None or finer.grid.lattice is not None:
            raise StreamError("a pyramid's levels must be laid out in blocks, not in the official lattice")
        if finer.source.width != self.source.width:
            raise StreamError(
                f"finer.source.width must be {self.source.width} as on the level before, got {finer.source.width}"
            )

    @property
    def levels(self) -> tuple[FineStream, ...]:
        """This level and all finer ones."""
        return (self,) if self.finer is None else (self, *self.finer.levels)

    def at(self, coarse_positions: Tensor) -> FineStream:
        """The same medium with its coarse tokens at the given `[n_coarse]` sequence indices."""
        return replace(self, coarse_positions=coarse_positions)

    def shifted(self, offset: int) -> FineStream:
        """The same medium after `offset` tokens were put in front of the sample (left padding)."""
        return self if self.coarse_positions is None else self.at(self.coarse_positions + offset)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FineStream:
        """The same medium with its features on another device or in another dtype."""
        source, embeds = self.source.to(device, dtype), self.coarse_embeds
        finer = None if self.finer is None else self.finer.to(device, dtype)
        if embeds is not None:
            embeds = embeds.to(
                device=embeds.device if device is None else device, dtype=dtype or embeds.dtype
            )
        if source is self.source and embeds is self.coarse_embeds and finer is self.finer:
            return self
        return replace(self, source=source, coarse_embeds=embeds, finer=finer)

    @cached_property
    def region_valid(self) -> Tensor:
        """`[n_regions, P]` bool: which rows of each (padded) region may be read."""
        assert self.valid is not None
        tokens = self.grid.tokens(torch.arange(self.grid.n_regions))
        return (tokens >= 0) & self.valid[tokens.clamp(min=0)]

    @cached_property
    def selectable(self) -> Tensor:
        """`[n_regions]` bool: regions with at least one token that may be read (all of the official lattice's)."""
        if self.grid.lattice is not None:
            return self.grid.everything
        found = self.region_valid.any(dim=1)
        return self.grid.everything if bool(found.all()) else found


@dataclass(frozen=True, eq=False)
class StreamBatch:
    """The media of one batch: a tuple of streams per sample, empty for text-only samples."""

    samples: tuple[tuple[FineStream, ...], ...]

    def __post_init__(self) -> None:
        samples = tuple(tuple(sample) for sample in self.samples)
        for i, sample in enumerate(samples):
            for j, stream in enumerate(sample):
                if not isinstance(stream, FineStream):
                    raise StreamError(f"samples[{i}][{j}] must be a FineStream, got {type(stream).__name__}")
        object.__setattr__(self, "samples", samples)

    @classmethod
    def from_features(
        cls, features: Sequence[Tensor], grid: Grid | Sequence[Grid], coarse_positions: Sequence[Tensor]
    ) -> StreamBatch:
        """One medium per sample from ready-made `[n_fine, C]` features; the short way in for tests and loops."""
        grids = [grid] * len(features) if isinstance(grid, Grid) else list(grid)
        return cls(
            tuple(
                (FineStream(g, positions, None, TensorSource(f, g)),)
                for f, g, positions in zip(features, grids, coarse_positions, strict=True)
            )
        )

    @classmethod
    def cat(cls, batches: Sequence[StreamBatch], offsets: Sequence[int] | None = None) -> StreamBatch:
        """Join batches, sample after sample.

        Args:
            batches: What to join.
            offsets: Tokens put in front of every sample of each batch by left padding (default none).
        """
        offsets = [0] * len(batches) if offsets is None else offsets
        return cls(
            tuple(
                tuple(stream.shifted(offset) for stream in sample)
                for batch, offset in zip(batches, offsets, strict=True)
                for sample in batch.samples
            )
        )

    def __repr__(self) -> str:
        media = [
            ["->".join(map(str, [s.grid.coarse, *(x.grid.fine for x in s.levels)])) for s in sample]
            for sample in self.samples
        ]
        return f"StreamBatch({len(self)} sample(s), media per sample: {media})"

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[tuple[FineStream, ...]]:
        return iter(self.samples)

    def __getitem__(self, index: int | slice) -> StreamBatch:
        """A batch of the chosen sample or samples."""
        picked = self.samples[index] if isinstance(index, slice) else (self.samples[index],)
        return StreamBatch(picked)

    @property
    def n_media(self) -> int:
        """Media in all samples together."""
        return sum(len(sample) for sample in self.samples)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> StreamBatch:
        """The same batch with its features on another device or in another dtype."""
        moved = tuple(tuple(s.to(device, dtype) for s in sample) for sample in self.samples)
        return self if moved == self.samples else StreamBatch(moved)
