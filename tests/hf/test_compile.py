"""Static mode and `torch.compile`: one graph for a decode step, and the same numbers as the lazy mode."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CompileConfig, DynamicCache

import flexcore
from flexcore.hf.kv_cache import cache_argument
from flexcore.hf.static import StaticContext
from flexcore.hf.wrapped import ON_CACHE

from .helpers import GRID, KINDS, WIDE, Sample, batch, forward, generate, plain, wrapped
from .test_training import gradients, training_inputs

SELECTORS = ("threshold", "top_k", "top_p", "random", "all")
MIXED = [Sample(), Sample(grids=[], seed=2, before=9), Sample(grids=[WIDE, GRID], seed=1)]


def counting():
    """A backend that runs graphs as they are, and the list of them."""
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    return backend, graphs


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decode(model, inputs: dict, **kwargs):
    out = generate(model, inputs, new=8, return_dict_in_generate=True, output_logits=True, **kwargs)
    return out, torch.stack(out.logits)


def steps(model, inputs: dict, step=None, n: int = 4) -> torch.Tensor:
    """Logits of a prompt and some greedy steps, written as a plain loop over a dynamic cache."""
    cache, mask = DynamicCache(), inputs["attention_mask"]
    with torch.no_grad():
        outs = [model(**inputs, **cache_argument(model, cache)).logits[:, -1]]
        for _ in range(n):
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
            out = (model if step is None else step)(
                input_ids=outs[-1].argmax(-1)[:, None],
                attention_mask=mask,
                position_ids=(mask.sum(1) - 1)[:, None],
                **cache_argument(model, cache),
            )
            outs.append(out.logits[:, -1])
    return torch.stack(outs)


# ---------------------------------------------------------------------- static mode


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("selector", SELECTORS)
def test_static_steps_equal_lazy_ones(selector, settings, monkeypatch):
    kind, seen = ("llava" if selector == "top_k" else "llama"), []
    attend = StaticContext.attend
    monkeypatch.setattr(StaticContext, "attend", lambda self, *a: seen.append(self) or attend(self, *a))
    inputs = batch(kind, MIXED)
    (lazy, expected), (static, found) = (
        decode(wrapped(kind, selector=selector, static=mode), inputs, **settings) for mode in (False, True)
    )
    assert torch.equal(lazy.sequences, static.sequences)
    assert float((expected - found).abs().max()) < 5e-5
    assert len({id(c) for c in seen}) == 7  # every step after the prompt


def test_static_mode_projects_every_region_once_and_keeps_it_for_the_next_turn():
    model, lazy = wrapped("llama", static=True), wrapped("llama")
    inputs = batch("llama", [Sample(), Sample(seed=1)])
    answers, projected = [], []
    for m in (model, lazy):
        out = generate(m, inputs, new=5, return_dict_in_generate=True)
        request = getattr(out.past_key_values, ON_CACHE)
        before = dict(request.kv.projected)
        more = torch.tensor([[11, 12, 13]]).expand(2, -1)
        ids = torch.cat([out.sequences, more], dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        turn["attention_mask"][:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        answers.append(generate(m, turn, new=5, **cache_argument(m, copy.deepcopy(out.past_key_values))))
        projected.append((before, dict(request.kv.projected)))
    assert torch.equal(*answers)
    before, after = projected[0]
    assert before == after and set(before.values()) == {1}
    assert len(before) == len(model.flex_config.layers) * 2 * GRID.n_regions


def test_static_mode_notices_new_weights_and_new_media():
    model, inputs = wrapped("llama", static=True), batch("llama", [Sample()])
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, **cache_argument(model, cache))
        first = getattr(cache, ON_CACHE).static
        assert first is not None
        for parameter in model.flex_fine.parameters():
            parameter.mul_(1.5)
        token = torch.tensor([[9]])
        found = model(input_ids=token, **cache_argument(model, copy.deepcopy(cache))).logits
        lazy = wrapped("llama")
        lazy.load_state_dict(model.state_dict())
        request = copy.deepcopy(cache)
        expected = lazy(input_ids=token, **cache_argument(lazy, request)).logits
    assert float((found - expected).abs().max()) < 5e-5


def test_static_mode_leaves_training_and_text_alone():
    inputs = training_inputs("llama")
    static, lazy = wrapped("llama", static=True), wrapped("llama")
    a, b = gradients(static, inputs), gradients(lazy, inputs)
    assert all(torch.equal(a[n], b[n]) for n in b)
    text = batch("llama", [Sample(grids=[])])
    assert torch.equal(generate(static, text), generate(static, plain(text)))


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_static_must_be_a_bool(value):
    with pytest.raises(ValueError, match=r"static must be a bool, got"):
        flexcore.FlexConfig(static=value)


# ---------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("kind", ["llama", pytest.param("llava", marks=pytest.mark.slow)])
def test_generate_compiles_a_static_step_as_one_graph(kind):
    inputs, (backend, graphs) = batch(kind, MIXED), counting()
    compiled = CompileConfig(backend=backend, fullgraph=True, mode=None)
    compiled._compile_all_devices = True  # transformers compiles on accelerators only unless told so
    expected, logits = decode(wrapped(kind), inputs)
    settings = {"cache_implementation": "static", "compile_config": compiled}
    out, found = decode(wrapped(kind, static=True), inputs, **settings)
    assert len(graphs) == 1
    assert torch.equal(out.sequences, expected.sequences) and float((found - logits).abs().max()) < 5e-5


def test_a_step_over_a_growing_cache_compiles_without_a_break():
    inputs, (backend, graphs) = batch("llama", MIXED), counting()
    model = wrapped("llama", layers=4, static=True)
    found = steps(model, inputs, torch.compile(model, backend=backend, fullgraph=True))
    assert 1 <= len(graphs) <= 3  # the second is for a length that may vary
    assert float((found - steps(wrapped("llama", layers=4), inputs)).abs().max()) < 5e-5


@pytest.mark.slow
def test_inductor_gives_the_same_step():
    inputs, model = batch("llama", [Sample()]), wrapped("llama", layers=3, static=True)
    found = steps(model, inputs, torch.compile(model, fullgraph=True, dynamic=True), n=2)
    assert float((found - steps(wrapped("llama", layers=3), inputs, n=2)).abs().max()) < 5e-5


@pytest.mark.parametrize("kind", KINDS)
def test_without_media_forward_compiles_as_one_graph(kind):
    model, inputs, (backend, graphs) = wrapped(kind), plain(batch(kind, MIXED)), counting()
    expected = forward(model, inputs)  # in its first call transformers installs hooks under a lock
    with torch.no_grad():
        found = torch.compile(model, backend=backend, fullgraph=True)(**inputs).logits
    assert torch.equal(found, expected) and len(graphs) == 1


@pytest.mark.parametrize("static", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_forward_with_media_is_right_if_in_pieces(static):
    model, inputs = wrapped("llama", layers=4, static=static), batch("llama", [Sample()])
    expected, compiled = forward(model, inputs), torch.compile(model, backend=counting()[0])
    with torch.no_grad():
        assert torch.equal(compiled(**inputs).logits, expected)
        assert not torch.equal(compiled(**plain(inputs)).logits, expected)


@pytest.mark.slow
def test_a_compiled_training_step_has_the_same_gradients():
    model, inputs = wrapped("llama", layers=4).train(), training_inputs("llama")
    expected = gradients(model, inputs, use_cache=False)
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(**inputs, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-5)


def test_export_takes_a_wrapped_model_without_media_and_refuses_media():
    model, inputs = wrapped("llama", layers=4), batch("llama", [Sample()])
    text = {"input_ids": inputs["input_ids"], "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), text, strict=False)
    assert torch.equal(program.module()(**text).logits, forward(model, text))
    with torch.no_grad(), pytest.raises(ValueError, match=r"Unsupported input type .*StreamBatch"):
        torch.export.export(model, (), {**text, "flex_streams": inputs["flex_streams"]}, strict=False)
