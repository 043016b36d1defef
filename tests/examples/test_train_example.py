"""examples/train.py with tiny models: what it prints and writes, bad data, and going on after a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import flexcore
from flexcore.hf.tiny import tiny_llava

ROOT = Path(__file__).resolve().parents[2]
KILLED = Path(__file__).with_name("killed_training.py")
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def example(load_example) -> ModuleType:
    return load_example("train")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A saved LLaVA with dropout."""
    folder = tmp_path_factory.mktemp("model")
    model, processor = tiny_llava(layers=4, attention_dropout=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Five pictures with questions, one of them in LLaVA's layout, and one without a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": f"What is {i}?", "answer": COLOURS[i % 3]})
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Where?"), ("gpt", "Here.")]
    said = [{"from": who, "value": value} for who, value in turns]
    lines[4] = {"id": "a", "image": "4.png", "conversations": said}
    lines.append(
        {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    )
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    return folder


def options(pictures: Path, output: Path, *more: str, model: Path | None = None) -> list[str]:
    given = ["--data", pictures / "train.jsonl", "--output", output, "--device", "cpu", "--log-every", "1"]
    given += ["--model", model] if model else []
    return [str(o) for o in (*given, *more)]


# All that a killed run must come out of with the same bits: dropout, exploration, alpha, epochs, a schedule.
EVERYTHING = (
    *(
        "--max-steps",
        "5",
        "--batch",
        "2",
        "--accumulate",
        "2",
        "--save-every",
        "2",
        "--learning-rate",
        "1e-2",
    ),
    *(
        "--trains",
        "all-but-tower",
        "--fine-learning-rate",
        "2e-2",
        "--selector",
        "top_k",
        "--fraction",
        "0.3",
    ),
    *("--exploration", "0.5", "--selection-loss", "0.1", "--alpha-warmup", "2", "--seed", "3", "--keep", "2"),
)


def test_dry_run(tmp_path):
    """As a user types it first, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train.py"), "--max-steps", "2", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "warning"},  # else no bar
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a step: " in done.stdout and "memory on each device: at least" in done.stdout
    assert re.search(r"loss \d+\.\d+, \d+\.\d% of regions selected", done.stdout)
    assert "Traceback" not in done.stderr and "2/2" in done.stderr
    model = flexcore.from_pretrained(tmp_path / "outputs" / "train" / "model")
    assert flexcore.is_wrapped(model) and model.flex_config.selector == "threshold"


@pytest.fixture(scope="module")
def whole(example, plain, pictures, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole")
    assert example.main(options(pictures, output, *EVERYTHING, model=plain)) == 0
    return load_file(output / "model" / "model.safetensors")


def killed(where: str, step: int, given: list[str]) -> None:
    command = [sys.executable, "-W", "ignore", str(KILLED), where, str(step), *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def check_resumed(example, given: list[str], output: Path, whole: dict[str, torch.Tensor]) -> None:
    assert example.main(given) == 0
    found = load_file(output / "model" / "model.safetensors")
    assert set(found) == set(whole) and all(torch.equal(found[n], whole[n]) for n in whole)
    assert not (output / "model.part").exists()


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_with_the_same_bits(
    example, plain, pictures, whole, tmp_path, capsys
):
    given = options(pictures, tmp_path, *EVERYTHING, model=plain)
    killed("optimizer", 4, given)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    check_resumed(example, given, tmp_path, whole)
    out = capsys.readouterr().out
    assert (
        "checkpoint-4 was not finished: deleted" in out
        and f"going on from {tmp_path / 'checkpoint-2'}" in out
    )
    # the control: another seed's run isn't the same
    start = load_file(plain / "model.safetensors")
    assert any(not torch.equal(start[n], whole[n]) for n in start)


@pytest.mark.slow
@pytest.mark.parametrize(
    "where, step",
    [
        *(("training", step) for step in range(5)),
        *((place, 4) for place in ("weights", "random numbers", "state", "rotation")),
        ("state", 2),
        ("rotation", 5),
        ("weights", 5),
        ("model", 5),
    ],
)
def test_a_run_killed_at_any_moment_goes_on_with_the_same_bits(
    example, plain, pictures, whole, tmp_path, where, step
):
    given = options(pictures, tmp_path, *EVERYTHING, model=plain)
    killed(where, step, given)
    check_resumed(example, given, tmp_path, whole)


def log(output: Path, name: str = "loss") -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def test_two_processes_give_the_loss_of_one(example, checkpoint, pictures, tmp_path):
    """Batches of one in two processes, one of which has a text without a picture, against batches of two."""
    more = ["--max-steps", "3", "--trains", "all", "--learning-rate", "1e-3", "--selector", "top_k"]
    more += ["--eval", str(pictures / "held.jsonl"), "--save-every", "3"]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    given = options(pictures, tmp_path / "two", *more, "--batch", "1", model=checkpoint)
    script = str(ROOT / "examples" / "train.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, script, *given], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("cost model (") == 1  # one process speaks
    assert example.main(options(pictures, tmp_path / "one", *more, "--batch", "2", model=checkpoint)) == 0
    losses = log(tmp_path / "one")
    assert log(tmp_path / "two") == pytest.approx(losses, abs=1e-4) and len(losses) == 3
    assert log(tmp_path / "two", "eval_loss") == pytest.approx(log(tmp_path / "one", "eval_loss"), abs=1e-4)
    one, two = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("one", "two"))
    start = load_file(checkpoint / "model.safetensors")
    # Adam makes much of gradients that are nothing but rounding
    apart = sum(float((one[n] - two[n]).square().sum()) for n in start)
    moved = sum(float((one[n] - start[n]).square().sum()) for n in start)
    assert moved > 0.01 and apart < 1e-3 * moved


@pytest.mark.parametrize("more", [["--bf16"], ["--lora", "4"]], ids=["bf16", "lora"])
def test_checkpointing_and_half_precision(example, checkpoint, pictures, tmp_path, capsys, more):
    settings = ["--gradient-checkpointing", "--zoom", "2", "--workers", "1"]
    settings += ["--learning-rate", "1e-2", "--max-steps", "3"]
    given = options(pictures, tmp_path / "out", *settings, *more, model=checkpoint)
    assert example.main(given) == 0
    assert all(np.isfinite(log(tmp_path / "out")))
    model = flexcore.from_pretrained(tmp_path / "out" / "model")
    start = load_file(checkpoint / "model.safetensors")
    found = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.float32} and flexcore.is_wrapped(model)
    changed = {n for n in start if not torch.equal(start[n], found[n])}
    assert bool(changed) == ("--lora" in more)  # merged into the decoder, nowhere else
    assert all("language_model.model.layers" in n and n.endswith("proj.weight") for n in changed)
    untrained = flexcore.wrap(tiny_llava(layers=4)[0]).flex_fine.state_dict()
    assert all(not torch.equal(found[f"flex_fine.{name}"], t) for name, t in untrained.items())


@pytest.mark.slow
def test_lora_resumes_with_the_same_bits(example, plain, pictures, tmp_path):
    more = [
        "--max-steps",
        "4",
        "--save-every",
        "2",
        "--lora",
        "4",
        "--learning-rate",
        "1e-2",
        "--alpha-warmup",
        "0",
    ]
    assert example.main(options(pictures, tmp_path / "whole", *more, model=plain)) == 0
    given = options(pictures, tmp_path / "killed", *more, model=plain)
    killed("optimizer", 4, given)
    whole = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    check_resumed(example, given, tmp_path / "killed", whole)


def test_accuracy_and_selected_share_are_logged(example, checkpoint, pictures, tmp_path, capsys):
    more = [
        "--eval",
        str(pictures / "held.jsonl"),
        "--max-steps",
        "80",
        "--save-every",
        "80",
        "--trains",
        "all",
    ]
    more += [
        "--learning-rate",
        "5e-3",
        "--selector",
        "top_k",
        "--fraction",
        "0.25",
        "--zoom",
        "2",
        "--batch",
        "2",
    ]
    data = ["--data", str(pictures / "held.jsonl"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert example.main([*data, "--model", str(checkpoint), *more]) == 0
    out = capsys.readouterr().out
    # two questions are learnt by heart; a quarter of four regions is one
    assert "evaluation: loss" in out and "100.0% of answers and 100.0% of their tokens right" in out
    assert "25.0% of regions selected" in out


def test_a_time_limit_stops_with_a_model_and_the_same_command_goes_on(
    example, checkpoint, pictures, tmp_path, capsys
):
    given = options(
        pictures, tmp_path, "--max-steps", "4", "--trains", "fine-and-projector", model=checkpoint
    )
    given += ["--learning-rate", "1e-2"]
    start = load_file(checkpoint / "model.safetensors")
    for step in (1, 2):
        assert example.main([*given, "--max-minutes", "1e-6"]) == 0
        assert len(log(tmp_path)) == step
        assert (tmp_path / f"checkpoint-{step}").is_dir()
    assert f"going on from {tmp_path / 'checkpoint-1'}" in capsys.readouterr().out
    found = load_file(tmp_path / "model" / "model.safetensors")
    changed = {n for n in start if not torch.equal(start[n], found[n])}
    assert changed and all("multi_modal_projector" in n for n in changed)
    assert example.main(given) == 0  # without a limit to the end
    assert len(log(tmp_path)) == 4


def test_the_cost_is_that_of_the_pictures_that_the_tower_gets(
    example, checkpoint, pictures, tmp_path, monkeypatch
):
    asked = []

    def measured(*args, **kwargs):
        asked.append(kwargs["side"])
        raise ValueError("enough")

    monkeypatch.setattr(example, "measure", measured)
    given = options(pictures, tmp_path, "--max-steps", "1", model=checkpoint)
    assert example.main(given) == 0 and asked == [48]


def test_bad_data_is_reported_with_its_line_and_left_out(example, checkpoint, pictures, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    good = (pictures / "0.png").read_bytes()
    (folder / "good.png").write_bytes(good)
    (folder / "half.png").write_bytes(good[: len(good) // 2])
    (folder / "none.png").write_bytes(b"no picture")
    wrong = {
        1: "{",
        2: json.dumps({"image": "good.png", "question": "What?"}),
        3: json.dumps({"image": "away.png", "question": "What?", "answer": "A"}),
        4: json.dumps({"image": "none.png", "question": "What?", "answer": "A"}),
        5: json.dumps({"image": "good.png", "question": "What? " * 400, "answer": "A"}),
        6: json.dumps([1]),
        7: json.dumps({"image": "good.png", "conversations": [{"from": "gpt", "value": "A"}]}),
    }
    right = [
        json.dumps({"image": name, "question": "What?", "answer": "A"}) for name in ("half.png", "good.png")
    ]
    (folder / "data.jsonl").write_text("\n".join([*wrong.values(), *right]) + "\n")
    given = ["--data", str(folder / "data.jsonl"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    given += ["--model", str(checkpoint), "--max-steps", "2", "--max-length", "400"]
    assert example.main(given) == 0
    out, error = capsys.readouterr()
    assert "data.jsonl: 2 usable examples, 7 left out" in out
    for line in wrong:
        assert f"left out: data.jsonl:{line}: " in error
    assert "data.jsonl:5: 2,5" in error and "max_length is 400" in error
    # its header was good: found out when it was loaded, and another took its place
    assert error.count("left out: data.jsonl:8: ") == 1 and "1 examples turned out to be unusable" in out

    (folder / "data.jsonl").write_text("\n".join(wrong.values()))
    given[3] = str(tmp_path / "other")
    assert example.main(given) == 2
    assert "holds nothing that can be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--max-minutes", "0"], "--max-minutes must be more than 0, got 0"),
        (["--bf16", "--fp16"], "take one of them"),
        (["--lora", "4", "--trains", "all"], "--lora trains beside the fine projections"),
        (["--threshold", "256"], "threshold must be an integer in [0, 255], got 256"),
        (["--data", "nowhere.jsonl"], "there is none at nowhere.jsonl"),
        (["--model", "/nowhere/llava"], "/nowhere/llava can't be trained"),
        (["--deepspeed", "nowhere.json"], "there is no file nowhere.json"),
        (["--machine", "toaster"], "machine must be one of"),
        (["--exploration", "2"], "anneal must be in [0, 1], got 2"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors_are_one_line(example, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert example.main(["--device", "cpu", "--max-steps", "1", *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_another_run_in_the_same_folder_is_refused(example, tmp_path, capsys):
    given = ["--max-steps", "1", "--output", str(tmp_path), "--device", "cpu"]
    assert example.main(given) == 0
    assert example.main([*given, "--learning-rate", "1"]) == 2
    assert "learning_rate (2e-05, now 1.0)" in capsys.readouterr().err
    # what is done stays done
    assert example.main(given) == 0
