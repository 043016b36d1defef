"""Static mode: what its prefill costs, and how its compiled decode step compares with the lazy one's.

    python -m benchmarks.speed_static            # compiles for a few minutes

Three wrapped models share their weights: lazy, static, and lazy without media as the floor. Decode steps run over a
`StaticCache` under `torch.compile`: static in one graph (`fullgraph=True`), lazy in the pieces that it breaks into.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StaticCache

from flexcore.hf.kv_cache import cache_argument

from .environment import environment
from .speed import WARM_UP, arguments, ratios, rounds
from .speed_arms import Bench


class Steps:
    """One arm: a prompt into a static cache, then compiled steps.

    Args:
        bench: The model.
        media: With its picture.
        whole: Compile the step as one graph.
        length: Tokens that the cache has room for.
    """

    def __init__(self, bench: Bench, media: bool, whole: bool, length: int):
        self.bench, self.media, self.length = bench, media, length
        self.compiled = torch.compile(bench.model.forward, fullgraph=whole, dynamic=False)
        self.cache = StaticCache(config=bench.model.config, max_cache_len=length)

    @torch.no_grad()
    def prefill(self) -> float:
        """Seconds of a prompt, which isn't compiled."""
        bench = self.bench
        bench.forget()
        self.cache = StaticCache(config=bench.model.config, max_cache_len=self.length)
        inputs = {"input_ids": bench.ids, **({"flex_streams": bench.streams} if self.media else {})}
        cache = cache_argument(bench.model, self.cache)
        return bench.timed(lambda: bench.model(**inputs, **cache, use_cache=True, logits_to_keep=1))[0]

    @torch.no_grad()
    def step(self) -> float:
        """Seconds of one compiled step."""
        bench = self.bench
        at = torch.tensor([[int(self.cache.get_seq_length())]]).expand(len(bench.ids), -1)
        cache = cache_argument(bench.model, self.cache)
        return bench.timed(
            lambda: self.compiled(input_ids=bench.ids[:, :1], position_ids=at, **cache, use_cache=True)
        )[0]


def measure(args: Any) -> dict[str, dict[str, list[float]]]:
    """Seconds of prefill and decode by arm."""
    lazy, static = Bench(args), Bench(args, static=True)
    static.model.load_state_dict(lazy.model.state_dict())
    static.streams, static.ids = lazy.streams, lazy.ids
    length = lazy.ids.shape[1] + 2 * (args.repeats + WARM_UP)
    coarse = Bench(args)
    coarse.model.load_state_dict(lazy.model.state_dict())
    coarse.ids = lazy.ids
    arms = {
        "coarse": Steps(coarse, False, True, length),
        "lazy": Steps(lazy, True, False, length),
        "static": Steps(static, True, True, length),
    }

    def of(name: str) -> dict[str, Callable[[], float]]:
        return {arm: getattr(steps, name) for arm, steps in arms.items()}

    found = {"prefill": rounds(args.repeats, of("prefill"), "prefill")}
    found["decode"] = rounds(args.repeats, of("step"), "decode, compiled", WARM_UP)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    args = arguments(argv)
    spread = ratios(found := measure(args))
    result = {
        "ratios": {name: one["median"] for name, one in spread.items()},
        "spread": spread,
        "milliseconds": {
            f"{part} {arm}": 1e3 * sorted(values)[len(values) // 2]
            for part, seconds in found.items()
            for arm, values in seconds.items()
        },
        "settings": vars(args),
        **environment("benchmarks.speed_static"),
    }
    print(f"\n{result['command']}\n{result['versions']}\n{result['machine']}\n")
    for name, value in result["milliseconds"].items():
        print(f"{name:<20}{value:>10.2f} ms")
    for name, one in spread.items():
        print(
            f"{name:<28}{one['median']:>10.3f} x   95 % {one['low']:.3f} to {one['high']:.3f}, {one['pairs']} pairs"
        )
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
