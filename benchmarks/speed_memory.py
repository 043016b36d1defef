"""Memory of one arm's prefill: the most that tensors took at once, allocation by allocation.

    python -m benchmarks.speed_memory --arms coarse flex dense

Counted from the profiler's allocations and frees instead of the process's size, which says what the allocator kept.
What Flex may take beyond coarse-only is the fine K/V that it holds and a tenth of coarse-only's own activations.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import flexcore

from .environment import environment
from .speed import arguments
from .speed_arms import Bench

MIB = 1 << 20


def peak(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that tensors made by `run` took at once."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        held = run()  # noqa: F841  what it returns is in use until the profile ends
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@torch.no_grad()
def held(bench: Bench) -> int:
    """Bytes of the fine K/V that a Flex prefill holds at its end."""
    bench.forget()
    with flexcore.trace(bench.model) as trace:
        bench.model(bench.ids, flex_streams=bench.streams, use_cache=True, logits_to_keep=1)
    config = bench.model.config
    token = 2 * config.num_key_value_heads * config.head_dim * bench.model.dtype.itemsize
    regions: dict[tuple[int, int], torch.Tensor] = {}
    for record in trace:
        if record.read_in is not None:
            key = record.read_in, record.sample
            regions[key] = regions.get(key, torch.zeros_like(record.regions)) | record.regions
    lengths = bench.grid.region_lengths
    return token * sum(int(lengths[chosen].sum()) for chosen in regions.values())


def measure(bench: Bench) -> dict[str, Any]:
    """Peaks in bytes by arm, and what Flex may take beyond coarse-only."""
    for arm in bench.args.arms[:2]:
        bench.prefill(arm)  # what is made once and kept is no part of it
    peaks = {arm: peak(lambda arm=arm: bench.prefill(arm)[1], bench.device) for arm in bench.args.arms}
    out: dict[str, Any] = {"peak_bytes": peaks}
    if {"coarse", "flex"} <= set(peaks):
        out |= {
            "flex_beyond_coarse": peaks["flex"] - peaks["coarse"],
            "fine_kv_bytes": held(bench),
            "bound": held(bench) + peaks["coarse"] // 10,
        }
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; 1 if Flex takes more than it may."""
    bench = Bench(arguments(argv))
    found = {**measure(bench), **environment("benchmarks.speed_memory"), "settings": vars(bench.args)}
    print(f"\n{found['command']}\n{found['versions']}\n")
    for arm, value in found["peak_bytes"].items():
        print(f"{arm:<10}{value / MIB:>10.1f} MiB at the peak of a prefill")
    if "bound" in found:
        print(
            f"Flex takes {found['flex_beyond_coarse'] / MIB:.1f} MiB more than coarse-only; its fine K/V are "
            f"{found['fine_kv_bytes'] / MIB:.1f} MiB, and with a tenth of coarse-only's peak "
            f"{found['bound'] / MIB:.1f} MiB"
        )
    if bench.args.json:
        print(json.dumps(found))
    return int(found.get("flex_beyond_coarse", 0) > found.get("bound", 0))


if __name__ == "__main__":
    sys.exit(main())
