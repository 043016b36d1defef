"""The `flexcore` command."""

import importlib.metadata
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import flexcore
from flexcore import cli, plugins
from tests.fake_plugins import Image, Video, registering


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four plug-ins: healthy, failing at import, and two of which claim one name."""

    def fail() -> object:
        raise ImportError("libsound is missing")

    def entry_point(name: str, load: object) -> SimpleNamespace:
        return SimpleNamespace(name=name, dist=SimpleNamespace(name=f"dist-{name}"), load=load)

    found = [
        entry_point("zebra", lambda: registering(("photo", Image))),
        entry_point("audio", fail),
        entry_point("one", lambda: registering(("video", Video), ("only_one", Image))),
        entry_point("two", lambda: registering(("video", Image))),
    ]
    monkeypatch.setattr(plugins, "_registry", plugins._Registry())
    monkeypatch.setattr(plugins, "_BUILTIN", ())
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"flexcore {flexcore.__version__}\n"


def test_without_a_command_it_helps(capsys):
    assert cli.main([]) == 0
    assert "adapters" in capsys.readouterr().out


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bake"])
    assert stop.value.code == 2
    assert "bake" in capsys.readouterr().err


def test_adapters_as_json(broken, capsys):
    assert cli.main(["adapters", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [list(row) for row in rows] == [["name", "distribution", "error"]] * 5
    assert [(row["name"], row["distribution"], row["error"] is None) for row in rows] == [
        ("audio", "dist-audio", False),
        ("only_one", "dist-one", True),
        ("photo", "dist-zebra", True),
        ("video", "dist-one", False),
        ("video", "dist-two", False),
    ]
    assert "libsound is missing" in rows[0]["error"]
    assert "dist-one" in rows[3]["error"] and "dist-two" in rows[3]["error"]


def test_adapters_as_text(broken, capsys):
    assert cli.main(["adapters"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["audio", "dist-audio"]
    assert "FAILED" in lines[1] and "libsound is missing" in lines[1]
    assert ["photo", "dist-zebra"] in [line.split() for line in lines]


def test_no_adapters(monkeypatch, capsys):
    monkeypatch.setattr(plugins, "_registry", plugins._Registry())
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert cli.main(["adapters", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []  # flexcore's own selectors are no adapters
    assert cli.main(["adapters"]) == 0
    assert "no adapters" in capsys.readouterr().out


def test_as_a_program():
    code = (
        "import sys; from flexcore.cli import main; status = main(['adapters', '--json']); "
        "heavy = {'transformers', 'PIL', 'matplotlib'} & set(sys.modules); "
        "print(status, sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert isinstance(json.loads(done.stdout), list)
    assert done.stderr.split("\n")[-2] == "0 []"
