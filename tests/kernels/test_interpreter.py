"""The kernels' tests in Triton's interpreter, in processes of their own: it can't be switched on after the import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = {
    "models": ["test_models.py"],
    "region-attention": ["test_region_attention.py"],
    "others": ["test_gather_project_rotate.py", "test_readout.py", "test_traffic.py"],
}

pytest.importorskip("triton")


def run(files: str, kind: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "FLEXCORE", "TRITON"))}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        kind,
        *FILES[files],
    ]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and passed and "skipped" not in done.stdout, done.stdout[-4000:] + done.stderr
    assert int(passed[1]) > 1


@pytest.mark.parametrize("files", FILES)
def test_in_the_interpreter(files: str) -> None:
    run(files, "not slow and not gpu")


@pytest.mark.slow
@pytest.mark.parametrize("files", ["others", "region-attention"])
def test_long_ones_in_the_interpreter(files: str) -> None:
    run(files, "slow and not gpu")
