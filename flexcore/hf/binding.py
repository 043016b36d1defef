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
from ..streams import StreamBatch
from ..trace import Trace
from .projection import AttentionSite, FineProjection, rotary_embeddings, shadow_key_value
from .state import FlexRequest, SampleState


class FlexBinding:
    """Everything about a wrapped model that isn't a request's.

    Args:
        config: With `first_layer` and `layers` filled in.
        sites: The attention of every eligible layer, in order.
        fine: Fine projections by layer, registered on the model.
        stubs: Per layer, a stand-in for the query projection in the shadow.
        width: C, the decoder's hidden size.
        base: Name of the attention backend the model had.
    """

    def __init__(
        self,
        config: FlexConfig,
        sites: dict[int, AttentionSite],
        fine: nn.ModuleDict,
        stubs: dict[int, nn.Module | None],
        width: int,
        base: str,
    ):
        assert config.layers is not None and config.first_layer is not None
        self.config = config
        self.sites = sites
        self.fine = fine
        self.stubs = stubs
        self.width = width
        self.base = base
        self.selector: Selector = make_selector(config)
        self.traces: list[Trace] = []
        self._layer_of = {id(site.attention): layer for layer, site in sites.items()}
        eligible = [layer for layer in sites if layer >= config.first_layer]
        before = {b: a for a, b in pairwise(eligible)}
        self.reads_from = {layer: before[layer] for layer in config.layers}
        self.read_in = {source: layer for layer, source in self.reads_from.items()}
        self.selecting = frozenset(self.read_in)
        self.traced = frozenset(eligible)  # a trace also shows what the last layer would pick
        self.positions = config.positions
        if self.positions == "auto":
            self.positions = "parent"
        self._lock = threading.Lock()
        self._running = 0

    def layer_of(self, module: nn.Module) -> int | None:
        """Index of an eligible layer's attention module, or None."""
        return self._layer_of.get(id(module))

    # ------------------------------------------------------------------ requests

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

    def weights_version(self) -> tuple[int, ...]:
        """Changes whenever a fine parameter was replaced or written in place (an optimizer step, a load)."""
        return tuple(
            v for p in self.fine.parameters() for v in (p.data_ptr(), 0 if p.is_inference() else p._version)
        )

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
        site = self.sites[layer]
        projection = self.fine[str(layer)]
        assert isinstance(projection, FineProjection)
        weight = next(projection.parameters())
        n, page = len(regions), sample.page
        features, positions, tables = [], [], []
        order = []
        for m, where, local in sample.by_medium(regions):
            stream = sample.streams[m]
            part = stream.source.features(local).to(device=weight.device, dtype=weight.dtype)
            features.append(nn.functional.pad(part, (0, 0, 0, page - part.shape[1])))
            tokens = stream.grid.tokens(local)
            tokens = nn.functional.pad(tokens, (0, page - tokens.shape[1]), value=-1).clamp(min=0)
            if self.positions == "official":
                tables.append(self._official(request, site, features[-1], stream.grid, tokens))
            elif site.rotary is not None:
                positions.append(self._positions(sample, m, tokens))
            order.append(where)
        back = torch.cat(order).argsort()
        flat = torch.cat(features)[back.to(weight.device)].flatten(0, 1)[None]
        if self.config.fine_norm and site.norm is not None:
            flat = site.norm(flat)
        at = None
        if tables:
            cos, sin = (torch.cat(t)[back].flatten(0, 1)[None].to(flat) for t in zip(*tables, strict=True))
            embeddings: tuple[Tensor, Tensor] | None = (cos, sin)
        else:
            embeddings = None
            if positions:
                at = torch.cat(positions, dim=-2)[..., back, :].flatten(-2)
                embeddings = rotary_embeddings(site, flat, at, request.max_position)
                at = at[..., None, :].to(flat.device)
        replaced = projection.modules_by_name()
        stub = self.stubs.get(layer)
        if stub is not None:
            replaced["q_proj"] = stub
        key, value = shadow_key_value(site, replaced, flat, embeddings, at)
        return tuple(t[0].transpose(0, 1).unflatten(0, (n, page)) for t in (key, value))  # type: ignore[return-value]

    def _positions(self, sample: SampleState, medium: int, tokens: Tensor) -> Tensor:
        """`[..., n, P]` rotary positions of fine tokens."""
        start, stop = sample.cell_at[medium], sample.cell_at[medium + 1]
        if sample.rope is None or not bool(sample.rope_known[start:stop].all()):
            raise StreamError(
                "a medium was selected before all of its coarse tokens had passed through the model"
            )
        return fine_positions(
            sample.rope[..., start:stop], sample.streams[medium].grid, tokens, self.positions
        )

    def _official(
        self, request: FlexRequest, site: AttentionSite, like: Tensor, grid: Any, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The official interpolated rotary tables at fine tokens, `[n, P, D]` each (semantics section 4)."""
        # one table per forward, from the first sample that has a medium, by raw sequence index
        first = next(s for s in request.samples if s.streams)
        cells = first.cells[: first.cell_at[1]]
        if grid not in request.tables:
            embeddings = rotary_embeddings(site, like.float(), cells)
            if embeddings is None:
                raise StreamError(
                    "positions='official' needs a model with rotary tables; use positions='parent'"
                )
            request.tables[grid] = official_tables(embeddings[0][0].cpu(), embeddings[1][0].cpu(), grid)
        cos, sin = request.tables[grid]
        return cos[tokens], sin[tokens]

    # ------------------------------------------------------------------ copying

    def __deepcopy__(self, memo: dict[int, Any]) -> FlexBinding:
        """A copied model gets a binding of its own: modules copied with it, no traces, nothing running."""
        import copy

        other = FlexBinding.__new__(FlexBinding)
        memo[id(self)] = other
        for name, value in self.__dict__.items():
            if name not in ("traces", "_lock", "_running", "_layer_of"):
                setattr(other, name, copy.deepcopy(value, memo))
        other.traces, other._lock, other._running = [], threading.Lock(), 0
        other._layer_of = {id(site.attention): layer for layer, site in other.sites.items()}
        return other
