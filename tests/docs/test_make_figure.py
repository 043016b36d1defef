"""docs/make_figure.py draws the README's picture."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib (pip install 'flexcore[cli]')")
pytest.importorskip("skimage", reason="scikit-image carries the photograph (pip install 'flexcore[image]')")

DOCS = Path(__file__).parents[2] / "docs"


def test_the_script_draws_the_picture(tmp_path):
    spec = importlib.util.spec_from_file_location("make_figure", DOCS / "make_figure.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(tmp_path / "drawn.png")
    kept, drawn = (
        np.asarray(Image.open(p).convert("RGB")) for p in (DOCS / "mechanism.png", tmp_path / "drawn.png")
    )
    assert kept.shape == drawn.shape == (script.HEIGHT, script.WIDTH, 3)
    # another release of matplotlib may set its letters a little differently
    assert np.abs(kept.astype(float) - drawn).mean() < 2
    assert (DOCS / "mechanism.png").stat().st_size < 400_000
