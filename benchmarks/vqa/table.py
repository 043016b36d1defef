"""The table at the end: an arm per column, on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .answers import ANSWER, SKIPPED
from .base import Benchmark, Judge, Sample

_SHOWN = 20  # problems that are listed in full; the others are in results.json


def results(
    benchmark: Benchmark,
    samples: Sequence[Sample],
    records: Mapping[str, Mapping[str, Mapping[str, Any]]],
    reasons: Mapping[str, str],
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Scores of every arm, side by side.

    Args:
        benchmark: The benchmark.
        samples: Those that were asked.
        records: What was recorded by arm and sample.
        reasons: Why an arm was not run.
        judge: Decides where a score can't.

    Returns:
        `rows`: score and number of samples, by row and arm; `not run`: the reason, by arm.
    """
    reasons = dict(reasons)
    run = [own for arm, own in records.items() if arm not in reasons]
    # All arms are scored on the same samples: those that each of them could be asked about.
    asked = [s for s in samples if all({ANSWER, SKIPPED} & set(own.get(s.key, ())) for own in run)]
    rows: dict[str, dict[str, Any]] = {}
    for arm, own in records.items():
        if arm in reasons:
            continue
        if skipped := [own[sample.key][SKIPPED] for sample in asked if SKIPPED in own[sample.key]]:
            reasons[arm] = f"{len(skipped):,} of {len(asked):,} samples don't fit, the first: {skipped[0]}"
            continue
        scored = [(s, own[s.key][ANSWER], benchmark.score(s, own[s.key][ANSWER], judge)) for s in asked]
        for name, value, number in benchmark.rows(scored) if scored else ():
            rows.setdefault(name, {})[arm] = {"score": value, "samples": number}
    return {"rows": rows, "not run": reasons}


def table(title: str, found: Mapping[str, Any], arms: Sequence[str]) -> str:
    """The results as a Markdown table, and below it what is missing from it and why."""
    lines = [f"| {title} | samples | {' | '.join(arms)} |", f"|---|---|{'---|' * len(arms)}"]
    for name, cells in found["rows"].items():
        number = max(cell["samples"] for cell in cells.values())
        scores = [f"{100 * cells[arm]['score']:.1f} %" if arm in cells else "not run" for arm in arms]
        lines.append(f"| {name} | {number:,} | {' | '.join(scores)} |")
    lines.append("")
    lines += [f"{arm}: not run: {reason}" for arm, reason in found["not run"].items()]
    lines += [f"{arm}: {note}" for arm, note in found["notes"].items()]
    if problems := found["problems"]:
        lines.append(f"{len(problems):,} malformed sample(s) left out:")
        lines += [f"  {problem}" for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            lines.append(f"  and {len(problems) - _SHOWN:,} more, see results.json")
    return "\n".join(lines).rstrip()
