"""The attention function that wrapped models run: the model's own backend first, then the readout rows.

Registered under a name of our own per base backend, together with the base's mask function (without it the mask would
silently become None). With no media in the call it is the base function and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .context import FlexContext
from .plain_attention import sdpa_step
from .static import StaticContext

# `sdpa`, `flash` and `flex_attention` in a name trigger checks meant for the real backends, so bases get aliases
PREFIX = "flex_hierarchical"
ALIASES = {"sdpa": "", "eager": "_eager", "flash_attention_2": "_fa2", "flash_attention_3": "_fa3"}
# the state's way to the attention function in decoders that drop keyword arguments; unused otherwise
CARRIED: ContextVar[Any] = ContextVar("flexcore_carried", default=None)


class Captured(Exception):
    """Raised to leave an attention module's forward once it has handed over its key and value."""


class Capture:
    """Stands in for a context while a layer's own code projects fine features; receives its key and value."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def take(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value
        raise Captured


@dataclass(eq=False)
class AttentionCall:
    """One call of the attention function, as `wrap`'s dry run saw it."""

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    out: Tensor
    scaling: float | None
    causal: bool
    kwargs: dict[str, Any]


class Probe:
    """Stands in for a context during `wrap`'s dry run; notes who calls the attention function, and with what."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []


class TransparentName(str):
    """Our implementation's name, which compares equal to the base's name too.

    For modeling code that asks whether its implementation is called "sdpa" or "eager" and does something else if not.
    Lookups still find our functions, since they go by the hash first.
    """

    base: str

    def __new__(cls, name: str, base: str) -> TransparentName:
        own = super().__new__(cls, name)
        own.base = base
        return own

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or str.__eq__(self.base, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return str.__hash__(self)

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.base


def _own_eager(module: torch.nn.Module) -> Callable[..., Any]:
    """A family's eager attention: the function its modeling file falls back to."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise AttributeError(f"no eager_attention_forward beside {type(module).__name__}")


class _RealBackend:
    """A module as its real backend expects to see it: flash attention reads the backend's name from the config."""

    def __init__(self, module: torch.nn.Module, name: str):
        self._module = module
        self.config = _Renamed(module.config, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Renamed:
    def __init__(self, config: Any, name: str):
        self._config = config
        self._attn_implementation = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _make(base: str, carried: bool) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def flex_attention_forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Base attention, then hierarchical attention for the readout rows; shapes as in `sdpa_attention_forward`."""
        context = kwargs.pop("flex_streams", None)
        if carried:
            context = CARRIED.get()
        if type(context) is Capture:
            context.take(key, value)
        if base == "sdpa" and type(context) is FlexContext and context.wants_lse(module):
            found = sdpa_step(query, key, value, attention_mask, dropout, scaling, kwargs)
            if found is not None:
                out, lse = found
                scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
                return context.attend(module, query, key, None, out, scaling, False, kwargs, lse), None
        owner: Any
        if base == "eager":
            run, owner = _own_eager(module), module
        else:
            run = ALL_ATTENTION_FUNCTIONS[base]
            owner = _RealBackend(module, base) if "flash" in base else module
        out, weights = run(
            owner, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        if context is None:
            return out, weights
        causal = base != "eager" and kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
        if type(context) is Probe:
            call = (query, key, value, attention_mask, out, scaling, causal, kwargs)
            context.calls.append(AttentionCall(module, *call))
            return out, weights
        if not isinstance(context, (FlexContext, StaticContext)):
            return out, weights  # `generate` runs an encoder with whatever keywords the decoder is to get
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return context.attend(module, query, key, attention_mask, out, scaling, causal, kwargs), weights

    return flex_attention_forward


def registered_name(base: str, carried: bool = False) -> str:
    """Register the attention and mask functions for a base backend and return the name they go by.

    Args:
        base: The backend that does the ordinary attention.
        carried: For decoders that drop keyword arguments: look for the state in `CARRIED` instead.

    Raises:
        ValueError: The base backend isn't known to this transformers.
    """
    alias = ALIASES.get(base, "_" + base.replace("flash_attention", "fa").replace("|", "_"))
    name = PREFIX + alias + ("_carried" if carried else "")
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return name
    if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise ValueError(f"attn_implementation must be one that this transformers knows, got {base!r}")
    if base not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        raise ValueError(f"attn_implementation must be one with a mask function, got {base!r}")
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    AttentionInterface.register(name, _make(base, carried))
    return name
