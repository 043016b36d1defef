"""Reading sound: every kind a user may hold becomes mono float samples at any rate, window by window.

A file is never read whole. A window is resampled with as much context as the filter reaches, so windows put side by
side are what resampling the whole file would have given.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from .audio_checks import check_file, check_rate, check_values, mono, need, unpack

# torchaudio's default filter: taps on either side at the lower rate, and the share of the band that passes.
_TAPS, _ROLLOFF = 6, 0.99
# torchaudio holds a filter per output phase; rates with a larger table than this are resampled sample by sample.
_TABLE = 1 << 22
_CHUNK = 1 << 14


class Recording:
    """One recording, checked when it is opened and read window by window.

    Args:
        source: Path of a sound file; array or tensor `[n]`, `[n, channels]` or `[channels, n]`, floats in `[-1, 1]`,
            int16, int32 or uint8; an `(array, sampling_rate)` pair; a mapping with `array` and `sampling_rate`; or
            another recording. Channels are averaged.
        sampling_rate: Samples per second of an array that doesn't say it; a file knows its own.
        start: Where to begin, in seconds.
        stop: Where to end, in seconds; None is the end.
        name: What to call it in messages; files go by their path.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Empty, corrupt, truncated, not finite, or of an unknown layout; the message says which.
        ImportError: soundfile is missing.
    """

    def __init__(
        self,
        source: Any,
        sampling_rate: int | None = None,
        *,
        start: float = 0.0,
        stop: float | None = None,
        name: str = "recording",
    ):
        self.path: str | None = None
        self.name: str
        self.rate: int
        self.frames: int
        self._start: int
        self._samples: Tensor | None = None
        offset, total = 0, None
        if isinstance(source, Recording):
            self.path, self._samples, self.rate, self.name = (
                source.path,
                source._samples,
                source.rate,
                source.name,
            )
            offset, total = source._start, source.frames
        elif isinstance(source, (str, os.PathLike)):
            self.path = os.fspath(source)
            self.name = repr(self.path)
            self.rate, total = check_file(self.path)
        else:
            self.name = name
            array, own = unpack(source, name)
            self.rate = check_rate(own if own is not None else sampling_rate, name)
            self._samples = mono(array, name)
            total = len(self._samples)
        length = total / self.rate
        if not 0 <= start < length or (stop is not None and not start < stop):
            raise ValueError(
                f"{self.name}: start and stop must be seconds with 0 <= start < stop and start < {length:g}, the "
                f"recording's length; got {start} and {stop}"
            )
        first = round(start * self.rate)
        last = total if stop is None else min(total, round(stop * self.rate))
        self._start, self.frames = offset + first, last - first
        if self.frames < 1:
            raise ValueError(f"{self.name} has no samples between {start} and {stop} seconds")

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.frames / self.rate

    def length(self, rate: int) -> int:
        """Samples in all at another rate."""
        return -(-self.frames * rate // self.rate)

    def read(self, start: int, stop: int, rate: int) -> Tensor:
        """Samples `start .. stop - 1` at `rate`, silence where the recording has none.

        Args:
            start: First sample, counted at `rate`.
            stop: One past the last sample.
            rate: Samples per second wanted.

        Returns:
            `[stop - start]` float32.

        Raises:
            ValueError: The file can't be read there any more, or holds numbers that aren't finite.
        """
        divisor = math.gcd(self.rate, rate)
        source, target = self.rate // divisor, rate // divisor
        if source == target:
            return self._native(start, stop)
        width = math.ceil(_TAPS * source / (min(source, target) * _ROLLOFF))
        if source * target > _TABLE:
            return self._exact(start, stop, source, target, width)
        # whole periods of both rates, so that the filter's phases are those of the whole recording
        context = -(-width // source)
        first, last = start // target - context, -(-stop // target) + context
        around = self._native(first * source, last * source)
        resample = need("torchaudio").functional.resample
        out = resample(around, source, target, lowpass_filter_width=_TAPS, rolloff=_ROLLOFF)
        return out[start - first * target :][: stop - start]

    def _exact(self, start: int, stop: int, source: int, target: int, width: int) -> Tensor:
        """The same filter without a table: for rates that hardly share a divisor."""
        scale = min(source, target) * _ROLLOFF / source
        reach = torch.arange(-width, width + 2)
        out = []
        for at in range(start, stop, _CHUNK):
            index = torch.arange(at, min(at + _CHUNK, stop))
            centre, rest = index * source // target, index * source % target
            low = int(centre[0]) - width
            samples = self._native(low, int(centre[-1]) + width + 2)
            time = ((reach - (rest.double() / target)[:, None]) * scale).clamp(-_TAPS, _TAPS)
            window = torch.cos(time * math.pi / _TAPS / 2).square()
            kernel = (torch.sinc(time) * window * scale).float()
            out.append((samples[centre[:, None] + reach - low] * kernel).sum(dim=1))
        return torch.cat(out)

    def _native(self, start: int, stop: int) -> Tensor:
        """Samples at the recording's own rate, zeros outside it."""
        first, last = (min(max(at, 0), self.frames) for at in (start, stop))
        if last <= first:
            return torch.zeros(stop - start)
        if self._samples is not None:
            inside = self._samples[self._start + first : self._start + last]
        else:
            inside = self._from_file(first, last)
        out = torch.zeros(stop - start)
        out[first - start : last - start] = inside
        return out

    def _from_file(self, first: int, last: int) -> Tensor:
        soundfile = need("soundfile")
        # opened for every window: a handle can't be shared by threads, nor sent to another process
        try:
            with soundfile.SoundFile(self.path) as file:
                file.seek(self._start + first)
                samples = torch.from_numpy(file.read(last - first, dtype="float32", always_2d=True))
        except (soundfile.LibsndfileError, OSError) as error:
            raise ValueError(f"{self._where(first)} can't be read: {error}") from error
        if len(samples) != last - first:
            raise ValueError(
                f"{self._where(first + len(samples))} ends too early: it is corrupt or truncated"
            )
        check_values(samples, self._where(first))
        return samples.mean(dim=1)

    def _where(self, frame: int) -> str:
        return f"{self.name} at {clock((self._start + frame) / self.rate)}"


def clock(seconds: float) -> str:
    """A time stamp such as `1:02:03.4`, hours only where there are any.

    >>> clock(75.25), clock(36000)
    ('1:15.2', '10:00:00.0')
    """
    tenths = math.floor(seconds * 10)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    lead = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{lead}:{tenths // 10:02}.{tenths % 10}"
