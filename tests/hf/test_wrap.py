"""wrap() and unwrap(): what they refuse, before changing anything, and what a wrapped model still is."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, LlamaForCausalLM

import flexcore
from flexcore.hf.interface import registered_name

from .helpers import GRID, Sample, batch, forward, generate, make, perturb, plain, wrapped


def state(model) -> tuple:
    return (
        type(model),
        sorted(vars(model)),
        sorted(model.state_dict()),
        model.get_decoder().config._attn_implementation,
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [m.training for m in model.modules()],
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"first_layer": 6}, r"first_layer must be a layer of LlamaForCausalLM \(0\.\.5\), got 6"),
        ({"first_layer": 5}, "first_layer must leave a later layer to read"),
        ({"selector": "nearest"}, "nearest"),
        ({"first_layer": 2, "layers": (2, 3)}, r"layers must be among those that can read after layer 2"),
    ],
)
def test_a_config_that_does_not_fit_changes_nothing(config, message):
    model = make("llama").train()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        flexcore.wrap(model, flexcore.FlexConfig(**config))
    assert state(model) == before


def test_defaults_follow_the_depth():
    model = flexcore.wrap(make("llama", layers=8))
    assert model.flex_config.first_layer == 2 and model.flex_config.layers == (3, 4, 5, 6, 7)
    model = flexcore.wrap(make("llama"), flexcore.FlexConfig(first_layer=1, layers=[3, 5]))
    assert model.flex_config.layers == (3, 5) and set(model.flex_fine) == {"3", "5"}
    with flexcore.trace(model) as trace:
        forward(model, batch("llama", [Sample()]))
    assert {r.layer: r.read_in for r in trace} == {1: None, 2: 3, 3: None, 4: 5, 5: None}


def test_a_model_without_the_attention_interface_is_refused_unchanged():
    config = FalconConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=50)
    model = FalconForCausalLM(config).eval()
    before = state(model)
    with pytest.raises(flexcore.UnsupportedModelError, match="attention interface"):
        flexcore.wrap(model)
    assert state(model) == before
    with pytest.raises(flexcore.UnsupportedModelError, match="transformers model"):
        flexcore.wrap(torch.nn.Linear(2, 2))


def test_wrapping_twice_and_unwrapping_a_plain_model():
    model = wrapped("llama")
    inputs = batch("llama", [Sample()])
    expected = forward(model, inputs)
    with pytest.raises(flexcore.WrapStateError, match="wrapped already"):
        flexcore.wrap(model)
    with pytest.raises(ValueError, match="wrapped already"):
        flexcore.wrap(model)
    assert torch.equal(forward(model, inputs), expected)
    flexcore.unwrap(model)
    with pytest.raises(flexcore.WrapStateError, match="isn't wrapped"):
        flexcore.unwrap(model)
    with pytest.raises(ValueError, match="FlexConfig"):
        flexcore.wrap(model, {"first_layer": 1})
    with pytest.raises(ValueError, match="wrapped model"), flexcore.trace(model):
        pass


def test_attached_unwraps_after_an_error():
    model = make("llama")
    with pytest.raises(KeyError), flexcore.attached(model, flexcore.FlexConfig(first_layer=1)):
        assert flexcore.is_wrapped(model)
        raise KeyError
    assert not flexcore.is_wrapped(model) and type(model) is LlamaForCausalLM


def test_signatures_show_the_new_arguments():
    model = wrapped("llava")
    names = list(inspect.signature(model.forward).parameters)
    base = list(inspect.signature(make("llava").forward).parameters)
    assert [n for n in names if n not in base] == ["flex_streams", "readout_mask", "alpha"]
    assert [n for n in names if n in base] == base
    assert "flex_streams" in inspect.signature(model.generate).parameters
    assert type(model).__name__ == "LlavaForConditionalGeneration"


def test_other_models_are_untouched():
    one, other = make("llama"), make("llama", seed=4)
    inputs = batch("llama", [Sample()])
    before = forward(other, plain(inputs))
    flexcore.wrap(one, flexcore.FlexConfig(first_layer=1))
    two = flexcore.wrap(make("llama", seed=4), flexcore.FlexConfig(first_layer=3, selector="all"))
    forward(one, inputs)
    forward(two, inputs)
    assert other.config._attn_implementation == "sdpa"
    assert torch.equal(forward(other, plain(inputs)), before)
    assert one.flex_config.layers == (2, 3, 4, 5) and two.flex_config.layers == (4, 5)


def test_a_deep_copy_stands_alone():
    model, inputs = wrapped("llava"), batch("llava", [Sample()])
    expected = forward(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(forward(twin, inputs), expected)
    perturb(twin, seed=9)
    assert not torch.equal(forward(twin, inputs), expected)
    assert torch.equal(forward(model, inputs), expected)
    flexcore.unwrap(twin)
    assert torch.equal(forward(model, inputs), expected)
    generate(model, inputs, new=2)


def test_fine_projections_start_as_copies_or_at_random():
    model = flexcore.wrap(make("llama"), flexcore.FlexConfig(first_layer=1))
    for layer in model.flex_config.layers:
        own = model.model.layers[layer].self_attn
        for name in ("k_proj", "v_proj"):
            fine = model.flex_fine[str(layer)].get_submodule(name).weight
            assert (
                torch.equal(fine, own.get_submodule(name).weight)
                and fine is not own.get_submodule(name).weight
            )
    drawn = flexcore.wrap(make("llama"), flexcore.FlexConfig(first_layer=1, init="random"))
    weight = drawn.flex_fine["2"].k_proj.weight
    assert not torch.equal(weight, drawn.model.layers[2].self_attn.k_proj.weight)
    assert 0.015 < float(weight.detach().std()) < 0.025
    assert {n.split(".")[2] for n, _ in model.named_parameters() if n.startswith("flex_fine")} == {
        "k_proj",
        "v_proj",
    }


def bad_streams():
    sample = batch("llama", [Sample()])["flex_streams"].samples[0][0]
    length = batch("llama", [Sample()])["input_ids"].shape[1]
    narrow = flexcore.TensorSource(torch.randn(GRID.n_fine, 32), GRID)
    unbound = flexcore.FineStream(GRID, None, None, sample.source)
    two = flexcore.StreamBatch(((sample,), (sample,)))
    return {
        "not-a-batch": ([sample], "flex_streams must be a StreamBatch, got list"),
        "sample-count": (two, r"one entry per sample of the batch \(1\), got 2"),
        "width": (
            flexcore.StreamBatch(((flexcore.FineStream(GRID, sample.coarse_positions, None, narrow),),)),
            "features must be 64 wide",
        ),
        "unbound": (flexcore.StreamBatch(((unbound,),)), "coarse_positions must be set"),
        "beyond": (
            flexcore.StreamBatch(((sample.shifted(length),),)),
            rf"must lie in the sequence of {length} tokens",
        ),
    }


@pytest.mark.parametrize("case", ["not-a-batch", "sample-count", "width", "unbound", "beyond"])
@pytest.mark.parametrize("act", ["forward", "generate"])
def test_bad_streams_are_refused_before_any_work(case, act):
    streams, message = bad_streams()[case]
    model = wrapped("llama")
    inputs = {**batch("llama", [Sample()]), "flex_streams": streams}
    ran = []
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=message):
        (forward if act == "forward" else generate)(model, inputs)
    assert not ran
    handle.remove()
    forward(model, batch("llama", [Sample()]))


def test_a_readout_mask_of_the_wrong_shape():
    model, inputs = wrapped("llama"), batch("llama", [Sample()])
    length = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match="readout_mask must be"):
        forward(model, inputs, readout_mask=torch.ones(1, length + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="readout_mask must be"):
        forward(model, inputs, readout_mask=torch.ones(length, dtype=torch.bool))


def test_names_of_our_functions_avoid_the_real_backends():
    for base in ("sdpa", "eager"):
        name = registered_name(base)
        assert not any(word in name for word in ("sdpa", "flash", "flex_attention", "|", "/"))


def test_the_wrapped_models_plain_path_is_the_base_path():
    """Without media a wrapped model runs exactly the operations of the plain one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.ops = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs = plain(batch("llama", [Sample()]))
    counts = []
    for model in (make("llama"), wrapped("llama")):
        with Count() as count:
            forward(model, inputs)
        counts.append(count.ops)
    assert counts[0] == counts[1] and len(counts[0]) > 100


def test_without_media_a_layer_costs_at_most_20_microseconds_of_python():
    """As the speed benchmark measures it."""
    from benchmarks.speed_no_media import python_per_layer

    assert python_per_layer(wrapped("llama", layers=6)) < 20e-6
