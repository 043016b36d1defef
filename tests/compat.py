"""Run the core of the matrix on other versions of transformers: `python tests/compat.py 5.0.0 5.23.0`.

Each version is installed into a folder of its own that is put in front of the environment's packages; nothing of the
environment changes. Prints a line per version; exits with 1 if any of them fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = (
    "tests/hf/test_golden.py",
    "tests/hf/test_invariants.py",
    "tests/hf/test_generation.py",
    "tests/hf/test_training.py",
    "tests/hf/test_wrap.py",
    "tests/hf/test_checkpoint.py",
    "tests/hf/test_pretrained.py",
    "tests/hf/test_encoder_decoder.py",
    "tests/hf/test_families.py",
    "tests/adapters",
)
# what early versions of transformers can't do themselves
LATER = {
    "test_assisted_decoding": "the assistant refuses a minimum length",
    "test_chunked_prefill": "chunked prefill needs a cache made beforehand",
    "t5": "T5 doesn't dispatch through the attention interface",
    "diffllama": "DiffLlama doesn't either, so it is refused for another reason",
    "threads": "its vision towers mix up the hidden states of threads, without flexcore too",
    "qwen2_5_vl": "its forward doesn't know mm_token_type_ids yet",
}


def run(version: str, tests: Sequence[str]) -> tuple[bool, str]:
    """Install a version beside the environment and run the tests with it; returns success and pytest's last line."""
    with tempfile.TemporaryDirectory() as folder:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--target",
            folder,
            f"transformers=={version}",
        ]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path = os.pathsep.join([folder, str(ROOT), str(ROOT / "adapters")])
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", *tests]
        if tuple(int(n) for n in version.split(".")[:2]) < (5, 10):
            command += ["-k", " and ".join(f"not {name}" for name in LATER)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            print(f"  {line[:180]}")
    return done.returncode == 0, (done.stdout.strip().splitlines() or ["no output"])[-1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="+", help="versions of transformers, oldest first")
    parser.add_argument(
        "--tests", nargs="*", default=CORE, help="what to run; default: the core of the matrix"
    )
    args = parser.parse_args(argv)
    good = []
    for version in args.versions:
        ok, line = run(version, args.tests)
        good.append(ok)
        print(f"transformers {version}: {'ok' if ok else 'FAILED'}, {line}", flush=True)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
