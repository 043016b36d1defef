"""wrap(), unwrap() and attached(): make a Hugging Face model look closer, and undo it without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from ..config import FlexConfig
from ..errors import UnsupportedModelError, WrapStateError
from .binding import FlexBinding
from .dry_run import explore, text_decoder
from .fine_projections import FineProjections
from .offload import check_forward, rebind_forward, without_peft
from .probes import Findings
from .projection import FineProjection, key_value_modules, zero_query
from .shared import SharedProjection
from .site import AttentionSite
from .wrapped import wrapped_class

Model = TypeVar("Model")


def wrap(model: Model, config: FlexConfig | None = None) -> Model:
    """Teach a model to read fine tokens; in place, and returned for convenience.

    The model stays an instance of its class. `model.flex_config` holds the config with `first_layer` and `layers`
    filled in, `model.flex_fine` the new parameters.

    Args:
        model: A transformers model whose text decoder's attention goes through the attention interface, or a peft
            model around one.
        config: Default: `FlexConfig()`.

    Raises:
        UnsupportedModelError: The model can't work; nothing was changed.
        WrapStateError: It is wrapped already.
        ValueError: The config asks for layers or a selector that aren't there.
    """
    config = FlexConfig() if config is None else config
    if not isinstance(config, FlexConfig):
        raise ValueError(f"config must be a FlexConfig, got {type(config).__name__}")
    if is_wrapped(model):
        raise WrapStateError("wrap: this model is wrapped already; call flexcore.unwrap(model) first")
    inner = without_peft(model)
    if inner is not model:
        wrap(inner, config)
        return model
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise UnsupportedModelError(f"wrap takes a transformers model, got {type(model).__name__}")
    target: Any = model
    decoder = text_decoder(target)
    check_forward(target, "wrap")
    name = type(model).__name__
    base = decoder.config._attn_implementation
    before = _implementations(decoder)
    try:
        found = explore(target, decoder, name, base)
        config = resolve(config, found.sites, name)
        binding = _bind(target, config, found, base)
    except BaseException:
        _restore(before)
        raise
    target.flex_fine = binding.fine
    target.flex_config = binding.config
    target._flex_binding = binding
    target.__class__ = wrapped_class(target.__class__)
    rebind_forward(target)
    return model


def resolve(config: FlexConfig, sites: dict[int, AttentionSite], name: str) -> FlexConfig:
    """Fill in `first_layer` and `layers` from what the model has.

    Raises:
        ValueError: `first_layer` or `layers` lie beyond the model, or no layer is left to read.
    """
    depth = max(sites) + 1
    able = [layer for layer, site in sites.items() if site.reads]
    first = min(depth // 4, able[-2]) if config.first_layer is None else config.first_layer
    if first >= depth:
        raise ValueError(f"first_layer must be a layer of {name} (0..{depth - 1}), got {first}")
    readers = [layer for layer in able if layer >= first][1:]
    if not readers:
        raise ValueError(
            f"first_layer must leave a later layer to read: {name}'s layers with full attention are {able}, "
            f"got first_layer={first}"
        )
    if config.layers is not None:
        wrong = sorted(set(config.layers) - set(readers))
        if wrong or not config.layers:
            raise ValueError(
                f"layers must be among those that can read after layer {first}, {readers}; got {wrong}"
            )
        readers = list(config.layers)
    return config.replace(first_layer=first, layers=tuple(readers))


def _bind(model: Any, config: FlexConfig, found: Findings, base: str) -> FlexBinding:
    assert config.layers is not None
    eligible = {layer: site for layer, site in found.sites.items() if site.reads}
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    fine = FineProjections()
    shared: dict[int, SharedProjection] = {}
    stubs: dict[int, nn.Module | None] = {}
    known: dict[Any, tuple[tuple[str, ...], dict[str, Tensor], nn.Module | None]] = {}
    for layer in config.layers:
        site = eligible[layer]
        if config.fine_norm and not _is_norm(site.norm):
            raise ValueError(
                f"fine_norm: layer {layer} of {type(model).__name__} has no norm before its attention"
            )
        kind = (type(site.attention), tuple((n, p.shape) for n, p in site.attention.named_parameters()))
        if kind not in known:
            names, rows = key_value_modules(site)
            known[kind] = (names, rows, zero_query(site, names))
        names, rows, stubs[layer] = known[kind]
        if config.share_kv_projections:
            shared[layer] = SharedProjection(site, names)
        else:
            fine[str(layer)] = FineProjection(site, names, rows, config.init, std or 0.02)
    width = next(iter(eligible.values())).width
    return FlexBinding(config, eligible, fine, stubs, width, base, found.implementation, found.ear, shared)


def _is_norm(module: nn.Module | None) -> bool:
    return module is not None and "norm" in type(module).__name__.lower()


def _implementations(decoder: nn.Module) -> list[tuple[Any, Any]]:
    """Attention implementation of the decoder's config and of every config below it."""
    configs = {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}
    return [
        (c, c._attn_implementation_internal)
        for c in configs.values()
        if hasattr(c, "_attn_implementation_internal")
    ]


def _restore(before: list[tuple[Any, Any]]) -> None:
    for config, implementation in before:
        config._attn_implementation_internal = implementation


def is_wrapped(model: Any) -> bool:
    """Whether `wrap` was applied to this model and not undone."""
    return getattr(model, "_flex_binding", None) is not None


def unwrap(model: Model) -> Model:
    """Undo `wrap`: class, attention implementation and parameters as before. The fine weights are dropped.

    Raises:
        WrapStateError: The model isn't wrapped, or a request is running.
    """
    target: Any = without_peft(model)
    binding = getattr(model, "_flex_binding", None)
    if binding is None:
        raise WrapStateError("unwrap: this model isn't wrapped")
    binding.check_idle("unwrap")
    for module in target.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation_internal", None) == str(binding.implementation):
            config._attn_implementation_internal = binding.base
    target.__class__ = target._flex_base
    rebind_forward(target)
    del target.flex_fine, target.flex_config, target._flex_binding
    return model


@contextmanager
def attached(model: Model, config: FlexConfig | None = None) -> Iterator[Model]:
    """Wrap for the length of a `with` block."""
    wrap(model, config)
    try:
        yield model
    finally:
        unwrap(model)
