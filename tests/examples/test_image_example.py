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


def six(out: str) -> list[list[str]]:
    """Rows of the tables of all six frames: colour, digit, coarse-only's answer, Flex's answer."""
    return [list(row) for row in re.findall(r"^  (\w+) +(\d) +(\S+) +(\S+)$", out, re.MULTILINE)]


def test_default(example, read_costs, tmp_path, capsys):
    """The model that ships, on a canvas and on a photo: it reads what coarse tokens alone don't show."""
    output = tmp_path / "looked.png"
    assert example.main(["--output", str(output), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    answers = re.findall(r"^answer    '(\d)'$", out, re.MULTILINE)
    assert answers == re.findall(r"^truth     '(\d)'$", out, re.MULTILINE) and len(answers) == 2
    rows = six(out)
    assert len(rows) == 12 and [row[:2] for row in rows[:6]] == [row[:2] for row in rows[6:]]
    coarse, flex = (sum(row[1] == row[i] for row in rows) for i in (2, 3))
    assert flex >= 8 and coarse <= 4
    for part in out.split("----")[1:]:
        layers = table(part)
        assert list(layers) == [2, 3, 4] and all(row[0] == 8 for row in layers.values())
        cost = read_costs(part)
        assert cost["coarse only"][0] < cost["flex"][0] < cost["dense high resolution"][0]
        encoded, tiles = map(int, re.search(r"encoded on demand: (\d+) of (\d+) tiles", part).groups())
        assert 0 < encoded <= tiles == 9
    with Image.open(output) as drawn, Image.open(tmp_path / "looked_photo.png") as photo:
        assert drawn.size == (192, 192) and photo.size == (741, 500)


def test_where_it_looked(example, monkeypatch, tmp_path, capsys):
    """The boxes that are named lie in the picture, and the overlay shows them."""
    output = tmp_path / "looked.png"
    arguments = ["--image", str(example.default_photo()), "--question", "What is in the blue frame?"]
    assert example.main([*arguments, "--output", str(output), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    boxes = re.findall(r"^ +(\d+)%  \((\d+), (\d+), (\d+), (\d+)\)$", out, re.MULTILINE)
    shares = [int(share) for share, *_ in boxes]
    assert len(boxes) == 5 and shares == sorted(shares, reverse=True) and shares[-1] > 0
    photo, frames = example.magnified.placed(example.load_image(example.default_photo()))
    for _, left, top, right, bottom in boxes:
        assert 0 <= int(left) < int(right) <= photo.width and 0 <= int(top) < int(bottom) <= photo.height
    # the box that was read most holds a part of the frame
    blue = next(frame.box for frame in frames if frame.colour == "blue")
    most = [int(v) for v in boxes[0][1:]]
    assert most[0] < blue[2] and blue[0] < most[2] and most[1] < blue[3] and blue[1] < most[3]
    with Image.open(output) as drawn:
        assert (drawn.size, drawn.format) == (photo.size, "PNG")
        assert not np.array_equal(np.asarray(drawn), np.asarray(photo))


@pytest.mark.parametrize("width", [60, 30])
def test_a_photo_too_narrow_for_the_frames(example, tmp_path, capsys, width):
    Image.new("RGB", (width, 900)).save(tmp_path / "narrow.png")
    arguments = ["--image", str(tmp_path / "narrow.png"), "--output", str(tmp_path / "looked.png")]
    assert example.main(arguments) == 2
    assert f"--image must leave room for six frames, got {width}x900 pixels" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--top-k", "3"), ("--selector", "all"), ("--zoom", "2")], ids=" ".join)
def test_the_model_that_ships_takes_no_settings(example, capsys, option):
    assert example.main([*option]) == 2
    assert f"{option[0]} needs --model" in capsys.readouterr().err


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
