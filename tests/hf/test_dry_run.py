"""wrap() on model classes that nobody has seen: what a layer's attention does decides, not what it is called."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import (
    ALL_ATTENTION_FUNCTIONS,
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

import flexcore
from flexcore.hf.families import Sample, family

from .helpers import forward, make, perturb, plain


class Parts(LlamaAttention):
    """Llama's attention in steps that the classes below change."""

    def states(self, x, position_embeddings):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return *apply_rotary_pos_emb(q, k, *position_embeddings), v

    def attend(self, q, k, v, mask, **kwargs):
        function = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return function(self, q, k, v, mask, scaling=self.scaling, **kwargs)[0]

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        q, k, v = self.states(hidden_states, position_embeddings)
        out = self.attend(q, k, v, attention_mask, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


class Twice(Parts):
    def attend(self, q, k, v, mask, **kwargs):
        return super().attend(q, k, v, mask, **kwargs) - 0.5 * super().attend(q, k, 2 * v, mask, **kwargs)


class HiddenBranch(Parts):
    def attend(self, q, k, v, mask, **kwargs):
        name = getattr(self.config, "_attn_implementation"[:])
        return super().attend(q if name.startswith("sdpa") else 2 * q, k, v, mask, **kwargs)


class Reused(Parts):
    """Keys and values of the layer before, in odd layers."""

    kept: dict = {}  # noqa: RUF012

    def states(self, x, position_embeddings):
        q, k, v = super().states(x, position_embeddings)
        if self.layer_idx % 2:
            return q, *self.kept[self.layer_idx - 1]
        self.kept[self.layer_idx] = (k, v)
        return q, k, v


class Window(Parts):
    def attend(self, q, k, v, mask, **kwargs):
        window = {"sliding_window": 4} if self.layer_idx % 2 else {}
        return super().attend(q, k, v, mask, **kwargs, **window)


class Linear(Parts):
    """Something else than softmax attention comes out of the attention function."""

    def attend(self, q, k, v, mask, **kwargs):
        kwargs["softcap"] = 0.01
        return super().attend(q, k, v, mask, **kwargs)


def model_of(cls, **config):
    model = make("llama", **config)
    for layer in model.model.layers:
        attention = cls(model.config, layer.self_attn.layer_idx).eval()
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention
    return model


def inputs_of(model):
    return family("llama").example(model, [Sample(before=4, after=5, seed=1)])


def test_an_unknown_attention_works():
    model = model_of(Parts)
    inputs = inputs_of(model)
    before = forward(model, plain(inputs))
    perturb(flexcore.wrap(model, flexcore.FlexConfig(first_layer=1, selector="all")))
    assert torch.equal(forward(model, plain(inputs)), before)
    reference = make("llama")
    perturb(flexcore.wrap(reference, flexcore.FlexConfig(first_layer=1, selector="all")))
    assert torch.allclose(forward(model, inputs), forward(reference, inputs), atol=5e-5)
    assert not torch.allclose(forward(model, inputs), before, atol=1e-3)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Twice, "2 times in a forward pass"),
        (HiddenBranch, "goes by another name"),
        (Linear, "something else than softmax|does not support"),
    ],
)
def test_what_it_does_not_fit_is_refused(cls, message):
    config = {"attn_implementation": "eager"} if cls is Linear else {}
    model = model_of(cls, **config)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = (type(model), model.config._attn_implementation, sorted(vars(model)))
    with pytest.raises(flexcore.UnsupportedModelError, match=message):
        flexcore.wrap(model)
    assert (type(model), model.config._attn_implementation, sorted(vars(model))) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("cls", [Reused, Window])
def test_layers_that_cannot_read_are_left_out(cls):
    model = flexcore.wrap(model_of(cls), flexcore.FlexConfig(first_layer=0))
    assert model.flex_config.layers == (2, 4)
    with pytest.raises(ValueError, match=r"layers must be among those that can read after layer 0, \[2, 4\]"):
        flexcore.wrap(model_of(cls), flexcore.FlexConfig(first_layer=0, layers=(3,)))


def test_one_full_layer_is_not_enough():
    with pytest.raises(flexcore.UnsupportedModelError, match="1 of 2 attention layers can"):
        flexcore.wrap(model_of(Window, layers=2))


def test_a_decoder_that_drops_keywords_refuses_gradient_checkpointing():
    model = family("stablelm").build()
    inputs = family("stablelm").example(model, [Sample()])
    perturb(flexcore.wrap(model, flexcore.FlexConfig(selector="all"))).train()
    model(**inputs).logits.sum().backward()
    model.gradient_checkpointing_enable()
    model(**plain(inputs))
    with pytest.raises(flexcore.UnsupportedModelError, match="gradient checkpointing must be off"):
        model(**inputs)
    assert torch.isfinite(model(**plain(inputs)).logits).all()


def test_fused_projections_hold_key_and_value_rows_only():
    model = flexcore.wrap(family("phi3").build())
    layer = model.flex_config.layers[0]
    own = model.model.layers[layer].self_attn.qkv_proj.weight
    rows = 2 * model.config.num_key_value_heads * model.config.hidden_size // model.config.num_attention_heads
    fine = model.flex_fine[str(layer)].qkv_proj.weight
    assert fine.shape == (rows, own.shape[1]) and torch.equal(fine, own[-rows:])


def test_multi_axis_positions_are_heard():
    model = family("qwen2_5_vl").build()
    inputs = family("qwen2_5_vl").example(model, [Sample(before=4, after=3)])
    flexcore.wrap(model, flexcore.FlexConfig(selector="all"))
    seen = {}
    ours = type(model._flex_binding)._positions

    def spy(binding, sample, medium, tokens):
        seen["coarse"] = sample.rope
        return ours(binding, sample, medium, tokens)

    model._flex_binding._positions = spy.__get__(model._flex_binding)
    forward(model, inputs)
    start = int(inputs["flex_streams"].samples[0][0].coarse_positions[0])
    assert seen["coarse"].tolist() == [
        [start] * 4,
        [start, start, start + 1, start + 1],
        [start, start + 1] * 2,
    ]
    assert not any(m._forward_pre_hooks for m in model.modules())
