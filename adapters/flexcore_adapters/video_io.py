"""Reading videos: a file or an array of frames becomes a `Video` that gives any frame and knows when it is shown."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .video_container import inspect
from .video_decoder import Decoder, require_decord

# Bytes of whole frames that are held at once.
_AT_ONCE = 1 << 26
_ADVICE = "ffmpeg -i FILE -c:v libx264 FIXED.mp4 makes one that can be read"


class Video:
    """A clip whose frames are decoded when they are asked for.

    Args:
        name: What to call it in messages.
        times: `[n]` seconds at which each frame is first shown, rising.
        duration: When the last frame stops being shown, in seconds.
        size: `(height, width)` of the upright picture.

    `decoded` counts how often each frame was decoded.
    """

    def __init__(self, name: str, times: np.ndarray, duration: float, size: tuple[int, int]):
        self.name = name
        self.times = times
        self.duration = duration
        self.size = size
        self.decoded: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.times)

    @property
    def keys(self) -> np.ndarray:
        """`[m]` frames that cost no more than themselves to decode."""
        return np.arange(len(self))

    def read(self, indices: list[int]) -> list[np.ndarray | Exception]:
        """Frames of rising `indices`, or what went wrong with them."""
        raise NotImplementedError

    def frames(self, indices: Iterable[int]) -> Iterator[tuple[int, np.ndarray | Exception]]:
        """Frames in one pass, and few at a time; faster than one by one where key frames are rare.

        Args:
            indices: Any, in any order.

        Yields:
            Index, rising, and frame `[H, W, 3]` uint8, upright; or the error that it can't be decoded.
        """
        wanted = sorted({int(i) for i in indices})
        few = max(1, _AT_ONCE // (3 * self.size[0] * self.size[1]))
        for start in range(0, len(wanted), few):
            part = wanted[start : start + few]
            for index, frame in zip(part, self.read(part), strict=True):
                if not isinstance(frame, Exception):
                    self.decoded[index] = self.decoded.get(index, 0) + 1
                yield index, frame

    def frame(self, index: int) -> np.ndarray:
        """Frame `[H, W, 3]` uint8, upright.

        Raises:
            RuntimeError: It can't be decoded.
            TimeoutError: The decoder hangs on it.
        """
        ((_, frame),) = self.frames([index])
        if isinstance(frame, Exception):
            raise frame
        return frame

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """Indices of the frames that are shown at the given times."""
        return np.clip(np.searchsorted(self.times, seconds, side="right") - 1, 0, len(self) - 1)


class FileVideo(Video):
    """A video file; see `open_video`."""

    def __init__(self, path: Path, decoder: Decoder, opened: dict[str, Any]):
        times, ends = opened["times"][:, 0], opened["times"][:, 1]
        # frames without a duration are shown for as long as the average one
        last = max(float(ends[-1]), float(times[-1]) + (0.0 if ends[-1] > times[-1] else 1 / opened["fps"]))
        super().__init__(repr(str(path)), times, last, (opened["height"], opened["width"]))
        self.path = str(path)
        self.decoder = decoder
        self.dated = opened["dated"]
        self._keys = opened["keys"]
        self._bad: dict[int, Exception] = {}

    @property
    def keys(self) -> np.ndarray:
        return self._keys

    def read(self, indices: list[int]) -> list[np.ndarray | Exception]:
        good = [i for i in indices if i not in self._bad]
        try:
            found = self.decoder.frames(self.path, good) if good else []
        except (RuntimeError, TimeoutError) as error:
            if len(good) > 1:  # one of them is to blame: find out which, and keep the others
                return [self.read([i])[0] for i in indices]
            # whatever lies behind it can't be reached either; a time limit is waited for once
            after = self._keys[self._keys > good[0]]
            self._bad.update(dict.fromkeys(range(good[0], int(after[0]) if len(after) else len(self)), error))
            found = []
        known = dict(zip(good, found, strict=False)) | {i: self._bad[i] for i in indices if i in self._bad}
        return [known[i] for i in indices]


class ArrayVideo(Video):
    """Frames that are in memory already."""

    def __init__(self, frames: Sequence[np.ndarray], fps: float, name: str):
        super().__init__(name, np.arange(len(frames)) / fps, len(frames) / fps, frames[0].shape[:2])
        self.arrays = frames

    def read(self, indices: list[int]) -> list[np.ndarray | Exception]:
        return [np.ascontiguousarray(self.arrays[i]) for i in indices]


def is_clip(value: Any) -> bool:
    """Whether a value is one clip; a list of pictures is one, a list of paths isn't."""
    if not isinstance(value, (list, tuple)):
        return True
    return bool(value) and all(_picture(item) for item in value)


def _picture(item: Any) -> bool:
    array = isinstance(item, (np.ndarray, torch.Tensor))
    return hasattr(item, "getbands") or (array and item.ndim == 3)


def open_video(
    video: Any,
    *,
    decoder: Decoder | None = None,
    fps: float = 25.0,
    name: str = "video",
    partial: bool = False,
) -> Video:
    """Open a video of any supported kind.

    Args:
        video: Path of a file; or frames in memory: a list of PIL images or arrays, an array `[T, H, W, 3]`, or a
            tensor `[T, 3, H, W]` (or `[T, H, W, 3]`), all uint8 or floats in `[0, 1]`. A `Video` is returned as is.
        decoder: Process that decodes files; None starts one.
        fps: Frame rate of frames in memory.
        name: What to call the video in messages; files go by their path.
        partial: Accept a file that was cut short; its missing frames fail when they are asked for.

    Raises:
        ValueError: It is empty, truncated, corrupt, has no pictures in it, or can't be decoded in time.
        FileNotFoundError: No such file.
        ImportError: decord isn't installed.
    """
    if isinstance(video, Video):
        return video
    if not isinstance(video, (str, os.PathLike)):
        return ArrayVideo(_frames(video, name), fps, name)
    if str(video).startswith(("http://", "https://", "data:")):
        raise ValueError(f"{str(video)[:60]!r} isn't a file: load it first, nothing is downloaded")
    path = Path(video)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    path = path.absolute()  # the working directory may change before the last frame is read
    if path.stat().st_size == 0:
        raise ValueError(f"{str(path)!r} is empty")
    container = inspect(path)
    if container.missing and not partial:
        raise ValueError(f"{str(path)!r} is truncated: {container.missing}")
    require_decord()
    decoder = decoder or Decoder()
    try:
        opened = decoder.open(str(path), container.keys, container.kind == "mp4")
    except (RuntimeError, TimeoutError) as error:
        if "cannot find video stream" in str(error):
            raise ValueError(f"{str(path)!r} has no video stream, only sound or other data") from error
        raise ValueError(f"{str(path)!r} isn't a video that decord can decode: {error}; {_ADVICE}") from error
    return FileVideo(path, decoder, opened)


def _frames(video: Any, name: str) -> list[np.ndarray]:
    """Frames in memory as `[H, W, 3]` uint8 arrays, checked; views of the caller's memory where they can be."""
    if isinstance(video, torch.Tensor):
        video = video.detach().cpu().numpy()
    if isinstance(video, np.ndarray) and video.ndim != 4:
        raise ValueError(f"{name} must be [T, H, W, 3] or [T, 3, H, W], got {list(video.shape)}")
    if not isinstance(video, (list, tuple, np.ndarray)):
        raise TypeError(
            f"{name} must be a path, a list of frames, a numpy array or a torch tensor, got {type(video).__name__}"
        )
    if len(video) == 0:
        raise ValueError(f"{name} has no frames")
    frames = [_frame(frame, f"{name}, frame {i}") for i, frame in enumerate(video)]
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"{name} must have frames of one size, got {sorted({f.shape[:2] for f in frames})}")
    return frames


def _frame(frame: Any, name: str) -> np.ndarray:
    if hasattr(frame, "getbands"):
        frame = np.asarray(frame.convert("RGB"))
    elif isinstance(frame, torch.Tensor):
        frame = frame.detach().cpu().numpy()
    if not isinstance(frame, np.ndarray) or frame.ndim != 3:
        raise ValueError(f"{name} must be [H, W, 3] or [3, H, W], got {getattr(frame, 'shape', type(frame))}")
    if frame.shape[2] != 3 and frame.shape[0] == 3:
        frame = np.moveaxis(frame, 0, 2)
    if frame.shape[2] != 3 or 0 in frame.shape:
        raise ValueError(f"{name} must be [H, W, 3] or [3, H, W] with pixels in it, got {list(frame.shape)}")
    if np.issubdtype(frame.dtype, np.floating):
        if not np.isfinite(frame).all() or frame.min() < 0 or frame.max() > 1:
            raise ValueError(f"{name} must hold floats in [0, 1], got {frame.min()}..{frame.max()}")
        return (frame * 255).round().astype(np.uint8)
    if frame.dtype != np.uint8:
        raise ValueError(f"{name} must hold uint8 or floats in [0, 1], got {frame.dtype}")
    return frame
