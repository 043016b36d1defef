"""Real photographs from scikit-image's wheel, and a tiny LLaVA."""

from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from flexcore.hf.tiny import tiny_llava


@pytest.fixture(scope="session")
def photo() -> Callable[[str], Path]:
    pytest.importorskip("skimage")

    def path(name: str) -> Path:
        return Path(str(resources.files("skimage") / "data" / name))

    return path


@pytest.fixture(scope="session")
def llava() -> tuple[Any, Any]:
    return tiny_llava()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Tiny models: handing a tile to a second thread takes longer than encoding it.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
