"""Decoder: the parent's side of the decoding process, with a time limit on every answer."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_WORKER = Path(__file__).with_name("video_worker.py")
_THREADS = 4
_START = 60.0  # seconds that Python and numpy may take to start on a busy machine


def require_decord() -> None:
    """Raise ImportError, naming the extra to install, if decord isn't there; it isn't imported."""
    if importlib.util.find_spec("decord") is None:
        raise ImportError("reading a video file needs decord: pip install 'flexcore[video]'")


class Decoder:
    """A process that decodes frames, started when the first file is opened and shared by any number of files.

    Some files make a decoder hang or abort. In a thread that would take the user's process along; a process is
    ended, and the next request gets a new one. Threads take turns.

    Args:
        timeout: Seconds without a sign of progress after which the process is ended.

    Raises:
        ValueError: The timeout isn't positive.
    """

    def __init__(self, timeout: float = 30.0):
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds > 0, got {timeout!r}")
        self.timeout = float(timeout)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[tuple[dict[str, Any], bytes] | None] = queue.Queue()
        self._known: dict[str, dict[str, Any]] = {}
        self._opened: set[str] = set()
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[type, tuple[float]]:
        # a copy, in this process or another, starts its own
        return Decoder, (self.timeout,)

    def open(self, path: str, keys: tuple[int, ...] | None, edited: bool) -> dict[str, Any]:
        """Open a file and decode its first frame.

        Args:
            path: The file.
            keys: Key frames in display order, if known.
            edited: Whether its container has edit lists that cut frames away.

        Returns:
            `height`, `width`, `fps`, `dated` (whether its times can be believed), `times` `[n, 2]` in seconds and
            `keys` `[m]`.

        Raises:
            RuntimeError: The decoder refuses the file, or died of it.
            TimeoutError: The decoder hangs.
        """
        request = {"op": "open", "path": path, "keys": keys, "edited": edited, "threads": self._threads()}
        with self._lock:
            self._known[path] = request
            fields, payload = self._ask(request, "opening the file")
            self._opened.add(path)
        numbers = np.frombuffer(payload, dtype=np.float64)
        n = fields["frames"]
        return {**fields, "times": numbers[: 2 * n].reshape(n, 2), "keys": numbers[2 * n :].astype(np.int64)}

    def frames(self, path: str, indices: Sequence[int]) -> list[np.ndarray | Exception]:
        """Frames of a file opened before, in one pass.

        Args:
            path: The file.
            indices: Frames, rising.

        Returns:
            For each a `[H, W, 3]` uint8 array, or the error that it can't be decoded.

        Raises:
            RuntimeError: The decoder died of them.
            TimeoutError: The decoder hangs.
        """
        doing = f"decoding frame {indices[0]}" + (f" to {indices[-1]}" if len(indices) > 1 else "")
        found: list[np.ndarray | Exception] = []
        with self._lock:
            if not self._running():
                self._opened = set()
            if path not in self._opened:  # a new process since
                self._ask(self._known[path], "opening the file")
                self._opened.add(path)
            self._send({"op": "frames", "path": path, "indices": [int(i) for i in indices]})
            for _ in indices:
                fields, payload = self._receive(doing)
                if "failed" in fields:
                    found.append(RuntimeError(_readable(fields["failed"])))
                else:
                    found.append(np.frombuffer(payload, dtype=np.uint8).reshape(fields["shape"]))
        return found

    def close(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            self._end()

    def _threads(self) -> int:
        return min(_THREADS, os.cpu_count() or 1)

    def _running(self) -> bool:
        # after a fork the child has the pipes of its parent, and must keep its hands off them
        mine = self._owner == os.getpid()
        return mine and self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        require_decord()
        # the script's own folder stays off the path: it holds modules with everyday names
        command = [sys.executable, "-P", str(_WORKER)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._process, self._owner = process, os.getpid()
        self._answers = queue.Queue(maxsize=4)
        self._opened = set()
        assert process.stdout is not None
        threading.Thread(target=_listen, args=(process.stdout, self._answers), daemon=True).start()
        weakref.finalize(self, _stop, process)
        try:
            ready = self._answers.get(timeout=_START)
        except queue.Empty:
            ready = None
        if ready is None:
            self._end()
            raise RuntimeError(f"the decoder's process ({' '.join(command)}) doesn't start")

    def _end(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            _stop(self._process)
        self._process = None

    def _ask(self, request: dict[str, Any], doing: str) -> tuple[dict[str, Any], bytes]:
        self._send(request)
        return self._receive(doing)

    def _send(self, request: dict[str, Any]) -> None:
        if not self._running():
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None
        # a process that died since is noticed when no answer comes
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()

    def _receive(self, doing: str) -> tuple[dict[str, Any], bytes]:
        process = self._process
        assert process is not None
        try:
            answer = self._answers.get(timeout=self.timeout)
            while answer is not None and "beat" in answer[0]:
                answer = self._answers.get(timeout=self.timeout)
        except queue.Empty:
            self._end()
            raise TimeoutError(
                f"{doing} made no progress for {self.timeout:g} s, so the decoder was ended; a larger timeout gives "
                "it longer"
            ) from None
        except BaseException:  # an interrupt: the answer to come would be taken for the next request's
            self._end()
            raise
        if answer is None:
            code = process.wait()
            self._end()
            raise RuntimeError(f"the decoder died while {doing} (exit status {code})")
        fields, payload = answer
        if "error" in fields:
            raise RuntimeError(_readable(fields["error"]))
        return fields, payload


def _listen(pipe: BinaryIO, answers: queue.Queue[tuple[dict[str, Any], bytes] | None]) -> None:
    with pipe:
        for line in pipe:
            fields = json.loads(line)
            payload = pipe.read(fields["bytes"])
            if len(payload) < fields["bytes"]:
                break
            answers.put((fields, payload))
    answers.put(None)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _readable(error: str) -> str:
    """decord's message without its source files, line numbers and stack."""
    text = error.splitlines()[0].rsplit(".cc:", 1)[-1]
    return text.lstrip("0123456789: ") or error
