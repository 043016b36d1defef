"""The KV cache among a model's inputs and outputs, by whichever name this transformers has for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

# transformers 5.24 renamed the one to the other and takes both for a while
NAMES = ("cache", "past_key_values")


def cache_among(inputs: Mapping[str, Any]) -> Any:
    """The KV cache that a call was given, or None."""
    return next((inputs[name] for name in NAMES if inputs.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The KV cache that a model's output carries, or None."""
    if isinstance(output, Mapping):
        return cache_among(output)
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return next((found for name in NAMES if (found := getattr(output, name, None)) is not None), None)


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The KV cache as a keyword argument for the model's `forward`, by the name that it takes.

    Raises:
        ValueError: It takes none.
    """
    taken = inspect.signature(model.forward).parameters
    name = next((name for name in NAMES if name in taken), None)
    if name is None:
        raise ValueError(f"{type(model).__name__}.forward takes no KV cache, by none of {', '.join(NAMES)}")
    return {name: cache}
