"""Two processes with gloo, one of them without media: losses, gradients and training as in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .distributed_runs import inputs, model_to_train
from .helpers import Sample, batch, generate
from .training_runs import trainer

ROOT = Path(__file__).resolve().parents[2]


def launch(mode: str, folder: Path) -> list[dict]:
    """Run a mode of `distributed_runs` in two processes and return what each of them saved."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.hf.distributed_runs", mode, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{mode}*.pt"))]


def check(found: list[dict]) -> None:
    """Loss and gradients of both processes against the same two batches in this one."""
    model = model_to_train().train()
    losses = [model(**inputs(rank), use_cache=False).loss for rank in range(2)]
    assert not losses[1].requires_grad  # alone, the batch without media would train nothing
    (sum(losses) / 2).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(found) == 2
    for own in found:
        assert float(own["loss"]) == pytest.approx(float(sum(losses).detach()) / 2, abs=1e-5)
        assert set(own["grads"]) == set(expected)
        for name, grad in expected.items():
            assert float((own["grads"][name] - grad).abs().max()) < 1e-5
            assert float(grad.abs().max()) > 1e-3


def test_ddp_equals_one_process(tmp_path):
    check(launch("ddp", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp2", "fsdp2-checkpointing"])
def test_fsdp2_equals_one_process(mode, tmp_path):
    found = launch(mode, tmp_path)
    check(found)
    if mode == "fsdp2":
        model = model_to_train()
        for rank, own in enumerate(found):
            assert torch.equal(own["generated"], generate(model, batch("llama", [Sample(seed=rank)])))


@pytest.mark.slow
def test_a_trainer_in_two_processes_trains_as_in_one(tmp_path):
    settings = {"warmup": True, "max_steps": 3}
    (found,) = launch("trainer", tmp_path)
    alone = trainer(tmp_path, per_device_train_batch_size=2, **settings)
    alone.train()
    for name, parameter in alone.model.named_parameters():
        assert float((found[name] - parameter).abs().max()) < 1e-4
