"""What a video file says about itself, read from its first boxes: is it whole, and which frames can be sought.

A decoder finds out that a file is cut short only when it gets there. Containers say how long they mean to be, and MP4
says exactly which frame is shown when, so this is known before any work.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

_MP4 = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"}
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"
_INDEX_LIMIT = 1 << 28  # bytes of an MP4's index that are read


@dataclass(frozen=True)
class Container:
    """What is known without decoding.

    Args:
        kind: `mp4`, `avi`, `matroska` or "" for any other.
        missing: What is missing of a file that was cut short, or "".
        keys: Frames that a decoder can start at, in display order; None where the container doesn't say.
    """

    kind: str = ""
    missing: str = ""
    keys: tuple[int, ...] | None = None


def inspect(path: Path) -> Container:
    """Read a file's boxes, not its media.

    Args:
        path: An existing file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[4:8] in _MP4:
            return _mp4(file, size)
        if head[:4] == b"RIFF" and head[8:] == b"AVI ":
            end = 8 + int.from_bytes(head[4:8], "little")
            return Container("avi", _beyond(end, size))
        if head[:4] == _EBML:
            return Container("matroska", _matroska(file, size))
    return Container()


def _beyond(end: int, size: int) -> str:
    return f"it ends at byte {size:,} of {end:,}" if end > size else ""


def _mp4(file: BinaryIO, size: int) -> Container:
    at, index, fragments = 0, b"", False
    while at + 8 <= size:
        file.seek(at)
        header = file.read(16)
        length, kind, body = int.from_bytes(header[:4], "big"), header[4:8], 8
        if length == 1:
            length, body = int.from_bytes(header[8:16], "big"), 16
        elif length == 0:  # to the end of the file
            length = size - at
        if length < body:
            return Container("mp4", f"there is no box at byte {at:,}")
        if at + length > size:
            return Container("mp4", _beyond(at + length, size))
        fragments = fragments or kind == b"moof"
        if kind == b"moov":
            file.seek(at + body)
            index = file.read(min(length - body, _INDEX_LIMIT))
        at += length
    if not index:
        return Container("mp4", "its index (the box moov) isn't there")
    try:
        return Container("mp4", keys=None if fragments else _key_frames(index))
    except (struct.error, ValueError, IndexError):
        return Container("mp4")


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, at + 8)
            yield kind, data[at + 16 : at + length]
        else:
            length = length or len(data) - at
            yield kind, data[at + 8 : at + length]
        at += max(length, 8)


def _inside(data: bytes, *path: bytes) -> list[bytes]:
    found = [data]
    for name in path:
        found = [body for outer in found for kind, body in _boxes(outer) if kind == name]
    return found


def _key_frames(index: bytes) -> tuple[int, ...] | None:
    """Display order of the samples marked as key frames, of the one video track."""
    tracks = [
        media
        for media in _inside(index, b"trak", b"mdia")
        if any(handler[8:12] == b"vide" for handler in _inside(media, b"hdlr"))
    ]
    if len(tracks) != 1:
        return None
    (tables,) = _inside(tracks[0], b"minf", b"stbl")
    times = np.cumsum(_runs(_inside(tables, b"stts")[0]))
    n = len(times)
    times = np.concatenate([[0], times[:-1]])  # when each sample is decoded
    for offsets in _inside(tables, b"ctts"):
        times = times + _runs(offsets)[:n].astype(np.int32)  # version 0 says unsigned, and writers disagree
    sync = _inside(tables, b"stss")
    marked = np.arange(n) if not sync else np.frombuffer(sync[0], ">u4", offset=8).astype(np.int64) - 1
    rank = np.empty(n, dtype=np.int64)
    rank[np.argsort(times, kind="stable")] = np.arange(n)
    return tuple(rank[marked].tolist()) if len(marked) else None


def _runs(table: bytes) -> np.ndarray:
    """A run-length coded table, written out."""
    pairs = np.frombuffer(table, ">u4", offset=8).reshape(-1, 2).astype(np.int64)
    return np.repeat(pairs[:, 1], pairs[:, 0])


def _matroska(file: BinaryIO, size: int) -> str:
    """Follow the header to the one segment that holds everything else."""

    def length(at: int) -> tuple[int, int]:
        """An element's size, None-like -1 if unknown, and where its body starts."""
        file.seek(at)
        first = file.read(1)[0]
        width = 9 - first.bit_length()
        value = int.from_bytes(bytes([first & (0xFF >> width)]) + file.read(width - 1), "big")
        return (-1 if value == (1 << (7 * width)) - 1 else value), at + width

    try:
        header, body = length(4)
        file.seek(body + header)
        if file.read(4) != _SEGMENT:
            return ""
        segment, body = length(body + header + 4)
    except IndexError:
        return f"it ends at byte {size:,}, within its header"
    return _beyond(body + segment, size) if segment >= 0 else ""
