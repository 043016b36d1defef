"""Reading sound: all kinds of input, all kinds of bad input, and windows that equal the whole file."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip(
    "soundfile", reason="soundfile reads the files (pip install 'flexcore[audio]')"
)
torchaudio = pytest.importorskip("torchaudio", reason="torchaudio resamples (pip install 'flexcore[audio]')")

from flexcore_adapters.audio_checks import is_recording  # noqa: E402
from flexcore_adapters.audio_io import Recording, clock  # noqa: E402

RATE = 16000


def tone(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """Noise and a rising tone: something at every frequency, different at every moment."""
    at = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(at))
    return (0.2 * np.sin(2 * np.pi * (200 + 300 * at) * at) + 0.02 * noise).astype(np.float32)


def whole(recording: Recording, rate: int = RATE) -> torch.Tensor:
    return recording.read(0, recording.length(rate), rate)


def resampled(samples: np.ndarray, rate: int) -> torch.Tensor:
    """The whole recording at 16 kHz: torchaudio's for usual rates, whose filter fits memory, else the sum itself."""
    if math.gcd(rate, RATE) >= 25:
        return torchaudio.functional.resample(torch.from_numpy(samples), rate, RATE)
    scale = 0.99 * min(rate, RATE) / rate
    reach = math.ceil(6 / scale)
    padded = np.pad(samples.astype(float), reach + 1)
    out = []
    for n in range(math.ceil(len(samples) * RATE / rate)):
        centre, rest = divmod(n * rate, RATE)
        time = (np.arange(-reach, reach + 2) - rest / RATE) * scale
        kernel = np.sinc(time) * np.cos(np.clip(time, -6, 6) * np.pi / 12) ** 2 * scale
        out.append(float(padded[centre + 1 : centre + 2 * reach + 3] @ kernel))
    return torch.tensor(out)


def by_window(recording: Recording, window: int, rate: int = RATE) -> torch.Tensor:
    total = recording.length(rate)
    return torch.cat([recording.read(s, s + window, rate) for s in range(0, total, window)])[:total]


# ---------------------------------------------------------------------- resampling


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000, 44101, 7919])
@pytest.mark.parametrize("window", [8000, 5003])
def test_windows_equal_the_whole_file(tmp_path: Path, rate: int, window: int) -> None:
    samples = tone(1.217, rate) + np.float32(0.3)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    recording = Recording(tmp_path / "a.wav")
    expected = resampled(samples, rate)
    found = by_window(recording, window)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-4
    # a window resampled on its own is audibly different at its edges
    if rate != RATE:
        cut = resampled(samples[: rate // 2], rate)
        assert float((cut[-8:] - expected[len(cut) - 8 : len(cut)]).abs().max()) > 1e-3


def test_silence_outside(tmp_path: Path) -> None:
    recording = Recording((tone(1.0, 22050), 22050))
    assert torch.equal(recording.read(-500, -100, 22050), torch.zeros(400))
    assert torch.equal(recording.read(30000, 30100, 22050), torch.zeros(100))
    around = recording.read(-10, 22060, 22050)
    assert torch.equal(around[10:-10], whole(recording, 22050)) and not around[:10].any()
    late = recording.read(RATE + 100, RATE + 200, RATE)
    assert late.shape == (100,) and float(late.abs().max()) < 1e-6


def test_a_part_of_a_recording() -> None:
    samples = tone(2.0, 8000)
    part = Recording((samples, 8000), start=0.5, stop=1.25)
    assert part.seconds == 0.75 and torch.equal(whole(part, 8000), torch.from_numpy(samples[4000:10000]))
    again = Recording(part, start=0.25)
    assert torch.equal(whole(again, 8000), torch.from_numpy(samples[6000:10000]))
    assert Recording((samples, 8000), stop=99.0).seconds == 2.0


# ---------------------------------------------------------------------- what is taken


@pytest.mark.parametrize(
    ("name", "subtype"),
    [
        ("a.wav", "PCM_16"),
        ("a.wav", "PCM_24"),
        ("a.wav", "PCM_32"),
        ("a.wav", "PCM_U8"),
        ("a.wav", "FLOAT"),
        ("a.wav", "DOUBLE"),
        ("a.wav", "ULAW"),
        ("a.flac", "PCM_16"),
        ("a.aiff", "PCM_16"),
        ("a.ogg", "VORBIS"),
    ],
)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_files(tmp_path: Path, name: str, subtype: str, channels: int) -> None:
    both = np.stack([tone(0.5, RATE, seed) for seed in range(channels)], axis=1)
    soundfile.write(tmp_path / name, both, RATE, subtype=subtype)
    recording = Recording(str(tmp_path / name))
    expected = soundfile.read(tmp_path / name, dtype="float32", always_2d=True)[0].mean(axis=1)
    assert (recording.rate, recording.frames) == (RATE, len(both))
    assert torch.allclose(whole(recording), torch.from_numpy(expected), atol=1e-6)


def test_mp3(tmp_path: Path) -> None:
    if "MP3" not in soundfile.available_formats():
        pytest.skip("this libsndfile has no MP3")
    soundfile.write(tmp_path / "a.mp3", tone(1.0, RATE), RATE)
    assert Recording(tmp_path / "a.mp3").seconds > 0.9


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "int16", "int32", "uint8", ">f4"])
@pytest.mark.parametrize("shape", ["n", "n2", "2n"])
@pytest.mark.parametrize("torched", [False, True], ids=["numpy", "torch"])
def test_arrays(kind: str, shape: str, torched: bool) -> None:
    samples = tone(0.25, RATE)
    scale = {"int16": 2**15, "int32": 2**31, "uint8": 2**7}.get(kind, 1)
    array = samples * scale + (128 if kind == "uint8" else 0)
    array = np.round(array).astype(kind) if scale > 1 else array.astype(kind)
    if shape != "n":
        array = np.stack([array, array], axis=1 if shape == "n2" else 0)
    value = torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) if torched else array
    tolerance = {"uint8": 1e-2, "float16": 1e-3, "int16": 1e-4}.get(kind, 1e-6)
    for source in ((value, RATE), {"array": value, "sampling_rate": RATE}):
        assert np.abs(whole(Recording(source)).numpy() - samples).max() < tolerance
    assert np.abs(whole(Recording(value, RATE)).numpy() - samples).max() < tolerance


def test_silence_and_the_shortest() -> None:
    assert not whole(Recording((np.zeros(100, np.int16), 8000))).any()
    one = Recording((np.full(1, 0.5, np.float32), 48000))
    assert one.length(RATE) == 1 and whole(one).shape == (1,)


def test_what_is_one_recording() -> None:
    array = np.zeros(4)
    assert is_recording("a.wav") and is_recording(array) and is_recording((array, 8000))
    assert (
        not is_recording([array, array]) and not is_recording((array, array)) and not is_recording(("a", "b"))
    )


def test_clock() -> None:
    assert [clock(s) for s in (0, 9.99, 75.25, 3600, 36000.5)] == [
        "0:00.0",
        "0:09.9",
        "1:15.2",
        "1:00:00.0",
        "10:00:00.5",
    ]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((np.zeros(0), RATE), r"recording 3 must be .* with samples in it, got \[0\]"),
        ((np.zeros((2, 2, 9)), RATE), r"must be \[n\].*got \[2, 2, 9\]"),
        ((np.array([0.0, math.nan]), RATE), "finite samples"),
        ((np.array([0.0, -math.inf]), RATE), "finite samples"),
        ((np.array([0.0, 20000.0]), RATE), r"floats in \[-1, 1\], got 0..20000; are these integers"),
        ((np.zeros(9, np.int64), RATE), "must hold floats, int16, int32 or uint8, got torch.int64"),
        ((np.zeros(9, np.uint16), RATE), "must hold floats, int16, int32 or uint8, got uint16"),
        ((np.zeros(9, complex), RATE), "must hold floats, int16, int32 or uint8, got complex128"),
        (np.zeros(9), "doesn't say its sampling rate"),
        ((np.zeros(9), 0), "whole number of samples per second, got 0"),
    ],
)
def test_bad_arrays(source: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recording(source, name="recording 3")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        Recording(tmp_path / "absent.wav")
    with pytest.raises(ValueError, match="is a folder"):
        Recording(tmp_path)
    (tmp_path / "empty.wav").touch()
    with pytest.raises(ValueError, match="is empty"):
        Recording(tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("not a sound " * 100)
    with pytest.raises(ValueError, match=r"text.wav' is not a sound file that soundfile can read"):
        Recording(tmp_path / "text.wav")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    with pytest.raises(ValueError, match="has no samples"):
        Recording(tmp_path / "none.wav")
    with pytest.raises(TypeError, match=r"recording must be a path, an array.*got int"):
        Recording(3)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.aiff"])
def test_truncated_files_are_named_before_any_work(tmp_path: Path, name: str) -> None:
    soundfile.write(tmp_path / name, tone(2.0, RATE), RATE)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"truncated|not a sound file"):
        Recording(tmp_path / name)


def test_a_file_that_is_damaged_in_the_middle_or_vanishes(tmp_path: Path) -> None:
    samples = tone(2.0, RATE)
    samples[RATE] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, RATE, subtype="FLOAT")
    recording = Recording(tmp_path / "nan.wav")
    assert recording.read(0, 100, RATE).isfinite().all()
    with pytest.raises(ValueError, match=r"nan.wav' at 0:00.5 must hold finite samples"):
        recording.read(RATE // 2, 2 * RATE, RATE)
    (tmp_path / "nan.wav").unlink()
    with pytest.raises(ValueError, match="can't be read"):
        recording.read(0, 100, RATE)


@pytest.mark.parametrize(("start", "stop"), [(-1, None), (2.0, None), (1.0, 1.0), (1.5, 0.5)])
def test_bad_parts(start: float, stop: float | None) -> None:
    with pytest.raises(ValueError, match="start and stop must be seconds"):
        Recording((tone(2.0, 8000), 8000), start=start, stop=stop)


@pytest.mark.parametrize("module", ["soundfile", "torchaudio"])
def test_a_missing_library_is_named_when_it_is_used(tmp_path: Path, module: str) -> None:
    soundfile.write(tmp_path / "a.wav", tone(0.1, 8000), 8000)
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "import flexcore_adapters.audio\n"
        "from flexcore_adapters.audio_io import Recording\n"
        f"try: Recording({str(tmp_path / 'a.wav')!r}).read(0, 10, 16000)\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"{module} is needed for audio" in done.stdout and "flexcore[audio]" in done.stdout
