"""A model's cost from its config alone, against torch's FLOP counter on the real model, its cache and its wrapping."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flexcore
from flexcore.cost import coarse_prefill, decode, flex_prefill, kv_bytes
from flexcore.errors import UnsupportedModelError
from flexcore.hf import cost
from flexcore.hf.families import Sample, family
from flexcore.hf.kv_cache import cache_argument

# grouped heads, biases, a plain MLP with fused projections, experts (shared ones too), latent attention, windows
TEXT = ["llama", "qwen2", "gpt2", "mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gemma3_text"]
N = 40


def built(name):
    """A real random model that counts all its products: eager attention, experts one by one."""
    model = family(name).build()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def counted(model, **inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(**inputs, use_cache=True)
    return counter.get_total_flops(), out


def eager(shape, n, rows):
    """FLOPs of eager attention: no window and no causality saves it anything; a step's keys are those kept."""
    layers = shape.windows or (None,) * shape.layers
    return sum(
        rows * (n if rows > 1 or w is None else min(n, w)) * shape.pair_flops for w in layers if w != 0
    )


@pytest.mark.parametrize("name", TEXT)
def test_text_models(name):
    measured = cost.measure(cost.family_config(name))
    shape = measured.shape
    assert measured.encoder is None
    model = built(name)
    ids = torch.randint(5, 90, (1, N))
    prefill, out = counted(model, input_ids=ids, logits_to_keep=1)
    own = coarse_prefill(shape, N, 0)
    assert own.linear + own.lm_head + eager(shape, N, N) == pytest.approx(prefill, rel=0.02)
    cache = out.past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(shape, N, itemsize=4) == held
    step, _ = counted(model, input_ids=ids[:, :1], logits_to_keep=1, **cache_argument(model, cache))
    own = decode(shape, N + 1)
    assert own.linear + own.lm_head + eager(shape, N + 1, 1) == pytest.approx(step, rel=0.02)
    # without windows, what causality saves is all the difference to the model's own numbers
    if not shape.windows:
        assert own.total == pytest.approx(step, rel=0.02)


def test_counting_sees_experts():
    """The control: an expert too many, or all of them, is far outside of what the tests above allow."""
    shape = cost.measure(cost.family_config("mixtral")).shape
    prefill, _ = counted(built("mixtral"), input_ids=torch.randint(5, 90, (1, N)), logits_to_keep=1)
    expert = 2 * 3 * 32 * 64 * shape.layers * N
    own = coarse_prefill(shape, N, 0)
    assert own.linear + own.lm_head + eager(shape, N, N) == pytest.approx(prefill, rel=0.02)
    assert expert > 0.2 * prefill
    config = cost.family_config("mixtral")
    config.num_experts_per_tok = 3
    more = cost.measure(config)
    assert coarse_prefill(more.shape, N, 0).linear - coarse_prefill(shape, N, 0).linear == expert


@pytest.mark.parametrize(
    "name, side", [("llava", 24), ("qwen2_5_vl", 24), ("llava_next", 24), ("gemma3", 24)]
)
def test_pictures(name, side):
    """Tower, projector and decoder together, on the whole model with one picture."""
    measured = cost.measure(cost.family_config(name), side=side)
    encoder, known = measured.encoder, family(name)
    model = built(name)
    inputs = known.example(model, [Sample(before=6, after=5)])
    del inputs["flex_streams"]
    prefill, _ = counted(model, **inputs, logits_to_keep=1)
    n = inputs["input_ids"].shape[1]
    own = coarse_prefill(measured.shape, n, 0)
    decoder = own.linear + own.lm_head + eager(measured.shape, n, n)
    tiles = inputs["pixel_values"].shape[1] if inputs["pixel_values"].ndim == 5 else 1
    made = tiles * (encoder.tower_flops + encoder.projector_flops)
    assert decoder + made == pytest.approx(prefill, rel=0.02)
    assert made > 0.1 * prefill
    assert encoder.projector_flops > 0
    outside = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in model.get_decoder().parameters()
    )
    head = model.get_output_embeddings().weight
    outside -= 0 if head is model.get_input_embeddings().weight else head.numel()
    assert encoder.tower_params + encoder.projector_params == outside


@pytest.mark.parametrize("name, side", [("llava", 24), ("qwen2_5_vl", 24)])
def test_coarse_tokens(name, side):
    encoder = cost.measure(cost.family_config(name), side=side).encoder
    known = family(name)
    assert encoder.tokens == known.media.tokens.count(90)


def test_a_larger_picture():
    config = cost.family_config("llava")
    small, large = (cost.measure(config, side=side).encoder for side in (24, 48))
    assert (small.tokens, large.tokens) == (16, 64)
    assert 3.5 < large.tower_flops / small.tower_flops < 8
    assert large.projector_flops == 4 * small.projector_flops
    assert config.vision_config.image_size == 24  # the caller's own


@pytest.mark.parametrize("name", ["qwen2", "qwen3_next", "gemma3_text", "deepseek_v3", "mixtral", "llava"])
def test_agrees_with_wrap(name):
    """The layers that read, and the matrices of their fine projections."""
    shape = cost.measure(cost.family_config(name), encoder=False).shape
    model = family(name).build()
    with flexcore.attached(model):
        assert shape.reading == model.flex_config.layers
        matrices = sum(p.numel() for p in model.flex_fine.parameters() if p.ndim == 2)
    assert shape.fine_params_per_layer * len(shape.reading) == matrices


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mixtral"])
def test_what_reading_adds(name, monkeypatch):
    """Everything selected, against the wrapped model: fine projections, readout logits and fine attention."""
    # torch's counter doesn't know its own attention for CPUs
    monkeypatch.setattr("flexcore.row_attention._FLASH", None)
    shape, known, model = cost.measure(cost.family_config(name)).shape, family(name), built(name)
    inputs = known.example(model, [Sample(before=8, after=7)])
    n = inputs["input_ids"].shape[1]
    plain, _ = counted(model, **{k: v for k, v in inputs.items() if k != "flex_streams"}, logits_to_keep=1)
    with flexcore.attached(model, flexcore.FlexConfig(selector="all")):
        counted(model, **inputs, logits_to_keep=1)  # the first forward tries out how layers rotate keys
        wrapped, _ = counted(model, **inputs, logits_to_keep=1)
    own = flex_prefill(shape, n - 16, 16, fine_projected=3 * 16)
    assert own.fine_projection + own.readout_logits + own.fine_attention == pytest.approx(
        wrapped - plain, rel=0.02
    )


def test_first_layer():
    assert cost.measure(cost.family_config("qwen2"), first_layer=2).shape.reading == (3,)


def test_experts_are_apart():
    measured = cost.measure(cost.family_config("qwen3_moe"))
    weights, model = measured.weights, built("qwen3_moe")
    experts = [p for n, p in model.named_parameters() if "experts" in n and p.ndim == 3]
    assert weights.experts == sum(p.numel() for p in experts)
    assert weights.routed == pytest.approx(2 / 4, abs=0.01)
    layers = sum(p.numel() for p in model.get_decoder().layers.parameters())
    norm = model.get_decoder().norm.weight.numel()
    assert weights.layers + weights.experts == layers + norm


def test_load_config(tmp_path):
    config = cost.family_config("llava")
    config.save_pretrained(tmp_path)
    for target in (tmp_path, tmp_path / "config.json"):
        assert cost.load_config(str(target)).text_config.hidden_size == 32
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(ValueError, match="isn't a config that this transformers reads"):
        cost.load_config(str(tmp_path))
    with pytest.raises(ValueError, match=r"target must be one of llava-1.5-7b, a folder"):
        cost.load_config(str(tmp_path / "gone"))


def set_fields(config, **values):
    for name, value in values.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    "name, changed, options, error, message",
    [
        ("llama", {"is_encoder_decoder": True}, {}, ValueError, "is_encoder_decoder=True"),
        ("llama", {"num_kv_shared_layers": 2}, {}, ValueError, "num_kv_shared_layers=2"),
        ("llama", {}, {"first_layer": 9}, ValueError, r"first_layer must be a layer .* got 9"),
        ("bloom", {}, {}, UnsupportedModelError, "attention interface"),
        ("mistral-sliding", {}, {}, UnsupportedModelError, "0 of 4 layers have full attention"),
        ("llava", {}, {"side": 25}, ValueError, r"vision_config.patch_size=6, got 25"),
        ("qwen2_5_vl", {}, {"side": 5}, ValueError, "at least one token's 12 pixels, got 5"),
        ("qwen2_audio", {}, {}, ValueError, "audio_config"),
    ],
)
def test_refuses(name, changed, options, error, message):
    with pytest.raises(error, match=message):
        cost.measure(set_fields(cost.family_config(name), **changed), **options)


def test_audio_decoder_alone():
    assert cost.measure(cost.family_config("qwen2_audio"), encoder=False).encoder is None
