"""benchmarks/scale.py: what it compares, what it says when something is missing, and one real measurement."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import scale, scale_media
from benchmarks.scale import Check, Row, checks, main, measure, named, plot, report
from benchmarks.scale_probe import children, memory, reset_peak

FOUND = {
    "open seconds": [9.0, 0.5, 0.7],
    "seconds": [3.0, 1.0, 1.5],
    "CPU seconds": [3.0, 1.0, 1.5],
    "peak MiB": 100.0,
    "over the model MiB": 10.0,
    "decoder MiB": 50.0,
    "coarse tokens": 216,
    "fine tokens": 34560,
    "regions": 960,
    "units": 960,
    "encoded": 100,
}


def args(*only: str, quick: bool = True, limit: float = 60.0) -> argparse.Namespace:
    return argparse.Namespace(only=list(only), quick=quick, time_limit=limit, size=48)


def rows(medium: str, **longer: object) -> list[Row]:
    short, long = scale.QUICK[medium]
    return [Row(medium, short, FOUND), Row(medium, long, {**FOUND, **longer})]


@pytest.mark.parametrize(
    ("medium", "longer", "holding"),
    [
        ("video", {}, [True, True, True, True]),
        ("video", {"peak MiB": 119.0, "decoder MiB": 61.0}, [True, True, False, True]),
        ("video", {"open seconds": [5.0, 2.1, 2.2]}, [True, True, True, False]),
        ("audio", {"peak MiB": 121.0, "over the model MiB": 31.0}, [False, True]),
        ("audio", {"seconds": [999.0]}, [True, True]),
        # the first question pays for set-up: the median of the others counts
        ("image", {"CPU seconds": [99.0, 1.4, 1.9, 1.8]}, [True]),
        ("image", {"CPU seconds": [0.1, 1.9, 1.9, 1.9]}, [False]),
    ],
)
def test_what_must_hold(medium: str, longer: dict, holding: list[bool]) -> None:
    found = checks(rows(medium, **longer), args(medium))
    assert [check.holds for check in found] == holding


def test_what_was_not_measured_does_not_hold() -> None:
    short, long = rows("audio")
    for missing in ([short], [short, Row("audio", long.length, {"error": "no room"})]):
        found = checks(missing, args("audio"))
        assert [(c.value, c.holds) for c in found if c.bound] == [(None, False)]


def test_report_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the plot (pip install 'flexcore[cli]')")
    found = [*rows("video"), Row("video", 7200, {"error": "no room on the disk"}), *rows("image")]
    held = [Check("memory", 1.3, 1.2), Check("opening", 0.5, 2.0), Check("beyond", 1.4)]
    report(found, held, {"command": "python -m ...", "versions": {}, "machine": {}})
    out = capsys.readouterr().out
    assert "video     30 s     0.50" in out and "zoom 9" in out
    assert "2 h   not measured: no room on the disk" in out
    assert "DOES NOT HOLD memory: 1.30, at most 1.2" in out and "holds         opening: 0.50" in out
    assert "              beyond: 1.40\n" in out
    plot(tmp_path / "cost.png", found)
    assert (tmp_path / "cost.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("medium", "length", "text"),
    [
        ("video", 7200, "2 h"),
        ("audio", 9000, "2.5 h"),
        ("audio", 90, "1.5 min"),
        ("video", 30, "30 s"),
        ("image", 9, "zoom 9"),
    ],
)
def test_names(medium: str, length: int, text: str) -> None:
    assert named(medium, length) == text


def test_without_ffmpeg_the_others_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="scikit-image carries the photograph")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(scale, "probe", lambda *a: FOUND)
    found = measure(args("video", "image"), tmp_path)
    assert [row.ok for row in found] == [False, False, True, True]
    assert "ffmpeg" in found[0].found["error"]
    assert not checks(found, args("video", "image"))[0].holds


def test_no_room_and_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"GiB are needed in .*, .* GiB are free"):
        scale_media.check_room(tmp_path, 1e18)
    monkeypatch.setattr(scale, "probe", lambda *a: pytest.fail("measured after its time"))
    found = measure(args("image", limit=0.0), tmp_path)
    assert {row.found["error"] for row in found} == {"the time limit was reached"}


def test_media_have_their_length(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="soundfile writes the recording")
    pytest.importorskip("torchaudio", reason="torchaudio resamples")
    try:
        path = scale_media.recording(tmp_path, 100)
    except ValueError as error:
        pytest.skip(str(error))
    about = soundfile.info(path)
    assert about.frames == 100 * scale_media.RATE and about.channels == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_peak_is_a_process_s_own() -> None:
    """A child of a large process is not large: `getrusage` would say so."""
    held = torch.ones(300 << 20, dtype=torch.uint8)
    code = (
        "print(next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM:')) / 1024)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(child.stdout) < 100 < 300 < memory("VmHWM")
    del held
    reset_peak()
    assert memory("VmRSS") <= memory("VmHWM") + 1
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process.pid in children()
        process.communicate(b"\n")


@pytest.mark.slow
def test_a_real_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("skimage", reason="scikit-image carries the photograph")
    status = main(["--quick", "--only", "image", "--json"])
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert status == (0 if found["checks"][0]["holds"] else 1)
    few, many = found["rows"]
    assert (few["length"], many["length"], few["units"], many["units"]) == (3, 9, 9, 81)
    assert 0 < few["encoded"] <= 9 < many["encoded"] < 81
    assert few["peak MiB"] > few["over the model MiB"] > 0
