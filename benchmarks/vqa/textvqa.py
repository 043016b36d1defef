"""TextVQA: reading in photographs; ten annotators' answers, compared as VQA does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import SHORT, Benchmark, Judge, Problem, Sample, check, entries, overall, read_json
from .vqa_answers import accuracy

FILE, PICTURES, ANNOTATORS = "TextVQA_0.5.1_val.json", "train_images", 10


def samples(folder: Path) -> Iterator[Sample | Problem]:
    """The validation questions in one JSON file, pictures by `image_id`."""
    for i, entry in enumerate(entries(read_json(folder / FILE, folder), "data", list, FILE)):
        where = f"{FILE}: data[{i}]"
        if wrong := check(entry, question_id=(int, str), question=str, image_id=str, answers=list):
            yield Problem(where, wrong)
            continue
        answers = entry["answers"]
        if len(answers) != ANNOTATORS or not all(isinstance(answer, str) for answer in answers):
            yield Problem(where, f"answers must be {ANNOTATORS} strings, got {answers!r}")
            continue
        picture = folder / PICTURES / f"{entry['image_id']}.jpg"
        key, text = str(entry["question_id"]), entry["question"] + SHORT
        yield Sample(key, f"{where} (question_id {key})", "all", text, (picture,), answers)


def score(sample: Sample, answer: Any, judge: Judge | None = None) -> float:
    """VQA accuracy over the ten annotators."""
    return accuracy(answer, sample.truth)


BENCHMARK = Benchmark("textvqa", "TextVQA", samples, score, overall, new_tokens=16)
