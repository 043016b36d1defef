"""The long way round, for models that keep our keyword from the layers or don't tell them the tokens' positions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..errors import UnsupportedModelError
from .binding import FlexBinding
from .context import FlexContext
from .interface import CARRIED
from .site import arguments


def roundabout(model: Any, binding: FlexBinding, context: FlexContext, forward: Callable[..., Any]) -> Any:
    """Run a forward pass whose layers find the context in a context variable, or whose positions must be listened for.

    Args:
        model: The wrapped model.
        binding: Its binding.
        context: Of this forward pass.
        forward: The base class's `forward`, its own arguments bound.

    Raises:
        UnsupportedModelError: Gradient checkpointing would recompute layers without the context.
    """
    with ExitStack() as stack:
        if binding.ear is not None and not context.request.knows_positions:
            stack.enter_context(binding.ear.listening(context.record_positions))
        if not binding.carried:
            return forward(flex_streams=context)
        if torch.is_grad_enabled() and model.training and model.is_gradient_checkpointing:
            raise UnsupportedModelError(
                "gradient checkpointing must be off: this decoder drops keyword arguments, and layers that are "
                "recomputed would miss the media; call model.gradient_checkpointing_disable()"
            )
        stack.callback(CARRIED.reset, CARRIED.set(context))
        return forward()


@contextmanager
def injecting(decoder: Any, begin: Callable[[dict[str, Any]], FlexContext | None]) -> Iterator[None]:
    """Hand every forward pass of a decoder its context, whoever calls it.

    For models whose `generate` is their own: some hand over to an inner model that doesn't know our keyword.

    Args:
        decoder: The text decoder.
        begin: Makes a forward pass's context from the decoder's arguments.
    """
    own = threading.get_ident()

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != own or kwargs.get("flex_streams") is not None:
            return None
        return args, {**kwargs, "flex_streams": begin(arguments(module, args, kwargs))}

    handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
