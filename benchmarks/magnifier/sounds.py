"""Sounds: real spoken digits, bells, noise, and windows of sixteen seconds made of them.

The digits are single takes, one of each digit by each of two speakers: Asterisk's English telephone prompts
(CC-BY-SA-3.0) and Debian's saytime (GPL). They come from Debian's archive, are kept in a cache, and nothing made of
them ships. Every mixing changes speed, tilt of the spectrum and level, and the noise of a recording is its own. So
all splits hold the same twenty takes, and what is measured on held-out recordings is reading known takes in mixes and
noises that training hasn't seen, not unknown speakers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..speech_data import fetch

RATE, WINDOW = 8000, 16  # samples a second, seconds
SAMPLES = RATE * WINDOW
PACKAGES = ("asterisk-core-sounds-en-wav", "saytime")
CACHE = Path(".cache/magnifier")
# Hertz of each bell's strike note.
BELLS = {"glass": 3000.0, "silver": 2130.0, "brass": 1500.0, "copper": 1060.0, "iron": 740.0, "bronze": 500.0}
NAMES = tuple(BELLS)
_SPEED, _TILT, _LEVEL = (0.85, 1.18), (-0.4, 0.4), (0.06, 0.12)
_PARTIALS = ((1.0, 1.0), (1.19, 0.3), (1.5, 0.2))  # share of the strike note, amplitude
_RING, _BELL_LEVEL, _NOISE_LEVEL = 3.0, (0.06, 0.1), (0.008, 0.02)
_WAIT = (0.6, 1.4)  # seconds from a bell to its digit
_QUIET = 1.0  # seconds after a bell's digit, so that no other digit is taken for it


@functools.cache
def takes() -> tuple[tuple[int, np.ndarray], ...]:
    """Digits and their samples at 8 kHz, silence cut off, of unit power.

    Raises:
        RuntimeError: The packages can't be downloaded.
    """
    import soundfile

    share = fetch(CACHE, PACKAGES) / "usr/share"
    out = []
    for pattern in ("asterisk/sounds/en_US_f_Allison/digits/{}.wav", "saytime/{}.au"):
        for digit in range(10):
            samples, rate = soundfile.read(share / pattern.format(digit), dtype="float32")
            assert rate == RATE and samples.ndim == 1
            loud = np.flatnonzero(np.abs(samples) > 0.05 * np.abs(samples).max())
            samples = samples[max(0, loud[0] - 160) : loud[-1] + 160]
            out.append((digit, samples / np.sqrt((samples**2).mean())))
    return tuple(out)


def spoken(rng: np.random.Generator, digit: int) -> np.ndarray:
    """A digit, said by either speaker, at a speed, tilt and level of its own."""
    some = [samples for of, samples in takes() if of == digit]
    samples = some[rng.integers(len(some))]
    speed, tilt = rng.uniform(*_SPEED), rng.uniform(*_TILT)
    at = np.arange(0, len(samples) - 1, speed)
    out = np.interp(at, np.arange(len(samples)), samples)
    out = out + tilt * np.concatenate([[0.0], out[:-1]])
    return (out * rng.uniform(*_LEVEL) / np.sqrt((out**2).mean())).astype(np.float32)


def bell(rng: np.random.Generator, name: int) -> np.ndarray:
    """A bell's stroke, three seconds of it."""
    t = np.arange(round(_RING * RATE)) / RATE
    note = BELLS[NAMES[name]] * rng.uniform(0.985, 1.015)
    tone = np.zeros(len(t))
    for share, amplitude in _PARTIALS:
        if share * note < 0.49 * RATE:
            tone += amplitude * np.sin(2 * np.pi * (share * note * t + rng.random()))
    attack = np.minimum(1, t / 0.005)
    return (rng.uniform(*_BELL_LEVEL) * attack * np.exp(-t / rng.uniform(0.9, 1.3)) * tone).astype(np.float32)


class Room:
    """Noise with a spectrum and a level of its own.

    Args:
        rng: Where it is drawn from.
    """

    def __init__(self, rng: np.random.Generator):
        knots = rng.uniform(-1, 1, 6) * 0.9  # powers of ten of amplitude: 18 dB up or down
        frequencies = np.linspace(0, 1, SAMPLES // 2 + 1)
        self.envelope = (10 ** (np.interp(frequencies, np.linspace(0, 1, 6), knots) / 2)).astype(np.float32)
        self.level = rng.uniform(*_NOISE_LEVEL)

    def noise(self, rng: np.random.Generator) -> np.ndarray:
        """`[window]` samples."""
        white = np.fft.rfft(rng.standard_normal(SAMPLES, np.float32))
        out = np.fft.irfft(white * self.envelope, SAMPLES)
        return (out * self.level / np.sqrt((out**2).mean())).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Window:
    """Sixteen seconds of sound.

    Args:
        samples: `[128000]` float32.
        bells: Index into `NAMES`, seconds of the stroke.
        digits: Digit, seconds of its beginning and end; those after the bells come first, in their order.
    """

    samples: np.ndarray
    bells: tuple[tuple[int, float], ...]
    digits: tuple[tuple[int, float, float], ...]


def window(
    rng: np.random.Generator, room: Room, strokes: Sequence[tuple[int, int]] = (), others: int = 0
) -> Window:
    """Draw a window.

    Args:
        rng: Where it is drawn from.
        room: Its noise.
        strokes: Bell and the digit that is said after it, at most two.
        others: Digits without a bell, as many as fit.
    """
    samples = room.noise(rng)
    # what there is takes turns: a slot for each, of equal length
    slot = WINDOW / max(1, len(strokes) + others)
    bells, digits, more = [], [], []
    order = rng.permutation(len(strokes) + others)
    for turn, which in enumerate(order):
        begin, end = turn * slot + 0.1, (turn + 1) * slot - 0.1
        if which < len(strokes):
            name, digit = strokes[which]
            voice, wait = spoken(rng, digit), rng.uniform(*_WAIT)
            length = wait + len(voice) / RATE
            at = rng.uniform(begin, end - length - _QUIET)
            _add(samples, bell(rng, name), at)
            bells.append((which, (int(name), at)))
            at += wait
            digits.append((which, (int(digit), at, at + len(voice) / RATE)))
        else:
            digit = int(rng.integers(10))
            voice = spoken(rng, digit)
            at = rng.uniform(begin, end - len(voice) / RATE)
            more.append((digit, at, at + len(voice) / RATE))
        _add(samples, voice, at)
    return Window(
        samples,
        tuple(b for _, b in sorted(bells)),
        (*(d for _, d in sorted(digits)), *more),
    )


def _add(samples: np.ndarray, sound: np.ndarray, at: float) -> None:
    start = round(at * RATE)
    part = sound[: len(samples) - start]
    samples[start : start + len(part)] += part
