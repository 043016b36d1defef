"""What accelerate and peft do to modules, undone or followed where the binding has to look underneath.

accelerate's offloading leaves parameters on the meta device and brings them in from a `forward` that it sets on the
*instance*; peft puts layers of its own in a module's place. Neither package is imported unless its traces are there.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..errors import WrapStateError
from .quantised import plain_twins

_HOOKED = ("_hf_hook", "_old_forward", "forward")


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: its offload hook's device if it has one, else its first parameter's."""
    for part in module.modules():
        hook = part.__dict__.get("_hf_hook")
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    found: Any = next(module.parameters(), None)
    found = (
        next(module.buffers(), None) if found is None else found
    )  # quantised layers may keep theirs in buffers
    return torch.device("cpu") if found is None else found.device


def plain_copy(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A deep copy of plain modules: weights in memory and dequantised, offload hooks left behind, LoRA merged.

    Args:
        module: Any module; it isn't changed.
        dtype: Of layers that were quantised. Default: what they say they compute in.
    """
    memo: dict[int, Any] = {}
    with ExitStack() as stack:
        for part in module.modules():
            hook = part.__dict__.get("_hf_hook")
            if hook is not None:
                from accelerate.utils import align_module_device

                memo[id(hook)] = False  # a hook may hold the whole model's weights
                stack.enter_context(align_module_device(part))
        memo.update(plain_twins(module, dtype))  # deepcopy takes them for copies
        twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        if "_old_forward" in part.__dict__:
            for name in _HOOKED:
                part.__dict__.pop(name, None)
    return _merged(twin)


def _merged(module: nn.Module) -> nn.Module:
    """The module with every adapter layer in it replaced by its base layer, the active adapters merged in."""
    if hasattr(module, "get_base_layer") and hasattr(module, "merge"):
        if not module.disable_adapters:
            module.merge()  # type: ignore[operator]
        return module.get_base_layer()  # type: ignore[operator,no-any-return]
    for name, child in module.named_children():
        merged = _merged(child)
        if merged is not child:
            setattr(module, name, merged)
    return module


def without_peft(model: Any) -> Any:
    """The transformers model inside a peft model, or the model itself."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def check_forward(model: nn.Module, what: str) -> None:
    """Raise WrapStateError if something other than accelerate's hooks has replaced `forward` on the instance."""
    if "forward" in model.__dict__ and "_old_forward" not in model.__dict__:
        raise WrapStateError(
            f"{what}: `forward` was replaced on this very model (by `Accelerator.prepare` with mixed precision, or a "
            f"patch); call flexcore.{what} before that, or undo it first"
        )


def rebind_forward(model: nn.Module) -> None:
    """Let a hooked model's hook call the `forward` of the class that the model has now."""
    if "_old_forward" not in model.__dict__:
        return
    own = MethodType(type(model).forward, model)
    model._old_forward = own  # type: ignore[assignment]
    # `generate` and Trainer read the signature through the hook's wrapper
    hooked: Any = model.__dict__.get("forward")
    if hasattr(hooked, "__wrapped__"):
        hooked.__wrapped__ = own
        hooked.__dict__.pop("__signature__", None)
