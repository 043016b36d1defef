"""What several benchmarks' tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA in `model` and its fine weights in `fine`, as `benchmarks.vqa` takes them."""
    from .vqa_helpers import save_checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    save_checkpoint(folder)
    return folder
