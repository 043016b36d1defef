"""What the dry run of `wrap` saw, layer by layer: how to make fine keys and values, or why that can't be done."""

from __future__ import annotations

import inspect
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UnsupportedModelError
from ..row_attention import row_attention, with_sinks
from .interface import AttentionCall, Probe
from .projection import shadow_key_value
from .rows import row_keys
from .site import AttentionSite, Ear, Rotary, arguments

# a layer of such a type loses sight of coarse tokens, or has no keys of its own
PARTIAL = re.compile("slid|chunk|local|window|sparse|compress|dummy|linear|conv|mamba|recurrent")
KEPT = (bool, int, float, str, type(None))


@dataclass
class Findings:
    """What `wrap` learnt from its dry run.

    Args:
        sites: Layers that call the attention function, in order.
        implementation: Name that our attention function goes by.
        ear: Where to hear positions, if the attention call doesn't name them.
    """

    sites: dict[int, AttentionSite]
    implementation: str
    ear: Ear | None


def findings(
    decoder: nn.Module,
    probe: Probe,
    watch: Any,
    name: str,
    implementation: str,
    carried: bool,
    encoded: Tensor | None = None,
) -> Findings:
    """Describe every layer that called the attention function.

    Args:
        decoder: The text decoder.
        probe: The calls of the attention function.
        watch: The calls of the decoder's modules.
        name: The model's class's name, for messages.
        implementation: Name that our attention function goes by.
        carried: Whether the decoder drops keyword arguments.
        encoded: What the trial handed over as the encoder's output; selection and reading then happen in the
            attention to it.

    Raises:
        UnsupportedModelError: No layer can read.
    """
    types = layer_types(getattr(decoder, "config", None))
    sites: dict[int, AttentionSite] = {}
    ear = None
    for call in probe.calls:
        if encoded is not None and call.key.shape[2] != encoded.shape[1]:
            continue  # a decoder's attention to its own text has no coarse tokens
        layer = layer_index(decoder, call.module)
        if layer is None or layer in sites:
            raise UnsupportedModelError(
                f"{name}: {type(call.module).__name__} is not the one attention of one layer, so it can't be told "
                "which layer reads what another selected; use a decoder-only model"
            )
        site, hidden, positions = _site(layer, call, watch, carried, encoded)
        kind = types[layer] if types is not None and layer < len(types) and not site.states else ""
        site.reason = (
            _partial(call, kind) or _unusual_attention(call) or _unlike_own(site, call, hidden, positions)
        )
        if site.reads and ear is None:
            ear = _ear(site, call, positions)
        sites[layer] = site
    sites = dict(sorted(sites.items()))
    able = [site for site in sites.values() if site.reads]
    if len(able) < 2:
        why = "; ".join(sorted({site.reason for site in sites.values() if site.reason}))
        raise UnsupportedModelError(
            f"{name}: one layer must select and a later one read, but {len(able)} of {len(sites)} attention layers "
            f"can ({why or 'it has no more'}); use a model with more layers of full attention"
        )
    return Findings(sites, implementation, ear)


def layer_types(config: Any) -> list[str] | None:
    try:
        from transformers.cache_utils import get_layer_types_and_kwargs

        return list(get_layer_types_and_kwargs(config)[0])
    except (ImportError, AttributeError, TypeError):  # older versions, or a config that isn't a decoder's
        return getattr(config, "layer_types", None)


def layer_index(decoder: nn.Module, module: nn.Module) -> int | None:
    index = getattr(module, "layer_idx", None)
    if isinstance(index, int):
        return index
    path = next((n for n, m in decoder.named_modules() if m is module), "")
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    return numbers[0] if numbers else None


def _site(
    layer: int, call: AttentionCall, watch: Any, carried: bool, encoded: Tensor | None
) -> tuple[AttentionSite, Tensor, Tensor | None]:
    """A layer's attention, what went into it, and the positions of its rotary tables."""
    module = call.module
    given = arguments(module, *watch.calls[module])
    hidden = given.pop(list(inspect.signature(type(module).forward).parameters)[1])
    rotary, positions = None, None
    template: dict[str, Any] = {}
    for name, value in given.items():
        if name == "flex_streams":
            continue
        # what layers hand each other (keys and values that later ones share) is a mapping, but no dict everywhere
        filled = isinstance(value, MutableMapping)
        template[name] = value if isinstance(value, KEPT) else dict if filled else None
        found = _rotary(name, value, watch, hidden.shape[-2]) if rotary is None else None
        if found is not None:
            rotary, positions = found
    if positions is None and isinstance(given.get("position_ids"), Tensor):
        positions = given["position_ids"]
    states = next((n for n, v in given.items() if encoded is not None and v is encoded), "")
    if states:
        # fine tokens stand beside the encoder's output, which has no rotary positions and was normed by the encoder
        rotary, positions, width = None, None, hidden.shape[-1]
        hidden = given[states]
        if hidden.shape[-1] != width:
            raise UnsupportedModelError(
                f"{type(module).__name__}: the encoder's output is {hidden.shape[-1]} wide and the decoder {width}; "
                "use a model in which they agree"
            )
    site = AttentionSite(
        layer=layer,
        attention=module,
        norm=None if states else watch.maker(hidden)[0],
        rotary=rotary,
        call=template,
        width=hidden.shape[-1],
        dtype=hidden.dtype,
        carried=carried,
        states=states,
    )
    return site, hidden, positions


def _rotary(argument: str, value: Any, watch: Any, length: int) -> tuple[Rotary, Tensor] | None:
    """The module that made an argument of the attention from positions, if one did."""
    leaves = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    module, given = watch.maker(leaves[0]) if leaves else (None, {})
    if module is None:
        return None
    name = next((n for n, t in given.items() if _is_positions(t, length)), None)
    if name is None:
        return None
    like = next((n for n, t in given.items() if isinstance(t, Tensor) and n != name), None)
    others = {n: v for n, v in given.items() if n not in (name, like)}
    return Rotary(module, argument, name, like, others, tuple(given[name].shape[:-2])), given[name]


def _is_positions(value: Any, length: int) -> bool:
    """Whether a tensor is `[..., B, N]`, which hidden states `[B, N, C]` are not; positions may be floats."""
    return (
        isinstance(value, Tensor)
        and value.ndim >= 2
        and value.shape[-1] == length
        and value.shape[-2] != length
    )


def _ear(site: AttentionSite, call: AttentionCall, positions: Tensor | None) -> Ear | None:
    """Where to listen for positions, unless the attention call names those that the rotary tables are made of."""
    named = call.kwargs.get("position_ids")
    if positions is None:
        return None
    # with several axes, what a model names here depends on who calls it (`generate` adds an axis for the text)
    several = site.rotary is not None and bool(site.rotary.axes)
    if (
        not several
        and isinstance(named, Tensor)
        and named.shape == positions.shape
        and torch.equal(named, positions)
    ):
        return None
    if site.rotary is not None:
        return Ear(site.rotary.module, site.rotary.positions)
    return Ear(site.attention, "position_ids")


def _partial(call: AttentionCall, kind: str) -> str:
    if call.kwargs.get("sliding_window") is not None or PARTIAL.search(kind):
        return f"{kind or 'sliding'} layers don't keep all coarse tokens in sight".replace("_", " ")
    return ""


def _unusual_attention(call: AttentionCall) -> str:
    """Whether the last row's output is the softmax attention that selecting and merging take it for."""
    batch, heads, length, width = call.query.shape
    if call.out.shape != (batch, length, heads, call.value.shape[-1]) or heads % call.key.shape[1]:
        return f"attention outputs of shape {list(call.out.shape)} can't be merged with"
    bias = call.kwargs.get("position_bias")
    if bias is not None and bool((bias != 0).any()):
        return "the attention adds a bias by position, and has none for fine tokens"
    rows = torch.full((batch, 1), length - 1, device=call.query.device)
    key, mask = row_keys(call.key, call.mask, rows, length, call.causal, 0)
    scaling = width**-0.5 if call.scaling is None else call.scaling
    sinks = call.kwargs.get("s_aux")
    out, lse, _ = row_attention(
        call.query[:, :, -1:],
        key,
        call.value[:, :, : key.shape[2]],
        mask,
        scaling=scaling,
        softcap=call.kwargs.get("softcap"),
    )
    assert out is not None
    out = out * (lse - with_sinks(lse, sinks)).exp()[..., None]
    if not _close(out.transpose(1, 2), call.out[:, -1:]):
        return "the attention computes something else than softmax attention over its keys"
    return ""


def _unlike_own(site: AttentionSite, call: AttentionCall, hidden: Tensor, positions: Tensor | None) -> str:
    """Whether the layer's own code, run on its own input in the shadow, hands over its own keys and values."""
    error: Exception | None = None
    for needs_mask in (False, True):
        site.needs_mask = needs_mask
        try:
            key, value = shadow_key_value(site, {}, hidden, positions)
            other_key, other_value = shadow_key_value(site, {}, -hidden, positions)
        except Exception as other:  # anything may go wrong in code that nobody here has seen
            error = error or other
            continue
        # what a layer keeps from an earlier layer comes out right too, whatever goes in
        follows = not torch.equal(key, other_key) and not torch.equal(value, other_value)
        if follows and _close(key, call.key) and _close(value, call.value):
            return ""
        return "keys or values aren't made from the layer's input alone"
    return f"its attention can't be run on fine features ({type(error).__name__}: {error})"


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-8}.get(b.dtype, 3e-2)
    scale = float(b.float().abs().max()) + 1e-6
    return float((a.float() - b.float()).abs().max()) <= tolerance * scale
