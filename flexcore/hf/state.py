"""Per-request state. It rides on the KV cache or in the call; nothing is kept on modules or in globals."""

from __future__ import annotations

import copy
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import StreamError
from ..fine_cache import FineCache
from ..grid import Grid
from ..streams import FineStream, StreamBatch
from ..tiled_source import warm

if TYPE_CHECKING:
    from .static import StaticFine


class SampleState:
    """One sample's media, with cells and regions of all of them numbered through.

    Attributes:
        media: The streams as they were given.
        streams: The same, followed by the finer levels of those that have any.
        chains: By medium with finer levels: indices into `streams`, coarsest first.
    """

    def __init__(self, media: tuple[FineStream, ...]):
        self.media = self.streams = media
        self.chains: dict[int, list[int]] = {}
        self._base = list(range(len(media)))
        for m, medium in enumerate(media):
            if medium.finer is not None:
                finer = medium.finer.levels
                self.chains[m] = [m, *range(len(self.streams), len(self.streams) + len(finer))]
                self.streams += finer
                self._base += [m] * len(finer)
        self.cell_at = _offsets([s.grid.n_coarse for s in media])
        self.region_at = _offsets([s.grid.n_regions for s in self.streams])
        self.n_regions = self.region_at[-1]
        self.page = max((s.grid.region_tokens for s in self.streams), default=0)
        positions = [s.coarse_positions for s in media]
        if any(p is None for p in positions):
            raise StreamError(
                "coarse_positions must be known before the model runs; bind them with stream.at(...)"
            )
        self.cells = torch.cat([p for p in positions if p is not None] or [torch.zeros(0, dtype=torch.long)])
        self.last_cell = int(self.cells.max()) if len(self.cells) else -1
        # what the model itself used as positions of the coarse tokens: [..., n_cells], filled as they pass through
        self.rope: Tensor | None = None
        self.rope_known = torch.zeros(len(self.cells), dtype=torch.bool)
        self._valid: Tensor | None = None
        self._lost: dict[int, Tensor] = {}

    def span(self, stream: int) -> slice:
        """Where the coarse cells of a stream's medium are among the sample's."""
        medium = self._base[stream]
        return slice(self.cell_at[medium], self.cell_at[medium + 1])

    @cached_property
    def ragged(self) -> bool:
        """Whether any row of any page must not be read."""
        return not bool(self.valid(torch.arange(self.n_regions)).all())

    def valid(self, regions: Tensor) -> Tensor:
        """`[n, page]` bool: which rows of the given regions' pages may be read."""
        if self._valid is None:
            parts = [
                torch.nn.functional.pad(s.region_valid, (0, self.page - s.grid.region_tokens))
                for s in self.streams
            ]
            self._valid = torch.cat(parts)
        return self._valid[regions]

    def selectable(self, medium: int) -> Tensor:
        """`[n_regions]` bool: regions of a medium that may be selected."""
        lost = self._lost.get(medium)
        stream = self.streams[medium]
        return stream.selectable if lost is None else stream.selectable & ~lost

    def lose(self, medium: int, local: Tensor) -> None:
        """Leave out regions of a medium that turned out to be unreadable, `[n]` indices within it."""
        lost = self._lost.setdefault(
            medium, torch.zeros(self.streams[medium].grid.n_regions, dtype=torch.bool)
        )
        lost[local] = True
        start = self.region_at[medium]
        self.valid(torch.zeros(0, dtype=torch.long))
        assert self._valid is not None
        self._valid[start + local] = False
        self.__dict__["ragged"] = True

    def by_medium(self, regions: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Split region indices into (medium, where in `regions`, indices within the medium)."""
        if len(self.streams) == 1:
            return [(0, torch.arange(len(regions)), regions)] if len(regions) else []
        out = []
        for m, (start, stop) in enumerate(pairwise(self.region_at)):
            where = ((regions >= start) & (regions < stop)).nonzero()[:, 0]
            if len(where):
                out.append((m, where, regions[where] - start))
        return out


class FlexRequest:
    """Everything one request knows: its media, their positions, its readout rows so far, its fine keys and values.

    Rides on the KV cache as `_flexcore_request`, so that a later turn finds it. Fine keys and values belong to
    samples, not batch rows: beams of a sample share them and nothing is reordered.
    """

    def __init__(self, streams: StreamBatch, cache_bytes: int | None):
        self.streams = streams
        self.samples = [SampleState(sample) for sample in streams.samples]
        self.kv = FineCache(cache_bytes)
        self.weights: tuple[int, ...] | None = None
        self.static: StaticFine | None = None  # all fine keys and values, in static mode
        self.explicit: Tensor | None = None  # a readout mask for a prompt that hasn't been seen yet
        self.prefix: Tensor | None = (
            None  # [samples, T] bool readout mask of the prompt so far; beyond it: True
        )
        self.layouts: dict[int, Any] = {}  # where a decode step's readout rows are, by batch size
        # by selecting layer and sample: what the last decode step selected, and what came of it
        self.picks: dict[tuple[int, int], tuple[Tensor, tuple[Tensor, Tensor] | None]] = {}
        self.max_position = 0
        self.tables: dict[Grid, tuple[Tensor, Tensor]] = {}  # official rotary tables, by grid

    @property
    def last_cell(self) -> int:
        """Largest sequence index of any coarse token, -1 without media."""
        return max((sample.last_cell for sample in self.samples), default=-1)

    @property
    def knows_positions(self) -> bool:
        """Whether all coarse tokens have passed through the model."""
        return all(bool(sample.rope_known.all()) for sample in self.samples)

    def adopt(self, streams: StreamBatch, past: int) -> None:
        """Take a later turn's media: those whose coarse tokens are in the cache already stay, new ones join."""
        if len(streams) != len(self.samples):
            raise StreamError(
                f"flex_streams must hold the {len(self.samples)} sample(s) that this cache was filled with, "
                f"got {len(streams)}"
            )
        kept = []
        for old, new in zip(self.samples, streams.samples, strict=True):
            old_here = {int(s.coarse_positions[0]): s for s in old.media if s.coarse_positions is not None}
            joined = []
            for stream in new:
                first = None if stream.coarse_positions is None else int(stream.coarse_positions[0])
                joined.append(old_here[first] if first in old_here and first < past else stream)
            listed = {int(s.coarse_positions[0]) for s in joined if s.coarse_positions is not None}
            earlier = [s for at, s in old_here.items() if at < past and at not in listed]
            kept.append(tuple(earlier + joined))
        self.streams = StreamBatch(tuple(kept))
        self.layouts.clear()
        self.picks.clear()
        for i, (old, sample) in enumerate(zip(self.samples, kept, strict=True)):
            if sample == old.media:
                continue
            fresh = SampleState(sample)
            if sample[: len(old.media)] == old.media and old.rope is not None:
                fresh.rope_known[: len(old.cells)] = old.rope_known
                fresh.rope = old.rope.new_zeros(*old.rope.shape[:-1], len(fresh.cells))
                fresh.rope[..., : len(old.cells)] = old.rope
            if fresh.streams[: len(old.streams)] != old.streams or fresh.page != old.page or old.rope is None:
                self.kv.clear(i)  # its pages are numbered or cut in another way
            self.samples[i] = fresh

    def begin_turn(
        self, length: int, past: int, readout: str, attention_mask: Tensor | None, explicit: Tensor | None
    ) -> None:
        """Decide which rows of the sequence up to `length` read; rows after it are generated ones and all read.

        Args:
            length: Tokens in the sequence, those in the cache included.
            past: Tokens in the cache; their rows keep what an earlier turn decided.
            readout: `answer` or `text`.
            attention_mask: `[B, length]`, or None for no padding.
            explicit: `[B, length]` bool, overrides the rule.
        """
        n = len(self.samples)
        mask = torch.zeros(n, length, dtype=torch.bool)
        if explicit is not None:
            rows = _per_sample(explicit, n, "readout_mask").bool()
            if rows.shape[1] > length:
                raise StreamError(f"readout_mask must be [B, {length}] at most, got {list(explicit.shape)}")
            mask[:, length - rows.shape[1] :] = rows
        else:
            present = torch.ones(n, length, dtype=torch.bool)
            if attention_mask is not None and attention_mask.ndim == 2:
                given = _per_sample(attention_mask, n, "attention_mask").bool()[:, -length:]
                present[:, length - given.shape[1] :] = given
            if readout == "text":
                mask = self._text_rows(present)
            else:
                last = length - 1 - present.flip(1).long().argmax(dim=1)
                mask[torch.arange(n), last] = present.any(dim=1)
        if past and self.prefix is not None:
            earlier = torch.ones(n, past, dtype=torch.bool)
            known = min(past, self.prefix.shape[1])
            earlier[:, :known] = self.prefix[:, :known]
            mask[:, :past] = earlier
        self.prefix = mask

    def _text_rows(self, present: Tensor) -> Tensor:
        """Rows after a sample's first medium that are no coarse tokens themselves."""
        mask = torch.zeros_like(present)
        for i, sample in enumerate(self.samples):
            if len(sample.cells):
                first = int(sample.cells[: sample.cell_at[1]].max())
                mask[i, first + 1 :] = present[i, first + 1 :]
                mask[i, sample.cells[sample.cells < mask.shape[1]]] = False
        return mask

    def record_positions(self, ids: Tensor, past: int, length: int, beams: int) -> None:
        """Note the rotary positions of coarse tokens that pass through the model.

        Args:
            ids: `[..., B|1, T]` positions of the tokens of this forward, on the CPU.
            past: Tokens before them.
            length: T.
            beams: Batch rows per sample.
        """
        self.max_position = max(self.max_position, int(ids.max()))
        for i, sample in enumerate(self.samples):
            here = (sample.cells >= past) & (sample.cells < past + length)
            if not bool(here.any()):
                continue
            row = min(i * beams, ids.shape[-2] - 1)
            new = ids[..., row, :][..., sample.cells[here] - past]
            if sample.rope is None:
                sample.rope = new.new_zeros(*new.shape[:-1], len(sample.cells))
            elif bool((sample.rope_known & here).any()) and not torch.equal(sample.rope[..., here], new):
                self.static = None
                self.kv.clear(i)  # the same tokens at other positions: their fine keys are stale
            sample.rope[..., here] = new
            sample.rope_known |= here

    def check_cells(self, n_keys: int) -> None:
        """In cross-attention the encoder's output must hold every coarse token; only here its length is known."""
        for i, sample in enumerate(self.samples):
            if sample.last_cell >= n_keys:
                raise StreamError(
                    f"flex_streams sample {i}: coarse_positions must lie in the encoder's output of {n_keys} states, "
                    f"got {sample.last_cell}"
                )

    def warm(self, layer: int, regions: list[Tensor | None], keep: bool) -> None:
        """Let sources that share an encoder encode what all samples lack in a layer in common micro-batches."""
        wanted = []
        for i, (sample, chosen) in enumerate(zip(self.samples, regions, strict=True)):
            if chosen is not None:
                missing = self.kv.missing(layer, i, chosen) if keep else chosen
                wanted += [(sample.streams[m].source, local) for m, _, local in sample.by_medium(missing)]
        warm(wanted)

    def rows(self, past: int, length: int) -> Tensor:
        """`[samples, length]` bool: readout rows among the sequence indices `past .. past + length - 1`."""
        assert self.prefix is not None
        mask = torch.ones(len(self.samples), length, dtype=torch.bool)
        known = self.prefix[:, past : past + length]
        mask[:, : known.shape[1]] = known
        return mask

    def __deepcopy__(self, memo: dict[int, Any]) -> FlexRequest:
        """A request of its own for a copied KV cache; streams and fine pages are shared until written."""
        other = FlexRequest.__new__(FlexRequest)
        memo[id(self)] = other
        other.streams, other.weights, other.prefix = self.streams, self.weights, self.prefix
        other.explicit, other.layouts, other.picks = self.explicit, {}, {}
        other.static = self.static
        other.max_position, other.tables = self.max_position, dict(self.tables)
        other.kv = copy.deepcopy(self.kv, memo)
        other.samples = []
        for sample in self.samples:
            twin = copy.copy(sample)
            twin.rope_known = sample.rope_known.clone()
            twin.rope = None if sample.rope is None else sample.rope.clone()
            other.samples.append(twin)
        return other


def _offsets(sizes: list[int]) -> list[int]:
    out = [0]
    for size in sizes:
        out.append(out[-1] + size)
    return out


def _per_sample(mask: Tensor, n: int, name: str) -> Tensor:
    """One row per sample, on the CPU, from a mask with one row per sample or per beam."""
    if mask.ndim != 2 or mask.shape[0] % n:
        raise StreamError(
            f"{name} must be [B, T] with B a multiple of the {n} sample(s), got {list(mask.shape)}"
        )
    return mask[:: mask.shape[0] // n].detach().to("cpu")
