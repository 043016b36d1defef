"""Pickling wrapped models: their class is made on the spot, so it is rebuilt from the model's own class."""

from __future__ import annotations

from typing import Any


def rebuild(base: type) -> Any:
    """An empty wrapped model of a model class; what pickle calls before it fills in the state."""
    from .wrapped import wrapped_class

    cls: Any = wrapped_class(base)
    return cls.__new__(cls)


def reduce_wrapped(model: Any, protocol: Any) -> tuple[Any, ...]:
    """`__reduce_ex__` of a wrapped model: its base class by reference, and the state as ever."""
    base = type(model)._flex_base
    _, _, *rest = base.__reduce_ex__(model, protocol)
    return (rebuild, (base,), *rest)
