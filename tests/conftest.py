"""Settings every test runs under: no network, one thread per worker, the same random numbers."""

import os

# Before transformers is imported by any test module: it reads both at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder with outputs of the official implementation, for tests/hf/test_golden.py",
    )


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers share the cores: torch's own threads would only get into each other's way.
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
