"""Short ways of the decode step and of projecting, each against the long way that it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import flexcore
from flexcore.hf import binding as binding_module
from flexcore.hf import interface, projection
from flexcore.hf.context import FlexContext
from flexcore.hf.kv_cache import cache_argument, cache_of
from flexcore.hf.plain_attention import sdpa_step
from flexcore.hf.site import rotary_tables
from flexcore.hf.weights_version import WeightsVersion, walked_version
from flexcore.hf.wrapped import ON_CACHE

from .helpers import GRID, Sample, batch, forward, generate, make, wrapped

# ---------------------------------------------------------------------- weights


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 2, bias=False)})


def in_place(model: Nested) -> None:
    with torch.no_grad():
        model.inner["b"].weight.add_(1)


def other_data(model: Nested) -> None:
    model.inner["a"].bias.data = torch.ones(2)


def other_parameter(model: Nested) -> None:
    model.inner["a"].weight = nn.Parameter(torch.ones(2, 3))


def other_module(model: Nested) -> None:
    model.inner["b"] = nn.Linear(2, 2)


def one_more_module(model: Nested) -> None:
    model.inner["a"].adapter = nn.Linear(2, 2)


def one_more_parameter(model: Nested) -> None:
    model.inner["b"].bias = nn.Parameter(torch.zeros(2))


def one_less(model: Nested) -> None:
    del model.inner["b"]


def a_step(model: Nested) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


CHANGES = (
    in_place,
    other_data,
    other_parameter,
    other_module,
    one_more_module,
    one_more_parameter,
    one_less,
    a_step,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_are_noticed_without_walking(change):
    model, other, version = Nested(), nn.Linear(2, 2), WeightsVersion()
    kept = list(model.parameters())  # or a freed parameter's memory may be given to the next one
    before = version.of([model, other])
    assert before == version.of([model, other]) == walked_version([*model.parameters(), *other.parameters()])
    change(model)
    after = version.of([model, other])
    assert before != after == walked_version([*model.parameters(), *other.parameters()])
    assert kept


def test_other_modules_are_another_version():
    a, b, version = nn.Linear(2, 2), nn.Linear(2, 2), WeightsVersion()
    assert version.of([a]) != version.of([b]) and version.of([a, b]) == version.of([a]) + version.of([b])


# ---------------------------------------------------------------------- projecting


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_keys_turned_where_they_lie_are_the_layers_own(kind, dtype):
    model = wrapped(kind, layers=4).to(dtype)
    binding = model._flex_binding
    layer = max(binding.reads_from)
    site, replaced = binding.sites[layer], binding.fine.at(layer).modules_by_name()
    features = torch.randn(1, 37, binding.width, dtype=dtype)
    at = torch.randint(0, 90, (1, 37))
    with torch.no_grad():
        tables = rotary_tables(site.rotary, features, at)
        assert projection._plain(site, replaced, features, tables)
        found = projection._turned(replaced, features, tables)
        expected = projection._captured(site, replaced, features, at, tables)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and float((f - e).abs().max()) < 1e-5
    assert not projection._plain(site, replaced, features, tables), "autograd keeps the layer's own code"
    with torch.no_grad(), torch.autocast("cpu"):
        assert not projection._plain(site, replaced, features, tables)


@pytest.mark.parametrize("media", [[GRID], [GRID, GRID]], ids=["one", "two"])
def test_projecting_in_runs_is_projecting_at_once(media, monkeypatch):
    inputs, outputs, parts = batch("llama", [Sample(grids=media)]), [], []
    whole = binding_module.FlexBinding.parts
    monkeypatch.setattr(
        binding_module.FlexBinding, "parts", lambda *a: (parts.append(whole(*a)), parts[-1])[1]
    )
    for tokens in (1 << 20, 5):
        monkeypatch.setattr(binding_module, "PART_TOKENS", tokens)
        parts.clear()
        with torch.no_grad():
            outputs.append(forward(wrapped("llama", selector="all"), inputs))
        assert (max(map(len, parts)) > 1) == (tokens == 5)
    assert float((outputs[0] - outputs[1]).abs().max()) < 1e-5


# ---------------------------------------------------------------------- decoding


def test_a_step_that_chooses_as_the_last_one_did_reads_the_same_regions(monkeypatch):
    """With what is remembered between steps, and with nothing remembered: the same bits."""
    logits = []
    for remember in (True, False):
        model, inputs = wrapped("llama"), batch("llama", [Sample()])
        with torch.no_grad():
            out = model(**inputs, use_cache=True)
            cache = cache_of(out)
            request, steps = getattr(cache, ON_CACHE), []
            for token in (5, 5, 5, 9, 5):
                if not remember:
                    request.picks.clear()
                    request.kv._joined.clear()
                steps.append(model(torch.tensor([[token]]), **cache_argument(model, cache)).logits)
        assert request.picks and request.kv._joined
        logits.append(torch.cat(steps))
    assert torch.equal(*logits)


def test_what_was_picked_is_forgotten_with_the_media_and_not_shared_with_a_copy():
    model, inputs = wrapped("llama"), batch("llama", [Sample()])
    with torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
        model(torch.tensor([[5]]), **cache_argument(model, cache))
    request = getattr(cache, ON_CACHE)
    assert request.picks and not copy.deepcopy(request).picks
    request.adopt(flexcore.StreamBatch(request.streams.samples), past=10_000)
    assert not request.picks


def test_keys_for_selectors_are_layer_and_row_from_the_medium_on():
    model, inputs = wrapped("llama"), batch("llama", [Sample(grids=[GRID, GRID])])
    with torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
    request, binding = getattr(cache, ON_CACHE), model._flex_binding
    past = cache.get_seq_length()
    for length, at in ((1, past), (1, past + 3), (2, past)):
        context = FlexContext(binding, request, at, length, 1, 1.0)
        for m, stream in enumerate(request.samples[0].media):
            first = int(stream.coarse_positions[0])
            keys = context._keys(0, m, torch.device("cpu"))
            for layer in binding.sites:
                rows = [[layer, at + i - first] for i in range(length)]
                assert keys[layer].tolist() == rows


@pytest.mark.parametrize("batches, heads, keys, width", [(1, 8, 640, 64), (3, 2, 1, 16), (2, 5, 77, 40)])
def test_a_steps_attention_is_the_backends_own_bit_for_bit(batches, heads, keys, width):
    q = torch.randn(batches, heads, 1, width)
    k, v = torch.randn(2, batches, keys, heads, width).transpose(2, 3)
    layer = nn.Module()
    for scaling in (None, 0.3):
        with torch.no_grad():
            out, lse = sdpa_step(q, k, v, None, 0.0, scaling, {})
            plain, _ = sdpa_attention_forward(layer, q, k, v, None, scaling=scaling)
        assert torch.equal(out, plain) and out.stride() == plain.stride()
        logits = q @ k.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
        assert float((lse - logits.logsumexp(-1)).abs().max()) < 1e-5


def test_what_the_backend_would_do_otherwise_is_left_to_it():
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 7, 16)
    with torch.no_grad():
        assert sdpa_step(q, k, k, None, 0.0, None, {}) is not None
        for args in (
            (q, k, k, torch.ones(1, 1, 1, 7, dtype=torch.bool), 0.0, None, {}),
            (q, k, k, None, 0.1, None, {}),
            (q.expand(-1, -1, 2, -1), k, k, None, 0.0, None, {}),
            (q, k[:, :1], k[:, :1], None, 0.0, None, {}),
            (q.double(), k.double(), k.double(), None, 0.0, None, {}),
            (q, k, k, None, 0.0, None, {"position_bias": torch.zeros(1, 2, 1, 7)}),
        ):
            assert sdpa_step(*args) is None
        with sdpa_kernel(SDPBackend.MATH):
            assert sdpa_step(q, k, k, None, 0.0, None, {}) is None
    assert sdpa_step(q, k, k, None, 0.0, None, {}) is None, "under autograd"


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_steps_with_the_backends_log_sum_exp_and_with_our_own(kind, monkeypatch):
    found, taken = [], []
    step = interface.sdpa_step
    for own in (False, True):
        monkeypatch.setattr(
            interface,
            "sdpa_step",
            (lambda *a: None) if own else (lambda *a: (taken.append(step(*a)), taken[-1])[1]),
        )
        model, inputs = wrapped(kind, model=make(kind, kv_heads=4)), batch(kind, [Sample()])
        with torch.no_grad():
            cache = cache_of(model(**inputs, use_cache=True))
            steps = [model(torch.tensor([[t]]), **cache_argument(model, cache)).logits for t in (5, 7, 9)]
        found.append(torch.cat(steps))
    assert float((found[0] - found[1]).abs().max()) < 5e-5
    binding = model._flex_binding
    assert binding.busy == binding.selecting | set(binding.reads_from)
    assert len(taken) == 3 * len(binding.busy) and not any(t is None for t in taken)


@pytest.mark.parametrize("cache", [True, False])
def test_no_forward_draws_from_the_global_generator(cache):
    # what a sampling user seeded decides alone; the first forward tries layers out on random weights
    model, inputs = wrapped("llava"), batch("llava", [Sample()])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    generate(model, inputs, new=3, use_cache=cache)
    assert torch.equal(torch.get_rng_state(), before)
