"""Trace: what was looked at, per request, layer, readout row and medium."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .grid import Grid


@dataclass(frozen=True, eq=False)
class TraceRecord:
    """One readout row's selection in one layer, for one medium.

    Args:
        request: Running number of the request (a `generate` or a lone `forward`) within the trace.
        layer: The layer whose attention chose.
        read_in: The layer that reads the chosen regions, or None if no later layer does.
        position: Sequence index of the readout row; in generation it grows by one per step.
        row: Batch row (a beam counts as a row of its own).
        sample: Sample in the stream batch.
        medium: Medium within the sample.
        scores: `[n_coarse]` float32 head-summed attention on the coarse cells, margins included.
        regions: `[n_regions]` bool, what was chosen.
        grid: The medium's lattice, at this level.
        level: 1, or more for the finer levels of a pyramid.
    """

    request: int
    layer: int
    read_in: int | None
    position: int
    row: int
    sample: int
    medium: int
    scores: Tensor
    regions: Tensor
    grid: Grid
    level: int = 1


@dataclass(eq=False)
class Trace:
    """Records of everything selected while `flexcore.trace(model)` was open."""

    records: list[TraceRecord] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _requests: dict[int, int] = field(default_factory=dict, repr=False)
    _alive: list[Any] = field(default_factory=list, repr=False)

    def number(self, request: object) -> int:
        """Running number of a request object, in order of first appearance."""
        with self._lock:
            if id(request) not in self._requests:
                self._requests[id(request)] = len(self._requests)
                self._alive.append(request)  # keeps the id from being used again
            return self._requests[id(request)]

    def add(self, records: list[TraceRecord]) -> None:
        """Append records; several threads may do so at once."""
        with self._lock:
            self.records += records

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[TraceRecord]:
        return iter(self.records)

    @property
    def layers(self) -> list[int]:
        """Layers that selected, ascending."""
        return sorted({r.layer for r in self.records})

    def where(self, **fields: Any) -> list[TraceRecord]:
        """Records whose fields equal the given values, as `trace.where(layer=9, sample=0)`."""
        return [r for r in self.records if all(getattr(r, k) == v for k, v in fields.items())]

    def looked_at(
        self, sample: int = 0, medium: int = 0, request: int | None = None, read: bool = True, level: int = 1
    ) -> Tensor:
        """How often each region was chosen, `[n_regions]` float in `[0, 1]`: a share of (layer, row) pairs.

        Args:
            sample: Sample in the batch.
            medium: Medium within the sample.
            request: Running number of the request; None takes them all.
            read: Count only selections that a later layer reads.
            level: Of a pyramid.

        Raises:
            ValueError: Nothing was recorded for it.
        """
        found = [
            r
            for r in self.where(sample=sample, medium=medium, level=level)
            if (request is None or r.request == request) and (r.read_in is not None or not read)
        ]
        if not found:
            raise ValueError(
                f"sample={sample}, medium={medium}, level={level}, request={request}: nothing was recorded in this "
                "trace"
            )
        return torch.stack([r.regions for r in found]).float().mean(dim=0)

    def overlay(
        self, image: Any, sample: int = 0, medium: int = 0, request: int | None = None, level: int = 1
    ) -> Any:
        """The picture, a PIL image, with the regions that were read lit up. See `flexcore.viz.overlay`."""
        from .viz import overlay

        counts = self.looked_at(sample, medium, request, level=level)
        record = self.where(sample=sample, medium=medium, level=level)[0]
        return overlay(image, record.grid, counts)


@contextmanager
def trace(model: Any) -> Iterator[Trace]:
    """Record what a wrapped model looks at while the block runs.

    Raises:
        ValueError: The model isn't wrapped.
    """
    binding = getattr(model, "_flex_binding", None)
    if binding is None:
        raise ValueError("trace(model) takes a wrapped model; call flexcore.wrap(model, config) first")
    record = Trace()
    binding.traces.append(record)
    try:
        yield record
    finally:
        binding.traces.remove(record)
