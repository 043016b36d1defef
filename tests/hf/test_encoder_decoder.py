"""Encoder-decoder models: coarse tokens are the encoder's output, selection and reading happen in cross-attention."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

import flexcore
from flexcore.hf.wrapped import ON_CACHE

from .helpers import lazy, perturb

COARSE, FINE, WIDTH, START = 12, 36, 32, 3
GRID = flexcore.Grid.blocks((COARSE,), (FINE,), region=3)
SIZES = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": START,
}
KINDS = ("whisper", "bart", "t5")


def make(kind: str):
    if kind == "whisper":
        audio = {"num_mel_bins": 8, "max_source_positions": COARSE, "max_target_positions": 64}
        suppressed = {"suppress_tokens": None, "begin_suppress_tokens": None}
        model = WhisperForConditionalGeneration(WhisperConfig(**SIZES, **audio, **suppressed))
    elif kind == "bart":
        config = BartConfig(**SIZES, max_position_embeddings=64, forced_eos_token_id=None)
        model = BartForConditionalGeneration(config)
    else:
        tokens = {
            k: SIZES[k] for k in ("vocab_size", "pad_token_id", "eos_token_id", "decoder_start_token_id")
        }
        model = T5ForConditionalGeneration(
            T5Config(**tokens, d_model=WIDTH, d_kv=8, num_layers=4, num_heads=4, d_ff=48)
        )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    model.generation_config.max_length = None
    return model.eval()


def wrapped(kind: str, **flex):
    return perturb(
        flexcore.wrap(make(kind), flexcore.FlexConfig(**{"first_layer": 1, "selector": "all", **flex}))
    )


def inputs(n: int = 2, length: int = 5, source=flexcore.TensorSource, media: bool = True) -> dict:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(n, COARSE, WIDTH, generator=generator)
    features = torch.randn(n, FINE, WIDTH, generator=generator)
    ids = torch.randint(4, 99, (n, length), generator=generator)
    ids[:, 0] = START
    out = {"encoder_outputs": BaseModelOutput(states), "decoder_input_ids": ids}
    if media:
        streams = [
            (flexcore.FineStream(GRID, torch.arange(COARSE), None, source(f, GRID)),) for f in features
        ]
        out["flex_streams"] = flexcore.StreamBatch(tuple(streams))
    return out


def one(batch: dict, row: int) -> dict:
    states = batch["encoder_outputs"].last_hidden_state[row : row + 1]
    out = {
        "encoder_outputs": BaseModelOutput(states),
        "decoder_input_ids": batch["decoder_input_ids"][row : row + 1],
    }
    return {**out, "flex_streams": batch["flex_streams"][row]} if "flex_streams" in batch else out


def plain(batch: dict) -> dict:
    return {k: v for k, v in batch.items() if k != "flex_streams"}


def forward(model, batch: dict, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs).logits


def generate(model, batch: dict, **kwargs):
    # `generate` writes into the encoder's output when it expands it for beams
    batch = {**batch, "encoder_outputs": BaseModelOutput(batch["encoder_outputs"].last_hidden_state.clone())}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **kwargs}
    return model.generate(**batch, **settings)


def answers(out: torch.Tensor) -> torch.Tensor:
    return out[:, -6:]  # Whisper returns the new tokens only


def cross_attention(model, layer: int):
    decoder = model.get_decoder()
    return (
        decoder.block[layer].layer[1].EncDecAttention
        if hasattr(decoder, "block")
        else decoder.layers[layer].encoder_attn
    )


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_selected_is_bit_identical(kind):
    batch = inputs()
    before = forward(make(kind), plain(batch))
    model = wrapped(kind, selector="top_k", fraction=0.0)
    assert model.flex_config.layers == (2, 3)
    assert torch.equal(forward(model, plain(batch)), before) and torch.equal(forward(model, batch), before)
    expected = generate(make(kind), plain(batch))
    assert torch.equal(generate(model, plain(batch)), expected) and torch.equal(
        generate(model, batch), expected
    )
    assert float((forward(wrapped(kind), batch) - before).abs().max()) > 1e-3
    flexcore.unwrap(model)
    assert torch.equal(forward(model, plain(batch)), before) and not hasattr(model, "flex_fine")


@pytest.mark.parametrize("kind", KINDS)
def test_everything_selected_equals_dense_cross_attention(kind):
    """In the first reading layer, against the same attention over encoder states and fine keys side by side."""
    model, batch = wrapped(kind), one(inputs(), 0)
    attention, seen = cross_attention(model, 2), {}
    q, k, v = (getattr(attention, n if kind == "t5" else f"{n}_proj") for n in "qkv")
    out = attention.o if kind == "t5" else attention.out_proj

    def hook(module, args, kwargs, result):
        seen["hidden"], seen["found"] = args[0] if args else kwargs["hidden_states"], result[0]

    handle = attention.register_forward_hook(hook, with_kwargs=True)
    forward(model, batch)
    handle.remove()
    fine = model.flex_fine["2"].modules_by_name()
    own = batch["encoder_outputs"].last_hidden_state[0]
    features = batch["flex_streams"].samples[0][0].source.tensor
    with torch.no_grad():
        names = ("k", "v") if kind == "t5" else ("k_proj", "v_proj")
        keys = torch.cat([k(own), fine[names[0]](features)]).view(-1, 4, 8).transpose(0, 1)
        values = torch.cat([v(own), fine[names[1]](features)]).view(-1, 4, 8).transpose(0, 1)
        row = q(seen["hidden"][0, -1]).view(4, 1, 8)
        scale = 1.0 if kind == "t5" else 8**-0.5
        expected = out(((row @ keys.transpose(1, 2) * scale).softmax(-1) @ values).reshape(-1))
        only = out(
            ((row @ keys[:, :COARSE].transpose(1, 2) * scale).softmax(-1) @ values[:, :COARSE]).reshape(-1)
        )
    assert float((seen["found"][0, -1] - expected).abs().max()) < 5e-5
    assert float((only - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_batches_caches_and_beams_agree(kind):
    model, batch = perturb(wrapped(kind, selector="top_k", top_k=3), scale=1.0, seed=3), inputs()
    out = generate(model, batch)
    assert not torch.equal(out, generate(model, plain(batch)))
    assert torch.equal(generate(model, batch, use_cache=False), out)
    for row in range(2):
        assert torch.equal(answers(generate(model, one(batch, row)))[0], answers(out)[row])
    beams = generate(model, batch, num_beams=3)
    assert torch.equal(generate(model, batch, num_beams=3, use_cache=False), beams)
    late = inputs(source=lazy)
    assert torch.equal(generate(model, late), out)
    if kind != "whisper":  # its own generate returns no cache
        kv = getattr(generate(model, batch, return_dict_in_generate=True).past_key_values, ON_CACHE).kv
        assert set(kv.projected.values()) == {1}


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_forcing_equals_decoding(kind):
    model, batch = wrapped(kind, selector="top_k", top_k=3), inputs()
    new = answers(generate(model, batch))
    ids = torch.cat([batch["decoder_input_ids"], new], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, 4:-1] = new  # a decoder's labels are the next tokens of its inputs
    forced = forward(model, {**batch, "decoder_input_ids": ids}, labels=labels)
    assert torch.equal(forced[:, 4:-1].argmax(-1), new)
    unread = forward(model, {**batch, "decoder_input_ids": ids}, labels=torch.full_like(ids, -100))
    assert float((unread - forced)[:, 4:-1].abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_labels_alone_train_the_fine_projections(kind):
    model, batch = wrapped(kind, selector="top_k", top_k=3).train(), inputs()
    labels = batch.pop("decoder_input_ids")
    model(**batch, labels=labels).loss.backward()
    grads = [p.grad for p in model.flex_fine.parameters()]
    # a key's bias shifts all of a row's fine logits; every other parameter must move the loss
    assert all(g is not None for g in grads) and sum(float(g.abs().max()) > 0 for g in grads) >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_fit_again(kind, tmp_path):
    model, batch = wrapped(kind), inputs()
    model.save_adapter_weights(tmp_path)
    other = flexcore.wrap(make(kind), model.flex_config)
    other.load_adapter_weights(tmp_path)
    assert torch.equal(forward(other, batch), forward(model, batch))
    assert torch.equal(forward(copy.deepcopy(model), batch), forward(model, batch))


def test_positions_beyond_the_encoders_output_are_refused():
    model, batch = wrapped("whisper"), inputs()
    far = [tuple(s.shifted(1) for s in sample) for sample in batch["flex_streams"].samples]
    with pytest.raises(flexcore.StreamError, match="encoder's output of 12 states, got 12"):
        forward(model, {**batch, "flex_streams": flexcore.StreamBatch(tuple(far))})
    forward(model, batch)


def test_fine_norm_needs_a_norm_on_the_encoders_side():
    with pytest.raises(ValueError, match="fine_norm"):
        flexcore.wrap(make("whisper"), flexcore.FlexConfig(first_layer=1, fine_norm=True))
