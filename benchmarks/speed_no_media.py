"""What a wrapped model costs when there is nothing to look at: tensor operations and Python beyond the plain model's.

python -m benchmarks.speed_no_media
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .environment import environment
from .speed import arguments
from .speed_arms import Bench


class Operations(TorchDispatchMode):
    """Counts tensor operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def extra_operations(model: Any, inputs: dict[str, Any]) -> int:
    """Tensor operations of a forward that the same model makes with flexcore and not without."""
    found = []
    for run in (lambda: model(**inputs), lambda: type(model)._flex_base.forward(model, **inputs)):
        run()
        with Operations() as operations:
            run()
        found.append(operations.counts)
    return (found[0] - found[1]).total()


def quick_difference(run: Callable[[], Any], plain: Callable[[], Any], times: int = 400) -> float:
    """Seconds that one call takes more than another when little else goes on: quartiles of each, called in turns."""
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(times):
        for call, taken in zip((run, plain), seconds, strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    first, second = (sorted(taken)[times // 4] for taken in seconds)
    return first - second


@torch.no_grad()
def python_per_layer(model: Any) -> float:
    """Seconds a layer that flexcore adds to a forward without media.

    Our attention function against the base's on tensors of no size, and a layer's share of the wrapped forward.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layers, config = model.model.layers, model.config
    attention = layers[len(layers) // 2].self_attn
    ours = ALL_ATTENTION_FUNCTIONS[str(model._flex_binding.implementation)]
    query = torch.zeros(1, config.num_attention_heads, 1, config.head_dim)
    key = torch.zeros(1, config.num_key_value_heads, 1, config.head_dim)
    plain, inputs = type(model)._flex_base.forward, {"input_ids": torch.ones(1, 1, dtype=torch.long)}
    own = quick_difference(
        lambda: ours(attention, query, key, key, None, scaling=1.0),
        lambda: sdpa_attention_forward(attention, query, key, key, None, scaling=1.0),
    )
    whole = quick_difference(lambda: model(**inputs), lambda: plain(model, **inputs))
    return own + max(0.0, whole) / len(layers)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    args = arguments(argv)
    # a model of no size: work would drown what Python takes
    args.hidden, args.zoom = 64, 1
    model = Bench(args).model
    found = {
        "microseconds_per_layer": 1e6 * python_per_layer(model),
        "extra_operations": extra_operations(model, {"input_ids": torch.ones(1, 8, dtype=torch.long)}),
        **environment("benchmarks.speed_no_media"),
    }
    print(f"\n{found['command']}\n{found['versions']}\n{found['machine']}\n")
    print(
        f"{found['microseconds_per_layer']:.1f} microseconds a layer, {found['extra_operations']} operations more"
    )
    if args.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
