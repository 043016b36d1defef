"""Measured sections of a README: what stands between two marker lines is written by a command."""

from __future__ import annotations

from pathlib import Path


def write_section(path: Path, markers: tuple[str, str], section: str) -> None:
    """Replace what stands between a file's markers.

    Raises:
        ValueError: The file has no markers.
    """
    text = path.read_text(encoding="utf-8")
    start, end = text.find(markers[0]), text.find(markers[1])
    if start < 0 or end < start:
        raise ValueError(f"{path} must hold the lines {markers[0]} and {markers[1]}")
    path.write_text(f"{text[:start]}{markers[0]}\n{section}\n{text[end:]}", encoding="utf-8")
