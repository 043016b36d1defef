"""A photograph through adapter, wrapped LLaVA and generate: batches, margins, memory of tiles, threads."""

from __future__ import annotations

import threading

import pytest
import torch
from PIL import Image

import flexcore
from flexcore.hf.tiny import tiny_llava

PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


@pytest.fixture
def model():
    model, processor = tiny_llava()
    flexcore.wrap(model, flexcore.FlexConfig(first_layer=1, selector="top_k", top_k=2, region_size=3))
    with torch.no_grad():
        for parameter in model.flex_fine.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, processor


def answer(model, inputs, **kwargs):
    settings = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "suppress_tokens": [3],
        **kwargs,
    }
    return model.generate(**inputs, **settings)


def without(inputs, *names):
    return {k: v for k, v in inputs.items() if k not in names}


def test_on_demand_answers_as_up_front(model, photo):
    images = [Image.open(photo("coffee.png")), photo("chelsea.png")]
    outs, kinds = [], set()
    for lazy in (True, False):
        adapter = flexcore.load_adapter("image", *model, zoom=3, lazy=lazy)
        inputs = adapter(text=[PROMPT, PROMPT + " In short:"], images=images)
        outs.append(answer(model[0], inputs, output_logits=True, return_dict_in_generate=True))
        kinds.add(type(inputs["flex_streams"].samples[0][0].source))
    assert len(kinds) == 2 and torch.equal(outs[0].sequences, outs[1].sequences)
    for a, b in zip(outs[0].logits, outs[1].logits, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    plain = answer(
        model[0], without(inputs, "flex_streams"), output_logits=True, return_dict_in_generate=True
    )
    assert float((plain.logits[0] - outs[0].logits[0]).abs().max()) > 1e-3


def test_a_mixed_batch_equals_its_samples_alone(model, photo):
    adapter = flexcore.load_adapter("image", *model, zoom=2)
    one, two = Image.open(photo("coffee.png")), Image.open(photo("chelsea.png")).resize((90, 200))
    texts = [PROMPT, "USER: Hello? ASSISTANT:", "USER: <image><image>\nSame? ASSISTANT:"]
    images = [[one], [], [two, one]]
    together = adapter(text=texts, images=images)
    found = answer(model[0], together, output_logits=True, return_dict_in_generate=True)
    for row, (text, own) in enumerate(zip(texts, images, strict=True)):
        alone = adapter(text=[text], images=[own])
        expected = answer(model[0], alone, output_logits=True, return_dict_in_generate=True)
        for a, b in zip(found.logits, expected.logits, strict=True):
            assert float((a[row] - b[0]).abs().max()) < 5e-5


def test_margins_are_never_read(model, photo):
    wide = Image.open(photo("coffee.png")).resize((300, 100))
    adapter = flexcore.load_adapter("image", *model, zoom=3)
    inputs = adapter(text=[PROMPT], images=[wide])
    (stream,) = inputs["flex_streams"].samples[0]
    with flexcore.trace(model[0]) as trace:
        answer(model[0], inputs)
    looked = trace.looked_at() > 0
    rows = stream.grid.fine_valid.view(stream.grid.fine)[:, 0]
    assert not bool(rows[:5].any()) and bool(rows[6:12].all())
    margin = ~stream.selectable
    assert bool(margin.any()) and not bool(looked[margin].any()) and bool(looked[~margin].any())
    overlay = trace.overlay(wide)
    assert overlay.size == wide.size


def test_fewer_regions_means_fewer_tiles(model, photo):
    adapter = flexcore.load_adapter("image", *model, zoom=9)
    inputs = adapter(text=[PROMPT], images=[photo("coffee.png")])
    (stream,) = inputs["flex_streams"].samples[0]
    answer(model[0], inputs, max_new_tokens=1, min_new_tokens=1)
    # two regions a layer, each within one tile
    assert 0 < stream.source.stats.units <= 2 * len(model[0].flex_config.layers) < stream.source.n_tiles == 81


def test_one_set_of_inputs_serves_two_threads(model, photo):
    adapter = flexcore.load_adapter("image", *model, zoom=3, tile_cache_bytes=20_000)
    inputs = adapter(text=[PROMPT], images=[photo("coffee.png")])
    expected = answer(model[0], inputs)
    found = []
    threads = [threading.Thread(target=lambda: found.append(answer(model[0], inputs))) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 3 and all(torch.equal(f, expected) for f in found)


@pytest.mark.parametrize("aspect", ["pad", "native"])
def test_a_pyramid_opens_finer_tiles_where_it_read(model, photo, aspect):
    images = [Image.open(photo("coffee.png")), photo("chelsea.png")]
    outs = []
    for lazy in (True, False):
        adapter = flexcore.load_adapter("image", *model, zoom=(2, 4, 8), aspect=aspect, lazy=lazy)
        inputs = adapter(text=[PROMPT, PROMPT + " In short:"], images=images)
        with flexcore.trace(model[0]) as trace:
            outs.append(answer(model[0], inputs, output_logits=True, return_dict_in_generate=True))
        stream = inputs["flex_streams"].samples[0][0]
        assert [level.grid.coarse for level in stream.levels] == [(6, 6)] * 3
        if lazy:
            levels = [level.source for level in stream.levels]
            assert "image 1" in inputs["flex_streams"].samples[1][0].finer.source.describe(0)
            assert levels[0].encoder is levels[2].encoder and levels[0].stats.units > 0
            # of level 2 only what some row chose was encoded, far from everything
            chosen = torch.stack([r.regions for r in trace.where(level=2, sample=0, request=0)]).any(dim=0)
            assert 0 < int(chosen.sum()) < stream.finer.grid.n_regions // 2
            assert levels[0].stats.units < sum(source.n_tiles for source in levels)
    for a, b in zip(outs[0].logits, outs[1].logits, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    flat = flexcore.load_adapter("image", *model, zoom=2, aspect=aspect)
    one_level = answer(
        model[0],
        flat(text=[PROMPT, PROMPT + " In short:"], images=images),
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert (
        max(float((a - b).abs().max()) for a, b in zip(one_level.logits, outs[0].logits, strict=True)) > 1e-3
    )


@pytest.mark.parametrize("zoom", [(), (3, 3), (9, 3), (0, 3), (3, "9")])
def test_levels_of_a_pyramid_must_rise(model, zoom):
    with pytest.raises(ValueError, match="zoom"):
        flexcore.load_adapter("image", *model, zoom=zoom)
