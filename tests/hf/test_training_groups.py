"""What trains, the optimizer's groups, and what a training is judged by."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

import flexcore
from flexcore.errors import WrapStateError
from flexcore.exploration import ExploringSelector
from flexcore.hf.tiny import tiny_llama, tiny_llava
from flexcore.hf.training import Exploration
from flexcore.hf.training_groups import (
    lora,
    media_parameters,
    parameter_groups,
    projector_parameters,
    tower_parameters,
    train_only,
)
from flexcore.hf.training_metrics import SelectedShare, right_tokens

from .helpers import batch, forward, wrapped
from .training_runs import SAMPLES, trainer


@pytest.fixture
def llava():
    return flexcore.wrap(tiny_llava(layers=4)[0])


def names(model, parameters) -> set[str]:
    ids = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def test_parts_of_a_model(llava):
    every = {name for name, _ in llava.named_parameters()}
    tower = {name for name in every if ".vision_tower." in name}
    projector = {name for name in every if ".multi_modal_projector." in name}
    assert tower and projector
    assert names(llava, tower_parameters(llava)) == tower
    assert names(llava, projector_parameters(llava)) == projector
    assert names(llava, media_parameters(llava)) == tower | projector
    assert media_parameters(wrapped("llama")) == []
    calls = (media_parameters, tower_parameters, projector_parameters)
    for call in (*calls, lambda m: train_only(m, "all"), lambda m: lora(m, 4)):
        with pytest.raises(WrapStateError):
            call(tiny_llama())


@pytest.mark.parametrize("what", ["fine", "fine-and-projector", "all-but-tower", "all"])
def test_train_only(llava, what):
    every = {name for name, _ in llava.named_parameters()}
    expected = {
        "fine": {n for n in every if n.startswith("flex_fine")},
        "fine-and-projector": {
            n for n in every if n.startswith("flex_fine") or ".multi_modal_projector." in n
        },
        "all-but-tower": {n for n in every if ".vision_tower." not in n},
        "all": every,
    }[what]
    assert set(train_only(llava, what)) == expected
    assert {n for n, p in llava.named_parameters() if p.requires_grad} == expected
    with pytest.raises(
        ValueError, match="what must be one of fine, fine-and-projector, all-but-tower, all, got"
    ):
        train_only(llava, "none")


def test_groups(llava):
    train_only(llava, "all-but-tower")
    groups = parameter_groups(llava, 1e-3, 5e-3, 0.1)
    found = {(g["lr"], g["weight_decay"]): names(llava, g["params"]) for g in groups}
    trained = {n for n, p in llava.named_parameters() if p.requires_grad}
    fine = {n for n in trained if n.startswith("flex_fine")}
    plain = {n for n in trained if n.endswith("bias") or "norm" in n}
    assert found == {(5e-3, 0.1): fine, (1e-3, 0.1): trained - fine - plain, (1e-3, 0.0): plain}
    assert sum(len(g["params"]) for g in groups) == len(trained)
    assert {g["lr"] for g in parameter_groups(llava, 1e-3)} == {1e-3}
    with pytest.raises(ValueError, match="fine_learning_rate must be at least 0, got -1"):
        parameter_groups(llava, 1e-3, -1)
    with pytest.raises(ValueError, match="must have parameters that train"):
        parameter_groups(llava.requires_grad_(False), 1e-3)


def test_lora_reaches_the_decoder_and_keeps_the_fine_projections_whole(llava):
    pytest.importorskip("peft", reason="peft isn't installed")
    made = lora(llava, 4)
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    fine = {n for n in trained if "flex_fine" in n}
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert all(".modules_to_save." in n and "lora" not in n for n in fine)
    assert len(fine) == 2 * len(llava.flex_config.layers)
    rest = set(trained) - fine
    assert len(rest) == 2 * 4 * len(linear)
    assert all("lora_" in n and ".language_model." in n and n.split(".")[-4] in linear for n in rest)
    groups = parameter_groups(made, 1e-3, 5e-3)
    assert {g["lr"]: names(made, g["params"]) for g in groups} == {5e-3: fine, 1e-3: rest}
    with pytest.raises(ValueError, match="rank must be at least 1"):
        lora(llava, 0)


def test_an_optimizer_of_a_trainer_uses_the_groups(tmp_path):
    from transformers import Trainer

    model = wrapped("llama", layers=4)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=1e-3, report_to=[])
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    groups = parameter_groups(model, 1e-3, 5e-3)
    run = Trainer(model, arguments, optimizer_cls_and_kwargs=(cls, {**options, "params": groups}))
    made = run.create_optimizer()
    found = {
        g["lr"]: len(g["params"]) for g in made.param_groups if g["weight_decay"] == 0 and g["lr"] == 5e-3
    }
    assert found == {5e-3: 2 * len(model.flex_config.layers)} and type(made) is cls


# ---------------------------------------------------------------------- metrics


def test_right_tokens():
    labels = torch.tensor([[-100, -100, 3, 1], [-100, 2, 2, -100]])
    said = torch.tensor([[0, 3, 1, 0], [2, 0, 2, 0]])
    logits = torch.nn.functional.one_hot(said, 5).float()
    assert right_tokens((logits, None), labels).tolist() == [[2, 2], [1, 2]]
    share = SelectedShare(wrapped("llama"))
    found = share.metrics(SimpleNamespace(predictions=right_tokens(logits, labels).numpy()))
    assert found == {"answers": 0.5, "tokens": 0.75}


def test_the_selected_share_is_what_the_trace_says():
    model = wrapped("llama", selector="threshold", threshold=120)
    before = model._flex_binding.selector
    share = SelectedShare(model)
    inputs = batch("llama", SAMPLES[:2])
    with flexcore.trace(model) as trace:
        forward(model, inputs)
    chosen = sum(int(r.regions.sum()) for r in trace.where(level=1))
    able = 0
    for r in trace.where(level=1):
        able += int(inputs["flex_streams"].samples[r.sample][r.medium].selectable.sum())
    assert 0 < chosen < able
    # what is chosen and can't be read (margins) counts in neither
    assert share.counter.take(training=False) == pytest.approx(chosen / able)
    assert share.counter.take(training=False) is None and share.counter.take(training=True) is None
    share.close()
    assert model._flex_binding.selector is before


def test_it_gets_along_with_exploration(tmp_path):
    model = wrapped("llama", layers=4, fraction=0.2)
    before = model._flex_binding.selector
    share = SelectedShare(model)
    run = trainer(tmp_path, model, callbacks=[share, Exploration(1.0, 1.0)], max_steps=2)
    run.train()
    assert not isinstance(model._flex_binding.selector, ExploringSelector)
    logged = [e["selected"] for e in run.state.log_history if "selected" in e]
    # the selector's own fifth, rounded up, and not the whole that was explored
    assert len(logged) == 2 and all(0.15 < s < 0.4 for s in logged)
    share.close()
    assert model._flex_binding.selector is before
    with pytest.raises(WrapStateError):
        SelectedShare(tiny_llama())
