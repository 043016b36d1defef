"""The binding to Hugging Face transformers; the only part of flexcore that knows it."""

from .checkpoint import load_adapter_weights, read_adapter_config, save_adapter_weights
from .wrap import attached, is_wrapped, unwrap, wrap

__all__ = [
    "attached",
    "is_wrapped",
    "load_adapter_weights",
    "read_adapter_config",
    "save_adapter_weights",
    "unwrap",
    "wrap",
]
