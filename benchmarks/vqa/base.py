"""What the benchmarks have in common: samples, what is wrong with those that can't be asked, rows of a table."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

SHORT = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Problem:
    """A sample that can't be asked.

    Args:
        where: File, and line or key in it.
        message: What is wrong, and what would be right.
    """

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Encoded:
    """A picture in base64, decoded when it is asked about: a benchmark's pictures together are large."""

    text: str

    def open(self) -> Image:
        """The picture; a ValueError or an OSError if it isn't one."""
        from PIL import Image

        try:
            # some writers put a data URL's header in front
            data = base64.b64decode(self.text.rpartition(",")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"the picture must be base64: {error}") from None
        try:
            picture = Image.open(io.BytesIO(data))
            picture.load()
        except (SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"the picture can't be decoded: {error}") from None
        return picture


@dataclass(frozen=True)
class Sample:
    """One question.

    Args:
        key: Its name in the benchmark, in answer files too.
        where: File, and line or key in it, for messages.
        group: The table's row that it counts for.
        text: What is asked, as it follows the pictures.
        pictures: Files, or pictures in base64.
        truth: What the score compares with.
        options: Answers to choose the likeliest of; none: the model answers in its own words.
    """

    key: str
    where: str
    group: str
    text: str
    pictures: tuple[Path | Encoded, ...]
    truth: Any
    options: tuple[str, ...] = ()

    def media(self) -> list[Any]:
        """The pictures as the image adapter takes them."""
        for picture in self.pictures:
            if isinstance(picture, Path) and not picture.is_file():
                raise FileNotFoundError(f"there is no picture {picture}")
        return [p.open() if isinstance(p, Encoded) else p for p in self.pictures]


Judge = Callable[[str, str, str], bool]
"""Decides from question, right answer and response whether the response is right."""
Scored = Sequence[tuple[Sample, Any, float]]
"""Samples, the model's answers and their scores."""
Row = tuple[str, float, int]
"""What a line of the table says: its name, the score in 0..1, the number of samples."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Args:
        name: On the command line.
        title: Above the table.
        samples: Reads a folder.
        score: 0..1 for one sample, its answer (a string, or the options' losses) and a judge or None.
        rows: The table's lines.
        new_tokens: The longest answer, in tokens; not used where options are scored.
    """

    name: str
    title: str
    samples: Callable[[Path], Iterable[Sample | Problem]]
    score: Callable[[Sample, Any, Judge | None], float]
    rows: Callable[[Scored], list[Row]]
    new_tokens: int = 128

    def read(self, folder: Path, report: Callable[[Problem], None]) -> list[Sample]:
        """All samples that can be asked.

        Args:
            folder: The benchmark's.
            report: Told about every other one.

        Raises:
            ValueError: The folder isn't of this benchmark's layout, or holds no sample that can be asked.
        """
        if not folder.is_dir():
            raise ValueError(f"--data must be a folder, got {folder}")
        found: dict[str, Sample] = {}
        for item in self.samples(folder):
            if isinstance(item, Sample) and item.key in found:
                item = Problem(item.where, f"{item.key!r} is at {found[item.key].where} already")
            if isinstance(item, Problem):
                report(item)
            else:
                found[item.key] = item
        if not found:
            raise ValueError(f"{folder} holds no sample of {self.title} that can be asked")
        return list(found.values())


def read_json(path: Path, root: Path) -> Any:
    """A JSON file's content.

    Args:
        path: The file.
        root: What messages name it relative to.

    Raises:
        ValueError: It is missing or no JSON; the message gives file and line.
    """
    name = path.relative_to(root)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{name}: there is no such file in {root}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}:{error.lineno}: must be JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: must be UTF-8: {error}") from None


def entries(content: Any, field: str, kind: type, name: str) -> Any:
    """`content[field]`, a list or a mapping of samples."""
    found = content.get(field) if isinstance(content, dict) else None
    if not isinstance(found, kind):
        raise ValueError(f"{name}: must hold a {kind.__name__} under {field!r}, got {type(found).__name__}")
    return found


def check(entry: Any, **fields: type | tuple[type, ...]) -> str:
    """What is wrong with an entry's fields, or nothing."""
    if not isinstance(entry, Mapping):
        return f"must be an object, got {type(entry).__name__}"
    for name, kind in fields.items():
        value = entry.get(name)
        # bool is an int to Python, and an empty string is no question
        if isinstance(value, bool) or not isinstance(value, kind) or value == "":
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(k.__name__ for k in kinds)
            return f"{name} must be a {wanted} and not empty, got {value!r}"
    return ""


def mean_row(name: str, scored: Scored) -> Row:
    """The average score of some samples."""
    return name, sum(score for _, _, score in scored) / len(scored), len(scored)


def by_group(scored: Scored) -> Iterator[tuple[str, Scored]]:
    """Samples of each group, in the order in which the groups first appear."""
    for group in dict.fromkeys(sample.group for sample, _, _ in scored):
        yield group, [item for item in scored if item[0].group == group]


def overall(scored: Scored) -> list[Row]:
    """One row for all samples."""
    return [mean_row("overall", scored)]
