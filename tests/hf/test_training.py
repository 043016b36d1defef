"""Training without a Trainer: media, readout mask and alpha are arguments of forward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

import flexcore
from flexcore.hf.training import TimeLimit

from .helpers import GRID, WIDE, Sample, batch, forward, plain, twin, wrapped

MIXED = [Sample(after=8), Sample(grids=[GRID, WIDE], seed=1, after=7), Sample(grids=[], seed=2, after=6)]


def training_inputs(kind: str, samples=MIXED, answers: int = 4) -> dict:
    inputs = batch(kind, samples, side="right")
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, mask in enumerate(inputs["attention_mask"]):
        end = int(mask.sum())
        labels[row, end - answers : end] = inputs["input_ids"][row, end - answers : end]
    return {**inputs, "labels": labels}


def gradients(model, inputs: dict, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(**inputs, **kwargs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("reentrant", [False])
def test_gradient_checkpointing_gives_the_same_gradients(kind, reentrant):
    model, inputs = wrapped(kind).train(), training_inputs(kind)
    expected = gradients(model, inputs, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, inputs, use_cache=False)
    assert set(found) == set(expected)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    fine = [n for n in found if n.startswith("flex_fine")]
    assert len(fine) == len(list(model.flex_fine.parameters()))
    assert all(float(found[n].abs().max()) > 0 for n in fine)


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_labels_decide_the_rows_in_train_and_eval_mode(kind):
    inputs = training_inputs(kind)
    model = wrapped(kind)
    losses = [float(m(**inputs).loss.detach()) for m in (model.train(), model.eval())]
    assert losses[0] == losses[1]
    rows = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    rows[:, :-1] = inputs["labels"][:, 1:] != -100
    unlabelled = {k: v for k, v in inputs.items() if k != "labels"}
    assert torch.equal(forward(model, inputs), forward(model, unlabelled, readout_mask=rows))
    off = forward(model, plain(inputs))
    changed = (forward(model, inputs) != off).any(-1)
    for row, sample in enumerate(MIXED):
        if not sample.grids:
            assert not bool(changed[row].any())
            continue
        first = int(rows[row].nonzero()[0])
        assert not bool(changed[row, :first].any()) and bool(changed[row][rows[row]].all())


def test_alpha_blends_and_warms_up():
    model, inputs = wrapped("llama"), training_inputs("llama")
    config = model.flex_config
    assert [config.alpha(e) for e in (0, 0.04, 0.25)] == [0.0, pytest.approx(0.4), 1.0]
    base = twin(model)
    assert torch.equal(forward(model, inputs, alpha=0.0), forward(base, plain(inputs)))
    grads = gradients(model, inputs, alpha=0.0)
    assert all(float(grads[n].abs().max()) == 0 for n in grads if n.startswith("flex_fine"))
    half, full = forward(model, inputs, alpha=0.5), forward(model, inputs)
    assert float((half - full).abs().max()) > 1e-3
    learned = torch.tensor(0.5, requires_grad=True)
    model(**inputs, alpha=learned).loss.backward()
    assert learned.grad is not None and float(learned.grad.abs()) > 0
    assert float((forward(model, inputs, alpha=torch.tensor(0.5)) - half).abs().max()) < 1e-6


def test_a_plain_loop_learns_and_only_what_it_should():
    model = wrapped("llama").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("flex_fine"))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    inputs = training_inputs("llama")
    optimizer = torch.optim.AdamW(model.flex_fine.parameters(), lr=3e-2)
    losses = []
    for step in range(30):
        loss = model(**inputs, alpha=model.flex_config.alpha(step / 50)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_autocast_matches_float32_within_bfloat16():
    model, inputs = wrapped("llama").train(), training_inputs("llama")
    expected = gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, inputs)
    for name, grad in expected.items():
        if name.startswith("flex_fine"):
            cosine = torch.nn.functional.cosine_similarity(found[name].flatten(), grad.flatten(), dim=0)
            assert float(cosine) > 0.95


def test_text_rows_read_each_with_a_selection_of_its_own():
    model = wrapped("llama", readout="text", selector="threshold", threshold=150)
    inputs = batch("llama", [Sample(after=12)])
    with flexcore.trace(model) as trace:
        changed = (forward(model, inputs) != forward(twin(model), plain(inputs))).any(-1)[0]
    positions = inputs["flex_streams"].samples[0][0].coarse_positions
    length = inputs["input_ids"].shape[1]
    expected = torch.arange(length) > int(positions.max())
    assert torch.equal(changed, expected)
    picks = {tuple(r.regions.tolist()) for r in trace.where(layer=2)}
    assert len(trace.where(layer=2)) == int(expected.sum()) and len(picks) > 1


@pytest.mark.parametrize("readout", ["answer", "text"])
def test_no_attention_map_is_ever_made(readout):
    """Neither forward nor backward makes a tensor whose last two axes both reach the sequence's length."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.ndim >= 2:
                    seen.append(tuple(t.shape))
            return out

    grid = flexcore.Grid.blocks((32, 32), (96, 96), region=8, tile=32)
    inputs = batch("llama", [Sample(grids=[grid], after=1100)])
    inputs.pop("attention_mask")  # with padding, transformers itself makes an N x N mask
    length = inputs["input_ids"].shape[1]
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -600:] = inputs["input_ids"][:, -600:]
    model = wrapped("llama", readout=readout, layers=4, fraction=0.3).train()
    mask = torch.arange(length)[None] > length - 1000 if readout == "text" else None
    with Watch():
        model(**inputs, labels=labels, readout_mask=mask).loss.backward()
    assert max(s[-1] for s in seen) >= length > 2048
    square = {s for s in seen if s[-1] >= 1024 and s[-2] >= 1024 and 64 not in s[-2:] and 97 not in s[-2:]}
    assert not square
    wide = [s for s in seen if len(s) == 4 and s[-1] > 1024 and s[-2] > 1]
    assert wide and max(4 * torch.Size(s).numel() for s in wide) <= 64 << 20


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("selector", ["threshold", "all"])
def test_answer_rows_before_the_medium_read_nothing(reference, selector):
    flex = {"regions": "official", "positions": "official"} if reference else {}
    grid = flexcore.Grid.official(6, 18) if reference else GRID
    model = wrapped("llama", selector=selector, **flex)
    inputs = batch("llama", [Sample(before=6, grids=[grid])])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, 2:5] = inputs["input_ids"][:, 2:5]
    with flexcore.trace(model) as trace:
        found = forward(model, {**inputs, "labels": labels})
    assert torch.equal(found, forward(model, plain(inputs)))
    assert len(trace) > 0 and not any(bool(r.regions.any()) for r in trace)
    # the whole run before the medium, and one row after it: only that row reads
    labels[:, -1] = inputs["input_ids"][:, -1]
    changed = (forward(model, {**inputs, "labels": labels}) != found).any(-1)[0]
    assert changed.nonzero()[:, 0].tolist() == [len(changed) - 2, len(changed) - 1]
    grads = gradients(model.train(), {**inputs, "labels": labels})
    assert all(bool(g.isfinite().all()) for g in grads.values())


@pytest.mark.parametrize("together", [False, True])
def test_time_limit(monkeypatch, together):
    """At the first step that ends behind the limit; what several processes agree on is the first one's clock."""
    now = [100.0]
    monkeypatch.setattr("flexcore.hf.training.time.monotonic", lambda: now[0])
    arguments = SimpleNamespace(device=torch.device("cpu"))
    limit = TimeLimit(0.5)
    told = []
    if together:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(
            torch.distributed, "broadcast", lambda tensor, src: told.append((int(tensor), src))
        )
    limit.on_train_begin(arguments, None, None)
    for seconds, over in ((29.9, False), (30.0, True)):
        control = TrainerControl()
        now[0] = 100.0 + seconds
        limit.on_step_end(arguments, None, control)
        assert control.should_training_stop == control.should_save == over
    assert told == ([(0, 0), (1, 0)] if together else [])
    if together:  # another process' clock says that it is over, this one's doesn't
        monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: tensor.fill_(1))
        now[0], control = 100.0, TrainerControl()
        limit.on_step_end(arguments, None, control)
        assert control.should_training_stop
    with pytest.raises(ValueError, match="minutes must be a number > 0, got 0"):
        TimeLimit(0)
