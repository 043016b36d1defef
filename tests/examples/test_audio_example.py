"""examples/audio.py, run in this process with a tiny model: what it prints, what it writes, how it fails."""

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

soundfile = pytest.importorskip(
    "soundfile", reason="soundfile reads the files (pip install 'flexcore[audio]')"
)
pytest.importorskip("torchaudio", reason="torchaudio resamples (pip install 'flexcore[audio]')")
pytest.importorskip("matplotlib", reason="matplotlib draws the picture (pip install 'flexcore[audio]')")

from PIL import Image  # noqa: E402

from flexcore.hf.tiny_audio import tiny_audio_flamingo  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "examples" / "audio.py"


@pytest.fixture(scope="module")
def example(load_example) -> ModuleType:
    return load_example("audio")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Audio Flamingo of no size, with windows of 2 s."""
    folder = tmp_path_factory.mktemp("flamingo")
    model, processor = tiny_audio_flamingo(layers=4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "noise.flac"
    samples = 0.1 * np.random.default_rng(0).normal(size=(5 * 22050, 2))
    soundfile.write(path, samples, 22050)
    return path


@pytest.mark.parametrize("pool", [None, "10"])
def test_a_recording_and_a_checkpoint(example, read_costs, checkpoint, recording, tmp_path, capsys, pool):
    output = tmp_path / "heard.png"
    options = [
        "--model",
        str(checkpoint),
        "--audio",
        str(recording),
        "--output",
        str(output),
        "--device",
        "cpu",
    ]
    options += ["--max-new-tokens", "3", "--first-layer", "0", "--start", "0.5", "--top-k", "2"]
    assert example.main(options + ([] if pool is None else ["--pool", pool])) == 0
    out = capsys.readouterr().out
    assert "listening to 4.5 s of noise.flac" in out
    coarse, n = (112, 9) if pool is None else (23, 10)
    assert f"{coarse} coarse tokens" in out and f"regions ({n},)" in out
    rows = re.findall(
        rf"^ +(\d+) +2 of {n} +\d+% +([\d.]+) +(\d+) of {n} +\d+% +([\d.]+)$", out, re.MULTILINE
    )
    assert [int(row[0]) for row in rows] == [1, 2, 3]
    for _, first, regions, seconds in rows:
        assert 0.5 <= float(first) <= 1.0 and 2 <= int(regions) <= 6
        assert float(first) <= float(seconds) <= int(regions) * 0.5 + 0.05
    moments = re.findall(r"^ +\d+%  0:0([\d.]+) to 0:0([\d.]+)$", out, re.MULTILINE)
    assert 2 <= len(moments) <= 5 and all(0 <= float(a) < float(b) <= 4.5 for a, b in moments)
    cost = read_costs(out)
    assert cost["coarse only"][0] <= cost["flex"][0] < cost["dense high resolution"][0]
    assert all(row[2] > 0 for row in cost.values())
    assert "(noise:" not in out and re.search(r"encoded on demand: \d of 3 windows", out)
    with Image.open(output) as picture:
        assert picture.size == (1560, 624) and len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_default_recording(example):
    try:
        path = example.default_recording()
    except ValueError as error:
        pytest.skip(str(error))
    assert path.name == "two_cities.wav" and path.is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--audio", "absent.wav"], "no such file"),
        (["--audio", str(SCRIPT)], "is not a sound file"),
        (["--output", "nowhere/a.png"], "there is no folder nowhere"),
        (["--output", "a.txt"], "--output must end like a picture"),
        (["--start", "99"], "start and stop must be seconds"),
        (["--device", "abacus"], "--device abacus"),
        (["--model", "nowhere", "--max-new-tokens", "1"], "--model nowhere can't be loaded"),
    ],
)
def test_what_goes_wrong(example, recording, capsys, monkeypatch, tmp_path, options, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    given = options if "--audio" in options else ["--audio", str(recording), *options]
    assert example.main(given) == 2
    assert message in capsys.readouterr().err
