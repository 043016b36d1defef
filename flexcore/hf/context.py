"""Per-forward state: which rows read, what each layer selected, and the work of one layer's attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import StreamError
from ..grid import Grid
from ..hierarchical_attention import hierarchical_attention
from ..row_attention import RegionRows, row_attention, with_sinks
from ..tiled_source import warm
from ..trace import TraceRecord
from .levels import Attention, attention_by_level, open_levels
from .rows import RowLayout, row_keys
from .state import FlexRequest
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
        self.teaching: Teaching | None = None  # the selection loss of a training step that has one
        self.selected: dict[int, list[Tensor | None]] = {}
        self.traces = [(trace, trace.number(request)) for trace in binding.traces]
        self._recorded = False
        self._moved: dict[Any, Tensor] = {}
        # a decode step's rows are those of the step before; working them out anew would be most of its overhead
        steady = length == 1 and request.prefix is not None and past >= request.prefix.shape[1]
        layout = request.layouts.get(batch) if steady else None
        if layout is None:
            layout = RowLayout(request, request.rows(past, length), batch)
            if steady:
                request.layouts[batch] = layout
        self.n_rows, self.index, self.slots, self.cells = (
            layout.n_rows,
            layout.index,
            layout.slots,
            layout.cells,
        )
        # one row of one sample, as in most decoding: no gathering, no scattering
        self.single = batch == 1 and self.n_rows == 1 and len(request.samples) == 1

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
        if self.past > self.request.last_cell and self.request.max_position:
            self.request.max_position += self.length  # past the media there is nothing to learn but this
            return
        if position_ids is None:
            position_ids = torch.arange(self.past, self.past + self.length)[None]
        ids = position_ids.detach().to("cpu")
        self.request.max_position = max(self.request.max_position, int(ids.max()))
        for i, sample in enumerate(self.request.samples):
            here = (sample.cells >= self.past) & (sample.cells < self.past + self.length)
            if not bool(here.any()):
                continue
            row = min(i * self.beams, ids.shape[-2] - 1)
            new = ids[..., row, :][..., sample.cells[here] - self.past]
            if sample.rope is None:
                sample.rope = new.new_zeros(*new.shape[:-1], len(sample.cells))
            elif bool((sample.rope_known & here).any()) and not torch.equal(sample.rope[..., here], new):
                self.request.static = None
                self.request.kv.clear(i)  # the same tokens at other positions: their fine keys are stale
            sample.rope[..., here] = new
            sample.rope_known |= here

    def _check_cells(self, n_keys: int) -> None:
        """In cross-attention the encoder's output must hold every coarse token; only here its length is known."""
        for i, sample in enumerate(self.request.samples):
            if len(sample.cells) and int(sample.cells.max()) >= n_keys:
                raise StreamError(
                    f"flex_streams sample {i}: coarse_positions must lie in the encoder's output of {n_keys} states, "
                    f"got {int(sample.cells.max())}"
                )

    # ------------------------------------------------------------------ attention

    # what is selected decides the shapes here, so a graph would only be broken in many places instead of one
    @torch.compiler.disable
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

        Returns:
            `out`, with the readout rows replaced where they read something.
        """
        layer = self.binding.layer_of(module)
        if layer is None:
            return out
        self.attended = True
        if self.binding.crosses:
            self._check_cells(key.shape[2])
        elif self.binding.ear is None:
            self.record_positions(kwargs.get("position_ids"))
        if not self.n_rows:
            return self._joined(layer, out)
        selects = layer in self.binding.selecting or (bool(self.traces) and layer in self.binding.traced)
        chosen = self._chosen(layer)
        if not selects and chosen is None:
            return self._joined(layer, out)

        sinks = kwargs.get("s_aux")
        softcap = kwargs.get("softcap")
        offset = query.shape[2] - self.length  # some layers are handed only the last queries
        rows = self._on("slots", self.slots, query.device) + offset
        if query.shape[2] == 1:
            q = query
        else:
            q = query[torch.arange(self.batch, device=query.device)[:, None], :, rows].transpose(1, 2)
        key, row_mask = row_keys(key, mask, rows, query.shape[2], causal, self.past)
        cells = None
        if selects:
            cells = self._on("cells", self.cells, query.device).clamp(max=key.shape[2] - 1)
        _, lse, scores = row_attention(
            q, key, None, row_mask, scaling=scaling, softcap=softcap, cells=cells, sinks=sinks
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
        for selected in self.selected[source]:
            regions = None if selected is None else selected.any(dim=0).nonzero()[:, 0]
            if selected is None or regions is None or not len(regions):
                out.append(None)
            else:
                out.append((selected.index_select(1, regions), regions.to("cpu")))
        return out if any(o is not None for o in out) else None

    def _select(self, layer: int, scores: Tensor, n_keys: int, read: dict[int, Attention]) -> None:
        """Turn head-summed probabilities `[B, R, cells]` into a selection per sample.

        Where media have finer levels, `read` says by sample what the fine tokens read in this layer got.
        """
        result: list[Tensor | None] = []
        records = []
        for i, sample in enumerate(self.request.samples):
            batch_rows, queries, slots = (
                self._on(("index", i, j), t, scores.device) for j, t in enumerate(self.index[i])
            )
            if not sample.media or not len(queries):
                result.append(None)
                continue
            own = scores[0] if self.single else scores[batch_rows, slots][:, : len(sample.cells)]
            if sample.last_cell >= n_keys:  # a chunked prefill hasn't reached this medium yet
                own = own.masked_fill(self._on(("cells", i), sample.cells, scores.device) >= n_keys, 0.0)
            at = queries + self.past
            parts: dict[int, Tensor] = {}
            for m, stream in enumerate(sample.media):
                part = own[:, sample.span(m)]
                keys = self._keys(i, m, at)[layer]
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

    def _keys(self, sample: int, medium: int, at: Tensor) -> Tensor:
        """`[layers, R, 2]` what selectors may depend on, for all layers at once: layer, and row from the medium on."""
        name = ("keys", sample, medium, at.device)
        if name not in self._moved:
            state = self.request.samples[sample]
            rows = at - state.cells[state.cell_at[medium]].to(at.device)
            layers = torch.arange(max(self.binding.sites) + 1, device=at.device)
            self._moved[name] = torch.stack(torch.broadcast_tensors(layers[:, None], rows[None]), dim=2)
        return self._moved[name]

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
        if len(self.request.samples) > 1:
            self._warm(layer, chosen)
        for i, pick in enumerate(chosen):
            if pick is None:
                continue
            selected, regions = pick
            b, q, slots = (self._on(("index", i, j), t, query.device) for j, t in enumerate(self.index[i]))
            q = q + offset
            key, value = self._fine(layer, i, regions)
            sample = self.request.samples[i]
            # one row reads all that was chosen: what it can't see are the short ends of ragged regions
            mask = None
            if len(b) > 1 or sample.ragged:
                valid = sample.valid(regions).to(query.device)
                mask = RegionRows(selected[None].to(query.device), valid[None])
            rows = query if self.single and query.shape[2] == 1 else query[b, :, q].transpose(0, 1)[None]
            if read is not None and sample.chains:
                read[i] = attention_by_level(sample, regions, rows, key[None], mask, scaling, softcap)
            row_lse = lse if self.single else lse[b, :, slots].transpose(0, 1)[None]
            if self.teaching is not None:
                self.teaching.reads(
                    self, layer, i, pick, rows, key[None], mask, row_lse, scaling=scaling, softcap=softcap
                )
            merged = hierarchical_attention(
                rows,
                None,
                None,
                key[None],
                value[None],
                fine_mask=mask,
                scaling=scaling,
                softcap=softcap,
                alpha=self.alpha,
                plain=out if self.single and out.shape[1] == 1 else out[b, q][None],
                lse=row_lse,
            )
            where_b.append(b)
            where_q.append(q)
            new.append(merged[0])
        if self.single and out.shape[1] == 1:
            return new[0][None].to(out.dtype)
        index = (torch.cat(where_b), torch.cat(where_q))
        values = torch.cat(new).to(out.dtype)
        if torch.is_grad_enabled() and (out.requires_grad or values.requires_grad):
            return out.index_put(index, values)
        out[index] = values
        return out

    def _warm(self, layer: int, chosen: list[tuple[Tensor, Tensor] | None]) -> None:
        """Let sources that share an encoder encode what all samples lack in this layer in common micro-batches."""
        wanted = []
        for i, pick in enumerate(chosen):
            if pick is not None:
                sample = self.request.samples[i]
                missing = self.request.kv.missing(layer, i, pick[1]) if self.keep else pick[1]
                wanted += [(sample.streams[m].source, local) for m, _, local in sample.by_medium(missing)]
        warm(wanted)

    def _fine(self, layer: int, sample: int, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Fine keys `[Hkv, n * P, D]` and values of a sample's regions in one layer."""
        state = self.request.samples[sample]

        def project(missing: Tensor) -> tuple[Tensor, Tensor]:
            return self.binding.project(self.request, layer, state, missing)

        if not self.keep:
            if not torch.is_grad_enabled():
                self.reentrant = True
                for m, _, local in state.by_medium(regions):
                    check_reentrant_features(state.streams[m].source, local)
            return _heads_first(project(regions))
        static = self.request.static
        if static is not None and static.holds(sample, state):
            return _heads_first(static.pages(layer, sample, regions, state.page))
        # in decoding, the regions of one step are mostly those of the next
        return self.request.kv.joined(layer, sample, regions, state.n_regions, project, hold=self.length == 1)


def _heads_first(pages: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Pages `[n, P, Hkv, D]` as one run of tokens `[Hkv, n * P, D]`."""
    key, value = (t.flatten(0, 1).transpose(0, 1) for t in pages)
    return key, value
