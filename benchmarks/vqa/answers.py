"""Answers on disk: JSON lines, one file per arm and process, which a run that was killed goes on with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

ANSWER, PROBLEM, SKIPPED = "answer", "problem", "skipped"
SETTINGS = "settings.json"


class AnswerFile:
    """Where one process writes an arm's answers as they come.

    Args:
        folder: Of the run.
        arm: The arm.
        rank: The process.
    """

    def __init__(self, folder: Path, arm: str, rank: int):
        self.path = folder / f"{arm}-{rank:03d}.jsonl"

    def __enter__(self) -> AnswerFile:
        drop_unfinished(self.path)
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write some records; they are in the file when this returns."""
        self._file.write("".join(json.dumps(record) + "\n" for record in records))
        self._file.flush()


def drop_unfinished(path: Path) -> None:
    """Cut off a last line that a killed process wrote half of."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            file.truncate(end)


def read(folder: Path, arm: str) -> dict[str, dict[str, Any]]:
    """What all processes of all runs have recorded about an arm's samples, by key.

    A sample that could not be asked before and has an answer now counts as answered.

    Raises:
        ValueError: A line that isn't one of ours; the message gives file and line.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{arm}-*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        # What follows the last line's end is unfinished: another process may be writing it.
        for number, line in enumerate(lines[:-1], 1):
            try:
                record = json.loads(line)
                key = record["key"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: must be a JSON object with a key, got {line!r}") from None
            if key not in found or PROBLEM in found[key]:
                found[key] = record
    return found


def settle(folder: Path, settings: Mapping[str, Any], write: bool) -> None:
    """Make sure that a folder's answers are of the same model and settings.

    Args:
        folder: Of the run.
        settings: What an answer depends on.
        write: Whether this process makes the folder; the others wait for it before they call.

    Raises:
        ValueError: They differ; the message says in what.
    """
    path = folder / SETTINGS
    if write and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(settings, indent=1) + "\n")
        part.replace(path)
    there = json.loads(path.read_text())
    wanted = json.loads(json.dumps(settings))
    if different := [name for name in wanted if there.get(name) != wanted[name]]:
        changes = ", ".join(f"{name} ({there.get(name)!r}, now {wanted[name]!r})" for name in different)
        raise ValueError(f"--output {folder} holds answers with another {changes}; choose another folder")
