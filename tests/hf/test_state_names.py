"""load_state_dict takes a checkpoint's names: Trainer resumes by it, and doesn't translate."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import flexcore
from flexcore.errors import WeightsMismatchError
from flexcore.hf.state_names import own_names

from .helpers import KINDS, make, wrapped


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    """Two models with nothing in common, and what the first saved."""
    first, second = wrapped(request.param, seed=0), wrapped(request.param, seed=1)
    first.save_pretrained(tmp_path)
    return first, second, load_file(tmp_path / "model.safetensors")


def test_what_save_pretrained_wrote_is_loaded_whole(pair):
    first, second, saved = pair
    result = second.load_state_dict(saved, strict=False)
    assert not result.unexpected_keys
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


def test_the_plain_class_loads_none_of_llavas(tmp_path):
    # the trap: should it be gone, this file isn't needed any more
    make("llava").save_pretrained(tmp_path)
    other = make("llava", seed=1)
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    decoder = {name for name in before if ".language_model." in name and before[name].std() > 0}
    assert decoder and all(torch.equal(before[name], other.state_dict()[name]) for name in decoder)


def test_own_names_pass_as_they_are(pair):
    first, second, _ = pair
    state = first.state_dict()
    assert own_names(second, state) is state
    second.load_state_dict(state)
    assert all(torch.equal(weight, second.state_dict()[name]) for name, weight in state.items())


def test_names_that_nothing_has_are_told(pair):
    _, second, saved = pair
    result = second.load_state_dict({**saved, "somewhere.else": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["somewhere.else"]
    with pytest.raises(RuntimeError, match=r"somewhere\.else"):
        second.load_state_dict({"somewhere.else": torch.zeros(1)})


def test_a_trainer_resumes_from_the_weights_that_were_saved(tmp_path):
    from transformers import Trainer, TrainingArguments

    def trainer(seed):
        settings = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            save_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=0.0,
        )
        data = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}]
        return Trainer(wrapped("llava", seed=seed), settings, train_dataset=data)

    run = trainer(0)
    run.train()
    again = trainer(1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_weights_in_another_form_are_refused():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config)
    flexcore.wrap(model, flexcore.FlexConfig(first_layer=1))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(WeightsMismatchError, match=r"flexcore\.from_pretrained"):
        model.load_state_dict(
            {"model.layers.0.block_sparse_moe.experts.0.w1.weight": torch.zeros(16, 32)}, strict=False
        )
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in before.items())
