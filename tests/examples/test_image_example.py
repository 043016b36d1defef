"""examples/image.py, run in this process with a tiny model: what it prints, what it writes, how it fails."""

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import flexcore
from flexcore.hf.tiny import tiny_llava
from tests.adapters.anyres_helpers import tiny_anyres
from tests.adapters.native_helpers import tiny_native

pytest.importorskip("skimage", reason="scikit-image carries the photograph (pip install 'flexcore[image]')")

SCRIPT = Path(__file__).parents[2] / "examples" / "image.py"


@pytest.fixture(scope="module")
def example(load_example) -> ModuleType:
    return load_example("image")


def table(out: str) -> dict[int, list[int]]:
    """Per layer: regions and fine tokens at the prompt's row, regions and fine tokens over the answer."""
    rows = re.findall(
        r"^ +(\d+) +(\d+) of \d+ +\d+% +([\d,]+) +(\d+) of \d+ +\d+% +([\d,]+)$", out, re.MULTILINE
    )
    return {int(row[0]): [int(n.replace(",", "")) for n in row[1:]] for row in rows}


def test_default(example, read_costs, tmp_path, capsys):
    output = tmp_path / "looked.png"
    assert example.main(["--max-new-tokens", "3", "--output", str(output), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    # a quarter of eight layers selects first
    layers = table(out)
    assert list(layers) == [3, 4, 5, 6, 7]
    for regions, fine_tokens, all_regions, all_tokens in layers.values():
        assert 0 < regions <= all_regions <= 81
        assert 0 < fine_tokens <= all_tokens <= 5184
    assert "576 coarse tokens" in out and "5,184 fine tokens" in out
    assert "random weights" in out and "(noise:" in out
    cost = read_costs(out)
    # prefill first, then the rest of the answer
    assert cost["coarse only"][0] < cost["flex"][0] < cost["dense high resolution"][0]
    assert cost["coarse only"][1] < cost["flex"][1]
    assert all(row[2] > 0 for row in cost.values())
    encoded, tiles = map(int, re.search(r"encoded on demand: (\d+) of (\d+) tiles", out).groups())
    assert 0 < encoded <= tiles == 9
    boxes = re.findall(r"^ +(\d+)%  \((\d+), (\d+), (\d+), (\d+)\)$", out, re.MULTILINE)
    shares = [int(share) for share, *_ in boxes]
    assert len(boxes) == 5 and shares == sorted(shares, reverse=True) and shares[-1] > 0
    with Image.open(example.default_photo()) as photo:
        width, height = photo.size
    for _, left, top, right, bottom in boxes:
        assert 0 <= int(left) < int(right) <= width and 0 <= int(top) < int(bottom) <= height
    with Image.open(output) as drawn, Image.open(example.default_photo()) as photo:
        assert (drawn.size, drawn.format) == (photo.size, "PNG")
        assert not np.array_equal(np.asarray(drawn), np.asarray(photo.convert("RGB")))


def test_checkpoint_and_options(example, read_costs, checkpoint, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (90, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    output = tmp_path / "looked.jpg"
    status = example.main(
        [
            *("--model", str(checkpoint), "--image", str(tmp_path / "turned.jpg"), "--output", str(output)),
            *("--zoom", "2", "--selector", "top_k", "--top-k", "1", "--first-layer", "0"),
            *("--question", "What is it?", "--max-new-tokens", "2", "--device", "cpu", "--dense-limit", "99"),
        ]
    )
    out = capsys.readouterr().out
    assert status == 0
    # 31 bytes of text, 36 coarse tokens and 9 of 12 columns of fine ones are more than 99
    assert [row[2] is None for row in read_costs(out).values()] == [False, False, True]
    assert {layer: row[0] for layer, row in table(out).items()} == {1: 1, 2: 1, 3: 1}
    assert "36 coarse tokens (6, 6), 144 fine tokens (12, 12), 4 regions (2, 2)" in out
    assert "What is it?" in out
    assert "noise" not in out
    with Image.open(output) as drawn:
        assert (drawn.size, drawn.format) == ((90, 40), "JPEG")


@pytest.mark.parametrize("kind", ["llava_next", "qwen2_vl", "qwen3_vl"])
def test_other_kinds_of_models(example, read_costs, monkeypatch, tmp_path, capsys, kind):
    """A tiny model in the place of a checkpoint's."""
    model, processor = tiny_anyres(kind) if kind == "llava_next" else tiny_native(kind)
    monkeypatch.setattr(example.common, "load", lambda args: (model, processor))
    output = str(tmp_path / "looked.png")
    options = ["--model", "here", "--selector", "top_k", "--top-k", "2", "--max-new-tokens", "2"]
    assert example.main([*options, "--device", "cpu", "--output", output]) == 0
    out = capsys.readouterr().out
    assert all(row[2] > 0 for row in read_costs(out).values())
    assert all(row[0] == 2 for row in table(out).values()) and "noise" not in out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--image", str(SCRIPT)], "image.py"),
        (["--output", "nowhere/looked.png"], "there is no folder nowhere"),
        (["--output", "looked.text"], "looked.text"),
        (["--device", "toaster"], "--device toaster"),
        (["--model", "/nowhere/llava"], "--model /nowhere/llava can't be loaded"),
        (["--selector", "best"], "'best'"),
        (["--threshold", "256"], "threshold must be an integer in [0, 255], got 256"),
        (["--first-layer", "99"], "first_layer"),
        (["--zoom", "0"], "zoom must be an integer >= 1, got 0"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) and "image.py" not in v[-1] else "",
)
def test_errors_are_one_line(example, checkpoint, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    defaults = ["--model", str(checkpoint), "--device", "cpu", "--output", "looked.png"]
    assert example.main([*defaults, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_trained_fine_weights_bring_their_settings(example, checkpoint, tmp_path, capsys):
    model = flexcore.wrap(
        tiny_llava(layers=4)[0], flexcore.FlexConfig(first_layer=1, selector="top_k", top_k=2)
    )
    model.save_adapter_weights(tmp_path / "fine")
    arguments = [
        "--model",
        str(checkpoint),
        "--fine-weights",
        str(tmp_path / "fine"),
        "--max-new-tokens",
        "2",
    ]
    assert example.main([*arguments, "--output", str(tmp_path / "o.png"), "--device", "cpu"]) == 0
    layers = table(capsys.readouterr().out)
    assert list(layers) == [2, 3] and all(row[0] == 2 for row in layers.values())
    arguments[3] = str(tmp_path / "nowhere")
    assert example.main([*arguments, "--output", str(tmp_path / "o.png"), "--device", "cpu"]) == 2
    assert "nowhere" in capsys.readouterr().err
