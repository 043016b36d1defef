"""The README's "Write your own adapter": its files, copied out, make a plug-in that passes its own test."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def files() -> dict[str, str]:
    text = README.read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- adapter: (\S+) -->\n```\w+\n(.*?)```", text, re.DOTALL))


def test_the_adapter_takes_about_forty_lines():
    lines = [line for line in files()["flexcore_pulse.py"].splitlines() if line.strip()]
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 119


@pytest.mark.slow
def test_it_works_as_written(tmp_path):
    written = files()
    assert set(written) == {"pyproject.toml", "flexcore_pulse.py", "test_pulse.py"}
    for name, text in written.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    project = tomllib.loads(written["pyproject.toml"])["project"]
    info = tmp_path / "flexcore_pulse-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [f"{name} = {module}" for name, module in project["entry-points"]["flexcore"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[flexcore]", *lines, ""]))
    paths = [str(tmp_path), *(path for path in sys.path if path)]
    done = subprocess.run(
        [sys.executable, "-c", "from test_pulse import test_pulse; test_pulse()"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
