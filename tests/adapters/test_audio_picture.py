"""The spectrogram with marks: colour where something was read, ink on white elsewhere."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchaudio", reason="torchaudio makes the spectrogram (pip install 'flexcore[audio]')")
pytest.importorskip("matplotlib", reason="matplotlib draws the picture (pip install 'flexcore[audio]')")

from PIL import Image

from flexcore.grid import Grid
from flexcore_adapters.audio_io import Recording
from flexcore_adapters.audio_picture import levels, save_picture

RATE = 16000


def tones(*pitches: float) -> Recording:
    """A second of each pitch."""
    at = np.arange(RATE) / RATE
    return Recording((np.concatenate([0.5 * np.sin(2 * np.pi * p * at) for p in pitches]), RATE))


def test_levels_show_the_pitch_at_its_time() -> None:
    found, top = levels(tones(300, 3000, 1000))
    assert top == 8000 and found.shape == (96, 300) and float(found.max()) == 0
    loudest = found.argmax(dim=0)
    low, high, middle = (int(loudest[at]) for at in (50, 150, 250))
    assert low < middle < high
    assert all(int(loudest[at + d]) == int(loudest[at]) for at in (50, 150, 250) for d in (-40, 40))


def test_a_long_recording_gets_no_more_columns() -> None:
    recording = tones(*[500.0] * 65)
    found, _ = levels(recording, columns=130)
    assert found.shape == (96, 130) and float(found.amax(dim=0).min()) > -3


@pytest.mark.parametrize("bands", [1, 2])
def test_marks_lie_where_it_was_read(tmp_path: Path, bands: int) -> None:
    axes = 1 if bands == 1 else 2
    grid = Grid.blocks((15, bands)[:axes], (150, bands)[:axes], (25, 1)[:axes], tile=(50, bands)[:axes])
    weights = torch.zeros(grid.n_regions)
    # 1.5 to 2 s of 3; with two bands only in the lower one
    weights[3 if bands == 1 else 6] = 0.4
    save_picture(tmp_path / "a.png", tones(300, 3000, 1000), grid, weights, 0.02, "tones")
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    inside = pixels[40:460, 85:1550]
    marked = (inside.max(axis=2) - inside.min(axis=2)) > 30
    columns = np.flatnonzero(marked.any(axis=0)) / marked.shape[1]
    rows = np.flatnonzero(marked.any(axis=1)) / marked.shape[0]
    assert abs(columns.min() - 0.5) < 0.02 and abs(columns.max() - 2 / 3) < 0.02
    assert rows.max() > 0.95 and (rows.min() < 0.05 if bands == 1 else abs(rows.min() - 0.5) < 0.04)


def test_weights_must_fit(tmp_path: Path) -> None:
    grid = Grid.blocks((15,), (150,), 25)
    with pytest.raises(ValueError, match=r"one number for each of the 6 regions .* got \[5\]"):
        save_picture(tmp_path / "a.png", tones(300), grid, torch.zeros(5), 0.02)
