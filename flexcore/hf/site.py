"""AttentionSite: what one decoder layer's attention takes, and where its rotary positions come from."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import UnsupportedModelError


@dataclass(eq=False)
class Rotary:
    """The module that makes a layer's rotary tables, and how the model calls it.

    Args:
        module: The family's own rotary module.
        argument: The attention's parameter that takes its output.
        positions: The rotary module's parameter for positions.
        like: Its parameter that only lends dtype and device, or None.
        others: Its remaining arguments.
        axes: Leading axes of the positions: `(3,)` for multi-axis rotary models, `()` for the others.
    """

    module: nn.Module
    argument: str
    positions: str
    like: str | None
    others: dict[str, Any]
    axes: tuple[int, ...]


@dataclass(eq=False)
class AttentionSite:
    """One decoder layer's attention, as the dry run of `wrap` found it.

    Args:
        layer: Index of the layer.
        attention: Its attention module.
        norm: The module whose output is the attention's input, if any.
        rotary: What makes its rotary tables, if it takes any.
        call: The other arguments that the layer passes, by name; per-call ones are None.
        width: C, the width of what the attention takes.
        dtype: What the model computes in.
        carried: Whether the decoder drops keyword arguments, so that state comes in `CARRIED`.
        needs_mask: Whether its forward can't do without a mask tensor.
        states: In cross-attention, the attention's parameter that takes the encoder's output; else "".
        reason: Why the layer can't read fine tokens, or "" if it can.
    """

    layer: int
    attention: nn.Module
    norm: nn.Module | None
    rotary: Rotary | None
    call: dict[str, Any]
    width: int
    dtype: torch.dtype
    carried: bool = False
    needs_mask: bool = False
    states: str = ""
    reason: str = ""

    @property
    def reads(self) -> bool:
        """Whether the layer can read fine tokens."""
        return not self.reason


@dataclass(eq=False)
class Ear:
    """Hears the positions that a model gives its tokens, where the attention call doesn't name them.

    Args:
        module: The module that is handed the positions.
        argument: Under which name.
    """

    module: nn.Module
    argument: str

    @contextmanager
    def listening(self, record: Callable[[Tensor], None]) -> Iterator[None]:
        """Call `record` with the positions of the forward pass that this thread runs inside the block."""
        own = threading.get_ident()

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # another thread may be running another request through the same module
            if threading.get_ident() == own:
                found = arguments(module, args, kwargs).get(self.argument)
                if isinstance(found, Tensor):
                    record(found)

        handle = self.module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module by name, those of a `**kwargs` among them."""
    signature = inspect.signature(type(module).forward)
    bound = signature.bind_partial(module, *args, **kwargs)
    out = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            out.update(value)
        else:
            out[name] = value
    return out


def rotary_tables(rotary: Rotary, like: Tensor, positions: Tensor, longest: int = 0) -> Any:
    """The family's own rotary tables at (possibly fractional) positions, in the structure the family gives them.

    Args:
        rotary: The rotary module.
        like: Gives dtype and device.
        positions: `[..., B, N]`, with leading axes for multi-axis rotary models.
        longest: Largest position in the sequence; some families pick their frequencies by it.
    """
    positions = positions.to(like.device)
    n = positions.shape[-1]
    last = torch.full_like(positions[..., :1], longest)
    call = {**rotary.others, rotary.positions: torch.cat([positions, last], dim=-1)}
    if rotary.like is not None:
        call[rotary.like] = like
    out = rotary.module(**call)

    def shorten(table: Tensor) -> Tensor:
        axes = [a for a in (-2, *range(table.ndim)) if table.ndim >= 2 and table.shape[a] == n + 1]
        if not axes:
            raise UnsupportedModelError(
                f"{type(rotary.module).__name__} returns tables of shape {list(table.shape)} for {n + 1} positions, "
                "in which no axis is theirs; leave this layer out"
            )
        return table.narrow(axes[0], 0, n)

    return tree_map_only(Tensor, shorten, out)
