"""FlexBinding: what `wrap` found out about a model, and how its layers' fine keys and values are made."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FlexConfig
from ..errors import StreamError, WrapStateError
from ..positions import fine_positions, official_tables
from ..selection import Selector, make_selector
from ..sources import TensorSource
from ..streams import StreamBatch
from ..trace import Trace
from .fine_projections import FineProjections
from .interface import registered_name
from .offload import execution_device
from .projection import FineProjection, shadow_key_value
from .shared import SharedProjection
from .site import AttentionSite, Ear, rotary_tables
from .state import FlexRequest, SampleState
from .weights_version import WeightsVersion

# Fine tokens that go through a projection at once: enough for a matrix product to be as fast as it gets, few enough
# for what is made on the way (rotated keys, their halves) to stay in a processor's cache.
PART_TOKENS = 1024


class FlexBinding:
    """Everything about a wrapped model that isn't a request's.

    Args:
        config: With `first_layer` and `layers` filled in.
        sites: The attention of every eligible layer, in order.
        fine: Fine projections by layer, registered on the model.
        stubs: Per layer, a stand-in for the query projection in the shadow.
        width: C, the decoder's hidden size.
        base: Name of the attention backend the model had.
        implementation: Name that our attention function goes by in this model.
        ear: Where to hear the tokens' positions, if the attention call doesn't name them.
        shared: By layer, what stands in for a fine projection where the layer's own projections do the work.
    """

    def __init__(
        self,
        config: FlexConfig,
        sites: dict[int, AttentionSite],
        fine: FineProjections,
        stubs: dict[int, nn.Module | None],
        width: int,
        base: str,
        implementation: str,
        ear: Ear | None,
        shared: dict[int, SharedProjection] | None = None,
    ):
        assert config.layers is not None and config.first_layer is not None
        self.config = config
        self.sites = sites
        self.fine = fine
        self.stubs = stubs
        self.width = width
        self.base = base
        self.implementation = implementation
        self.ear = ear
        self.shared = shared or {}
        self.counting = min(sites)  # this layer's cache tells how many tokens there are
        self.carried = any(site.carried for site in sites.values())
        self.crosses = any(site.states for site in sites.values())  # coarse tokens are the encoder's output
        self.selector: Selector = make_selector(config)
        self.traces: list[Trace] = []
        self._layer_of = {id(site.attention): layer for layer, site in sites.items()}
        eligible = [layer for layer in sites if layer >= config.first_layer]
        before = {b: a for a, b in pairwise(eligible)}
        self.reads_from = {layer: before[layer] for layer in config.layers}
        self.read_in = {source: layer for layer, source in self.reads_from.items()}
        self.selecting = frozenset(self.read_in)
        self.busy = self.selecting | frozenset(self.reads_from)
        self.traced = frozenset(eligible)  # a trace also shows what the last layer would pick
        self.positions = config.positions
        if self.positions == "auto":
            axes = any(site.rotary is not None and site.rotary.axes for site in sites.values())
            self.positions = "fractional" if axes else "parent"
        self._weights = WeightsVersion()
        self._lock = threading.Lock()
        self._running = 0

    def layer_of(self, module: nn.Module) -> int | None:
        """Index of an eligible layer's attention module, or None."""
        return self._layer_of.get(id(module))

    # ------------------------------------------------------------------ requests

    def follow(self, model: Any) -> FlexBinding:
        """Take the fine projections that the model has now: peft may have put copies in their place."""
        self.fine = model.flex_fine.live()
        return self

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mark a request as running, so that nobody rewires the model under it."""
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    def check_idle(self, what: str) -> None:
        """Raise WrapStateError if a request is running."""
        if self._running:
            raise WrapStateError(
                f"{what} while {self._running} request(s) are running; wait for them to finish"
            )

    def new_request(self, streams: Any) -> FlexRequest:
        """State of a new request.

        Raises:
            StreamError: `streams` is no StreamBatch, or its features don't have the decoder's width.
        """
        self.check_streams(streams)
        return FlexRequest(streams, self.config.fine_cache_bytes)

    def check_streams(self, streams: Any) -> None:
        """Raise StreamError unless `streams` is a StreamBatch of the decoder's width."""
        if not isinstance(streams, StreamBatch):
            raise StreamError(f"flex_streams must be a StreamBatch, got {type(streams).__name__}")
        for i, sample in enumerate(streams.samples):
            for j, stream in enumerate(sample):
                if stream.source.width != self.width:
                    raise StreamError(
                        f"flex_streams sample {i}, medium {j}: features must be {self.width} wide (the decoder's "
                        f"hidden size), got {stream.source.width}"
                    )
                if stream.finer is not None and self.config.static:
                    raise StreamError(
                        f"flex_streams sample {i}, medium {j}: static must be False in the FlexConfig for a medium of "
                        f"{len(stream.levels)} levels; static mode projects every region, got static=True"
                    )

    def weights_version(self) -> tuple[int, ...]:
        """Changes whenever a fine parameter was replaced or written in place (an optimizer step, a load)."""
        return self._weights.of([self.fine, *(m for s in self.shared.values() for m in s.modules())])

    # ------------------------------------------------------------------ fine keys and values

    def project(
        self, request: FlexRequest, layer: int, sample: SampleState, regions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fine keys and values of some regions in one layer.

        Args:
            request: The request (its streams and positions).
            layer: The reading layer.
            sample: The sample whose regions they are.
            regions: `[n]` indices among all of the sample's regions, on the CPU.

        Returns:
            `[n, P, Hkv, D]` and `[n, P, Hkv, Dv]`.
        """
        out: tuple[Tensor, ...] = ()
        at = 0
        for part in self.parts(sample, regions):
            fresh = self._project(request, layer, sample, part)
            if len(part) == len(regions):
                return fresh
            out = out or tuple(t.new_empty(len(regions), *t.shape[1:]) for t in fresh)
            for whole, pages in zip(out, fresh, strict=True):
                whole[at : at + len(part)] = pages
            at += len(part)
            del fresh, pages  # or they would be there while the next run is made
        key, value = out
        return key, value

    def parts(self, sample: SampleState, regions: Tensor) -> tuple[Tensor, ...]:
        """`[n]` regions in runs that are projected one after another, so that what is made on the way stays small.

        Not under autograd, which would keep all of it. Only ready features come in any portions: an encoder makes
        them in batches of its own.
        """
        size = max(1, PART_TOKENS // max(sample.page, 1))
        ready = all(isinstance(stream.source, TensorSource) for stream in sample.streams)
        if len(regions) <= size or torch.is_grad_enabled() or not ready:
            return (regions,)
        # runs of one size: a short one at the end would cost nearly as much as a long one
        return regions.tensor_split(-(-len(regions) // size))

    def _project(
        self, request: FlexRequest, layer: int, sample: SampleState, regions: Tensor
    ) -> tuple[Tensor, Tensor]:
        site = self.sites[layer]
        projection: FineProjection | SharedProjection = self.shared.get(layer) or self.fine.at(layer)
        if isinstance(projection, SharedProjection):
            device, dtype = execution_device(site.attention), site.dtype
        else:
            device, dtype = execution_device(projection), next(projection.parameters()).dtype
        n, page = len(regions), sample.page
        features, positions, tables = [], [], []
        order = []
        for m, where, local in sample.by_medium(regions):
            stream = sample.streams[m]
            part = stream.source.features(local).to(device=device, dtype=dtype)
            readable = stream.source.readable(local)
            if not bool(readable.all()):
                sample.lose(m, local[~readable])
            if sample.ragged:
                # whatever a source leaves in rows that nobody may read must not reach an output: 0 * NaN is NaN
                valid = stream.region_valid[local]
                if not bool(valid.all()):
                    part = part.masked_fill(~valid[..., None].to(device), 0)
            tokens = stream.grid.tokens(local)
            if page > part.shape[1]:
                part = nn.functional.pad(part, (0, 0, 0, page - part.shape[1]))
                tokens = nn.functional.pad(tokens, (0, page - tokens.shape[1]), value=-1)
            features.append(part)
            tokens = tokens if stream.grid.even else tokens.clamp(min=0)
            if self.positions == "official":
                tables.append(self._official(request, site, features[-1], stream.grid, tokens))
            elif not self.crosses and (site.rotary is not None or "position_ids" in site.call):
                positions.append(self._positions(sample, m, tokens))
            order.append(where)
        back = None if len(order) == 1 else torch.cat(order).argsort()

        def in_order(parts: list[Tensor], dim: int = 0) -> Tensor:
            if back is None:  # of one medium: as asked for
                return parts[0]
            whole = torch.cat(parts, dim=dim)
            return whole.index_select(dim, back.to(whole.device))

        flat = in_order(features).flatten(0, 1)[None]
        if self.config.fine_norm and site.norm is not None:
            flat = site.norm(flat)
        at, blended = None, None
        if tables:
            blended = tuple(in_order(list(t)).flatten(0, 1)[None].to(flat) for t in zip(*tables, strict=True))
        elif positions:
            at = in_order(positions, -2).flatten(-2)[..., None, :].to(flat.device)
        replaced = projection.modules_by_name()
        stub = self.stubs.get(layer)
        if stub is not None:
            replaced["q_proj"] = stub
        key, value = shadow_key_value(site, replaced, flat, at, request.max_position, blended)
        home = execution_device(site.attention)  # a device map may have put the projection somewhere else
        key, value = (t[0].transpose(0, 1).unflatten(0, (n, page)).to(home) for t in (key, value))
        return key, value

    def _positions(self, sample: SampleState, medium: int, tokens: Tensor) -> Tensor:
        """`[..., n, P]` rotary positions of fine tokens."""
        span = sample.span(medium)
        if sample.rope is None or not bool(sample.rope_known[span].all()):
            raise StreamError(
                "a medium was selected before all of its coarse tokens had passed through the model"
            )
        return fine_positions(sample.rope[..., span], sample.streams[medium].grid, tokens, self.positions)

    def _official(
        self, request: FlexRequest, site: AttentionSite, like: Tensor, grid: Any, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The official interpolated rotary tables at fine tokens, `[n, P, D]` each (semantics section 4)."""
        # one table per forward, from the first sample that has a medium, by raw sequence index
        first = next(s for s in request.samples if s.streams)
        cells = first.cells[: first.cell_at[1]]
        if grid not in request.tables:
            if site.rotary is None or site.rotary.axes:
                raise StreamError(
                    "positions='official' needs a model with one-dimensional rotary tables; use positions='auto'"
                )
            cos, sin = rotary_tables(site.rotary, like.float(), cells[None])
            request.tables[grid] = official_tables(cos[0].cpu(), sin[0].cpu(), grid)
        cos, sin = request.tables[grid]
        return cos[tokens], sin[tokens]

    # ------------------------------------------------------------------ copying

    def __getstate__(self) -> dict[str, Any]:
        """What a copy shares the meaning of: no traces, nothing running."""
        return {
            k: v
            for k, v in self.__dict__.items()
            if k not in ("traces", "_weights", "_lock", "_running", "_layer_of")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Complete a copied or unpickled binding; in a new process the attention function isn't registered yet."""
        self.__dict__.update(state)
        self.traces, self._weights, self._lock, self._running = [], WeightsVersion(), threading.Lock(), 0
        self._layer_of = {id(site.attention): layer for layer, site in self.sites.items()}
        registered_name(self.base, self.carried)
