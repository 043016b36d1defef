"""Readout rows of a forward pass: where they are in the batch, and which keys they may look at."""

from __future__ import annotations

import torch
from torch import Tensor

from ..row_attention import CausalRows, GatheredRows, RowMask, SharedMask
from .state import FlexRequest


def row_keys(
    key: Tensor, mask: Tensor | None, rows: Tensor, n_queries: int, causal: bool, past: int
) -> tuple[Tensor, RowMask | None]:
    """The keys that rows may look at, and which of them each row sees.

    Args:
        key: `[B, Hkv, S, D]`.
        mask: As the base backend got it: None, a padding mask `[B, S]` or a mask `[B|1, H|1, Q, S]`.
        rows: `[B, R]` query indices.
        n_queries: Q.
        causal: Whether a missing mask means causal.
        past: Tokens in the cache before this forward.
    """
    if mask is not None and mask.ndim == 4:
        key = key[:, :, : mask.shape[3]]
        return key, SharedMask(mask) if mask.shape[2] == 1 else GatheredRows(mask, rows)
    if mask is None and (not causal or n_queries == 1):
        return key, None
    if mask is None and key.shape[2] > n_queries and not past:
        key = key[:, :, :n_queries]  # an empty static cache hands over its unwritten tail too
    causal_rows = CausalRows(rows + (key.shape[2] - n_queries), key.shape[2])
    if mask is None:
        return key, causal_rows
    padding = mask.to(torch.bool)[:, None, None, : key.shape[2]]
    seen = causal_rows.keys <= causal_rows.last[:, :, None]
    return key, GatheredRows(
        seen[:, None] & padding, torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    )


class RowLayout:
    """Where the readout rows of a forward pass are.

    Args:
        request: The request.
        rows: `[samples, length]` bool.
        batch: Rows of the batch; beams of a sample follow one another.
    """

    def __init__(self, request: FlexRequest, rows: Tensor, batch: int):
        beams_each = batch // len(request.samples)
        for i, sample in enumerate(request.samples):
            rows[i] &= bool(sample.streams)
        counts = rows.sum(dim=1)
        self.n_rows = int(counts.max()) if len(counts) else 0
        # per sample: (batch row, query index, slot) of every readout row, beams of a sample side by side
        self.index: list[tuple[Tensor, Tensor, Tensor]] = []
        self.slots = torch.zeros(batch, max(self.n_rows, 1), dtype=torch.long)
        for i, mask in enumerate(rows):
            at = mask.nonzero()[:, 0]
            beams = torch.arange(i * beams_each, (i + 1) * beams_each)
            self.slots[beams, : len(at)] = at
            order = torch.arange(len(at))
            self.index.append(
                (beams.repeat_interleave(len(at)), at.repeat(beams_each), order.repeat(beams_each))
            )
        width = max((len(s.cells) for s in request.samples), default=0)
        # by sample, medium and device: what selectors may depend on in every layer, for a row at index 0
        self.keys: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
        self.cells = torch.zeros(batch, width, dtype=torch.long)
        for i, sample in enumerate(request.samples):
            self.cells[i * beams_each : (i + 1) * beams_each, : len(sample.cells)] = sample.cells
