"""Static mode: all regions projected after the prompt, and decode steps of fixed shapes without a sync.

A step selects by a mask over all of a medium's fine keys instead of fetching what it selected, so the same numbers
come out of a graph that `torch.compile` captures whole. It pays in memory and in attention over all fine keys.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hierarchical_attention import hierarchical_attention
from ..row_attention import GatheredRows, RegionRows, row_attention, with_sinks
from .kv_cache import cache_among
from .offload import execution_device
from .state import FlexRequest, SampleState

if TYPE_CHECKING:
    from .binding import FlexBinding
    from .context import FlexContext


class StaticFine:
    """A request's fine keys and values, dense: every region of every sample in every reading layer.

    Args:
        context: The forward pass that brought the last of the media's coarse tokens.
    """

    def __init__(self, context: FlexContext):
        self.samples, binding = list(context.request.samples), context.binding
        self.streams = [sample.streams for sample in self.samples]
        self.page = max(s.page for s in self.samples)
        self.regions = max(s.n_regions for s in self.samples)
        cells = torch.zeros(len(self.samples), max(len(s.cells) for s in self.samples), dtype=torch.long)
        for i, sample in enumerate(self.samples):
            cells[i, : len(sample.cells)] = sample.cells
        # by layer: keys [S, Hkv, U, P, D] and values
        self._dense: dict[int, tuple[Tensor, Tensor]] = {}
        # the same with which tokens are real, [S, U, P]; filled when all layers are there
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        # by layer that selects: the sequence indices of coarse tokens [S, M]
        self.cells = {
            layer: cells.to(execution_device(binding.sites[layer].attention)) for layer in binding.selecting
        }

    def dense(self, context: FlexContext, layer: int) -> tuple[Tensor, Tensor]:
        """Keys `[S, Hkv, U, P, D]` and values of a layer, projected when they are first asked for."""
        if layer in self._dense:
            return self._dense[layer]
        request = context.request
        held: tuple[Tensor, ...] = ()
        for i, sample in enumerate(self.samples):
            at = 0
            for regions in context.binding.parts(sample, torch.arange(sample.n_regions)):
                if not len(regions):
                    continue
                # each run goes where it stays: copying all of them once more would cost a fifth of projecting them
                fresh = request.kv.get_unkept(
                    layer, i, regions, sample.n_regions, context.projection(layer, i)
                )
                held = held or tuple(self._room(pages) for pages in fresh)
                for whole, pages in zip(held, fresh, strict=True):
                    whole[i, :, at : at + len(regions), : pages.shape[1]] = pages.permute(2, 0, 1, 3)
                at += len(regions)
                del fresh, pages  # or they would be there while the next run is made
        key, value = held
        self._dense[layer] = key, value
        return key, value

    def _room(self, pages: Tensor) -> Tensor:
        shape = len(self.samples), pages.shape[2], self.regions, self.page, pages.shape[3]
        full = all(s.n_regions == self.regions and s.page == self.page for s in self.samples)
        return pages.new_empty(shape) if full else pages.new_zeros(shape)

    def finish(self, context: FlexContext) -> None:
        """Project what isn't yet, and note which tokens may be read."""
        held = {layer: self.dense(context, layer) for layer in context.binding.reads_from}
        valid = torch.zeros(len(self.samples), self.regions, self.page, dtype=torch.bool)
        for i, sample in enumerate(self.samples):
            if sample.streams:
                valid[i, : sample.n_regions, : sample.page] = sample.valid(torch.arange(sample.n_regions))
        self.layers = {layer: (*fine, valid.to(fine[0].device)) for layer, fine in held.items()}

    def holds(self, index: int, sample: SampleState) -> bool:
        """Whether what it has for a sample is of the media that the sample has now."""
        return index < len(self.streams) and self.streams[index] is sample.streams

    def joined(
        self, context: FlexContext, layer: int, index: int, regions: Tensor, page: int
    ) -> tuple[Tensor, Tensor]:
        """Keys `[1, Hkv, n * page, D]` and values of some of a sample's regions."""
        dense = self.dense(context, layer)
        at = regions.to(dense[0].device)
        key, value = (t[index].index_select(1, at)[:, :, :page].flatten(1, 2)[None] for t in dense)
        return key, value


class StaticContext:
    """One decode step in static mode: one new token per batch row, and every row reads.

    Args:
        binding: The model's binding.
        request: With its `static` filled.
        past: Tokens in the cache, as the cache says it (a number, or a tensor for static caches).
        batch: Batch rows.
        alpha: As in training.
    """

    def __init__(
        self, binding: FlexBinding, request: FlexRequest, past: Any, batch: int, alpha: float | Tensor
    ):
        assert request.static is not None
        self.binding = binding
        self.request = request
        self.fine: StaticFine = request.static
        self.past = past
        self.beams = batch // len(request.samples)
        self.alpha = alpha
        self.selected: dict[int, Tensor] = {}

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
        """Arguments as for `FlexContext.attend`; `query` is `[B, Hq, 1, D]`."""
        layer = self.binding.layer_of(module)
        if layer is None:
            return out
        selects = layer in self.binding.selecting
        source = self.binding.reads_from.get(layer)
        if not selects and source is None:
            return out
        sinks, softcap = kwargs.get("s_aux"), kwargs.get("softcap")
        rows = None
        if mask is not None:
            if mask.ndim == 2:
                mask = mask.to(torch.bool)[:, None, None, : key.shape[2]]
            key = key[:, :, : mask.shape[3]]
            rows = GatheredRows(
                mask, torch.zeros_like(mask[:, 0, :, 0], dtype=torch.long).expand(len(query), 1)
            )
        cells = self.fine.cells[layer].repeat_interleave(self.beams, dim=0) if selects else None
        _, lse, scores = row_attention(
            query, key, None, rows, scaling=scaling, softcap=softcap, cells=cells, sinks=sinks
        )
        if scores is not None:
            self.selected[layer] = self._select(layer, scores[:, 0])
        if source is None:
            return out
        fine_key, fine_value, valid = self.fine.layers[layer]
        samples, beams = len(valid), self.beams
        # beams of a sample read the same keys: they become rows of one attention
        merged = hierarchical_attention(
            query.view(samples, beams, *query.shape[1::2]).transpose(1, 2),
            None,
            None,
            fine_key.flatten(2, 3),
            fine_value.flatten(2, 3),
            fine_mask=RegionRows(self.selected[source].unflatten(0, (samples, beams)), valid),
            scaling=scaling,
            softcap=softcap,
            alpha=self.alpha,
            plain=out.reshape(samples, beams, *out.shape[2:]),
            lse=with_sinks(lse, sinks).view(samples, beams, -1).transpose(1, 2),
        )
        return merged.flatten(0, 1)[:, None].to(out.dtype)

    def _select(self, layer: int, scores: Tensor) -> Tensor:
        """Regions `[B, U]` from head-summed probabilities `[B, M]`."""
        regions = self.fine.layers[self.binding.read_in[layer]][2].shape[1]
        result = []
        for i, sample in enumerate(self.request.samples):
            own = scores[i * self.beams : (i + 1) * self.beams]
            parts = [own.new_zeros(self.beams, 0, dtype=torch.bool)]
            cells = self.fine.cells[layer][i]
            for m, stream in enumerate(sample.streams):
                at = (self.past - cells[sample.cell_at[m]]).expand(self.beams)
                keys = torch.stack([torch.full_like(at, layer), at], dim=1)
                part = own[:, sample.cell_at[m] : sample.cell_at[m + 1]]
                parts.append(self.binding.selector.select(part, stream.grid, stream.selectable, keys))
            chosen = torch.cat(parts, dim=1)
            result.append(torch.nn.functional.pad(chosen, (0, regions - chosen.shape[1])))
        return torch.cat(result)


def static_step(
    binding: FlexBinding, request: Any, inputs: dict[str, Any], alpha: float | Tensor | None
) -> StaticContext | None:
    """The context of a forward pass that is a decode step in static mode, else None.

    Args:
        binding: The model's binding.
        request: What the call was given as `flex_streams`, or else what rides on its cache.
        inputs: The call's other arguments.
        alpha: As given.
    """
    cache = cache_among(inputs)
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(request, FlexRequest) or request.static is None or cache is None or tokens is None:
        return None
    if (
        tokens.shape[1] != 1
        or torch.is_grad_enabled()
        or binding.traces
        or binding.carried
        or binding.crosses
    ):
        return None
    past = cache.get_seq_length()
    if not torch.compiler.is_compiling():
        # a compiled step is one of many alike; looking at the state again and again would break its graph
        assert request.prefix is not None
        fits = all(request.static.holds(i, sample) for i, sample in enumerate(request.samples))
        if not fits or int(past) < request.prefix.shape[1] or request.weights != binding.weights_version():
            return None
    # static caches count in place while the layers run
    return StaticContext(binding, request, past + 0, tokens.shape[0], 1.0 if alpha is None else alpha)


@torch.compiler.disable
def project_all(context: FlexContext) -> None:
    """After a forward pass in static mode: project what isn't yet, once all media have passed through."""
    request = context.request
    if not context.keep or context.binding.crosses or not any(s.streams for s in request.samples):
        return
    if not request.knows_positions:
        return
    if request.static is None or not all(request.static.holds(i, s) for i, s in enumerate(request.samples)):
        static = StaticFine(context) if context.static is None else context.static
        static.finish(context)
        request.static = static
        request.kv.clear()


def running(binding: FlexBinding) -> AbstractContextManager[None]:
    """`binding.running()`, except in a graph: taking a lock would break it, and `generate` has marked the request."""
    return nullcontext() if torch.compiler.is_compiling() else binding.running()
