"""The recipe around `examples/train.py` and a benchmark: its data, its kills, and what it writes, on a tiny model."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import real_weights, real_weights_data
from benchmarks.real_weights import ROOT, watch
from benchmarks.real_weights_report import paper_options
from benchmarks.vqa import __main__ as vqa
from flexcore.hf.tiny import tiny_llava
from flexcore.hf.training_data import read_examples

SIDE, ZOOM = 48, 2


@pytest.fixture(scope="module", autouse=True)
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_weights_data, "TRAINING", 6)
        patch.setattr(real_weights_data, "HELD", 2)
        patch.setattr(real_weights_data, "TEST", 3)
        patch.setattr(real_weights, "SAVE_EVERY", 4)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    made, processor = tiny_llava(layers=4)
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def command(model: Path, folder: Path, *more: str) -> list[str]:
    options = {"model": model, "folder": folder / "run", "results": folder, "side": SIDE, "zoom": ZOOM}
    options |= {"limit": 3, "threads": 1, "minutes": 0.02}
    return [*(str(word) for name, value in options.items() for word in (f"--{name}", value)), *more]


def test_the_data_is_in_its_layouts_and_the_word_is_in_the_picture(tmp_path):
    folder = tmp_path / "data"
    real_weights_data.fabricate(folder, 192)
    problems: list[Any] = []
    train, held = (read_examples(folder / f"{n}.jsonl", folder, problems.append) for n in ("train", "held"))
    samples = vqa.BENCHMARKS["textvqa"].read(folder / "textvqa", problems.append)
    assert (len(train), len(held), len(samples), problems) == (6, 2, 3, [])
    for example in (*train, *held):
        assert example.turns[0].answer in real_weights_data.WORDS
        # asked as the benchmark asks
        assert example.turns[0].question == samples[0].text
    for sample in samples:
        assert len(set(sample.truth)) == 1 and sample.truth[0] in real_weights_data.WORDS
        assert vqa.BENCHMARKS["textvqa"].score(sample, sample.truth[0].upper(), None) == 1.0
        with Image.open(sample.pictures[0]) as picture:
            assert picture.size == (192, 192)
    # the same again, and with another word in the same photograph, only a small plate differs
    picture, word = next(real_weights_data.pictures("test", 192, 1))
    again, same = next(real_weights_data.pictures("test", 192, 1))
    assert word == same == samples[0].truth[0] and np.array_equal(picture, again)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_weights_data, "WORDS", ("no",) * len(real_weights_data.WORDS))
        other, word = next(real_weights_data.pictures("test", 192, 1))
    differs = (np.asarray(picture) != np.asarray(other)).any(-1)
    assert word == "no" and 0 < differs.mean() < 0.05
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    real_weights_data.fabricate(folder, 192)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


COUNTING = """
import sys, time
for i in range({n}):
    with open(sys.argv[1], "a") as file:
        file.write("x")
    time.sleep(0.3)
sys.exit({code})
"""


def counting(folder: Path, n: int, code: int = 0) -> tuple[list[str], Callable[[], int]]:
    """A command that does `n` units, and how to count them."""
    path = folder / "done"
    return [
        "-c",
        COUNTING.format(n=n, code=code),
        str(path),
    ], lambda: len(path.read_text()) if path.exists() else 0


def test_a_command_is_killed_on_the_way_and_goes_on(tmp_path):
    words, count = counting(tmp_path, 50)
    killed = watch(words, tmp_path / "log", "units", count, 3, 1)
    assert killed["killed"] and killed["from"] == 0 and 3 <= killed["to"] <= 5
    assert 0.2 < killed["seconds"] < 5 and killed["CPU seconds"] < killed["seconds"] and killed["spent"] > 0.5
    assert killed["command"].startswith("python -c ")
    words, _ = counting(tmp_path, 2)
    rest = watch(words, tmp_path / "log", "units", count, None, 1)
    assert (rest["killed"], rest["from"], rest["to"]) == (False, killed["to"], killed["to"] + 2)


def test_a_command_that_fails_is_an_error_with_its_last_words(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)units failed, see .*log: .*ZeroDivisionError"):
        watch(["-c", "1 / 0"], tmp_path / "log", "units", lambda: 0, None, 1)
    words, count = counting(tmp_path, 1, code=3)
    with pytest.raises(RuntimeError, match="units failed"):
        watch(words, tmp_path / "log", "units", count, 5, 1)


def test_paths_of_commands_are_relative_to_the_repository(tmp_path):
    words = real_weights.options({"data": ROOT / "outputs" / "a", "other": tmp_path, "zoom": 3})
    assert words == ["--data", str(Path("outputs/a")), "--other", str(tmp_path), "--zoom", "3"]


def test_steps_that_are_done_twice_are_compared():
    losses = ["5", "4", "3", "2", "1", "3", "2.1", "1", "0"]  # killed after 5, on from 2
    assert real_weights.twice(losses, 2, 5) == {"steps": 3, "same loss": 2}
    assert real_weights.twice(losses[:5], 5, 5) == {"steps": 0, "same loss": 0}


def test_the_papers_cost_is_what_the_recipe_asks_for():
    options = paper_options()
    assert options[0] == "llava-1.5-7b" and options[options.index("--steps") + 1] == "5198"


@pytest.fixture
def within(monkeypatch) -> list[str]:
    """The commands run in this process, in place of processes of their own; what would be killed does nothing."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    programs = {"examples/train.py": importlib.import_module("train").main, "-m": vqa.main}
    ran = []

    def run(words, log, label, count, kill_at, threads):
        ran.append(label)
        before = count()
        if kill_at is None:
            first, *rest = words
            with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                assert programs[first](rest[1:] if first == "-m" else rest) == 0
        done = {"command": " ".join(words), "killed": kill_at is not None, "from": before, "to": count()}
        return {**done, "seconds": 0.5, "CPU seconds": 0.25, "spent": 1.2}

    monkeypatch.setattr(real_weights, "watch", run)
    return ran


def test_the_whole_recipe_writes_numbers_and_a_section(within, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert real_weights.main(command(model, tmp_path)) == 0
    assert within == ["steps", "steps", "answers", "answers"]
    found = json.loads((tmp_path / "results" / "real_weights.json").read_text())
    training = found["training"]
    history = json.loads((tmp_path / "run" / "train" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert training["steps"] == len(losses) >= 1
    assert training["loss, last steps"] == pytest.approx(np.mean(losses[-training["steps averaged"] :]))
    assert training["sample"]["coarse"] == 36 and training["sample"]["answer"] >= 1
    assert training["evaluations"][-1]["step"] == len(losses) and training["runs"][1]["resumed at"] == 0
    assert {arm: cell["samples"] for arm, cell in found["asked"]["rows"]["overall"].items()} == {
        "coarse": 3,
        "flex": 3,
        "dense": 3,
    }
    cost = found["cost"]["here"]
    assert 0 < cost["h100"]["seconds of a step"] < cost["a100"]["seconds of a step"]
    assert cost["a100"]["steps"] == len(losses) and found["cost"]["paper"]["a100"]["steps"] == 5198

    text = (tmp_path / "RESULTS.md").read_text()
    assert (
        "<!-- real-weights: begin -->\n## Real weights\n" in text
        and "## Real weights" in capsys.readouterr().out
    )
    for shown in (
        f"| steps reached | {len(losses):,}, in 0.0 minutes |",
        "a step, seconds by the clock: median before the kill, after it | 0.50, 0.50 |",
        "| overall | 3 |",
        "| LLaVA-1.5-7B, the paper's recipe | 8 x A100 SXM 80GB | 7.53 G | 9.35 PFLOP | 3.78 s | 27.6 GB | 5,198 |",
    ):
        assert shown in text
    # again: nothing is run, and other settings aren't mixed with these
    assert real_weights.main(command(model, tmp_path)) == 0 and len(within) == 4
    assert real_weights.main(command(model, tmp_path, "--batch", "3")) == 2
    assert "another batch (2, now 3)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["minutes", "side", "zoom", "batch", "limit", "threads"])
def test_options_are_checked(name, capsys):
    with pytest.raises(SystemExit):
        real_weights.arguments([f"--{name}", "0"])
    assert f"--{name} must be more than 0, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_real_processes_are_killed_and_go_on(model, tmp_path):
    options = command(model, tmp_path, "--minutes", "0.5")
    done = [sys.executable, "-c", SMALL, *options]
    assert subprocess.run(done, cwd=ROOT, timeout=600).returncode == 0
    found = json.loads((tmp_path / "results" / "real_weights.json").read_text())
    first, second = found["training"]["runs"]
    assert first["killed"] and first["to"] >= 4 + real_weights.AFTER and second["resumed at"] >= 4
    assert found["training"]["steps"] > second["resumed at"] and second["seconds"] > 0


SMALL = """
import sys
from benchmarks import real_weights, real_weights_data
real_weights_data.TRAINING, real_weights_data.HELD, real_weights_data.TEST = 6, 2, 3
real_weights.SAVE_EVERY = 4
sys.exit(real_weights.main(sys.argv[1:]))
"""
