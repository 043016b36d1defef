"""Trained models and real media; what isn't there skips its tests and says how to get it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import packaged_weights as weights
from benchmarks.assembled import assemble

# Where other processes want the cores too, threads that wait for each other cost far more than they gain.
torch.set_num_threads(1)

DEBIAN = weights.CACHE.parent / "debian"


def _loaded(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except weights.MissingWeights as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    """Model and tokenizer."""
    return _loaded(weights.smollm2)


@pytest.fixture(scope="module")
def dinov2() -> Any:
    return _loaded(weights.dinov2)


@pytest.fixture(scope="module")
def whisper() -> tuple[Any, Any]:
    """Model and processor."""
    return _loaded(weights.whisper)


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    """DINOv2 and SmolLM2 as a LLaVA, and its processor."""
    return assemble(_loaded(weights.dinov2), *_loaded(weights.smollm2))


@pytest.fixture(scope="module")
def photo() -> Callable[[str], Image.Image]:
    """Photographs from scikit-image's wheel, by file name."""
    pytest.importorskip("skimage")

    def load(name: str) -> Image.Image:
        return Image.open(str(resources.files("skimage") / "data" / name)).convert("RGB")

    return load


@pytest.fixture(scope="module")
def utterances() -> list[tuple[Path, str]]:
    """Read English sentences: wave files of 16 kHz and what is said in them."""
    package = "pocketsphinx-testdata"
    folder = next((p for p in _debian(package) if p.name == "librivox"), None)
    if folder is None:
        pytest.skip(
            f"needs the Debian package {package}; without installing it: apt-get download {package} && "
            f"dpkg-deb -x {package}_*.deb .cache/debian/{package}"
        )
    out = []
    for line in (folder / "transcription").read_text().splitlines():
        # `<s> he was not an ill disposed young man </s> (name of the file)`
        said, name = line.removeprefix("<s>").split("</s>")
        out.append((folder / f"{name.strip(' ()')}.wav", said.strip()))
    return out


def _debian(package: str) -> list[Path]:
    """What a Debian package holds: unpacked under `.cache/debian`, or installed."""
    if (DEBIAN / package).is_dir():
        return list((DEBIAN / package).rglob("*"))
    if shutil.which("dpkg-query") is None:
        return []
    listed = subprocess.run(["dpkg-query", "-L", package], capture_output=True, text=True, check=False)
    return [Path(line) for line in listed.stdout.splitlines()]
