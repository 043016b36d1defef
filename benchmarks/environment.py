"""What a measurement was made with: versions, machine and command, as every benchmark reports them."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import flexcore


def environment(module: str) -> dict[str, Any]:
    """Command, versions and machine of this process.

    Args:
        module: Of the benchmark, as `python -m` takes it.
    """
    return {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "flexcore": flexcore.__version__,
        },
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory GiB": _memory(),
            "load": _load(),
        },
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that has no name there
        return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _load() -> float | None:
    """What else the machine has to do: times by the clock mean little where this is more than its cores."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
