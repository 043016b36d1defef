"""The binding to Hugging Face transformers; the only part of flexcore that knows it.

Names are imported when they are asked for: an adapter's module may be imported without transformers being loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_adapter_weights, read_adapter_config, save_adapter_weights
    from .collation import collate
    from .embedding import EmbeddingAdapter
    from .official import import_official_checkpoint
    from .pretrained import from_pretrained
    from .processing import Adapter, View
    from .wrapping import attached, is_wrapped, unwrap, wrap

_HOMES = {
    "Adapter": "processing",
    "EmbeddingAdapter": "embedding",
    "View": "processing",
    "attached": "wrapping",
    "collate": "collation",
    "from_pretrained": "pretrained",
    "import_official_checkpoint": "official",
    "is_wrapped": "wrapping",
    "load_adapter_weights": "checkpoint",
    "read_adapter_config": "checkpoint",
    "save_adapter_weights": "checkpoint",
    "unwrap": "wrapping",
    "wrap": "wrapping",
}

__all__ = [
    "Adapter",
    "EmbeddingAdapter",
    "View",
    "attached",
    "collate",
    "from_pretrained",
    "import_official_checkpoint",
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
