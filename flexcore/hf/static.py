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
        samples, binding = context.request.samples, context.binding
        self.streams = [sample.streams for sample in samples]
        regions, page = max(s.n_regions for s in samples), max(s.page for s in samples)
        valid = torch.zeros(len(samples), regions, page, dtype=torch.bool)
        cells = torch.zeros(len(samples), max(len(s.cells) for s in samples), dtype=torch.long)
        for i, sample in enumerate(samples):
            cells[i, : len(sample.cells)] = sample.cells
            if sample.streams:
                valid[i, : sample.n_regions, : sample.page] = sample.valid(torch.arange(sample.n_regions))
        # by layer: keys [S, Hkv, U, P, D], values, and which tokens are real [S, U, P]
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for layer in binding.reads_from:
            keys: list[Tensor | None] = []
            values: list[Tensor | None] = []
            for i, sample in enumerate(samples):
                fine: Any = (None, None)
                if sample.streams:
                    fine = context._fine(layer, i, torch.arange(sample.n_regions))
                    fine = (t.unflatten(1, (sample.n_regions, sample.page)) for t in fine)
                for held, part in zip((keys, values), fine, strict=True):
                    held.append(part)
            key, value = (self._dense(parts, regions, page) for parts in (keys, values))
            self.layers[layer] = (key, value, valid.to(key.device))
        # by layer that selects: the sequence indices of coarse tokens [S, M]
        self.cells = {
            layer: cells.to(execution_device(binding.sites[layer].attention)) for layer in binding.selecting
        }

    @staticmethod
    def _dense(parts: list[Tensor | None], regions: int, page: int) -> Tensor:
        like = next(p for p in parts if p is not None)
        out = like.new_zeros(len(parts), like.shape[0], regions, page, like.shape[-1])
        for row, part in zip(out, parts, strict=True):
            if part is not None:
                row[:, : part.shape[1], : part.shape[2]] = part
        return out

    def holds(self, index: int, sample: SampleState) -> bool:
        """Whether what it has for a sample is of the media that the sample has now."""
        return index < len(self.streams) and self.streams[index] is sample.streams

    def pages(self, layer: int, index: int, regions: Tensor, page: int) -> tuple[Tensor, Tensor]:
        """Keys `[n, page, Hkv, D]` and values of some of a sample's regions."""
        key, value, _ = self.layers[layer]
        at = regions.to(key.device)
        key, value = (t[index, :, at, :page].movedim(0, 2) for t in (key, value))
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
        request.static = StaticFine(context)
        request.kv.clear()


def running(binding: FlexBinding) -> AbstractContextManager[None]:
    """`binding.running()`, except in a graph: taking a lock would break it, and `generate` has marked the request."""
    return nullcontext() if torch.compiler.is_compiling() else binding.running()
