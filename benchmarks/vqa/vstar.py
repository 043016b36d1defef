"""V*-Bench: small objects in large pictures; the likeliest of a question's options is the model's answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import SHORT, Benchmark, Judge, Problem, Row, Sample, Scored, by_group, check, mean_row, read_json

SUBSETS = ("direct_attributes", "relative_position", "OCR", "GPT4V-hard")
# The two that the published figures are about; the other two have rows of their own and stay out of the total.
TOTAL = SUBSETS[:2]
SUFFIXES = (".jpg", ".JPG", ".webp", ".png", ".jpeg")


def samples(folder: Path) -> Iterator[Sample | Problem]:
    """A JSON per sample, beside a picture of the same stem."""
    present = [name for name in SUBSETS if (folder / name).is_dir()]
    if not present:
        raise ValueError(
            f"{folder} must hold a folder per subset ({', '.join(SUBSETS)}), and has none of them"
        )
    for subset in present:
        for path in sorted((folder / subset).glob("*.json")):
            yield sample(path, folder, subset)


def sample(path: Path, folder: Path, subset: str) -> Sample | Problem:
    """What one JSON file asks."""
    where = str(path.relative_to(folder))
    try:
        entry = read_json(path, folder)
    except ValueError as error:
        name, _, message = str(error).partition(": ")
        return Problem(name, message)
    if wrong := check(entry, question=str, options=list):
        return Problem(where, wrong)
    options = entry["options"]
    if len(options) < 2 or not all(isinstance(option, str) and option.strip() for option in options):
        return Problem(where, f"options must be two strings or more, the right one first, got {options!r}")
    # Asked for one by one, a file system that knows no case would find one picture twice.
    pictures = [file for suffix in SUFFIXES if (file := path.with_suffix(suffix)).is_file()]
    if not pictures:
        return Problem(where, f"there is no picture {path.stem} beside it ({', '.join(SUFFIXES)})")
    key, text = f"{subset}/{path.stem}", entry["question"] + SHORT
    return Sample(key, where, subset, text, (pictures[0],), 0, tuple(options))


def score(sample: Sample, answer: Any, judge: Judge | None = None) -> float:
    """1 if the first option, the right one, has the lowest mean negative log-likelihood."""
    return float(min(range(len(answer)), key=lambda i: answer[i]) == sample.truth)


def rows(scored: Scored) -> list[Row]:
    """Accuracy per subset, and over the samples of the two that the published figures are about."""
    table = [mean_row(group, some) for group, some in by_group(scored)]
    total = [item for item in scored if item[0].group in TOTAL]
    if total and len(total) < len(scored):
        return [*table, mean_row(f"overall ({' and '.join(TOTAL)})", total)]
    return [*table, mean_row("overall", scored)]


BENCHMARK = Benchmark("vstar", "V*-Bench", samples, score, rows)
