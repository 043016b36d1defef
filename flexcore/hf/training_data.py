"""Questions about pictures from a file, line by line: what is wrong with a line is reported, and the line left out.

Two layouts, told apart by what a line holds. JSON lines `{"image": "a.jpg", "question": ..., "answer": ...}`, and
LLaVA's `{"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", ...}]}` as JSON
lines or as one list. `image` is relative to the pictures' folder and may be a list; LLaVA's layout may leave it out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .conversation import Turn

PLACEHOLDER = "<image>"
_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


@dataclass(frozen=True)
class Problem:
    """A line that can't be used.

    Args:
        where: File and line.
        message: What is wrong, and what would be right.
    """

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Example:
    """One conversation to learn from.

    Args:
        where: File and line, for messages.
        media: Files, all of them shown before the first question.
        turns: Questions and answers.
    """

    where: str
    media: tuple[Path, ...]
    turns: tuple[Turn, ...]


Check = Callable[[Example], None]
"""Raises a ValueError or an OSError for an example that can't be used."""


def read_examples(
    file: Path,
    folder: Path,
    report: Callable[[Problem], None],
    checks: Sequence[Check] = (),
    progress: bool | None = None,
) -> list[Example]:
    """All examples of a file that can be used.

    Args:
        file: JSON lines, or a JSON list.
        folder: The pictures'.
        report: Told about every line that is left out.
        checks: What else to ask of every example, such as whether its pictures open.
        progress: Show a bar; None shows one on a terminal.

    Raises:
        ValueError: There is no such file or folder, or nothing in the file can be used.
    """
    if not file.is_file():
        raise ValueError(f"data must be a file, there is none at {file}")
    if not folder.is_dir():
        raise ValueError(f"images must be a folder, there is none at {folder}")
    found, wrong = [], 0
    hidden = None if progress is None else not progress
    with tqdm(_entries(file), desc=f"checking {file.name}", unit="line", disable=hidden, leave=False) as bar:
        for item in bar:
            example = item if isinstance(item, Problem) else _example(item[0], item[1], folder)
            if isinstance(example, Example):
                example = _checked(example, checks)
            if isinstance(example, Problem):
                wrong += 1
                report(example)
            else:
                found.append(example)
    if not found:
        raise ValueError(f"{file} holds nothing that can be used: {wrong} lines, all of them left out")
    return found


def _checked(example: Example, checks: Iterable[Check]) -> Example | Problem:
    try:
        for check in checks:
            check(example)
    except (ValueError, OSError) as error:
        return Problem(example.where, str(error))
    return example


def _entries(file: Path) -> Iterator[tuple[str, Any] | Problem]:
    """Each line's content with where it is."""
    with file.open("rb") as lines:
        start = lines.read(64).lstrip()
    if start.startswith(b"["):
        yield from _list(file)
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file.name}:{number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                yield Problem(where, f"must be JSON: {error.msg} at column {error.colno}")
            except UnicodeDecodeError as error:
                yield Problem(where, f"must be UTF-8: {error}")


def _list(file: Path) -> Iterator[tuple[str, Any]]:
    """The items of a JSON list, each with the line that it starts on."""
    try:
        text = file.read_text(encoding="utf-8")
        decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
        counted = 0
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if text[at : at + 1] == "]":
                return
            line += text.count("\n", counted, at)
            counted = at
            value, end = decoder.raw_decode(text, at)
            yield f"{file.name}:{line}", value
            at = end
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file.name}:{error.lineno}: must be a JSON list or JSON lines: {error.msg}"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name}: must be UTF-8: {error}") from None


def _example(where: str, entry: Any, folder: Path) -> Example | Problem:
    if not isinstance(entry, dict):
        return Problem(where, f"must be an object, got {type(entry).__name__}")
    try:
        names = _names(entry)
        turns = _turns(entry["conversations"]) if "conversations" in entry else _turn(entry)
        if "conversations" not in entry and not names:
            raise ValueError("image must be a file's name, it is missing")
        shown = sum(turn.media for turn in turns)
        if shown == 0 and names:
            turns[0] = Turn(turns[0].question, turns[0].answer, len(names))
        elif shown != len(names):
            raise ValueError(f"{PLACEHOLDER} must stand {len(names)} times, once per image, got {shown}")
        if any(turn.media for turn in turns[1:]):
            raise ValueError(f"{PLACEHOLDER} must stand in the first question, got one in a later one")
        media = tuple(folder / name for name in names)
        for path in media:
            if not path.is_file():
                raise ValueError(f"there is no picture {path}")
    except ValueError as error:
        return Problem(where, str(error))
    return Example(where, media, tuple(turns))


def _names(entry: dict[str, Any]) -> list[str]:
    given = entry.get("image")
    names = [] if given is None else given if isinstance(given, list) else [given]
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"image must be a file's name, got {name!r}")
    return names


def _turn(entry: dict[str, Any]) -> list[Turn]:
    question, answer = (_text(entry.get(name), name) for name in ("question", "answer"))
    return [Turn(_plain(question), answer, question.count(PLACEHOLDER))]


def _turns(said: Any) -> list[Turn]:
    if not isinstance(said, list) or not said or len(said) % 2:
        raise ValueError("conversations must be a list of questions, each followed by its answer")
    turns = []
    for i in range(0, len(said), 2):
        texts = []
        for j, speaker in ((i, "human"), (i + 1, "gpt")):
            one = said[j] if isinstance(said[j], dict) else {}
            if _SPEAKERS.get(str(one.get("from"))) != speaker:
                raise ValueError(f"conversations[{j}].from must be {speaker!r}, got {one.get('from')!r}")
            texts.append(_text(one.get("value"), f"conversations[{j}].value"))
        turns.append(Turn(_plain(texts[0]), texts[1], texts[0].count(PLACEHOLDER)))
    return turns


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text, got {value!r}")
    return value.strip()


def _plain(question: str) -> str:
    """A question without placeholders: pictures come before it, as LLaVA's own training puts them."""
    return question.replace(PLACEHOLDER, "").strip()
