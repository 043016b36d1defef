"""Run the speed benchmark over fractions, batches, zooms and modes, and write tables and plots of it.

    python -m benchmarks.speed_suite                  # what isn't measured yet; half an hour on a quiet machine
    python -m benchmarks.speed_suite --only fraction zoom --again

Every measurement is a process of its own. Writes `benchmarks/results/speed.json` after each of them, plots beside it,
and the section `speed` of `benchmarks/RESULTS.md`. A suite that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from .sections import FOLDER, write_json, write_section
from .speed_report import plot, section

JSON = FOLDER / "speed.json"
CHOSEN = 16  # regions of 64 tokens, about 20 % of them at zoom 3
_SHORT = ["--arms", "coarse", "flex", "--repeats", "31"]
_BOTH = ["--parts", "prefill", "decode"]
# By group and case: the module and its options.
CASES: dict[str, dict[str, tuple[str, list[str]]]] = {
    "default": {
        "20 %": ("speed", []),
        "10 %": ("speed", ["--fraction", "0.1", *_SHORT]),
        "20 %, drifting": ("speed", ["--drift", *_SHORT, *_BOTH]),
    },
    # ratios this close to one take more pairs to tell
    "overhead": {
        f"{100 * f:g} %": (
            "speed",
            ["--fraction", str(f), "--arms", "coarse", "flex", *_BOTH, "--repeats", "101"],
        )
        for f in (0.2, 0.1)
    },
    "fraction": {
        f"{100 * f:g} %": ("speed", ["--fraction", str(f), *_SHORT, *_BOTH]) for f in (0.01, 0.05, 0.4)
    },
    "batch": {"4": ("speed", ["--batch", "4", *_SHORT, "--repeats", "11"])},
    "zoom": {
        str(z): ("speed", ["--zoom", str(z), "--on-demand", "--regions", str(CHOSEN), *_SHORT, *_BOTH])
        for z in (3, 9, 27, 40)
    },
    "memory": {
        "20 %": ("speed_memory", []),
        "10 %": ("speed_memory", ["--fraction", "0.1", "--arms", "coarse", "flex"]),
        "40 %": ("speed_memory", ["--fraction", "0.4", "--arms", "coarse", "flex"]),
        "20 %, batch 4": ("speed_memory", ["--batch", "4", "--arms", "coarse", "flex"]),
    },
    "static": {"20 %": ("speed_static", [])},
    "no media": {"20 %": ("speed_no_media", [])},
}


def run(module: str, options: Sequence[str]) -> dict[str, Any]:
    """One measurement in a process of its own.

    Raises:
        RuntimeError: It failed.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    lines = done.stdout.splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"{' '.join(command[1:])} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    args = parser.parse_args(argv)
    found = json.loads(JSON.read_text()) if JSON.exists() else {}
    wanted = [
        (group, case)
        for group in args.only
        for case in CASES[group]
        if args.again or case not in found.get(group, {})
    ]
    for group, case in tqdm(wanted, desc="speed", unit="case", disable=None):
        found.setdefault(group, {})[case] = run(*CASES[group][case])
        write_json(JSON, found)
    if not found:
        return 0
    plot(found, FOLDER)
    text = section(found)
    write_section("speed", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
