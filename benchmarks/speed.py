"""What looking closer costs: prefill, decode and training step of coarse-only, Flex, the official scheme and dense.

    python -m benchmarks.speed                      # the default sizes, medians of interleaved runs
    python -m benchmarks.speed --quick --json       # under a minute; the last line is JSON
    python -m benchmarks.speed --fraction 0.1 --batch 4 --drift --arms coarse flex

All arms share one random Llama-shaped decoder with LLaVA's geometry (24x24 coarse tokens, 72x72 fine, 60 text)
and the same inputs. The floor is the coarse-only model; the selected share of regions is forced, and held after the
first steps unless `--drift` is given. Timings on a shared machine are noisy, so arms take turns, forwards and
backwards, and ratios are taken pair by pair within a round. `benchmarks.speed_suite` runs this over fractions,
batches and zooms, with peak memory and static mode, and writes `RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from .environment import environment
from .speed_arms import ARMS, Bench
from .speed_floor import floors

PARTS = ("prefill", "decode", "training")
WARM_UP = 8  # tokens before decoding is timed
# the official code can't do more than one sample, and has no training mode of its own that would be comparable
_TRAINED = ("coarse", "flex")


def rounds(
    n: int, runs: dict[str, Callable[[], float]], part: str, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every run in each of `n` rounds.

    Args:
        n: Rounds.
        runs: What to time, by arm; every other round takes them in the opposite order.
        part: For the progress bar.
        warm_up: Rounds that aren't counted.
    """
    seconds: dict[str, list[float]] = {arm: [] for arm in runs}
    for i in tqdm(range(-warm_up, n), desc=f"{part}: {', '.join(runs)}", disable=None):
        for arm in reversed(runs) if i % 2 else runs:
            value = runs[arm]()
            if i >= 0:
                seconds[arm].append(value)
    return seconds


def measure(bench: Bench) -> dict[str, dict[str, list[float]]]:
    """Seconds by group of arms that took turns, `PART` or `PART/slow`, and by arm."""
    args = bench.args
    fast = [arm for arm in args.arms if arm in _TRAINED]
    slow = [arm for arm in args.arms if arm not in _TRAINED]
    found: dict[str, dict[str, list[float]]] = {}

    def prefill(arm: str) -> Callable[[], float]:
        return lambda: bench.prefill(arm)[0]

    if "prefill" in args.parts:
        found["prefill"] = rounds(args.repeats, {arm: prefill(arm) for arm in fast}, "prefill", 2)
        for arm in slow:
            pair = {"flex": prefill("flex"), arm: prefill(arm)}
            count = args.slow_repeats if arm == "dense" else args.repeats
            found[f"prefill/{arm}"] = rounds(count, pair, "prefill")
    if "decode" in args.parts:

        def step(arm: str) -> Callable[[], float]:
            state = bench.prefill(arm)[1]
            return lambda: bench.step(arm, state)

        steps = {arm: step(arm) for arm in args.arms if arm != "dense"}
        found["decode"] = rounds(args.repeats, steps, "decode", WARM_UP)
        if "dense" in args.arms:
            pair = {"flex": step("flex"), "dense": step("dense")}
            found["decode/dense"] = rounds(args.slow_repeats, pair, "decode", WARM_UP)
    if "training" in args.parts and fast:

        def training(arm: str) -> Callable[[], float]:
            return lambda: bench.training(arm)

        found["training"] = rounds(args.repeats, {arm: training(arm) for arm in fast}, "training step")
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median of paired ratios, its 95 % interval (by order statistics, no distribution assumed) and quartiles."""
    pairs = sorted(a / b for a, b in zip(above, below, strict=True))
    n = len(pairs)
    # the number of pairs below the true median is Binomial(n, 1/2)
    tail, lower = 0.5**n, 0
    while lower + 1 < n / 2 and tail + math.comb(n, lower + 1) * 0.5**n <= 0.025:
        lower += 1
        tail += math.comb(n, lower) * 0.5**n
    return {
        "median": statistics.median(pairs),
        "low": pairs[lower],
        "high": pairs[-1 - lower],
        "quartile_1": pairs[n // 4],
        "quartile_3": pairs[-1 - n // 4],
        "pairs": n,
    }


def ratios(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Every ratio of arms that took turns, as `PART_ARM_over_ARM`."""
    out = {}
    for group, seconds in found.items():
        part, arms = group.partition("/")[0], list(seconds)
        for above in reversed(arms):
            for below in arms[: arms.index(above)]:
                # dearer over cheaper, but for Flex over coarse
                out[f"{part}_{above}_over_{below}"] = ratio(seconds[above], seconds[below])
    return out


def report(bench: Bench, found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Ratios, medians and what they were measured on."""
    args, spread = bench.args, ratios(found)
    medians = {
        f"{group} {arm}": 1e3 * statistics.median(values)
        for group, seconds in found.items()
        for arm, values in seconds.items()
    }
    training = {"union of the answer rows' regions": bench.union()} if "training" in found else {}
    return {
        "ratios": {name: found["median"] for name, found in spread.items()},
        "spread": spread,
        "milliseconds": medians,
        **training,
        **floors(bench, medians),
        "regions": bench.k,
        "settings": {k: v for k, v in vars(args).items() if k != "json"},
        **environment("benchmarks.speed"),
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=12)
    add("--first-layer", type=int, default=8)
    add("--heads", type=int, help="default: one per 64 of the width")
    add("--kv-heads", type=int)
    add("--fraction", type=float, default=0.2, help="share of the regions that each layer reads")
    add("--regions", type=int, help="their number, instead of a share")
    add("--zoom", type=int, default=3, help="fine tokens per coarse token and axis")
    add("--on-demand", action="store_true", help="make fine features when they are asked for; not with dense")
    add("--batch", type=int, default=1)
    add("--drift", action="store_true", help="let the selection change at every step")
    add("--arms", nargs="+", choices=ARMS, help="default: all that can be run")
    add("--parts", nargs="+", choices=PARTS, help="default: all, without training if --quick")
    add("--repeats", type=int, help="rounds; default 31, or 11 with --quick")
    add("--slow-repeats", type=int, help="rounds of dense; default 31, or 3 with --quick")
    add("--device", default="cpu")
    add("--machine", help="peak rates for the floor on a GPU, as `flexcore cost --machine` takes them")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--seed", type=int, default=0)
    add("--quick", action="store_true")
    add("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args(argv)
    able = [
        arm
        for arm in ARMS
        if arm in _TRAINED or not (args.on_demand or (arm == "official" and args.batch > 1))
    ]
    if args.arms is None:
        args.arms = able
    elif not set(args.arms) <= set(able):
        parser.error(f"--arms must be among {', '.join(able)} with these settings, got {' '.join(args.arms)}")
    if set(args.arms) - {"coarse"} and "flex" not in args.arms:
        parser.error("--arms must have flex among them: the others are compared with it")
    args.arms = [arm for arm in ARMS if arm in args.arms]
    args.parts = args.parts or [part for part in PARTS if part != "training" or not args.quick]
    for name, quick, full in (("repeats", 11, 31), ("slow_repeats", 3, 31)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    bench = Bench(arguments(argv))
    result = report(bench, measure(bench))
    print(f"\n{result['command']}\n{result['versions']}\n{result['machine']}\n")
    for name, value in result["milliseconds"].items():
        floor = result.get("floor_milliseconds", {}).get(name)
        print(f"{name:<28}{value:>12.2f} ms" + (f"   {value / floor:.2f}x its floor" if floor else ""))
    print()
    for name, found in result["spread"].items():
        interval = f"95 % {found['low']:.3f} to {found['high']:.3f}, {found['pairs']} pairs"
        print(f"{name:<32}{found['median']:>10.3f} x   {interval}")
    if bench.args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
