"""The kernels' tests in Triton's interpreter, in processes of their own: it can't be switched on after the import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = (
    "test_gather_project_rotate",
    "test_models",
    "test_readout",
    "test_region_attention",
    "test_traffic",
)

pytest.importorskip("triton")


def run(file: str, kind: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "FLEXCORE", "TRITON"))}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", kind, f"{file}.py"]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and passed and "skipped" not in done.stdout, done.stdout[-4000:] + done.stderr
    assert int(passed[1]) > 1


@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str) -> None:
    run(file, "not slow and not gpu")


@pytest.mark.slow
@pytest.mark.parametrize("file", [f for f in FILES if f not in ("test_models", "test_traffic")])
def test_long_ones_in_the_interpreter(file: str) -> None:
    run(file, "slow and not gpu")
