"""Fine K/V through the layer's own code path: shadow attention and capture.

A shallow copy of the layer's attention module, with our K/V projections in place of its own, is run on the fine
features and stopped where it hands key and value to the attention function. Whatever the family does between the
projection and the attention (head split, norms on keys, partial rotary, latents) happens to fine tokens too, without
a line of per-family code.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .interface import Capture, Captured


@dataclass(eq=False)
class AttentionSite:
    """One decoder layer's attention, as the dry run of `wrap` found it.

    Args:
        layer: Index of the layer.
        attention: Its attention module.
        norm: The module whose output is the attention's input, if it is a norm.
        rotary: The module that made `position_embeddings`, if the attention takes them.
        rotary_kwargs: How the model called it, beside the positions.
        call: Keyword arguments that the layer passes, with per-call ones left out.
        width: C, the width of what the attention takes.
        reads: Whether the layer can read fine tokens at all.
    """

    layer: int
    attention: nn.Module
    norm: nn.Module | None
    rotary: nn.Module | None
    rotary_kwargs: dict[str, Any]
    call: dict[str, Any]
    width: int
    reads: bool


class ZeroQuery(nn.Module):
    """In a shadow, stands in for `q_proj`: one head of zeros instead of a projection nobody uses."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)


def shadow_key_value(
    site: AttentionSite,
    replaced: dict[str, nn.Module],
    features: Tensor,
    embeddings: tuple[Tensor, Tensor] | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Key and value that a layer would make of `features`, with some of its submodules replaced.

    Args:
        site: The layer.
        replaced: Submodules to use instead, by name within the attention module (dotted for nested ones).
        features: `[1, N, C]`.
        embeddings: `(cos, sin)`, each `[1, N, D]`, or None if the attention takes none.
        positions: `[..., 1, N]` position ids, for attentions that look at them.

    Returns:
        `[1, Hkv, N, D]` and `[1, Hkv, N, Dv]`, rotated as the family does.
    """
    shadow = _with_modules(site.attention, replaced)
    capture = Capture()
    call = dict(site.call)
    if "position_embeddings" in call:
        call["position_embeddings"] = embeddings
    if "position_ids" in call:
        call["position_ids"] = positions
    call["flex_streams"] = capture
    with suppress(Captured):
        # the class's forward: hooks on the instance (offloading) belong to the real module
        type(site.attention).forward(shadow, features, **call)
    if capture.key is None or capture.value is None:
        raise UnsupportedModelError(
            f"{type(site.attention).__name__} returned without calling the attention function, so fine tokens can't "
            "be projected through it; leave this layer out"
        )
    return capture.key, capture.value


def _with_modules(module: nn.Module, replaced: dict[str, nn.Module]) -> nn.Module:
    """A shallow copy with some (possibly nested) submodules swapped; nothing of the original changes."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    nested: dict[str, dict[str, nn.Module]] = {}
    for name, new in replaced.items():
        head, _, rest = name.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = new
        else:
            twin._modules[head] = new
    for head, inner in nested.items():
        child = module._modules[head]
        assert child is not None
        twin._modules[head] = _with_modules(child, inner)
    return twin


def key_value_modules(site: AttentionSite) -> tuple[str, ...]:
    """Names of the submodules whose parameters shape key or value, found by differentiating through a copy.

    Raises:
        UnsupportedModelError: The attention can't be run on features, or has no such parameters.
    """
    twin = copy.deepcopy(site.attention)
    leaves = {n: m for n, m in twin.named_modules() if next(m.parameters(recurse=False), None) is not None}
    parameters = {(n, k): p for n, m in leaves.items() for k, p in m.named_parameters(recurse=False)}
    first = next(iter(parameters.values()))
    with torch.enable_grad(), torch.inference_mode(False):
        for p in parameters.values():
            p.requires_grad_(p.is_floating_point())
        generator = torch.Generator(device="cpu").manual_seed(0)
        features = torch.randn(1, 4, site.width, generator=generator).to(first.device, first.dtype)
        positions = torch.arange(4, device=first.device)
        probe = replace(site, attention=twin)
        key, value = shadow_key_value(
            probe, {}, features, rotary_embeddings(site, features, positions), positions[None]
        )
        total = key.float().square().sum() + value.float().square().sum()
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    found = {name for (name, _), g in zip(parameters, grads, strict=True) if g is not None}
    if not found or "" in found:
        raise UnsupportedModelError(
            f"{type(site.attention).__name__} keeps no key/value projection as a module of its own, so there is "
            "nothing to copy for fine tokens"
        )
    return tuple(n for n in leaves if n in found)


def rotary_embeddings(
    site: AttentionSite, features: Tensor, positions: Tensor, longest: int = 0
) -> tuple[Tensor, Tensor] | None:
    """The family's own `(cos, sin)` at (possibly fractional) positions.

    Args:
        site: The layer.
        features: Gives dtype and device.
        positions: `[..., N]`, with leading axes for multi-axis rotary models.
        longest: Largest position in the sequence; some families pick their frequencies by it.

    Returns:
        Two tensors `[1, N, D]` (the family's own shape), or None if the attention takes none.
    """
    if site.rotary is None:
        return None
    positions = positions.to(features.device)
    last = torch.full_like(positions[..., :1], longest)
    cos, sin = site.rotary(features, torch.cat([positions, last], dim=-1)[..., None, :], **site.rotary_kwargs)
    return cos[..., :-1, :], sin[..., :-1, :]


def zero_query(site: AttentionSite, names: tuple[str, ...]) -> nn.Module | None:
    """A stub for `q_proj` if the layer's keys and values come out bit-identical with it, else None."""
    q_proj = site.attention._modules.get("q_proj")
    width = getattr(site.attention, "head_dim", None)
    if q_proj is None or "q_proj" in names or not isinstance(width, int):
        return None
    weight = next(q_proj.parameters())
    features = torch.randn(1, 3, site.width, generator=torch.Generator().manual_seed(0))
    features = features.to(weight.device, weight.dtype)
    positions = torch.arange(3, device=weight.device)
    with torch.no_grad():
        embeddings = rotary_embeddings(site, features, positions)
        full = shadow_key_value(site, {}, features, embeddings, positions[None])
        stub = ZeroQuery(width)
        try:
            short = shadow_key_value(site, {"q_proj": stub}, features, embeddings, positions[None])
        except (RuntimeError, UnsupportedModelError):
            return None
    return stub if all(torch.equal(a, b) for a, b in zip(full, short, strict=True)) else None


class FineProjection(nn.Module):
    """One layer's own K/V projections for fine tokens: the layer's K/V modules, copied or newly drawn."""

    def __init__(self, site: AttentionSite, names: tuple[str, ...], init: str, std: float):
        super().__init__()
        self.names = names
        for name in names:
            module = copy.deepcopy(site.attention.get_submodule(name))
            module.requires_grad_(True)
            if init == "random":
                _draw(module, std)
            self.add_module(name.replace(".", "__"), module)

    def modules_by_name(self) -> dict[str, nn.Module]:
        """Submodules to put in the shadow, read at call time so that later LoRA layers count."""
        out = {}
        for name in self.names:
            module = self._modules[name.replace(".", "__")]
            assert module is not None
            out[name] = module
        return out


@torch.no_grad()
def _draw(module: nn.Module, std: float) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, std)  # N(0, 0.02) in the official model
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1.0)
