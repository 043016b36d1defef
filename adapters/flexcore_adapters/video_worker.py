"""The decoder's own process: reads requests on stdin, one JSON object a line, and answers on stdout.

It runs as a script that imports numpy and decord only, so that it starts fast. decord is kept out of the user's
process because some files make it hang or abort: a process can be ended, a thread can't. What it takes to get the
right frame out of decord, in bounded memory:

- Its accurate seek gives up on a busy machine and hands out another frame without an error. So frames are reached by
  a plain seek to a key frame, and by reading on from there.
- Its list of key frames is in the order of the file, not of display; the caller may know better. In some containers
  even a plain seek lands elsewhere. So the first seeks in a file are compared with a sequential read, and a file that
  fails is only read sequentially.
- It reads packets for as long as it waits for a frame, and decodes all of them, also when nobody asks any more:
  gigabytes within seconds. So it is given time before it is asked, and parked by a seek after every request.
"""

from __future__ import annotations

import json
import os
import sys
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

OPEN_FILES = 4
# A second between signs of life is plenty for the caller's clock.
BEAT = 0.2
# Key frames that are compared with a sequential read: the first, and others this close behind it.
NEAR = 64
# Some containers give 2^63 or so for an unknown time; no clip runs for a hundred days.
NO_TIME = 1e7
# Seconds within which decord hands out a frame that it has at hand, and the longest pause before it is asked.
READY, LONGEST = 8e-4, 0.1


class Reader:
    """One open file, read at any frame.

    Args:
        path: The file.
        threads: Of the decoder.
        keys: Key frames in display order, if the caller knows them; else decord's list, which may be wrong.
        edited: Whether frames with a negative time are cut away by the container's edit list.
    """

    def __init__(self, path: str, threads: int, keys: list[int] | None = None, edited: bool = False):
        self.path = path
        self.threads = threads
        self.open()
        n = len(self.reader)
        self.fps = float(self.reader.get_avg_fps())
        self.fps = self.fps if np.isfinite(self.fps) and self.fps > 0 else 25.0
        times = np.asarray(self.reader.get_frame_timestamp(np.arange(n)), dtype=np.float64)
        self.dated = bool(np.isfinite(times).all() and (np.abs(times) < NO_TIME).all())
        if not self.dated:
            start = np.arange(n) / self.fps
            times = np.stack([start, start + 1 / self.fps], axis=1)
        # decord counts the frames that an edit list cuts away, but never delivers them
        cut = int((times[:, 0] < -1e-3).sum()) if edited and self.dated else 0
        self.times = times[cut:] if cut < n else times
        self.cut = n - len(self.times)
        listed = keys if keys is not None and keys[-1] < n else self.reader.get_key_indices()
        listed = sorted({int(k) for k in listed} | {0})
        # display index of a key frame -> what decord's seek is to be told
        self.keys = {max(k - self.cut, 0): k for k in listed}
        self.order = sorted(self.keys)
        # None: not known yet whether seeks land where they should
        self.seeks: bool | None = None if self.dated and len(self.order) > 1 else False

    def open(self) -> None:
        """Start at the first frame again: a fresh decoder is the one way that always lands there."""
        import decord

        self.reader: Any = None  # the old one's memory goes first
        self.reader = decord.VideoReader(self.path, num_threads=self.threads)
        self.at: int | None = 0  # the frame that comes next; None after a seek that nobody relies on
        self.pause = 0.0

    def frames(self, indices: list[int], beat: Callable[[], None]) -> Iterator[np.ndarray | Exception]:
        """Frames `[H, W, 3]` uint8, or what went wrong with them, in the order of rising `indices`."""
        for index in indices:
            try:
                self.approach(index, beat)
                yield self.next()
            except Exception as error:
                self.open()
                yield error

    def park(self) -> None:
        """Stop the decoder, which would go on decoding what it has read ahead."""
        if self.at == 0:  # it hasn't started
            return
        try:
            self.reader.seek(0)
            self.at = None
        except Exception:
            self.open()

    def approach(self, index: int, beat: Callable[[], None]) -> None:
        """Go where `index` is the next frame."""
        if self.seeks is None and index >= self.order[1]:
            try:
                self.prove(beat)
                self.seeks = True
            except Exception:  # seeks are wrong, or a frame on the way that nobody asked for is broken
                self.seeks = False
                self.open()
        key = self.order[bisect_right(self.order, index) - 1]
        if self.at is None or self.at > index or (self.seeks and key > self.at):
            if self.seeks:
                self.seek(key)
            else:
                self.open()
        while self.at is not None and self.at < index:
            self.advance()
            beat()

    def advance(self) -> Any:
        """The next frame, as decord's own array."""
        time.sleep(self.pause)
        asked = time.perf_counter()
        frame = self.reader.next()
        waited = time.perf_counter() - asked
        # wait outside of decord as long as it takes it to decode: inside, it would read ahead all the while
        self.pause = min(self.pause + waited / 2, LONGEST) if waited > READY else self.pause * 0.8
        self.at = None if self.at is None else self.at + 1
        return frame

    def next(self) -> np.ndarray:
        """The next frame."""
        frame: np.ndarray = self.advance().asnumpy()
        if frame.shape[2] != 3:
            # a rotated frame keeps its decoder's row padding, which decord takes for a channel
            height, width, channels = frame.shape
            frame = frame.reshape(height, width * channels)[:, : width * 3].reshape(height, width, 3)
        return np.ascontiguousarray(frame)

    def seek(self, key: int) -> None:
        """Go to a key frame."""
        if self.at is None or key >= self.at:
            # decord looks ahead by decoding time, which is earlier than display time, and overshoots; back is exact.
            # The last key frame is far enough: in a long file the way to the last frame takes most of a second
            last = self.order[-1]
            self.reader.seek(self.keys[last] if key < last else self.cut + len(self.times) - 1)
        self.reader.seek(self.keys[key])
        self.at = key

    def prove(self, beat: Callable[[], None]) -> None:
        """Fail unless seeks, from before and from behind, land on the frames that a sequential read finds there."""
        first = self.order[1]
        tests = [k for k in self.order[1:4] if k <= first + NEAR and k + 1 < len(self.times)]
        if not tests:
            raise LookupError("there's no key frame to try")
        self.open()
        wanted = {k + i for k in tests for i in (0, 1)}
        prints = {}
        for index in range(tests[-1] + 2):
            if index in wanted:
                prints[index] = fingerprint(self.next())
            else:
                self.advance()
            beat()
        for key in [*reversed(tests), 0, *tests]:
            self.seek(key)
            if key and [fingerprint(self.next()), fingerprint(self.next())] != [prints[key], prints[key + 1]]:
                raise LookupError(f"a seek to frame {key} lands elsewhere")
            beat()


def fingerprint(frame: np.ndarray) -> bytes:
    """Enough of a frame to tell it from its neighbours."""
    return np.ascontiguousarray(frame[::3, ::3]).tobytes()


class Server:
    """Answers requests; keeps the last few files open.

    An answer is a line of JSON, followed by as many bytes as its `bytes` says.
    """

    def __init__(self, out: BinaryIO):
        self.out = out
        self.readers: OrderedDict[str, Reader] = OrderedDict()
        self.settings: dict[str, dict[str, Any]] = {}
        self.told = time.monotonic()

    def answer(self, fields: dict[str, Any], payload: bytes | memoryview = b"") -> None:
        line = json.dumps({**fields, "bytes": len(payload)}).encode() + b"\n"
        self.out.write(line)
        self.out.write(payload)
        self.out.flush()
        self.told = time.monotonic()

    def beat(self) -> None:
        """Tell the caller that there's progress."""
        if time.monotonic() - self.told > BEAT:
            self.answer({"beat": True})

    def reader(self, path: str) -> Reader:
        if path not in self.readers:
            self.readers[path] = Reader(path, **self.settings[path])
            while len(self.readers) > OPEN_FILES:
                self.readers.popitem(last=False)
        self.readers.move_to_end(path)
        return self.readers[path]

    def handle(self, request: dict[str, Any]) -> None:
        path = request["path"]
        if request["op"] == "open":
            self.settings[path] = {name: request[name] for name in ("threads", "keys", "edited")}
            self.readers.pop(path, None)
            reader = self.reader(path)
            (first,) = reader.frames([0], self.beat)
            reader.park()
            if isinstance(first, Exception):
                raise first
            keys = np.array(reader.order, dtype=np.float64)
            times = np.ascontiguousarray(reader.times)
            fields = {"height": first.shape[0], "width": first.shape[1], "fps": reader.fps}
            fields |= {"dated": reader.dated, "frames": len(times)}
            self.answer(fields, times.tobytes() + keys.tobytes())
            return
        reader = self.reader(path)
        try:
            # all of them before the first is sent: the pipe may be slow, and the decoder doesn't wait
            found = list(reader.frames(request["indices"], self.beat))
        finally:
            reader.park()
        for frame in found:
            if isinstance(frame, Exception):
                self.answer({"failed": described(frame)})
            else:
                self.answer({"shape": frame.shape}, frame.data.cast("B"))


def described(error: Exception) -> str:
    """An error as text."""
    return f"{type(error).__name__}: {error}"


def main() -> None:
    # What decoders print must not get into the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    server = Server(out)
    server.answer({"ready": True})
    for line in sys.stdin.buffer:
        try:
            server.handle(json.loads(line))
        except Exception as error:
            server.readers.pop(json.loads(line)["path"], None)
            server.answer({"error": described(error)})


if __name__ == "__main__":
    main()
