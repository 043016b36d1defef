"""Per-forward state: which rows read, what each layer selected, and the work of one layer's attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..grid import Grid
from ..hierarchical_attention import hierarchical_attention
from ..row_attention import RegionRows, row_attention, with_sinks
from ..trace import TraceRecord
from .levels import Attention, attention_by_level, open_levels
from .rows import RowLayout, row_keys
from .state import FlexRequest
from .static import StaticFine
from .teaching import Teaching
from .training_checks import check_reentrant_features, trains_together

if TYPE_CHECKING:
    from .binding import FlexBinding


class FlexContext:
    """One forward pass: which rows read, and what each layer selected for the next.

    Selections are kept per layer, because gradient checkpointing recomputes layers in another order.
    """

    def __init__(
        self,
        binding: FlexBinding,
        request: FlexRequest,
        past: int,
        length: int,
        batch: int,
        alpha: float | Tensor,
    ):
        self.binding = binding
        self.request = request
        self.past = past
        self.length = length
        self.batch = batch
        self.alpha = alpha
        self.beams = batch // len(request.samples)
        # grad mode as the caller sees it: inside a checkpointed layer it may look switched off
        self.keep = not torch.is_grad_enabled()
        self.reentrant = False  # whether a layer ran under a reentrant checkpoint
        self.attended = False  # whether any layer's attention was reached
        self.static: StaticFine | None = None  # what static mode projects in this forward
        self.teaching: Teaching | None = None  # the selection loss of a training step that has one
        self.selected: dict[int, list[Tensor | None]] = {}
        self.traces = [(trace, trace.number(request)) for trace in binding.traces]
        self._recorded = False
        self._moved: dict[Any, Tensor] = {}
        self._layer_keys: dict[Any, tuple[Tensor, ...]] = {}
        # a decode step's rows are those of the step before; working them out anew would be most of its overhead
        steady = length == 1 and request.prefix is not None and past >= request.prefix.shape[1]
        layout = request.layouts.get(batch) if steady else None
        if layout is None:
            layout = RowLayout(request, request.rows(past, length), batch)
            if steady:
                request.layouts[batch] = layout
        self.layout, self.n_rows, self.index = layout, layout.n_rows, layout.index
        self.slots, self.cells = layout.slots, layout.cells
        # one row of one sample, as in most decoding: no gathering, no scattering
        self.single = batch == 1 and self.n_rows == 1 and len(request.samples) == 1
        self.last_cell = request.last_cell

    def _on(self, name: Any, tensor: Tensor, device: torch.device) -> Tensor:
        """A CPU index tensor on a layer's device, moved once per forward."""
        if tensor.device == device:
            return tensor
        key = (name, device)
        if key not in self._moved:
            self._moved[key] = tensor.to(device, non_blocking=True)
        return self._moved[key]

    # ------------------------------------------------------------------ positions

    def record_positions(self, position_ids: Tensor | None) -> None:
        """Note the rotary positions that the model gave to coarse tokens passing through in this forward."""
        if self._recorded:
            return
        self._recorded = True
        if self.past > self.last_cell and self.request.max_position:
            self.request.max_position += self.length  # past the media there is nothing to learn but this
            return
        if position_ids is None:
            position_ids = torch.arange(self.past, self.past + self.length)[None]
        ids = position_ids.detach().to("cpu")
        self.request.record_positions(ids, self.past, self.length, self.beams)

    # ------------------------------------------------------------------ attention

    def wants_lse(self, module: torch.nn.Module) -> bool:
        """Whether this is a decode step of a layer that selects or reads, outside of a graph."""
        one = self.length == 1 and bool(self.n_rows) and not torch.compiler.is_compiling()
        return one and self.binding.layer_of(module) in self.binding.busy

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        out: Tensor,
        scaling: float,
        causal: bool,
        kwargs: dict[str, Any],
        plain_lse: Tensor | None = None,
    ) -> Tensor:
        """Select with this layer's attention, and let the readout rows read what the layer before selected.

        Args:
            module: The layer's attention module.
            query: `[B, Hq, Q, D]` rotated.
            key: `[B, Hkv, S, D]` rotated, cache included.
            mask: As the base backend got it.
            out: `[B, Q, Hq, Dv]`, the base backend's output.
            scaling: Factor on the logits.
            causal: Whether a missing mask means causal.
            kwargs: The attention call's other arguments.
            plain_lse: `[B, Hq, Q]` log-sum-exp of the ordinary keys, if the base backend handed it out.

        Returns:
            `out`, with the readout rows replaced where they read something.
        """
        layer = self.binding.layer_of(module)
        if layer is None:
            return out
        if torch.compiler.is_compiling():
            return self._broken_out(layer, query, key, mask, out, scaling, causal, kwargs)
        return self._attend(layer, query, key, mask, out, scaling, causal, kwargs, plain_lse)

    # what is selected decides the shapes here, so a graph would only be broken in many places instead of one
    @torch.compiler.disable
    def _broken_out(self, *args: Any) -> Tensor:
        return self._attend(*args)

    def _attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        out: Tensor,
        scaling: float,
        causal: bool,
        kwargs: dict[str, Any],
        plain_lse: Tensor | None = None,
    ) -> Tensor:
        self.attended = True
        if self.binding.crosses:
            self.request.check_cells(key.shape[2])
        elif self.binding.ear is None:
            self.record_positions(kwargs.get("position_ids"))
        if not self.n_rows:
            return self._joined(layer, out)
        selects = layer in self.binding.selecting or (bool(self.traces) and layer in self.binding.traced)
        chosen = self._chosen(layer)
        if not selects and chosen is None:
            return self._joined(layer, out)

        sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
        offset = query.shape[2] - self.length  # some layers are handed only the last queries
        rows = self._on("slots", self.slots, query.device)
        rows = rows + offset if offset else rows
        if query.shape[2] == 1:
            q = query
        else:
            q = query[torch.arange(self.batch, device=query.device)[:, None], :, rows].transpose(1, 2)
        key, row_mask = row_keys(key, mask, rows, query.shape[2], causal, self.past)
        cells = None
        if selects:
            cells = self._on("cells", self.cells, query.device)
            if self.last_cell >= key.shape[2]:  # a chunked prefill hasn't reached them all
                cells = cells.clamp(max=key.shape[2] - 1)
        _, lse, scores = row_attention(
            q,
            key,
            None,
            row_mask,
            scaling=scaling,
            softcap=softcap,
            cells=cells,
            sinks=sinks,
            known=plain_lse,
        )
        if self.teaching is not None and layer in self.binding.selecting:
            assert cells is not None and scores is not None
            where = (q, key, cells, scores, with_sinks(lse, sinks))
            self.teaching.selects(layer, *where, scaling=scaling, softcap=softcap)
        read: dict[int, Attention] = {}
        if chosen is None:
            out = self._joined(layer, out)
        else:
            exact = with_sinks(lse, sinks)
            out = self._read(
                layer, chosen, query, offset, exact, out, scaling, softcap, read if selects else None
            )
        if selects:
            assert scores is not None
            self._select(layer, scores, key.shape[2], read)
        return out

    def _joined(self, layer: int, out: Tensor) -> Tensor:
        """The output of a layer that read nothing, in reach of its fine projections where other processes wait."""
        if layer not in self.binding.reads_from or not trains_together(self.binding.fine):
            return out
        zero = self.binding.fine.zero(layer)
        return out if zero is None else out + zero.to(out.device, out.dtype)

    def _chosen(self, layer: int) -> list[tuple[Tensor, Tensor] | None] | None:
        """Per sample (selection `[n, U]`, its U regions on the CPU), or None where nothing was selected."""
        source = self.binding.reads_from.get(layer)
        if source is None or source not in self.selected:
            return None
        out: list[tuple[Tensor, Tensor] | None] = []
        for i, selected in enumerate(self.selected[source]):
            if selected is None:
                out.append(None)
                continue
            # most decode steps choose what the step before chose
            known = self.request.picks.get((source, i)) if self.length == 1 else None
            if known is not None and known[0].shape == selected.shape and torch.equal(known[0], selected):
                out.append(known[1])
                continue
            regions = selected.any(dim=0).nonzero()[:, 0]
            pick = (selected.index_select(1, regions), regions.to("cpu")) if len(regions) else None
            out.append(pick)
            if self.length == 1:
                self.request.picks[source, i] = selected, pick
        return out if any(o is not None for o in out) else None

    def _select(self, layer: int, scores: Tensor, n_keys: int, read: dict[int, Attention]) -> None:
        """Turn head-summed probabilities `[B, R, cells]` into a selection per sample.

        Where media have finer levels, `read` says by sample what the fine tokens read in this layer got.
        """
        result: list[Tensor | None] = []
        records = []
        for i, sample in enumerate(self.request.samples):
            if not sample.media or not len(self.index[i][0]):
                result.append(None)
                continue
            if self.single:
                own = scores[0]
            else:
                batch_rows, slots = (
                    self._on(("index", i, j), self.index[i][j], scores.device) for j in (0, 2)
                )
                own = scores[batch_rows, slots][:, : len(sample.cells)]
            if sample.last_cell >= n_keys:  # a chunked prefill hasn't reached this medium yet
                own = own.masked_fill(self._on(("cells", i), sample.cells, scores.device) >= n_keys, 0.0)
            parts: dict[int, Tensor] = {}
            for m, stream in enumerate(sample.media):
                part = own if len(sample.media) == 1 else own[:, sample.span(m)]
                keys = self._keys(i, m, scores.device)[layer]
                parts[m] = self.binding.selector.select(part, stream.grid, sample.selectable(m), keys)
                if m in sample.chains:
                    parts |= open_levels(
                        sample, m, self.binding.selector, part, parts[m], read.get(i, {}), keys
                    )
                if self.traces:
                    for level, n in enumerate(sample.chains.get(m, [m]), start=1):
                        grid = sample.streams[n].grid
                        records += self._records(layer, i, m, level, grid, part, parts[n])
            result.append(
                parts[0] if len(parts) == 1 else torch.cat([parts[m] for m in sorted(parts)], dim=1)
            )
        self.selected[layer] = result
        for trace, number in self.traces:
            trace.add([TraceRecord(number, *record) for record in records])

    def _keys(self, sample: int, medium: int, device: torch.device) -> tuple[Tensor, ...]:
        """By layer `[R, 2]` what selectors may depend on: the layer, and the row counted from the medium on."""
        name = (sample, medium, device)
        if name not in self._layer_keys:
            if name not in self.layout.keys:
                state = self.request.samples[sample]
                rows = (self.index[sample][1] - state.cells[state.cell_at[medium]]).to(device)
                layers = torch.arange(max(self.binding.sites) + 1, device=device)
                keys = torch.stack(torch.broadcast_tensors(layers[:, None], rows[None]), dim=2)
                self.layout.keys[name] = keys, torch.tensor([0, 1], device=device)
            keys, unit = self.layout.keys[name]
            self._layer_keys[name] = torch.add(keys, unit, alpha=self.past).unbind(0)
        return self._layer_keys[name]

    def _records(
        self, layer: int, sample: int, medium: int, level: int, grid: Grid, scores: Tensor, regions: Tensor
    ) -> list[tuple[Any, ...]]:
        read_in = self.binding.read_in.get(layer)
        scores, regions = scores.float().cpu(), regions.cpu()
        batch_rows, queries, _ = self.index[sample]
        return [
            (layer, read_in, int(q) + self.past, int(b), sample, medium, scores[r], regions[r], grid, level)
            for r, (b, q) in enumerate(zip(batch_rows, queries, strict=True))
        ]

    def _read(
        self,
        layer: int,
        chosen: list[tuple[Tensor, Tensor] | None],
        query: Tensor,
        offset: int,
        lse: Tensor,
        out: Tensor,
        scaling: float,
        softcap: float | None,
        read: dict[int, Attention] | None,
    ) -> Tensor:
        """`out` with what the readout rows read; their attention to it goes into `read` if finer levels need it."""
        where_b, where_q, new = [], [], []
        whole = self.single and query.shape[2] == 1 and out.shape[1] == 1  # the one row is all there is
        if len(self.request.samples) > 1:
            self.request.warm(layer, [None if pick is None else pick[1] for pick in chosen], self.keep)
        for i, pick in enumerate(chosen):
            if pick is None:
                continue
            selected, regions = pick
            key, value = self._fine(layer, i, regions)
            sample = self.request.samples[i]
            # one row reads all that was chosen: what it can't see are the short ends of ragged regions
            mask = None
            if len(self.index[i][0]) > 1 or sample.ragged:
                valid = sample.valid(regions).to(query.device)
                mask = RegionRows(selected[None].to(query.device), valid[None])
            if whole:
                rows, row_lse, plain = query, lse, out
            else:
                b, q, slots = (
                    self._on(("index", i, j), t, query.device) for j, t in enumerate(self.index[i])
                )
                q = q + offset if offset else q
                rows = query[b, :, q].transpose(0, 1)[None]
                row_lse = lse if self.single else lse[b, :, slots].transpose(0, 1)[None]
                plain = out[b, q][None]
                where_b.append(b)
                where_q.append(q)
            if read is not None and sample.chains:
                read[i] = attention_by_level(sample, regions, rows, key, mask, scaling, softcap)
            if self.teaching is not None:
                self.teaching.reads(
                    self, layer, i, pick, rows, key, mask, row_lse, scaling=scaling, softcap=softcap
                )
            merged = hierarchical_attention(
                rows,
                None,
                None,
                key,
                value,
                fine_mask=mask,
                scaling=scaling,
                softcap=softcap,
                alpha=self.alpha,
                plain=plain,
                lse=row_lse,
            )
            if whole:
                return merged.to(out.dtype)
            new.append(merged[0])
        index = (torch.cat(where_b), torch.cat(where_q))
        values = torch.cat(new).to(out.dtype)
        if torch.is_grad_enabled() and (out.requires_grad or values.requires_grad):
            return out.index_put(index, values)
        out[index] = values
        return out

    def _fine(self, layer: int, sample: int, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Fine keys `[1, Hkv, n * P, D]` and values of a sample's regions in one layer."""
        state, project = self.request.samples[sample], self.projection(layer, sample)
        if not self.keep:
            if not torch.is_grad_enabled():
                self.reentrant = True
                for m, _, local in state.by_medium(regions):
                    check_reentrant_features(state.streams[m].source, local)
            key, value = (pages.flatten(0, 1).transpose(0, 1)[None] for pages in project(regions))
            return key, value
        static = self.request.static
        if static is None or not static.holds(sample, state):
            static = self._begun()
        if static is not None:
            return static.joined(self, layer, sample, regions, state.page)
        # in decoding, the regions of one step are mostly those of the next
        return self.request.kv.joined(layer, sample, regions, state.n_regions, project, hold=self.length == 1)

    def projection(self, layer: int, sample: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """What projects regions of a sample in a layer."""
        return partial(self.binding.project, self.request, layer, self.request.samples[sample])

    def _begun(self) -> StaticFine | None:
        """In static mode, all fine keys and values, layer by layer as they are read; None before that can be."""
        if not self.binding.config.static or self.binding.crosses or not self.request.knows_positions:
            return None
        self.static = self.static or StaticFine(self)
        return self.static
