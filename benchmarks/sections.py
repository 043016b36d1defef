"""Sections of `RESULTS.md`: each is written by its own benchmark, between markers, and leaves the others alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "RESULTS.md"
FOLDER = Path(__file__).parent / "results"


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Put a text between a benchmark's markers in a file; what isn't there yet is made.

    Args:
        name: Of the benchmark.
        text: Markdown.
        path: The file.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    if begin not in whole:
        whole = whole.rstrip("\n") + f"\n\n{begin}\n{end}\n"
    before, _, rest = whole.partition(begin)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def write_json(path: Path, found: Any) -> None:
    """Write numbers, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)
