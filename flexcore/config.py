"""FlexConfig: every choice of the mechanism, validated, with a JSON round trip."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

READOUTS = ("answer", "text")
POSITIONS = ("auto", "parent", "fractional", "official")
INITS = ("copy", "random")
REGIONS = ("blocks", "official")


def _number(name: str, value: Any, low: float, high: float, integer: bool = False) -> None:
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "an integer" if integer else "a number"
        raise ValueError(f"{name} must be {what} in [{low}, {high}], got {value!r}")


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class FlexConfig:
    """How a wrapped model looks closer.

    Args:
        first_layer: First layer that selects; the next eligible layer is the first that reads. Default: a quarter
            of the depth (the paper: 8 of 32).
        layers: Layers that read. None lets `wrap` take every eligible layer after `first_layer`; after `wrap`,
            `model.flex_config.layers` lists them.
        selector: `threshold` (paper), `top_k`, `top_p`, `random`, `all`, or one that a plug-in registered.
        threshold: For `threshold`: a cell is chosen when its min-max normalised score exceeds `threshold / 255`.
        top_k: For `top_k` and `random`: regions per readout row and medium; None takes `fraction` of them.
        fraction: For `top_k` and `random`: share of a medium's regions, rounded up.
        top_p: For `top_p`: share of the coarse attention that the chosen cells must hold.
        seed: For `random`.
        selector_options: Keyword arguments for a plug-in's selector.
        readout: Which rows select and read: `answer` (rows that predict the answer, as in the official code) or
            `text` (every text row after the medium).
        positions: Rotary position of a fine token: its coarse cell's (`parent`), interpolated between cells
            (`fractional`), the official interpolation of rotary tables (`official`), or `auto`.
        init: Fine projections start as copies of the layer's own K/V weights (`copy`) or at random (`random`).
        fine_norm: Pass fine features through the layer's input norm before projecting them.
        share_kv_projections: Project fine tokens with the layer's own K/V weights and add none: for use without
            training. It can't learn to treat fine tokens differently from coarse ones (training it trains the
            model's own projections), and those weights expect normed inputs, so combine it with `fine_norm=True`.
            `init` has no meaning then.
        regions: How adapters lay out regions: `blocks`, or the `official` 9x9 lattice.
        region_size: Side of a block, in fine tokens.
        static: Project every region after the prompt and let decode steps select by mask, in fixed shapes and without
            syncs, for `torch.compile`. `fine_cache_bytes` has no meaning then. Models with cross-attention go on as
            without it.
        fine_cache_bytes: Budget of one request's projected fine keys and values; None is unlimited.
        alpha_warmup: `alpha = min(1, epoch * alpha_warmup)` in training (semantics section 6).
        selection_loss: In training, weight of a loss that teaches a layer's coarse attention to choose what the next
            layer reads (`flexcore.selection_loss`). Ours and not the paper's; 0, the default and in reference mode,
            computes nothing.

    Raises:
        ValueError: A field is out of range; the message names it.
    """

    first_layer: int | None = None
    layers: tuple[int, ...] | None = None
    selector: str = "threshold"
    threshold: int = 48
    top_k: int | None = None
    fraction: float = 0.1
    top_p: float = 0.5
    seed: int = 0
    selector_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    readout: str = "answer"
    positions: str = "auto"
    init: str = "copy"
    fine_norm: bool = False
    share_kv_projections: bool = False
    regions: str = "blocks"
    region_size: int = 8
    static: bool = False
    fine_cache_bytes: int | None = 4 << 30
    alpha_warmup: float = 10.0
    selection_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.first_layer is not None:
            _number("first_layer", self.first_layer, 0, 10_000, integer=True)
        if self.layers is not None:
            if not isinstance(self.layers, Iterable):
                raise ValueError(f"layers must be a sequence of integers, got {self.layers!r}")
            layers = tuple(self.layers)
            for layer in layers:
                _number("layers", layer, 0, 10_000, integer=True)
            if list(layers) != sorted(set(layers)):
                raise ValueError(f"layers must rise without repeats, got {list(layers)}")
            object.__setattr__(self, "layers", layers)
        if not isinstance(self.selector, str) or not self.selector:
            raise ValueError(f"selector must be a registered selector's name, got {self.selector!r}")
        _number("threshold", self.threshold, 0, 255, integer=True)
        if self.top_k is not None:
            _number("top_k", self.top_k, 1, 1 << 31, integer=True)
        _number("fraction", self.fraction, 0, 1)
        _number("top_p", self.top_p, 0, 1)
        _number("seed", self.seed, 0, (1 << 31) - 1, integer=True)
        _choice("readout", self.readout, READOUTS)
        _choice("positions", self.positions, POSITIONS)
        _choice("init", self.init, INITS)
        _choice("regions", self.regions, REGIONS)
        _number("region_size", self.region_size, 1, 1 << 20, integer=True)
        if self.fine_cache_bytes is not None:
            _number("fine_cache_bytes", self.fine_cache_bytes, 0, 1 << 62, integer=True)
        _number("alpha_warmup", self.alpha_warmup, 0, 1e9)
        _number("selection_loss", self.selection_loss, 0, 1e9)
        for name in ("fine_norm", "share_kv_projections", "static"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if not isinstance(self.selector_options, Mapping):
            raise ValueError(f"selector_options must be a mapping, got {self.selector_options!r}")
        object.__setattr__(self, "selector_options", dict(self.selector_options))

    @classmethod
    def reference(cls, **changes: Any) -> FlexConfig:
        """The official code's settings: layer 8 selects, threshold 48, 9x9 regions, interpolated rotary tables."""
        official: dict[str, Any] = {
            "first_layer": 8,
            "selector": "threshold",
            "threshold": 48,
            "positions": "official",
            "regions": "official",
            "init": "random",
        }
        return cls(**{**official, **changes})

    def replace(self, **changes: Any) -> FlexConfig:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)

    def alpha(self, epoch: float) -> float:
        """Weight of the fine-reading output in training after `epoch` epochs (a fraction counts), in `[0, 1]`."""
        return min(1.0, max(0.0, epoch * self.alpha_warmup))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        out = asdict(self)
        out["layers"] = None if self.layers is None else list(self.layers)
        return out

    def to_json(self) -> str:
        """JSON text that `from_json` reads back to an equal config."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlexConfig:
        """Read what `to_dict` wrote; unknown fields are an error that names them."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown FlexConfig field(s) {unknown}; known fields are {sorted(known)}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> FlexConfig:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"a FlexConfig's JSON must be an object, got {type(values).__name__}")
        return cls.from_dict(values)
