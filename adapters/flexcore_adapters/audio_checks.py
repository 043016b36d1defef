"""What is accepted as sound, and what is refused before any work: arrays, files and their headers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import extras

# Floats are samples in [-1, 1], and mixing may overshoot; anything further is 16-bit numbers in a float array.
_LOUDEST = 16.0
_INTEGERS = {torch.uint8: (128, 128.0), torch.int16: (0, 32768.0), torch.int32: (0, 2147483648.0)}


def need(module: str) -> Any:
    """Import a module of the `audio` extra when it is first used; see `extras.need`."""
    hint = " (its version must be the one for your torch, CUDA build included)" * (module == "torchaudio")
    return extras.need(module, "audio", hint)


def is_recording(value: Any) -> bool:
    """Whether a value is one recording and not a list of them: an `(array, rate)` pair is one."""
    if isinstance(value, tuple) and len(value) == 2 and not isinstance(value[1], (bool, str, os.PathLike)):
        return isinstance(value[0], (np.ndarray, Tensor)) and isinstance(value[1], (int, np.integer))
    return not isinstance(value, (list, tuple))


def unpack(source: Any, name: str) -> tuple[np.ndarray | Tensor, Any]:
    """The array, and the sampling rate that comes with it or None."""
    array, rate = source, None
    if isinstance(source, Mapping) and "array" in source:
        array, rate = source["array"], source.get("sampling_rate")
    elif isinstance(source, tuple) and is_recording(source):
        array, rate = source
    if not isinstance(array, (np.ndarray, Tensor)):
        raise TypeError(
            f"{name} must be a path, an array, a tensor, an (array, sampling_rate) pair or a Recording, "
            f"got {type(array).__name__}"
        )
    return array, rate


def check_rate(rate: Any, name: str) -> int:
    """A sampling rate as an integer, or ValueError."""
    if rate is None:
        raise ValueError(
            f"{name} is an array and doesn't say its sampling rate: pass (array, 16000), or set sampling_rate"
        )
    if isinstance(rate, bool) or int(rate) != rate or not 1 <= rate <= 1 << 24:
        raise ValueError(f"{name}: sampling_rate must be a whole number of samples per second, got {rate!r}")
    return int(rate)


def check_file(path: str) -> tuple[int, int]:
    """Sampling rate and frames of a file that has what its header promises."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {path!r}")
    if os.path.isdir(path):
        raise ValueError(f"{path!r} is a folder, not a sound file")
    soundfile = need("soundfile")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path!r} is empty")
    try:
        with soundfile.SoundFile(path) as file:
            rate, frames = int(file.samplerate), int(file.frames)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{path!r} is not a sound file that soundfile can read (WAV, FLAC, OGG, MP3 and others): {error}"
        ) from error
    if frames < 1:
        raise ValueError(f"{path!r} has no samples")
    for problem in _shortfall(path, frames):
        raise ValueError(f"{path!r} is truncated or corrupt: {problem}")
    return rate, frames


def _shortfall(path: str, frames: int) -> Iterator[str]:
    """What a file lacks of what its header promises; nothing if it is whole."""
    with open(path, "rb") as raw:
        head = raw.read(8)
    if head[:4] in (b"RIFF", b"FORM"):
        promised = int.from_bytes(head[4:], "little" if head[:4] == b"RIFF" else "big") + 8
        # a recorder that streams leaves the size open; libsndfile quietly takes what there is of the others
        if promised not in (8, (1 << 32) + 7) and promised > os.path.getsize(path) + 1:
            yield f"its header promises {promised:,} bytes, it has {os.path.getsize(path):,}"
            return
    soundfile = need("soundfile")
    try:
        with soundfile.SoundFile(path) as file:
            file.seek(frames - 1)
            if len(file.read(1, dtype="float32", always_2d=True)) == 1:
                return
            yield f"its header promises {frames:,} samples, and the last one isn't there"
    except (soundfile.LibsndfileError, RuntimeError) as error:
        yield f"its header promises {frames:,} samples, and the last one can't be read: {error}"


def mono(array: np.ndarray | Tensor, name: str) -> Tensor:
    """An array's samples as one float32 channel in `[-1, 1]`."""
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiu" or array.dtype in (np.uint16, np.uint32, np.uint64):
            raise ValueError(f"{name} must hold floats, int16, int32 or uint8, got {array.dtype}")
        array = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
    samples = array.detach().to("cpu")
    if samples.ndim not in (1, 2) or not samples.numel():
        raise ValueError(
            f"{name} must be [n], [n, channels] or [channels, n] with samples in it, got {list(samples.shape)}"
        )
    if samples.dtype in _INTEGERS:
        zero, scale = _INTEGERS[samples.dtype]
        samples = (samples.float() - zero) / scale
    elif not samples.is_floating_point():
        raise ValueError(f"{name} must hold floats, int16, int32 or uint8, got {samples.dtype}")
    samples = samples.float()
    check_values(samples, name)
    if samples.ndim == 2:
        # no recording has more channels than samples
        samples = samples.mean(dim=0 if samples.shape[0] < samples.shape[1] else 1)
    return samples


def check_values(samples: Tensor, name: str) -> None:
    """Raise ValueError unless samples are finite and of a float's usual size."""
    if not bool(samples.isfinite().all()):
        raise ValueError(f"{name} must hold finite samples, it has NaN or infinity")
    if samples.numel() and float(samples.abs().max()) > _LOUDEST:
        raise ValueError(
            f"{name} must hold floats in [-1, 1], got {float(samples.min()):g}..{float(samples.max()):g}; "
            "are these integers in a float array?"
        )
