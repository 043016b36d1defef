"""MagnifierBench: multiple choice about details of large pictures, answered in words from which a letter is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import Benchmark, Encoded, Judge, Problem, Sample, check, entries, overall, read_json

PICTURES, QUESTIONS = "images.json", "data_instructions.json"
_SAID = re.compile(r"(?i:the answer is)\s*:?\s*\(?([A-D])\b")
# An A before a word in lower case is the article, unless it is one letter among several.
_LONE = re.compile(r"(?<![\w'])(?:A(?! (?!or\b|and\b)[a-z])|[B-D])(?![\w'])")
_OPTION = re.compile(
    r"(?:^|(?<=[\s,;]))\(?([A-D])[.):]\s*(.*?)(?=\s*(?:[\s,;]\(?[A-D][.):]|\n|$))", re.DOTALL
)
_WORDS = re.compile(r"[^\W_]+")


def samples(folder: Path) -> Iterator[Sample | Problem]:
    """Instructions by id in one file, pictures in base64 in another."""
    pictures = read_json(folder / PICTURES, folder)
    if not isinstance(pictures, dict):
        raise ValueError(f"{PICTURES}: must be an object of pictures by id, got {type(pictures).__name__}")
    for key, entry in entries(read_json(folder / QUESTIONS, folder), "data", dict, QUESTIONS).items():
        where = f"{QUESTIONS}: data[{key!r}]"
        if wrong := check(entry, instruction=str, answer=str, image_ids=list):
            yield Problem(where, wrong)
            continue
        missing = [
            i for i in entry["image_ids"] if not isinstance(i, str) or not isinstance(pictures.get(i), str)
        ]
        if missing or not entry["image_ids"]:
            yield Problem(where, f"image_ids must name pictures of {PICTURES}, got {entry['image_ids']!r}")
            continue
        right = letter(entry["answer"], entry["instruction"])
        if right is None:
            yield Problem(
                where, f"answer must name one of A to D, or an option's text, got {entry['answer']!r}"
            )
            continue
        images = tuple(Encoded(pictures[i]) for i in entry["image_ids"])
        truth = {"letter": right, "answer": entry["answer"]}
        yield Sample(key, where, "all", entry["instruction"], images, truth)


def letter(response: str, instruction: str) -> str | None:
    """The option that a response chooses: said outright, else a lone letter, else by its text; None if none is.

    Args:
        response: The model's words.
        instruction: What was asked, options included.
    """
    if said := _SAID.search(response):
        return said[1]
    lone = set(_LONE.findall(response))
    if len(lone) == 1:
        return str(lone.pop())
    return by_text(response, options(instruction))


def options(instruction: str) -> dict[str, str]:
    """The text of each option of an instruction, such as `(A) red` or `B. blue`, by letter."""
    return {match[1]: match[2].strip() for match in _OPTION.finditer(instruction)}


def by_text(response: str, options: dict[str, str]) -> str | None:
    """The option whose words a response consists of, else the only one whose words it holds."""
    said = _words(response)
    texts = {name: _words(text) for name, text in options.items() if _words(text).strip()}
    found = [name for name, text in texts.items() if text == said]
    if not found:
        held = {name: text for name, text in texts.items() if text in said}
        # "dark red" holds "red" too, which isn't meant
        found = [n for n, t in held.items() if not any(t in other and t != other for other in held.values())]
    return found[0] if len(found) == 1 else None


def _words(text: str) -> str:
    """Words in lower case with a space around each, so that only whole ones are found."""
    return f" {' '.join(_WORDS.findall(text.lower()))} "


def score(sample: Sample, answer: Any, judge: Judge | None = None) -> float:
    """1 for the right letter; a judge decides where a response has none."""
    chosen = letter(answer, sample.text)
    if chosen is None and judge is not None:
        return float(bool(judge(sample.text, sample.truth["answer"], answer)))
    return float(chosen == sample.truth["letter"])


BENCHMARK = Benchmark("magnifier", "MagnifierBench", samples, score, overall, new_tokens=64)
