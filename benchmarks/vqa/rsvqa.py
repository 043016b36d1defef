"""RSVQA-HR: questions about aerial pictures, scored by type of question."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import (
    SHORT,
    Benchmark,
    Judge,
    Problem,
    Row,
    Sample,
    Scored,
    by_group,
    check,
    entries,
    mean_row,
    read_json,
)

SPLIT, COUNT = "USGS_split_test_{}.json", "count"
# The upper ends of the data set's classes of numbers; zero is a class of its own.
EDGES = (10, 100, 1000)
_NUMBER = re.compile(r"(\d+)(m2)?")


def samples(folder: Path) -> Iterator[Sample | Problem]:
    """Active questions of the test split, each with its first active answer."""
    table = {
        kind: entries(read_json(folder / SPLIT.format(kind), folder), kind, list, SPLIT.format(kind))
        for kind in ("questions", "answers", "images")
    }
    answers: dict[Any, Any] = {
        entry["id"]: entry
        for entry in table["answers"]
        if not check(entry, id=int, question_id=int, answer=str)
    }
    # as unpacked from its archive, or beside the JSON files
    pictures = folder / "Data" if (folder / "Data").is_dir() else folder
    hidden = {entry.get("id") for entry in table["images"] if isinstance(entry, dict) and not _active(entry)}
    for i, entry in enumerate(table["questions"]):
        where = f"{SPLIT.format('questions')}: questions[{i}]"
        if isinstance(entry, dict) and (not _active(entry) or entry.get("img_id") in hidden):
            continue
        if wrong := check(entry, id=int, img_id=int, type=str, question=str, answers_ids=list):
            yield Problem(where, wrong)
            continue
        own = [answers[n] for n in entry["answers_ids"] if isinstance(n, int) and n in answers]
        own = [answer for answer in own if _active(answer) and answer["question_id"] == entry["id"]]
        if not own:
            named = f"answers_ids must name an active answer of {SPLIT.format('answers')} to question {entry['id']}"
            yield Problem(where, f"{named}, got {entry['answers_ids']!r}")
            continue
        key, picture = str(entry["id"]), pictures / f"{entry['img_id']}.tif"
        text, truth = entry["question"] + SHORT, own[0]["answer"]
        yield Sample(key, f"{where} (id {key})", entry["type"], text, (picture,), truth)


def _active(entry: dict[str, Any]) -> bool:
    return entry.get("active", True) is True


def plain(answer: str) -> str:
    """An answer in lower case, without full stop and spaces around it."""
    return answer.strip().rstrip(".").strip().lower().replace("m²", "m2")


def binned(answer: str) -> str:
    """The class of an answer that is a number, of things or of square metres; any other answer as it stands.

    >>> binned("0"), binned("7"), binned("10"), binned("11 m2"), binned("4000"), binned("Yes.")
    ('0', 'between 0 and 10', 'between 0 and 10', 'between 10m2 and 100m2', 'more than 1000', 'yes')
    """
    text = plain(answer)
    number = _NUMBER.fullmatch(text.replace(",", "").replace(" ", ""))
    if number is None:
        return text
    value, unit = int(number[1]), number[2] or ""
    if value == 0:
        return f"0{unit}"
    for low, high in zip((0, *EDGES), EDGES, strict=False):
        if value <= high:
            return f"between {low}{unit} and {high}{unit}"
    return f"more than {EDGES[-1]}{unit}"


def score(sample: Sample, answer: Any, judge: Judge | None = None) -> float:
    """1 for the same answer, numbers by their class."""
    return float(binned(answer) == binned(sample.truth))


def rows(scored: Scored) -> list[Row]:
    """Accuracy per type, their average, and over all; and how many counts are right to the number."""
    table = [mean_row(group, some) for group, some in by_group(scored)]
    average = ("average of types", sum(value for _, value, _ in table) / len(table), len(scored))
    out = [*table, average, mean_row("overall", scored)]
    counts = [(s, a, float(plain(a) == plain(s.truth))) for s, a, _ in scored if s.group == COUNT]
    # Not part of the totals: the data set's own score has classes.
    return [*out, mean_row("count, to the number", counts)] if counts else out


BENCHMARK = Benchmark("rsvqa-hr", "RSVQA-HR", samples, score, rows, new_tokens=16)
