"""The Triton kernels beside the torch path: bytes and FLOPs against the floor, what the compiler made, times on a GPU.

    python -m benchmarks.kernels              # counts and, where tools for it are there, the compiler's statistics
    python -m benchmarks.kernels --notes      # the same, written into benchmarks/NOTES.md
    python -m benchmarks.kernels --json       # on a card also times; the last line is JSON
    python -m benchmarks.kernels --table      # on a card: measure buckets of sizes for FLEXCORE_KERNELS=auto

The floor counts each input and output once; what a kernel asks for and what torch's operators take and give are more,
though caches may serve some of it. Sizes are those of one layer of LLaVA-1.5-7B, and of the same with grouped queries.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from flexcore.kernels.artefacts import SHARED_LIMIT
from flexcore.kernels.dispatch import MARGIN, TABLE, Shape

from .environment import environment
from .kernel_cases import CARDS, Case, cases, counted, statistics

NOTES = Path(__file__).with_name("NOTES.md")
MARKERS = "<!-- kernels: begin -->", "<!-- kernels: end -->"
# ---------------------------------------------------------------------- timing


def timed(runs: Sequence[Callable[[], Any]], rounds: int = 31) -> list[tuple[float, float]]:
    """Microseconds on the device with cold caches, and per call back to back with the host's part, of each run."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    device: list[list[float]] = [[] for _ in runs]
    host: list[list[float]] = [[] for _ in runs]
    for run in runs:  # compile and warm up
        for _ in range(3):
            run()
    for _ in range(rounds):
        for i, run in enumerate(runs):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            device[i].append(1e3 * start.elapsed_time(stop))
            began = perf_counter()
            for _ in range(10):
                run()
            torch.cuda.synchronize()
            host[i].append(1e5 * (perf_counter() - began))
    return [(median(d), median(h)) for d, h in zip(device, host, strict=True)]


def measured(case: Case) -> dict[str, float]:
    """Times of kernel and torch path on the CUDA device, after checking that they agree."""
    given = case.inputs(torch.device("cuda"))
    for found, expected in zip(case.run(given, True), case.run(given, False), strict=True):
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        if not error < 1e-2:
            raise RuntimeError(f"kernel and torch path differ by {error:.1e} in {case}")
    (kernel, kernel_call), (plain, plain_call) = timed(
        [lambda: case.run(given, kernel=True), lambda: case.run(given, kernel=False)]
    )
    return {
        "kernel_us": kernel,
        "torch_us": plain,
        "kernel_call_us": kernel_call,
        "torch_call_us": plain_call,
        "ratio": max(kernel / plain, kernel_call / plain_call),
    }


def write_table() -> None:
    """Measure both ends of every bucket and put the worse ratios into the table of `FLEXCORE_KERNELS=auto`."""
    name = torch.cuda.get_device_name()
    entries = []
    for upper in tqdm(list(_buckets()), desc=name):
        ratio = max(measured(Case(end))["ratio"] for end in (upper.least(), upper))
        entries.append({**asdict(upper), "ratio": round(ratio, 3)})
        table = json.loads(TABLE.read_text())
        table["devices"][name] = entries
        TABLE.write_text(json.dumps(table, indent=1) + "\n")


def _buckets() -> Iterator[Shape]:
    for dtype in ("bfloat16", "float16"):
        for width, groups, lanes in ((128, 1, 32), (128, 4, 8), (64, 1, 8), (128, 8, 4)):
            for rows in (1, 32):
                for keys in (1024, 4096):
                    yield Shape("readout", dtype, width, groups, lanes, rows, keys)
                    for grad in (False, True) if rows > 1 else (False,):
                        yield Shape("region_attention", dtype, width, groups, lanes, rows, keys, grad)
            for tokens in (512, 1024):
                yield Shape("gather_project_rotate", dtype, width, 1, lanes, 4096, tokens)


# ---------------------------------------------------------------------- reporting


def report(result: dict[str, Any]) -> str:
    """Everything as Markdown."""
    made = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    lines = [
        f"`{made['command']}`, {versions}; {result['card'] or 'no CUDA device'}.",
        "",
        result["note"],
        "",
        "| kernel | sizes | floor MB | kernel MB | torch MB | floor GFLOP | kernel GFLOP issued | floor us "
        + " / ".join(CARDS)
        + " |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["counts"]:
        shape = row["case"]["shape"]
        name = shape["kernel"] + (" + backward" if shape["grad"] else "")
        floors = " / ".join(f"{us:.1f}" for us in row["floor_us"].values())
        lines.append(
            f"| {name} | {row['case']['name']} | {row['floor']['bytes'] / 1e6:.2f} "
            f"| {row['kernel']['bytes'] / 1e6:.2f} | {row['torch']['bytes'] / 1e6:.2f} "
            f"| {row['floor']['flops'] / 1e9:.3f} | {row['kernel']['flops'] / 1e9:.3f} | {floors} |"
        )
    if result["times"]:
        lines += ["", "| kernel | sizes | kernel us | torch us | kernel call us | torch call us | floor us |"]
        lines.append("|---|---|---|---|---|---|---|")
        for row, times in zip(result["counts"], result["times"], strict=True):
            card = next((c for c in CARDS if c in result["card"]), None)
            floor = "" if card is None else f"{row['floor_us'][card]:.1f}"
            lines.append(
                f"| {row['case']['shape']['kernel']} | {row['case']['name']} | {times['kernel_us']:.1f} "
                f"| {times['torch_us']:.1f} | {times['kernel_call_us']:.1f} | {times['torch_call_us']:.1f} "
                f"| {floor} |"
            )
    lines += ["", *(f"Not compiled for {reason}." for reason in result["not_compiled"])]
    return "\n".join([*lines, *_compiled_table(result["compiled"])])


def _compiled_table(compiled: list[dict[str, Any]]) -> list[str]:
    if not compiled:
        return []
    targets = sorted({a["target"] for a in compiled})
    lines = [
        f"Compiled for {', '.join(f'sm_{t}' for t in targets)}: {len(compiled)} kernels, most spilled bytes "
        f"{max(a['spilled'] for a in compiled)}, most shared memory {max(a['shared'] for a in compiled)} bytes of the "
        f"{SHARED_LIMIT} that the smallest GPUs have. By target: registers, spilled bytes, shared bytes. A "
        "projection's rows are the width of its features.",
        "",
        f"| kernel | dtype | D | groups | rows | warps | {' | '.join(f'sm_{t}' for t in targets)} |",
        "|---|---|---|---|---|---|" + "---|" * len(targets),
    ]
    rows: dict[tuple[Any, ...], dict[int, str]] = {}
    for a in compiled:
        key = tuple(a[n] for n in ("kernel", "dtype", "width", "groups", "rows", "warps"))
        rows.setdefault(key, {})[a["target"]] = f"{a['registers']}, {a['spilled']}, {a['shared']}"
    for key, cells in sorted(rows.items(), key=lambda row: row[0][:1]):
        values = [*map(str, key), *(cells.get(t, "") for t in targets)]
        lines.append(f"| {' | '.join(values)} |")
    return lines


def write_notes(text: str, path: Path = NOTES) -> None:
    """Put a section between the markers of a Markdown file; append it where there are none."""
    old = path.read_text(encoding="utf-8") if path.exists() else "# Notes on speed\n"
    start, end = old.find(MARKERS[0]), old.find(MARKERS[1])
    if start < 0 or end < start:
        old = old.rstrip("\n") + f"\n\n## Kernels\n\n{MARKERS[0]}\n{MARKERS[1]}\n"
        start, end = old.find(MARKERS[0]), old.find(MARKERS[1])
    path.write_text(f"{old[:start]}{MARKERS[0]}\n{text}\n{old[end:]}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--notes", action="store_true", help="write the section of benchmarks/NOTES.md")
    parser.add_argument("--table", action="store_true", help="measure the table of FLEXCORE_KERNELS=auto")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiler's statistics out")
    args = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if args.table:
        if not cuda:
            parser.error("--table measures on a CUDA device, and there is none")
        write_table()
        return 0
    kept, reasons = ([], []) if args.no_compile else statistics()
    result = {
        "environment": environment("benchmarks.kernels"),
        "card": torch.cuda.get_device_name() if cuda else "",
        "note": (
            f"`auto` takes a kernel where its time is at most {MARGIN} of torch's; what it knows is in "
            "`flexcore/kernels/measured.json`."
            if cuda
            else "No time was measured: kernels can't run here, only be counted and compiled. So "
            "`FLEXCORE_KERNELS=auto` is the same as `off`."
        ),
        "counts": [counted(case) for case in cases()],
        "times": [measured(case) for case in tqdm(cases(), desc="timing")] if cuda else [],
        "not_compiled": reasons,
        "compiled": [
            asdict(a) | {n: getattr(c.shape, n) for n in ("dtype", "width", "groups", "rows")}
            for c, a in kept
        ],
    }
    text = report(result)
    print(text)
    if args.notes:
        write_notes(text)
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
