"""Which checkpoints are whole, file by file."""

from __future__ import annotations

import json
import shutil

import pytest

from flexcore.hf.checkpoints import drop_unfinished, fault, last_checkpoint

from .training_runs import trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, max_steps=3, save_strategy="steps", save_steps=1).train()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def test_the_last_of_a_run(run):
    assert last_checkpoint(run) == run / "checkpoint-3" and drop_unfinished(run) == []
    shutil.rmtree(run / "checkpoint-3")
    assert last_checkpoint(run) == run / "checkpoint-2"
    assert last_checkpoint(run / "nowhere") is None and drop_unfinished(run / "nowhere") == []
    # of two processes one has left no random numbers
    assert last_checkpoint(run, processes=2) is None


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("how", ["gone", "empty", "half", "all but a byte"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_whole(run, name, how):
    path = run / "checkpoint-3" / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: {"empty": 0, "half": len(content) // 2}.get(how, len(content) - 1)])
    why = fault(run / "checkpoint-3")
    if how == "all but a byte" and name == "trainer_state.json" and content.endswith(b"}\n"):
        assert why == ""  # only the line's end is missing
        return
    assert name.split(".")[0] in why or why in ("there are no weights", "the optimizer is missing")
    assert last_checkpoint(run) == run / "checkpoint-2"
    assert drop_unfinished(run) == [run / "checkpoint-3"] and not (run / "checkpoint-3").exists()
    assert fault(run / "checkpoint-2") == ""


def test_a_step_that_the_name_does_not_say(run):
    (run / "checkpoint-3").rename(run / "checkpoint-30")
    assert fault(run / "checkpoint-30") == "trainer_state.json is of step 3"
    assert last_checkpoint(run) == run / "checkpoint-2"


def test_shards(run):
    folder = run / "checkpoint-3"
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shutil.copy(folder / "model.safetensors", folder / shards[0])
    (folder / "model.safetensors").rename(folder / shards[1])
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    assert fault(folder) == ""
    (folder / shards[1]).unlink()
    assert fault(folder) == f"{shards[1]} is missing"
    index.write_text(index.read_text()[:20])
    assert fault(folder) == f"{index.name} is cut off"


def test_deepspeeds_layout(run):
    folder = run / "checkpoint-3"
    steps = folder / "global_step3"
    steps.mkdir()
    (folder / "optimizer.pt").rename(steps / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "scheduler.pt").unlink()
    assert fault(folder) == "DeepSpeed's latest is missing"
    (folder / "latest").write_text("global_step3")
    assert fault(folder) == ""
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert fault(folder, processes=2) == "a process' optimizer is missing"
