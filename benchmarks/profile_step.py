"""Where a step's time and tensor operations go, part by part: a decode step, a prefill, or static mode's prefill.

    python -m benchmarks.profile_step --fraction 0.1                   # one decode step
    python -m benchmarks.profile_step --what prefill
    python -m benchmarks.profile_step --what static --repeats 15

Every part is timed without the parts inside it. Operations are counted in a run of their own, as PyTorch dispatches
them: views count too, for on a CPU a small operation costs its dispatch. The coarse-only model takes turns with Flex,
and the ratio is the median of paired ones. The measurements in `NOTES.md` are this script's, run on both commits.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .environment import environment
from .speed import WARM_UP, arguments, ratio
from .speed_arms import Bench

WHAT = ("decode", "prefill", "static")
# label: module, attribute; what an older version of the code lacks is left out
PARTS = {
    "weights changed?": ("flexcore.hf.binding", "FlexBinding.weights_version"),
    "request and rows": ("flexcore.hf.wrapped", "_context"),
    "attend, less the parts below": ("flexcore.hf.context", "FlexContext.attend"),
    "readout": ("flexcore.hf.context", "row_attention"),
    "selection": ("flexcore.hf.context", "FlexContext._select"),
    "selector": ("flexcore.selection", "Selector.select"),
    "chosen regions": ("flexcore.hf.context", "FlexContext._chosen"),
    "read, less the parts below": ("flexcore.hf.context", "FlexContext._read"),
    "fine K/V: held": ("flexcore.hf.context", "FlexContext._fine"),
    "fine K/V: projected": ("flexcore.hf.binding", "FlexBinding.project"),
    "fine attention and merge": ("flexcore.hf.context", "hierarchical_attention"),
    "static: all regions": ("flexcore.hf.wrapped", "project_all"),
}
REST = "the model itself"


class Meter(TorchDispatchMode):
    """Seconds and operations by the part that runs, inner parts not counted in outer ones."""

    def __init__(self) -> None:
        super().__init__()
        self.running = [REST]
        self.since = 0.0
        self.seconds: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[self.running[-1]] += 1
        return func(*args, **(kwargs or {}))

    def switch(self) -> None:
        """Book the time since the last switch on the part that ran."""
        now = time.perf_counter()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def around(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, booked on a part."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.running.append(label)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.running.pop()

        return run

    @contextmanager
    def booking(self) -> Iterator[None]:
        """Book what runs inside the block, by part."""
        with ExitStack() as stack:
            for label, (module, path) in PARTS.items():
                owner, (*names, last) = importlib.import_module(module), path.split(".")
                for name in names:
                    owner = getattr(owner, name)
                if hasattr(owner, last):
                    stack.enter_context(
                        mock.patch.object(owner, last, self.around(label, getattr(owner, last)))
                    )
            yield

    def read(self, run: Callable[[], Any]) -> tuple[Counter[str], float]:
        """Seconds by part of one call, and of the whole call."""
        self.seconds.clear()
        started = self.since = time.perf_counter()
        run()
        self.switch()
        return Counter(self.seconds), time.perf_counter() - started


def measure(bench: Bench, what: str, repeats: int) -> dict[str, Any]:
    """Medians by part, operations by part, and the paired ratio of uninstrumented runs."""
    runs: dict[str, Callable[[], float]] = {}
    for arm in ("coarse", "flex"):
        if what == "decode":
            state = bench.prefill(arm)[1]
            runs[arm] = functools.partial(bench.step, arm, state)
        else:
            runs[arm] = lambda arm=arm: bench.prefill(arm)[0]
    for _ in range(WARM_UP if what == "decode" else 2):
        for run in runs.values():
            run()
    pairs: dict[str, list[float]] = {"coarse": [], "flex": []}
    for i in range(repeats):
        for arm in reversed(runs) if i % 2 else runs:
            pairs[arm].append(runs[arm]())
    meter = Meter()
    with meter:
        runs["coarse"]()
    coarse = meter.operations.total()
    meter.operations.clear()
    with meter.booking():
        timed = [meter.read(runs["flex"])[0] for _ in range(repeats)]
        with meter:
            runs["flex"]()
    parts = [*PARTS, REST]
    return {
        "ratio": ratio(pairs["flex"], pairs["coarse"]),
        "milliseconds": {arm: 1e3 * statistics.median(values) for arm, values in pairs.items()},
        "operations": {"coarse": coarse, "flex": meter.operations.total()},
        "parts": {
            label: {
                "microseconds": 1e6 * statistics.median(found[label] for found in timed),
                "operations": meter.operations[label],
            }
            for label in parts
            if any(found[label] for found in timed)
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--what", choices=WHAT, default="decode")
    own, rest = parser.parse_known_args(argv)
    args = arguments(rest)
    bench = Bench(args, static=own.what == "static")
    with torch.no_grad():
        found = measure(bench, own.what, args.repeats)
    found |= {"what": own.what, "fraction": args.fraction, **environment("benchmarks.profile_step")}
    print(f"\n{found['command']}\n{found['versions']}\n{found['machine']}\n")
    print(f"{'part':<32}{'operations':>12}{'microseconds':>14}")
    for label, part in found["parts"].items():
        print(f"{label:<32}{part['operations']:>12}{part['microseconds']:>14.0f}")
    for arm in ("coarse", "flex"):
        print(f"{arm + ', whole':<32}{found['operations'][arm]:>12}{1e3 * found['milliseconds'][arm]:>14.0f}")
    one = found["ratio"]
    print(f"\nflex over coarse {one['median']:.3f}, 95 % {one['low']:.3f} to {one['high']:.3f}")
    if args.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
