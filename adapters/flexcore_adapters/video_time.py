"""Which frames of a clip are looked at, and when they are shown."""

from __future__ import annotations

import math

import numpy as np

from .video_io import Video

# A key frame this much of a step away is as good as the frame itself, and costs no other frames to decode.
_NEAR = 0.25


def span(video: Video, start: float | None, end: float | None) -> tuple[float, float]:
    """The seconds of a clip that are looked at.

    Raises:
        ValueError: There are none.
    """
    begin = float(video.times[0])
    first = begin if start is None else max(begin, float(start))
    last = video.duration if end is None else min(video.duration, float(end))
    if not first < last:
        raise ValueError(
            f"start={start} and end={end} must leave some of {video.name}, which runs from {clock(begin)} to "
            f"{clock(video.duration)}"
        )
    return first, last


def steps(
    video: Video, first: float, last: float, coarse: int, fine_fps: float, most: int, stack: int
) -> tuple[int, int]:
    """How many steps of time both views have: no more than there are frames, fine ones a multiple of coarse ones.

    Args:
        video: The clip.
        first: Start in seconds.
        last: End in seconds.
        coarse: Coarse frames wanted.
        fine_fps: Fine frames per second wanted.
        most: The most fine frames.
        stack: Frames per step.
    """
    there = int((video.at(np.array([last])) - video.at(np.array([first])))[0]) + 1
    if video.times[-1] >= last:  # the frame that only begins where the span ends
        there = max(1, there - int(video.times[video.at(np.array([last]))[0]] >= last))
    n_coarse = max(1, min(coarse, there) // stack)
    wanted = min(math.ceil((last - first) * fine_fps), most, there)
    return n_coarse, n_coarse * max(1, wanted // (n_coarse * stack))


def frames_at(video: Video, first: float, last: float, n: int) -> np.ndarray:
    """`[n]` frames at the middles of `n` equal parts of a span, or key frames where one is close by."""
    step = (last - first) / n
    middles = first + (np.arange(n) + 0.5) * step
    index = video.at(middles)
    keys = video.keys
    times = video.times[keys]
    after = np.clip(np.searchsorted(times, middles), 0, len(keys) - 1)
    before = np.clip(after - 1, 0, len(keys) - 1)
    nearest = np.where(np.abs(times[after] - middles) < np.abs(times[before] - middles), after, before)
    close = np.abs(times[nearest] - middles) <= _NEAR * step
    return np.where(close, keys[nearest], index)


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    >>> clock(3723.5)
    '1:02:03.50'
    """
    minutes, rest = divmod(round(max(seconds, 0.0) * 100), 6000)
    hours, minutes = divmod(minutes, 60)
    tail = f"{minutes:02d}:{rest / 100:05.2f}" if hours else f"{minutes}:{rest / 100:05.2f}"
    return f"{hours}:{tail}" if hours else tail
