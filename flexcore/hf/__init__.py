"""The binding to Hugging Face transformers; the only part of flexcore that knows it.

Names are imported when they are asked for: an adapter's module may be imported without transformers being loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_adapter_weights, read_adapter_config, save_adapter_weights
    from .collate import collate
    from .processing import Adapter
    from .wrap import attached, is_wrapped, unwrap, wrap

_HOMES = {
    "Adapter": "processing",
    "attached": "wrap",
    "collate": "collate",
    "is_wrapped": "wrap",
    "load_adapter_weights": "checkpoint",
    "read_adapter_config": "checkpoint",
    "save_adapter_weights": "checkpoint",
    "unwrap": "wrap",
    "wrap": "wrap",
}

__all__ = [
    "Adapter",
    "attached",
    "collate",
    "is_wrapped",
    "load_adapter_weights",
    "read_adapter_config",
    "save_adapter_weights",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
