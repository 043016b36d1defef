"""share_kv_projections: fine tokens through the layer's own K/V projections."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import flexcore
from flexcore.hf.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from flexcore.hf.kv_cache import cache_argument

from .helpers import KINDS, Sample, batch, forward, generate, make, perturb, wrapped

FLEX = {"first_layer": 1, "selector": "top_k", "fraction": 0.2}


def pair(kind: str, **flex):
    """A model that shares, and one with unperturbed copies."""
    shares = flexcore.wrap(make(kind), flexcore.FlexConfig(share_kv_projections=True, **FLEX, **flex))
    return shares, flexcore.wrap(make(kind), flexcore.FlexConfig(**FLEX, **flex))


@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normed"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_copies_that_nobody_has_trained(kind, norm):
    shares, copies = pair(kind, fine_norm=norm)
    inputs = batch(kind, [Sample(), Sample(before=7, seed=1)])
    assert torch.equal(forward(shares, inputs), forward(copies, inputs))
    assert torch.equal(generate(shares, inputs), generate(copies, inputs))
    perturb(copies)
    assert (forward(shares, inputs) - forward(copies, inputs)).abs().max() > 1e-3
    assert not list(shares.flex_fine.parameters())
    assert {n for n, _ in shares.named_parameters()} == {n for n, _ in make(kind).named_parameters()}


def test_gradients_reach_the_layers_own_projections():
    shares, copies = pair("llama")
    inputs = batch("llama", [Sample()])
    for model in (shares, copies):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for layer in shares.flex_config.layers:
        for name in ("k_proj", "v_proj"):
            own = copies.model.layers[layer].self_attn.get_submodule(name).weight.grad
            fine = copies.flex_fine[str(layer)].get_submodule(name).weight.grad
            found = shares.model.layers[layer].self_attn.get_submodule(name).weight.grad
            assert fine.abs().max() > 1e-6
            torch.testing.assert_close(found, own + fine, rtol=1e-4, atol=1e-7)


def test_a_step_on_the_layers_own_weights_reaches_cached_fine_keys():
    shares, _ = pair("llama")
    inputs = batch("llama", [Sample()])
    with torch.no_grad():
        out = shares(**inputs, use_cache=True)
        shares.model.layers[3].self_attn.v_proj.weight.mul_(1.5)
        token = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], dim=1)
        request = out.past_key_values._flexcore_request
        stale = request.weights
        shares(input_ids=token, attention_mask=mask, **cache_argument(shares, out.past_key_values))
    assert request.weights != stale


def test_saving_and_loading(tmp_path):
    shares, copies = pair("llama", fine_norm=True)
    inputs = batch("llama", [Sample()])
    expected = forward(shares, inputs)
    shares.save_adapter_weights(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / WEIGHTS_NAME) == {}
    assert "no weights of their own" in (tmp_path / "adapter" / "README.md").read_text()
    shares.load_adapter_weights(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"share_kv_projections must match: True .saved. and False .model."):
        copies.load_adapter_weights(tmp_path / "adapter")
    shares.save_pretrained(tmp_path / "whole")
    meta = json.loads((tmp_path / "whole" / CONFIG_NAME).read_text())
    assert meta["config"]["share_kv_projections"] is True
    assert torch.equal(forward(flexcore.from_pretrained(tmp_path / "whole"), inputs), expected)
    copies.save_pretrained(tmp_path / "copies")
    other = flexcore.from_pretrained(tmp_path / "copies", config=shares.flex_config)
    assert torch.equal(forward(other, inputs), expected)


def test_unwrapping_leaves_nothing():
    shares, _ = pair("llava")
    before = forward(
        make("llava"), {k: v for k, v in batch("llava", [Sample()]).items() if k != "flex_streams"}
    )
    flexcore.unwrap(shares)
    inputs = {k: v for k, v in batch("llava", [Sample()]).items() if k != "flex_streams"}
    assert torch.equal(forward(shares, inputs), before)


def test_the_field_is_validated_and_kept():
    with pytest.raises(ValueError, match="share_kv_projections must be a bool, got 1"):
        flexcore.FlexConfig(share_kv_projections=1)
    config = flexcore.FlexConfig(share_kv_projections=True)
    assert flexcore.FlexConfig.from_json(config.to_json()) == config
    assert wrapped("llama").flex_config.share_kv_projections is False
