"""The dry run of `wrap`: three tokens through the decoder, to see how each layer calls the attention function."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .interface import Probe
from .projection import AttentionSite

# what the layer passes anew in every call; the shadow sets what it needs of these itself
PER_CALL = (
    "past_key_values",
    "past_key_value",
    "attention_mask",
    "use_cache",
    "output_attentions",
    "cache_position",
)


def attention_sites(decoder: nn.Module, name: str) -> dict[int, AttentionSite]:
    """Run the decoder on three random embeddings and describe every layer's attention.

    Args:
        decoder: The text decoder, with our attention function already set.
        name: Its class's name, for messages.

    Returns:
        Layers in order; those that can't read have `reads=False`.

    Raises:
        UnsupportedModelError: The attention doesn't go through the interface, or not once per layer.
    """
    made_by: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
    alive: list[Any] = []
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = (args, kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, Tensor):
                made_by[id(t)] = (module, kwargs)
                alive.append(t)

    probe = Probe()
    modes = {m: m.training for m in decoder.modules()}
    hooks = []
    try:
        for module in decoder.modules():
            module.training = False
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(module.register_forward_hook(after, with_kwargs=True))
        with torch.no_grad():
            decoder(inputs_embeds=_embeddings(decoder), use_cache=False, flex_streams=probe)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode

    counts = Counter(id(module) for module, _, _ in probe.calls)
    if not counts:
        raise UnsupportedModelError(
            f"{name}: its attention doesn't go through transformers' attention interface (or its decoder drops "
            "keyword arguments), so there is nowhere to read fine tokens; use a model whose attention does"
        )
    if max(counts.values()) > 1:
        raise UnsupportedModelError(f"{name}: calls the attention function more than once per layer")
    sites = {}
    layer_types = getattr(getattr(decoder, "config", None), "layer_types", None)
    for module, sliding, _ in probe.calls:
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise UnsupportedModelError(
                f"{name}: {type(module).__name__} doesn't say which layer it belongs to"
            )
        args, kwargs = calls[module]
        hidden = args[0] if args else kwargs["hidden_states"]
        cos = (kwargs.get("position_embeddings") or (None,))[0]
        norm, _ = made_by.get(id(hidden), (None, {}))
        rotary, rotary_call = made_by.get(id(cos), (None, {}))
        full = not sliding and (layer_types is None or layer_types[layer] == "full_attention")
        sites[layer] = AttentionSite(
            layer=layer,
            attention=module,
            norm=norm,
            rotary=rotary,
            rotary_kwargs={k: v for k, v in rotary_call.items() if k not in ("x", "position_ids")},
            call=_template(kwargs),
            width=hidden.shape[-1],
            reads=full,
        )
    return dict(sorted(sites.items()))


def _template(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A layer's keyword arguments as the shadow may repeat them: no tensors, nothing of this call."""
    out = {}
    for key, value in kwargs.items():
        if key in ("hidden_states", "flex_streams"):
            continue
        out[key] = (
            None if key in PER_CALL or isinstance(value, Tensor) or key == "position_embeddings" else value
        )
    return out


def _embeddings(decoder: nn.Module) -> Tensor:
    weight = decoder.get_input_embeddings().weight  # type: ignore[operator,union-attr]
    if weight.device.type == "meta":
        raise UnsupportedModelError("the model's weights are on the meta device; load them before wrapping")
    width = getattr(decoder.config, "hidden_size", weight.shape[1])  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, width, generator=generator).to(weight.device, weight.dtype)
