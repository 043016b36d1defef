"""Generation: every decoding mode, what is projected when, and state that never leaks between requests."""

from __future__ import annotations

import copy

import pytest
import torch

import flexcore
from flexcore.errors import SourceError
from flexcore.hf.kv_cache import cache_argument
from flexcore.hf.wrapped import ON_CACHE
from flexcore.tiled_source import TiledSource, UnitEncoder

from .helpers import GRID, KINDS, WIDE, Sample, batch, forward, generate, lazy, make, plain, wrapped


def request_of(out):
    return getattr(out.past_key_values, ON_CACHE)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached_and_static(kind):
    model, inputs = wrapped(kind), batch(kind, [Sample(), Sample(grids=[WIDE], before=9)])
    dynamic = generate(model, inputs)
    assert torch.equal(generate(model, inputs, use_cache=False), dynamic)
    assert torch.equal(generate(model, inputs, cache_implementation="static"), dynamic)
    assert not torch.equal(generate(model, plain(inputs)), dynamic)


def test_prompt_lookup_verifies_and_crops():
    model, inputs = wrapped("llama"), batch("llama", [Sample()])
    expected = generate(model, inputs, new=16)
    assert torch.equal(generate(model, inputs, new=16, prompt_lookup_num_tokens=3), expected)
    assert not torch.equal(generate(model, plain(inputs), new=16), expected)


def test_assisted_decoding():
    model, inputs = wrapped("llama"), batch("llama", [Sample()])
    expected = generate(model, inputs, new=12)
    assistant = make("llama", seed=5, layers=2)
    settings = {"assistant_model": assistant, "min_new_tokens": 0}
    assert torch.equal(generate(model, inputs, new=12, **settings), expected)


@pytest.mark.parametrize("size", [7, 20])
def test_chunked_prefill(size):
    model, inputs = wrapped("llama"), batch("llama", [Sample(), Sample(before=9, seed=2)])
    assert torch.equal(generate(model, inputs, prefill_chunk_size=size), generate(model, inputs))


def test_sampling_returns_several_sequences():
    model, inputs = wrapped("llava"), batch("llava", [Sample(), Sample(grids=[], seed=1)])
    outs = []
    for cache in (True, False):
        torch.manual_seed(3)
        outs.append(generate(model, inputs, do_sample=True, num_return_sequences=3, use_cache=cache))
    assert torch.equal(*outs) and outs[0].shape[0] == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_no_region_is_projected_twice(kind, beams):
    model, inputs = wrapped(kind), batch(kind, [Sample(), Sample(seed=1)])
    out = generate(model, inputs, new=10, num_beams=beams, return_dict_in_generate=True)
    kv = request_of(out).kv
    assert set(kv.projected.values()) == {1} and kv.hits > len(kv.projected)
    assert {layer for layer, _, _ in kv.projected} == set(model.flex_config.layers)


@pytest.mark.parametrize("budget", [0, 20_000, 100_000])
def test_a_small_budget_changes_memory_not_answers(budget):
    inputs = batch("llama", [Sample(), Sample(seed=1)])
    expected = generate(wrapped("llama"), inputs, new=8)
    out = generate(wrapped("llama", fine_cache_bytes=budget), inputs, new=8, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    kv = request_of(out).kv
    assert kv.bytes <= budget
    assert max(kv.projected.values()) > 1


def test_a_second_turn_projects_nothing_twice_and_equals_one_run_from_scratch():
    model = wrapped("llama")
    first = batch("llama", [Sample()])
    out = generate(model, first, return_dict_in_generate=True)
    seen = dict(request_of(out).kv.projected)
    question = torch.randint(4, 97, (1, 7), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([out.sequences, question], dim=1)
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # the same readout rows, without a cache: turn 1's prompt end and answer, then turn 2's prompt end
    prompt, answered = first["input_ids"].shape[1], out.sequences.shape[1]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, prompt - 1 : answered - 1] = True
    mask[:, -1] = True
    streams = first["flex_streams"]
    expected = generate(model, {**second, "flex_streams": streams}, use_cache=False, readout_mask=mask)
    for media in (
        {},
        {"flex_streams": streams},
        {"flex_streams": batch("llama", [Sample()])["flex_streams"]},
    ):
        cache = copy.deepcopy(out.past_key_values)
        again = generate(
            model, {**second, **media}, **cache_argument(model, cache), return_dict_in_generate=True
        )
        assert torch.equal(again.sequences, expected)
        projected = request_of(again).kv.projected
        assert set(projected.values()) == {1} and set(seen) <= set(projected)
    # the deep copies shared the first turn's pages without touching them
    assert dict(request_of(out).kv.projected) == seen


def test_a_second_turn_may_bring_another_medium():
    model = wrapped("llama")
    whole = batch("llama", [Sample(grids=[GRID, WIDE])])
    streams = whole["flex_streams"].samples[0]
    cut = int(streams[1].coarse_positions[0]) - 1
    first = {
        "input_ids": whole["input_ids"][:, :cut],
        "flex_streams": flexcore.StreamBatch(((streams[0],),)),
    }
    with torch.no_grad():
        out = model(**first, use_cache=True)
        rest = whole["input_ids"][:, cut:]
        rows = torch.zeros(1, whole["input_ids"].shape[1], dtype=torch.bool)
        rows[0, -1] = True
        found = model(
            input_ids=rest,
            **cache_argument(model, out.past_key_values),
            flex_streams=whole["flex_streams"],
            readout_mask=rows,
        ).logits[0, -1]
    rows[0, cut - 1] = True
    expected = forward(model, whole, readout_mask=rows)[0, -1]
    assert float((found - expected).abs().max()) < 5e-5


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_into_a_text_only_prompt(kind):
    model = wrapped(kind)
    generate(model, batch(kind, [Sample()]))
    text = {"input_ids": torch.arange(5, 30)[None]}
    assert torch.equal(forward(model, text), forward(make(kind), text))
    assert torch.equal(generate(model, text), generate(make(kind), text))


def test_a_reset_cache_forgets_its_media():
    model, inputs = wrapped("llama"), batch("llama", [Sample()])
    out = generate(model, inputs, cache_implementation="static", return_dict_in_generate=True)
    cache = out.past_key_values
    cache.reset()
    text = {"input_ids": torch.arange(5, 30)[None]}
    with torch.no_grad():
        found = model(**text, **cache_argument(model, cache)).logits
        cache.reset()
        expected = make("llama")(**text, **cache_argument(model, cache)).logits
    assert torch.equal(found, expected)


class BrokenSource(flexcore.TensorSource):
    """Fails after a number of calls."""

    left = 3

    def features(self, regions):
        self.left -= 1
        if self.left < 0:
            raise OSError("the scan went away")
        return super().features(regions)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_call_is_right_after_an_error_in_the_middle(kind):
    model, inputs = wrapped(kind), batch(kind, [Sample()])
    expected = generate(model, inputs)
    with pytest.raises(OSError, match="went away"):
        generate(model, batch(kind, [Sample()], source=BrokenSource))
    assert torch.equal(generate(model, inputs), expected)
    text = {"input_ids": torch.arange(5, 30)[None]}
    assert torch.equal(forward(model, text), forward(make(kind), text))
    flexcore.unwrap(model)  # nothing is left running


def test_no_rewiring_while_a_request_runs():
    model = wrapped("llama")
    errors = []

    def meddle(regions):
        for act in (flexcore.unwrap, flexcore.wrap, lambda m: m.load_adapter_weights("nowhere")):
            with pytest.raises(flexcore.WrapStateError) as caught:
                act(model)
            errors.append(str(caught.value))
        return whole.features(regions)

    whole = flexcore.TensorSource(torch.randn(GRID.n_fine, 64), GRID)
    inputs = batch("llama", [Sample()], source=lambda f, g: flexcore.OnDemandSource(meddle, g, 64))
    generate(model, inputs, new=1)
    assert any("running" in e for e in errors) and any("wrapped already" in e for e in errors)
    flexcore.unwrap(model)


def test_inputs_are_reusable_and_nothing_is_kept_on_modules():
    model, inputs = wrapped("llava"), batch("llava", [Sample()], source=lazy)
    before = {n: sorted(vars(m)) for n, m in model.named_modules()}
    first = generate(model, inputs)
    assert torch.equal(generate(model, inputs), first)
    after = {n: sorted(vars(m)) for n, m in model.named_modules()}
    changed = {n for n in after if before[n] != after[n]}
    assert all("vision_tower" in n for n in changed)  # transformers' own capture hooks


def test_weights_that_change_within_a_request_are_noticed():
    model, inputs = wrapped("llama"), batch("llama", [Sample()])
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        token = out.logits[:, -1].argmax(-1)[:, None]
        for parameter in model.flex_fine.parameters():
            parameter.mul_(1.5)
        found = model(input_ids=token, **cache_argument(model, copy.deepcopy(out.past_key_values))).logits
        request_of(out).kv.clear()
        expected = model(input_ids=token, **cache_argument(model, out.past_key_values)).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    inputs = batch(kind, [Sample(), Sample(grids=[], seed=3)])
    expected = forward(wrapped(kind, selector="all"), inputs)  # rounding may turn another selector's choice
    model = wrapped(kind, selector="all", model=make(kind).to(torch.bfloat16))
    half = {k: v.to(torch.bfloat16) if k == "pixel_values" else v for k, v in inputs.items()}
    found, off = forward(model, half), forward(model, plain(half))
    assert found.dtype == torch.bfloat16 and bool(found.isfinite().all())
    assert torch.equal(found[1], off[1])
    # as near to float32 as the plain model in bfloat16 is to the plain one in float32
    base = (off.float() - forward(make(kind), plain(inputs))).abs()[0, -1].mean()
    assert float((found.float() - expected).abs()[0, -1].mean()) < 3 * float(base)
    assert generate(model, half, new=4).shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_backends_agree(attention):
    inputs = batch("llava", [Sample(), Sample(grids=[WIDE], before=9)])
    expected = forward(wrapped("llava"), inputs)
    model = make("llava")
    model.set_attn_implementation(attention)
    found = forward(wrapped("llava", model=model), inputs)
    valid = inputs["attention_mask"].bool()
    assert float((found - expected)[valid].abs().max()) < 5e-5
    flexcore.unwrap(model)
    assert model.get_decoder().config._attn_implementation == attention


class PoisonedSource(flexcore.TensorSource):
    """Leaves NaN in every row that must not be read."""

    def features(self, regions):
        out = super().features(regions)
        tokens = self.grid.tokens(regions)
        dead = (tokens < 0) | ~self.grid.fine_valid[tokens.clamp(min=0)]
        return out.masked_fill(dead[..., None], float("nan"))


@pytest.mark.parametrize("selector", ["all", "top_k"])
def test_what_must_not_be_read_never_reaches_an_output(selector):
    model = wrapped("llama", selector=selector)
    samples = [Sample(grids=[WIDE]), Sample(grids=[GRID, WIDE], seed=1)]
    clean, poisoned = batch("llama", samples), batch("llama", samples, source=PoisonedSource)
    assert torch.equal(forward(model, poisoned), forward(model, clean))


def tiled(grid, encoder, key):
    return TiledSource(grid, (6, 6), encoder, key, f"scan {key}")


def test_a_batch_encodes_in_common_micro_batches_and_skips_what_cannot_be_read():
    features = [torch.randn(GRID.n_fine, 64, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    calls, broken = [], set()

    def encode(units):
        calls.append(len(units))
        if broken & set(units):
            raise OSError("unreadable block")
        maps = [features[k].view(3, 6, 3, 6, 64).transpose(1, 2).reshape(9, 36, 64)[u] for k, u in units]
        return torch.stack(maps)

    def inputs(on_error="raise"):
        encoder = UnitEncoder(encode, 64, micro_batch=4, on_error=on_error)
        keys = iter(range(2))
        return batch("llama", [Sample(), Sample(seed=1)], source=lambda f, g: tiled(g, encoder, next(keys)))

    eager = batch("llama", [Sample(), Sample(seed=1)])
    for sample, own in zip(eager["flex_streams"].samples, features, strict=True):
        sample[0].source.tensor = own
    model = wrapped("llama", selector="top_k", top_k=3)
    assert torch.equal(forward(model, inputs()), forward(model, eager))
    assert max(calls) == 4 and sum(calls) <= 18

    everything = wrapped("llama", selector="all")
    broken |= {(0, 4), (1, 0)}
    with pytest.raises(SourceError, match=r"scan 0, tile 4 of 9 can't be read: unreadable block"):
        forward(everything, inputs())
    with pytest.warns(UserWarning, match="it is left out"), flexcore.trace(everything) as trace:
        found = forward(everything, inputs("skip"))
    # the same as never having had those tiles
    streams = []
    for sample, lost in zip(eager["flex_streams"].samples, (4, 0), strict=True):
        valid = torch.ones(3, 3, 6, 6, dtype=torch.bool)
        valid[lost // 3, lost % 3] = False
        valid = valid.transpose(1, 2).reshape(-1)
        streams.append((flexcore.FineStream(GRID, sample[0].coarse_positions, valid, sample[0].source),))
    expected = forward(everything, {**eager, "flex_streams": flexcore.StreamBatch(tuple(streams))})
    assert torch.equal(found, expected)
    lost = ~trace.where(sample=0, layer=4)[0].regions
    assert int(lost.sum()) == 4  # the tile's four regions, once they were known to be unreadable
    broken.clear()


@pytest.mark.slow
def test_a_quantised_cache():
    pytest.importorskip("optimum.quanto", reason="transformers' quantised cache needs optimum-quanto")
    inputs = batch("llama", [Sample()])
    rounded = {"backend": "quanto", "nbits": 4, "residual_length": 8, "q_group_size": 16}
    settings = {"cache_implementation": "quantized", "cache_config": rounded}
    off = generate(make("llama"), plain(inputs), **settings)
    assert torch.equal(generate(wrapped("llama", fraction=0.0), inputs, **settings), off)
    out = generate(wrapped("llama"), inputs, **settings, return_dict_in_generate=True)
    assert set(request_of(out).kv.projected.values()) == {1}
    assert out.sequences.shape == off.shape and not torch.equal(out.sequences, off)
