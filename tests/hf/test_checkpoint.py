"""save_adapter_weights / load_adapter_weights: what is written, and what is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import flexcore
from flexcore.hf.checkpoint import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, read_adapter_config

from .helpers import Sample, batch, forward, make, wrapped


@pytest.fixture
def saved(tmp_path):
    model = wrapped("llama")
    model.save_adapter_weights(tmp_path)
    return model, tmp_path


def test_the_folder_holds_the_new_weights_a_card_and_nothing_else(saved):
    model, folder = saved
    assert {p.name for p in folder.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
    tensors = load_file(folder / WEIGHTS_NAME)
    assert set(tensors) == set(model.flex_fine.state_dict())
    meta = json.loads((folder / CONFIG_NAME).read_text())
    assert meta["flexcore_version"] == flexcore.__version__ and meta["format"] == 1
    config, _ = read_adapter_config(folder)
    assert config == model.flex_config


def test_functions_and_methods_are_the_same_door(saved, tmp_path):
    model, folder = saved
    other = flexcore.wrap(make("llama"), read_adapter_config(folder)[0])
    flexcore.load_adapter_weights(other, folder)
    flexcore.save_adapter_weights(other, tmp_path / "again")
    inputs = batch("llama", [Sample()])
    assert torch.equal(forward(other, inputs), forward(model, inputs))
    assert (tmp_path / "again" / WEIGHTS_NAME).is_file()


def test_a_bfloat16_model_keeps_its_dtype(saved):
    _, folder = saved
    other = flexcore.wrap(make("llama").to(torch.bfloat16), read_adapter_config(folder)[0])
    other.load_adapter_weights(folder)
    assert {p.dtype for p in other.flex_fine.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("other", "flex", "message"),
    [
        ({"kv_heads": 4}, {}, "num_key_value_heads 2 .saved. and 4 .model."),
        ({"hidden": 32, "heads": 4}, {}, "hidden_size 64 .saved. and 32 .model."),
        ({"layers": 7}, {}, "num_hidden_layers 6 .saved. and 7 .model."),
        (
            {},
            {"first_layer": 2},
            r"layers must match: saved for \[2, 3, 4, 5\], this model reads in \[3, 4, 5\]",
        ),
    ],
)
def test_another_architecture_is_named(saved, other, flex, message):
    _, folder = saved
    model = flexcore.wrap(make("llama", **other), flexcore.FlexConfig(**{"first_layer": 1, **flex}))
    before = {k: v.clone() for k, v in model.flex_fine.state_dict().items()}
    with pytest.raises(flexcore.WeightsMismatchError, match=message):
        model.load_adapter_weights(folder)
    assert all(torch.equal(v, before[k]) for k, v in model.flex_fine.state_dict().items())


def broken(folder, how):
    weights, config = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    tensors, meta = load_file(weights), json.loads(config.read_text())
    if how == "no config":
        config.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "config is no JSON":
        config.write_text("{")
    elif how == "config of another kind":
        config.write_text("{}")
    elif how == "newer format":
        config.write_text(json.dumps({**meta, "format": 2}))
    elif how == "unknown field":
        config.write_text(json.dumps({**meta, "config": {**meta["config"], "zest": 1}}))
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "a tensor missing":
        tensors.pop("3.k_proj.weight")
        save_file(tensors, weights)
    elif how == "a tensor too many":
        save_file({**tensors, "9.k_proj.weight": torch.zeros(1)}, weights)
    elif how == "another shape":
        save_file({**tensors, "3.k_proj.weight": torch.zeros(2, 3)}, weights)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("no config", FileNotFoundError, CONFIG_NAME),
        ("no weights", FileNotFoundError, WEIGHTS_NAME),
        ("config is no JSON", ValueError, "must be JSON"),
        ("config of another kind", ValueError, "fields are missing"),
        ("newer format", ValueError, "format must be 1, got 2"),
        ("unknown field", ValueError, "zest"),
        ("truncated weights", ValueError, "must be a safetensors file"),
        ("a tensor missing", ValueError, "missing .'3.k_proj.weight'."),
        ("a tensor too many", ValueError, "unexpected .'9.k_proj.weight'."),
        ("another shape", ValueError, r"3.k_proj.weight \[2, 3\] .saved. and \[32, 64\] .model."),
    ],
)
def test_a_broken_folder_changes_nothing(saved, how, error, message):
    _, folder = saved
    model = flexcore.wrap(make("llama"), flexcore.FlexConfig(first_layer=1))
    before = {k: v.clone() for k, v in model.flex_fine.state_dict().items()}
    broken(folder, how)
    with pytest.raises(error, match=message):
        model.load_adapter_weights(folder)
    assert all(torch.equal(v, before[k]) for k, v in model.flex_fine.state_dict().items())


def test_a_plain_model_has_nothing_to_save(tmp_path):
    with pytest.raises(flexcore.WrapStateError, match="isn't wrapped"):
        flexcore.save_adapter_weights(make("llama"), tmp_path)
