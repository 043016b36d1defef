"""`transformers.Trainer` on a wrapped model, gradient checkpointing in both kinds, and resuming after a kill."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flexcore
from flexcore.hf.training import AlphaWarmup, FlexCollator, LiveAlpha, freeze_base

from .helpers import batch, forward, plain, twin, wrapped
from .test_training import MIXED, gradients, training_inputs
from .training_runs import SAMPLES, Questions, resumable, trainer

ROOT = Path(__file__).resolve().parents[2]


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def fine_weights(run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.model.flex_fine.parameters()]


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("plain"))
    before = twin(run.model)
    run.train()
    return before, run


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_a_trainer_trains_the_fine_projections_only(kind, tmp_path):
    run = trainer(tmp_path, kind=kind, max_steps=4)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.train()
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.startswith("flex_fine")}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing_in_a_trainer_changes_nothing(reference, reentrant, tmp_path):
    settings = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    run = trainer(tmp_path, gradient_checkpointing=True, **settings)
    run.train()
    assert losses(run) == losses(reference[1]) and equal(fine_weights(run), fine_weights(reference[1]))


def test_bfloat16_autocast(reference, tmp_path):
    run = trainer(tmp_path, bf16=True)
    run.train()
    assert losses(run) == pytest.approx(losses(reference[1]), rel=0.05) and losses(run) != losses(
        reference[1]
    )
    assert {p.dtype for p in run.model.flex_fine.parameters()} == {torch.float32}


def test_gradient_accumulation_equals_a_larger_batch(tmp_path):
    runs = [
        trainer(tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        for size, steps in ((4, 1), (2, 2))
    ]
    for run in runs:
        run.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5)
    for a, b in zip(*(fine_weights(run) for run in runs), strict=True):
        assert float((a - b).abs().max()) < 1e-4


def test_alpha_follows_the_step_also_with_worker_processes(reference, tmp_path):
    runs = [
        trainer(tmp_path, warmup=True, dataloader_num_workers=workers, dataloader_prefetch_factor=ahead)
        for workers, ahead in ((0, None), (2, 2))
    ]
    for run in runs:
        run.train()
    assert losses(runs[0]) == losses(runs[1]) and equal(*(fine_weights(run) for run in runs))
    assert losses(runs[0])[0] != losses(reference[1])[0]
    # the first step is at epoch 0: alpha is 0, and so are the gradients
    assert runs[0].state.log_history[0]["grad_norm"] == 0.0 < runs[0].state.log_history[1]["grad_norm"]


def test_evaluation_reads_with_full_alpha_and_returns_logits(tmp_path):
    questions = Questions()
    run = trainer(tmp_path, warmup=True, eval=questions, eval_strategy="steps", eval_steps=1, max_steps=1)
    untrained = twin(run.model)
    run.train()
    # alpha is 0 in the first step, so it trained nothing; the evaluation after it reads with 1
    found = next(e["eval_loss"] for e in run.state.log_history if "eval_loss" in e)
    expected = FlexCollator(pad_token_id=0)([questions[i] for i in range(len(questions))])
    with torch.no_grad():
        assert found == pytest.approx(float(untrained(**expected).loss), abs=1e-5)
        assert abs(found - float(untrained(**plain(expected)).loss)) > 1e-3
    out = run.predict(questions)
    assert torch.allclose(torch.tensor(out.predictions), forward(untrained, expected), atol=5e-5)


def test_resuming_after_a_kill_is_bit_equal_to_not_having_been_killed(tmp_path):
    whole = resumable(tmp_path / "whole")
    folder = tmp_path / "killed"
    command = [sys.executable, "-W", "ignore", "-m", "tests.hf.training_runs", str(folder), "3"]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert [p.name for p in folder.iterdir()] == ["checkpoint-2"]
    resumed = resumable(folder, resume=True)
    assert set(resumed) == set(whole) and any(n.startswith("flex_fine") for n in whole)
    assert all(torch.equal(resumed[n], whole[n]) for n in whole)


# ---------------------------------------------------------------------- reentrant checkpointing


def checkpointed(model, reentrant: bool = True):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_reentrant_checkpointing_gives_the_same_gradients(kind, frozen):
    model, inputs = wrapped(kind).train(), training_inputs(kind)
    if frozen:
        freeze_base(model)
    expected = gradients(model, inputs, use_cache=False)
    found = gradients(checkpointed(model), inputs, use_cache=False)
    assert set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in expected)
    fine = [n for n in found if n.startswith("flex_fine")]
    assert len(fine) == len(list(model.flex_fine.parameters()))


def projected(inputs: dict, projector) -> dict:
    """The same media with their features behind a trainable projector."""
    samples = tuple(
        tuple(
            flexcore.FineStream(
                s.grid,
                s.coarse_positions,
                None,
                flexcore.TensorSource(projector(s.source.tensor), s.grid),
            )
            for s in sample
        )
        for sample in inputs["flex_streams"].samples
    )
    return {**inputs, "flex_streams": flexcore.StreamBatch(samples)}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_a_projector_in_front_of_the_fine_features_trains_or_is_refused():
    found = []
    for reentrant in (None, False):
        torch.manual_seed(0)
        projector, model = torch.nn.Linear(64, 64), wrapped("llama").train()
        if reentrant is not None:
            checkpointed(model, reentrant)
        model(**projected(training_inputs("llama"), projector), use_cache=False).loss.backward()
        found.append(projector.weight.grad)
    assert torch.equal(*found) and float(found[0].abs().max()) > 0
    model = checkpointed(wrapped("llama").train())
    with pytest.raises(ValueError, match=r"use_reentrant must be False .* got True"):
        model(**projected(training_inputs("llama"), projector), use_cache=False)
    # leaf features have no graph behind them that a layer could free for the others
    leaf = torch.nn.Parameter(torch.randn(MIXED[0].grids[0].n_fine, 64))
    inputs = projected(training_inputs("llama", MIXED[:1]), lambda x: leaf)
    grads = []
    for m in (wrapped("llama").train(), model):
        leaf.grad = None
        m(**inputs, use_cache=False).loss.backward()
        grads.append(leaf.grad.clone())
    assert torch.allclose(*grads, atol=1e-6) and float(grads[0].abs().max()) > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_fine_gradients_are_never_lost_in_silence():
    model = checkpointed(wrapped("llama").train())
    freeze_base(model)
    model.lm_head.weight.requires_grad_(True)  # the loss has a gradient without any of ours
    model.disable_input_require_grads()
    with pytest.raises(ValueError, match="enable_input_require_grads"):
        model(**training_inputs("llama"), use_cache=False)
    with torch.no_grad():
        model(**training_inputs("llama"), use_cache=False)


# ---------------------------------------------------------------------- the parts


def test_freeze_base_names_what_trains():
    model = wrapped("llama")
    names = freeze_base(model)
    assert names == [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(n.startswith("flex_fine.") for n in names)
    with pytest.raises(ValueError, match="isn't wrapped"):
        freeze_base(flexcore.unwrap(model))


def test_a_collator_joins_what_an_adapter_makes():
    questions = Questions()
    whole = batch("llama", SAMPLES, side="right")
    found = FlexCollator(pad_token_id=0)([questions[i] for i in range(len(questions))])
    assert torch.equal(found["input_ids"], whole["input_ids"]) and "alpha" not in found
    model = wrapped("llama")
    labels = found.pop("labels")
    assert labels.shape == whole["input_ids"].shape
    assert torch.equal(forward(model, dict(found)), forward(model, whole))
    left = FlexCollator(pad_token_id=0, padding_side="left")([questions[i] for i in range(3)])
    assert torch.equal(left["input_ids"], batch("llama", SAMPLES[:3])["input_ids"])


def test_streams_and_collators_travel_to_worker_processes():
    inputs = training_inputs("llama")
    again = pickle.loads(pickle.dumps(inputs["flex_streams"]))
    assert torch.equal(
        forward(wrapped("llama"), {**inputs, "flex_streams": again}), forward(wrapped("llama"), inputs)
    )
    assert pickle.loads(pickle.dumps(FlexCollator(pad_token_id=5))).pad_token_id == 5


def test_live_alpha_reaches_forward():
    model, inputs = wrapped("llama"), training_inputs("llama")
    alpha = LiveAlpha(0.5)
    assert torch.equal(forward(model, inputs, alpha=alpha), forward(model, inputs, alpha=0.5))
    alpha.set(1.0)
    assert torch.equal(forward(model, inputs, alpha=alpha), forward(model, inputs))
    assert alpha.reads == 2
    forward(model, plain(inputs), alpha=alpha)  # a batch without media reads it too
    assert alpha.reads == 3


def test_a_warm_up_that_reaches_nothing_is_an_error(tmp_path):
    run = trainer(tmp_path, callbacks=[AlphaWarmup()])
    with pytest.raises(ValueError, match="alpha must be in the batches"):
        run.train()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FlexCollator(padding_side="middle"),
            "padding_side must be one of right, left, got 'middle'",
        ),
        (lambda: FlexCollator(alpha=0.5), "alpha must be an AlphaWarmup, got float"),
        (lambda: AlphaWarmup(rate=-1.0), "rate must be at least 0, got -1.0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
