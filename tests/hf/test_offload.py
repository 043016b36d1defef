"""Models whose weights lie in main memory or on disk by accelerate, wrapped before or after: the same numbers."""

from __future__ import annotations

import inspect

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

import flexcore
from flexcore.hf.offload import plain_copy

from .helpers import KINDS, WIDE, Sample, batch, forward, generate, make, perturb, plain, wrapped

FLEX = {"first_layer": 1, "selector": "top_k", "fraction": 0.2}
HOW = ("cpu", "disk", "device map")


def media(kind: str) -> dict:
    return batch(kind, [Sample(), Sample(grids=[WIDE], seed=1)])


def offload(model, how: str, folder):
    """Leave the model's parameters on the meta device, to be brought in layer by layer."""
    if how == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk":
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
        return model
    # every other layer, the head and (if they are there) the fine projections on disk
    decoder = model.get_decoder()
    prefix = next(n for n, m in model.named_modules() if m is decoder)
    places = {f"{prefix}.{n}": "cpu" for n, _ in decoder.named_children() if n != "layers"}
    places |= {f"{prefix}.layers.{i}": "disk" if i % 2 else "cpu" for i in range(len(decoder.layers))}
    for name, _ in model.named_parameters():
        if not name.startswith(f"{prefix}."):
            places[name.rpartition(".")[0]] = "disk" if name.startswith(("lm_head", "flex_fine")) else "cpu"
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


@pytest.fixture(scope="module", params=KINDS)
def expected(request):
    kind, inputs = request.param, media(request.param)
    model = wrapped(kind)
    return kind, inputs, forward(model, inputs), forward(model, plain(inputs)), generate(model, inputs)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("order", ["wrap, then offload", "offload, then wrap"])
def test_offloaded_weights_give_the_same_numbers(expected, how, order, tmp_path):
    kind, inputs, on, off, answer = expected
    if order == "wrap, then offload":
        model = offload(wrapped(kind), how, tmp_path)
    else:
        model = flexcore.wrap(offload(make(kind), how, tmp_path), flexcore.FlexConfig(**FLEX))
        perturb(model)
    assert any(p.device.type == "meta" for p in model.parameters())
    assert torch.equal(forward(model, inputs), on) and not torch.equal(on, off)
    assert torch.equal(forward(model, plain(inputs)), off)
    assert torch.equal(generate(model, inputs), answer)
    assert {"flex_streams", "readout_mask", "alpha"} <= set(inspect.signature(model.forward).parameters)
    flexcore.unwrap(model)
    assert torch.equal(forward(model, plain(inputs)), off)
    assert "flex_streams" not in inspect.signature(model.forward).parameters


def test_fine_projections_of_an_offloaded_model_are_real_and_free_of_hooks(tmp_path):
    whole = flexcore.wrap(make("llama"), flexcore.FlexConfig(**FLEX))
    model = flexcore.wrap(offload(make("llama"), "disk", tmp_path), flexcore.FlexConfig(**FLEX))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.flex_fine.parameters(), whole.flex_fine.parameters(), strict=True)
    )
    assert not any(
        "_hf_hook" in m.__dict__ or "_old_forward" in m.__dict__ for m in model.flex_fine.modules()
    )
    attention = model.get_decoder().layers[0].self_attn
    assert attention.q_proj.weight.device.type == "meta"
    twin = plain_copy(attention)
    assert torch.equal(twin.q_proj.weight, whole.get_decoder().layers[0].self_attn.q_proj.weight)
    assert attention.q_proj.weight.device.type == "meta" and "forward" not in twin.q_proj.__dict__


def test_a_replaced_forward_is_refused():
    model = make("llama")
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(ValueError, match="`forward` was replaced on this very model"):
        flexcore.wrap(model)
    assert not flexcore.is_wrapped(model)


def test_weights_that_are_nowhere_are_refused():
    with torch.device("meta"):
        model = type(make("llama"))(make("llama").config)
    with pytest.raises(ValueError, match="meta device"):
        flexcore.wrap(model)
