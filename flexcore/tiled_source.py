"""TiledSource: fine features encoded a tile, frame or window at a time, when one of its regions is first chosen.

A *unit* is what an encoder sees at once. Media that share an encoder share its cache and its micro-batches: the
regions that a whole batch asks for in one layer are encoded together, and what was encoded is kept in an LRU with a
byte budget. The numbers are those of encoding everything up front.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import FlexcoreError, SourceError
from .grid import Grid
from .sources import FineSource, TensorSource

Unit = tuple[int, int]  # (medium's key, raster index of the unit in that medium)
ON_ERROR = ("raise", "skip")


@dataclass
class SourceStats:
    """What an encoder has done so far; read it at any time.

    Args:
        regions: Regions handed out, repeats included.
        units: Units encoded.
        tokens: Fine tokens encoded.
        hits: Units found in the cache.
        bytes: Bytes held now.
        seconds: Seconds spent encoding.
    """

    regions: int = 0
    units: int = 0
    tokens: int = 0
    hits: int = 0
    bytes: int = 0
    seconds: float = 0.0


class UnitEncoder:
    """Encodes units in micro-batches and keeps them, least recently used first out.

    Args:
        encode: Called with up to `micro_batch` units `(key, index)`; returns `[k, tokens, C]`, a unit's tokens in
            raster order. May raise anything; it is reported as a `SourceError`.
        width: C.
        dtype: Of what `encode` returns.
        device: Of what `encode` returns.
        micro_batch: Units per call.
        max_bytes: Budget of the cache; None is unlimited.
        on_error: `raise` fails the request; `skip` warns, and the unit's regions can't be read or selected.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[Unit]], Tensor],
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        micro_batch: int = 8,
        max_bytes: int | None = None,
        on_error: str = "raise",
    ):
        if micro_batch < 1:
            raise ValueError(f"micro_batch must be >= 1, got {micro_batch}")
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes must be >= 0 or None, got {max_bytes}")
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
        self.encode = encode
        self.width = width
        self.dtype = dtype
        self.device = torch.device(device)
        self.micro_batch = micro_batch
        self.max_bytes = max_bytes
        self.on_error = on_error
        self.stats = SourceStats()
        self._held: OrderedDict[Unit, Tensor] = OrderedDict()
        self._lock = threading.RLock()  # requests in two threads may share one medium

    def run(
        self, wanted: Sequence[Unit], use: Callable[[Unit, Tensor], None], name: Callable[[Unit], str]
    ) -> list[Unit]:
        """Hand every wanted unit's features `[tokens, C]` to `use`, encoding those that aren't held.

        Nothing needs to fit the budget at once: each micro-batch is used before the next one is encoded.

        Args:
            wanted: Units without repeats.
            use: Called once per unit.
            name: What to call a unit in an error.

        Returns:
            Units that couldn't be encoded (`on_error="skip"` only).

        Raises:
            SourceError: A unit can't be encoded.
        """
        with self._lock:
            missing = []
            for unit in wanted:
                if unit in self._held:
                    self._held.move_to_end(unit)
                    self.stats.hits += 1
                    use(unit, self._held[unit])
                else:
                    missing.append(unit)
            lost = []
            for start in range(0, len(missing), self.micro_batch):
                chunk = missing[start : start + self.micro_batch]
                for unit, features in self._encode(chunk, name):
                    if features is None:
                        lost.append(unit)
                    else:
                        use(unit, features)
                        self._keep(unit, features)
            return lost

    @torch.no_grad()
    def _encode(self, units: list[Unit], name: Callable[[Unit], str]) -> list[tuple[Unit, Tensor | None]]:
        started = time.perf_counter()
        try:
            features = self.encode(units)
        except FlexcoreError:
            raise  # the set-up is wrong, not this unit
        except Exception as error:
            if len(units) > 1:  # one of them is to blame: find out which, and keep the others
                return [pair for unit in units for pair in self._encode([unit], name)]
            message = f"{name(units[0])} can't be read: {error}"
            if self.on_error == "raise":
                raise SourceError(message) from error
            warnings.warn(f"{message}; it is left out", stacklevel=2)
            return [(units[0], None)]
        if features.ndim != 3 or features.shape[0] != len(units) or features.shape[2] != self.width:
            raise ValueError(
                f"encode must return [{len(units)}, tokens, {self.width}] for {len(units)} units, "
                f"got {list(features.shape)}"
            )
        self.stats.seconds += time.perf_counter() - started
        self.stats.units += len(units)
        self.stats.tokens += features.shape[0] * features.shape[1]
        return list(zip(units, features, strict=True))

    def _keep(self, unit: Unit, features: Tensor) -> None:
        # a copy: a slice would keep its whole micro-batch alive
        features = features.clone()
        self._held[unit] = features
        self.stats.bytes += features.nbytes
        while self.max_bytes is not None and self.stats.bytes > self.max_bytes:
            _, old = self._held.popitem(last=False)
            self.stats.bytes -= old.nbytes


class TiledSource(FineSource):
    """One medium's fine features, encoded tile by tile on demand.

    Args:
        grid: The medium's lattice.
        tile: Tile's side in fine tokens, per axis. Where it doesn't divide the grid, the encoder pads the last tile
            and the tokens past the grid's end are not read.
        encoder: What encodes; several media may share it.
        key: The medium's own number among those of the encoder.
        name: What to call the medium in errors.
        where: Says where a tile lies in the medium's own terms, such as a time stamp.

    Raises:
        ValueError: There isn't one side >= 1 per axis.
    """

    def __init__(
        self,
        grid: Grid,
        tile: Sequence[int],
        encoder: UnitEncoder,
        key: int,
        name: str = "medium",
        where: Callable[[int], str] | None = None,
    ):
        tile = tuple(int(t) for t in tile)
        if len(tile) != len(grid.fine) or min(tile) < 1:
            raise ValueError(
                f"tile must hold one side >= 1 per axis of the fine grid {grid.fine}, got {tile}"
            )
        self.grid = grid
        self.tile = tile
        self.encoder = encoder
        self.key = key
        self.name = name
        self.where = where
        self.width = encoder.width
        self.dtype = encoder.dtype
        self.device = encoder.device
        self._unreadable: set[int] = set()

    @property
    def stats(self) -> SourceStats:
        """Counters of the encoder, shared by its media."""
        return self.encoder.stats

    @property
    def n_tiles(self) -> int:
        """Tiles in all."""
        return math.prod(-(-n // t) for n, t in zip(self.grid.fine, self.tile, strict=True))

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tile of each fine token, and its raster index within that tile; both the shape of `tokens`."""
        unit, inside = torch.zeros_like(tokens), torch.zeros_like(tokens)
        unit_stride = inside_stride = 1
        for size, side in zip(reversed(self.grid.fine), reversed(self.tile), strict=True):
            at = tokens % size
            unit = unit + at // side * unit_stride
            inside = inside + at % side * inside_stride
            unit_stride, inside_stride, tokens = (
                unit_stride * -(-size // side),
                inside_stride * side,
                tokens // size,
            )
        return unit, inside

    def describe(self, unit: int) -> str:
        """A tile's name for an error: medium, tile and the regions' place in the medium's own terms."""
        place = f", {self.where(unit)}" if self.where is not None else ""
        return f"{self.name}, tile {unit} of {self.n_tiles}{place}"

    def __reduce__(self) -> tuple[type, tuple[Tensor, Grid]]:
        # another process gets the features, not the model that makes them
        everything = torch.arange(self.grid.n_regions)
        tokens = self.grid.tokens(everything)
        flat = torch.zeros(self.grid.n_fine, self.width, dtype=self.dtype, device=self.device)
        flat[tokens[tokens >= 0].to(self.device)] = self.features(everything)[tokens >= 0]
        return TensorSource, (flat, self.grid)

    def features(self, regions: Tensor) -> Tensor:
        return gather([(self, regions)])[0]

    def readable(self, regions: Tensor) -> Tensor:
        if not self._unreadable:
            return torch.ones(len(regions), dtype=torch.bool)
        tokens = self.grid.tokens(regions)
        units, _ = self.locate(tokens.clamp(min=0))
        bad = torch.isin(units, torch.tensor(sorted(self._unreadable))) & (tokens >= 0)
        return ~bad.any(dim=1)


def gather(wanted: Sequence[tuple[FineSource, Tensor]]) -> list[Tensor]:
    """Features of several media's regions, encoding what they share an encoder for in common micro-batches.

    Args:
        wanted: Sources, each with the `[n]` regions asked of it.

    Returns:
        `[n, P, C]` per source, as `source.features(regions)`.
    """
    out: list[Tensor | None] = [None] * len(wanted)
    groups: dict[int, list[int]] = {}
    for i, (source, regions) in enumerate(wanted):
        if isinstance(source, TiledSource):
            groups.setdefault(id(source.encoder), []).append(i)
        else:
            out[i] = source.features(regions)
    for members in groups.values():
        tiled = {i: source for i in members if isinstance(source := wanted[i][0], TiledSource)}
        encoder = next(iter(tiled.values())).encoder
        jobs: dict[Unit, list[tuple[int, Tensor, Tensor]]] = {}
        names: dict[int, TiledSource] = {}
        for i, source in tiled.items():
            tokens = source.grid.tokens(wanted[i][1])
            units, inside = source.locate(tokens.clamp(min=0))
            units = units.masked_fill(tokens < 0, -1)
            out[i] = torch.zeros(*tokens.shape, source.width, dtype=source.dtype, device=source.device)
            encoder.stats.regions += len(tokens)
            names[source.key] = source
            for unit in units.unique().tolist():
                if unit >= 0:
                    rows = (units == unit).nonzero(as_tuple=True)
                    where = rows[0] * tokens.shape[1] + rows[1]
                    jobs.setdefault((source.key, unit), []).append((i, where, inside[rows]))

        def use(
            unit: Unit, features: Tensor, jobs: dict[Unit, list[tuple[int, Tensor, Tensor]]] = jobs
        ) -> None:
            for i, where, inside in jobs[unit]:
                target = out[i]
                assert target is not None
                picked = features[inside.to(features.device)].to(target.dtype)
                target.view(-1, target.shape[2])[where.to(target.device)] = picked

        def name(unit: Unit, names: dict[int, TiledSource] = names) -> str:
            return names[unit[0]].describe(unit[1])

        for key, unit in encoder.run(sorted(jobs), use, name):
            names[key]._unreadable.add(unit)
    return [t for t in out if t is not None]


def warm(wanted: Sequence[tuple[FineSource, Tensor]]) -> None:
    """Encode what several media's regions need in common micro-batches, for `features` to find.

    Only for encoders that keep all they encode: with a budget, a unit might be gone before it is used.

    Args:
        wanted: Sources, each with the `[n]` regions about to be asked of it.
    """
    groups: dict[int, list[tuple[TiledSource, Tensor]]] = {}
    for source, regions in wanted:
        if isinstance(source, TiledSource) and source.encoder.max_bytes is None:
            groups.setdefault(id(source.encoder), []).append((source, regions))
    for members in groups.values():
        if len(members) < 2:
            continue
        units, names = set(), {source.key: source for source, _ in members}
        for source, regions in members:
            tokens = source.grid.tokens(regions)
            units |= {(source.key, u) for u in source.locate(tokens[tokens >= 0])[0].unique().tolist()}

        def name(unit: Unit, names: dict[int, TiledSource] = names) -> str:
            return names[unit[0]].describe(unit[1])

        lost = members[0][0].encoder.run(sorted(units), lambda unit, features: None, name)
        for key, unit in lost:
            names[key]._unreadable.add(unit)
