"""flexcore: coarse tokens in the sequence, fine tokens on demand.

The core needs torch only; what binds it to transformers is imported the first time it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flexcore._version import __version__
from flexcore.config import FlexConfig
from flexcore.errors import (
    FlexcoreError,
    StreamError,
    UnsupportedModelError,
    WeightsMismatchError,
    WrapStateError,
)
from flexcore.grid import Grid
from flexcore.hookspecs import hookimpl
from flexcore.plugins import load_adapter
from flexcore.sources import FineSource, OnDemandSource, TensorSource
from flexcore.streams import FineStream, StreamBatch
from flexcore.trace import Trace, trace

if TYPE_CHECKING:
    from flexcore.hf.checkpoint import load_adapter_weights, save_adapter_weights
    from flexcore.hf.pretrained import from_pretrained
    from flexcore.hf.wrapping import attached, is_wrapped, unwrap, wrap

_LAZY = {
    "attached": "flexcore.hf.wrapping",
    "from_pretrained": "flexcore.hf.pretrained",
    "is_wrapped": "flexcore.hf.wrapping",
    "load_adapter_weights": "flexcore.hf.checkpoint",
    "save_adapter_weights": "flexcore.hf.checkpoint",
    "unwrap": "flexcore.hf.wrapping",
    "wrap": "flexcore.hf.wrapping",
}

__all__ = [
    "FineSource",
    "FineStream",
    "FlexConfig",
    "FlexcoreError",
    "Grid",
    "OnDemandSource",
    "StreamBatch",
    "StreamError",
    "TensorSource",
    "Trace",
    "UnsupportedModelError",
    "WeightsMismatchError",
    "WrapStateError",
    "__version__",
    "attached",
    "from_pretrained",
    "hookimpl",
    "is_wrapped",
    "load_adapter",
    "load_adapter_weights",
    "save_adapter_weights",
    "trace",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
