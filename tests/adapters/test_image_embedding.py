"""The image adapter for text-only models: a tiny Llama behind tiny CLIP, SigLIP and DINOv2 towers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import nn

import flexcore
from flexcore.errors import StreamError, UnsupportedModelError
from flexcore.hf.tiny import tiny_llama, tiny_tokenizer
from flexcore.sources import FineSource, TensorSource
from flexcore.tiled_source import TiledSource
from flexcore_adapters.image import ImageAdapter
from flexcore_adapters.image_embedding import EmbeddingImageAdapter
from tests.hf.helpers import forward, naive_forward, perturb, plain

WIDTH, PATCH, CELLS = 64, 8, 6
SIDE = PATCH * CELLS
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"
TOLERANCE, CONTROL = 5e-5, 1e-3
FIXED = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DINO = {"hidden_size": 32, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 4}

# Config, model, their fields, features before the map's.
TOWERS: dict[str, tuple[Any, Any, dict[str, Any], int]] = {
    "clip": (hf.CLIPVisionConfig, hf.CLIPVisionModel, FIXED, 1),
    "siglip": (hf.SiglipVisionConfig, hf.SiglipVisionModel, {**FIXED, "vision_use_head": False}, 0),
    "dinov2": (hf.Dinov2Config, hf.Dinov2Model, DINO, 1),
    "dinov2 with registers": (
        hf.Dinov2WithRegistersConfig,
        hf.Dinov2WithRegistersModel,
        {**DINO, "num_register_tokens": 4},
        5,
    ),
}


def tower_of(name: str, side: int = SIDE) -> Any:
    make_config, make, fields, _ = TOWERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = make(make_config(image_size=side, patch_size=PATCH, **fields)).eval()
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.normal_(std=0.2)
    return tower


def image_processor(side: int = SIDE) -> Any:
    cls = getattr(hf, "CLIPImageProcessorPil", None) or hf.CLIPImageProcessor
    return cls(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


@pytest.fixture(scope="module")
def model() -> Any:
    config = flexcore.FlexConfig(first_layer=1, selector="top_k", top_k=3, region_size=3)
    return perturb(flexcore.wrap(tiny_llama(layers=4, vocab=260), config))


def adapter_of(model: Any, name: str = "clip", **options: Any) -> EmbeddingImageAdapter:
    """An adapter whose projector is always the same."""
    torch.manual_seed(1)
    given = {"tower": tower_of(name), "image_processor": image_processor(), "zoom": 2, **options}
    return flexcore.load_adapter("image", model, tiny_tokenizer(), **given)


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


TEXTS = [PROMPT, "USER: Hello? ASSISTANT:", "USER: <image> or <image>? ASSISTANT:"]
MEDIA = [[noise((150, 97), 1)], [], [noise((61, 143), 2), noise((90, 90), 3)]]


def features_of(source: FineSource) -> torch.Tensor:
    regions = torch.arange(source.grid.n_regions)
    tokens = source.grid.tokens(regions)
    out = torch.full((source.grid.n_fine, source.width), float("nan"))
    out[tokens[tokens >= 0]] = source.features(regions)[tokens >= 0]
    return out


def encoded(adapter: Any, name: str, view: Image.Image) -> torch.Tensor:
    """`[H, W, C]` features of a picture of whole tiles, by a loop: each tile alone through tower and projector."""
    rows, cols = view.height // SIDE, view.width // SIDE
    out = torch.full((rows * CELLS, cols * CELLS, WIDTH), float("nan"))
    for r in range(rows):
        for c in range(cols):
            tile = view.crop((c * SIDE, r * SIDE, (c + 1) * SIDE, (r + 1) * SIDE))
            pixels = image_processor()(tile, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                patches = adapter.tower(pixel_values=pixels).last_hidden_state[0, TOWERS[name][3] :]
                part = adapter.projector(patches).view(CELLS, CELLS, -1)
            out[r * CELLS : (r + 1) * CELLS, c * CELLS : (c + 1) * CELLS] = part
    return out


def answer(model: Any, inputs: Any, new: int = 4, **kwargs: Any) -> torch.Tensor:
    """`[B, new, V]` logits of a generated answer."""
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
    return torch.stack(model.generate(**inputs, **{**settings, **kwargs}).logits, dim=1)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


# ---------------------------------------------------------------------- what the model gets


@pytest.mark.parametrize("name", TOWERS)
def test_both_views_go_through_tower_and_projector(model: Any, name: str) -> None:
    adapter = adapter_of(model, name, aspect="native")
    picture = noise((144, 96))
    inputs = adapter(PROMPT, images=picture)
    ((stream,),) = inputs["flex_streams"].samples
    assert "pixel_values" not in inputs
    coarse = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert gap(stream.coarse_embeds, encoded(adapter, name, coarse).flatten(0, 1)) < 1e-5
    rows, cols = (n // CELLS for n in stream.grid.fine)
    fine = picture.resize((cols * SIDE, rows * SIDE), Image.Resampling.BICUBIC)
    assert gap(features_of(stream.source), encoded(adapter, name, fine).flatten(0, 1)) < 1e-5
    # `<image>` was one token of the prompt and is a token per cell now
    assert inputs["input_ids"].shape[1] == len(tiny_tokenizer()(PROMPT)["input_ids"]) - 1 + CELLS**2


def test_padded_pictures_have_margins_as_in_llava(model: Any) -> None:
    (stream,) = adapter_of(model).streams(noise((150, 50)))
    assert stream.grid.padding == ((1 / 3, 1 / 3), (0.0, 0.0))
    assert not bool(stream.grid.fine_valid.all())


def test_a_tower_of_any_size_takes_the_processors(model: Any) -> None:
    adapter = adapter_of(model, "dinov2", tower=tower_of("dinov2", side=2 * SIDE))
    assert adapter.streams(noise((50, 50)))[0].grid.coarse == (CELLS, CELLS)
    fixed = adapter_of(model, tower=tower_of("clip", side=2 * SIDE))
    assert fixed.streams(noise((50, 50)))[0].grid.coarse == (2 * CELLS, 2 * CELLS)


# ---------------------------------------------------------------------- tiles on demand


def test_tiles_on_demand_equal_tiles_up_front(model: Any) -> None:
    (late,), (early,) = (adapter_of(model, lazy=lazy).streams(noise((150, 97))) for lazy in (True, False))
    assert isinstance(late.source, TiledSource) and isinstance(early.source, TensorSource)
    assert late.grid == early.grid
    assert torch.allclose(features_of(late.source), features_of(early.source), rtol=1e-5, atol=1e-6)


def test_only_tiles_with_chosen_regions_are_encoded(model: Any) -> None:
    adapter = adapter_of(model, zoom=5, micro_batch=3)
    batches: list[int] = []
    hook = adapter.tower.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    try:
        inputs = adapter(PROMPT, images=noise((300, 300)))
        ((stream,),) = inputs["flex_streams"].samples
        assert batches == [1]  # the coarse view
        answer(model, inputs, new=1)
        assert 0 < sum(batches[1:]) == stream.source.stats.units <= 3 * len(model.flex_config.layers) < 25
        assert stream.source.n_tiles == 25 and max(batches) <= 3
    finally:
        hook.remove()


# ---------------------------------------------------------------------- the design's invariants


def test_nothing_selected_is_the_same_as_plain_embeddings() -> None:
    base = tiny_llama(layers=4, vocab=260)
    none = flexcore.FlexConfig(first_layer=1, selector="top_k", fraction=0.0)
    model = perturb(flexcore.wrap(tiny_llama(layers=4, vocab=260), none))
    inputs = adapter_of(model)(PROMPT, images=noise((150, 97)))
    ((stream,),) = inputs["flex_streams"].samples
    embeds = base.get_input_embeddings()(inputs["input_ids"]).detach().clone()
    embeds[0, stream.coarse_positions] = stream.coarse_embeds.detach()
    with torch.no_grad():
        expected = base(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(forward(model, inputs), expected)
    some = perturb(flexcore.wrap(base, flexcore.FlexConfig(first_layer=1, selector="top_k", fraction=0.2)))
    assert gap(forward(some, inputs), expected) > CONTROL


def test_everything_selected_is_the_dense_reference() -> None:
    config = flexcore.FlexConfig(first_layer=1, selector="all", region_size=4)
    model = perturb(flexcore.wrap(tiny_llama(layers=4, vocab=260), config))
    inputs = adapter_of(model, lazy=False)(
        "<image> or <image>?", images=[noise((150, 97)), noise((61, 143), 2)]
    )
    streams = inputs["flex_streams"].samples[0]
    embeds = model.get_input_embeddings()(inputs["input_ids"])[0].detach().clone()
    for stream in streams:
        embeds[stream.coarse_positions] = stream.coarse_embeds.detach()
    expected = naive_forward(model, embeds, streams, [len(embeds) - 1])
    assert gap(forward(model, inputs)[0], expected) < TOLERANCE
    assert gap(expected[-1], forward(model, plain(inputs))[0, -1]) > CONTROL


def test_a_batch_equals_its_samples_alone(model: Any) -> None:
    adapter = adapter_of(model)
    found = answer(model, adapter(TEXTS, images=MEDIA))
    for row, (text, own) in enumerate(zip(TEXTS, MEDIA, strict=True)):
        assert gap(found[row], answer(model, adapter([text], images=[own]))[0]) < TOLERANCE


def test_beams_do_not_depend_on_their_neighbours(model: Any) -> None:
    adapter = adapter_of(model)
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 4, "pad_token_id": 0}
    beams |= {"min_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True}
    found = model.generate(**adapter(TEXTS, images=MEDIA), **beams)
    for row, (text, own) in enumerate(zip(TEXTS, MEDIA, strict=True)):
        alone = model.generate(**adapter([text], images=[own]), **beams)
        assert torch.equal(found.sequences[3 * row : 3 * row + 3, -4:], alone.sequences[:, -4:])
        assert gap(found.sequences_scores[3 * row : 3 * row + 3], alone.sequences_scores) < TOLERANCE


def test_teacher_forcing_equals_decoding(model: Any) -> None:
    inputs = adapter_of(model)(TEXTS, images=MEDIA)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    out = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    labels = torch.full_like(out.sequences, -100)
    labels[:, -4:] = out.sequences[:, -4:]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(TEXTS), 4, dtype=torch.long)], dim=1)
    forced = {**inputs, "input_ids": out.sequences, "attention_mask": mask}
    forced["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    found = forward(model, forced, labels=labels)[:, -5:-1]
    assert gap(found, torch.stack(out.logits, dim=1)) < TOLERANCE


def test_answers_on_demand_are_those_up_front(model: Any) -> None:
    late, early = (answer(model, adapter_of(model, lazy=lazy)(TEXTS, images=MEDIA)) for lazy in (True, False))
    assert torch.allclose(late, early, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("lazy", [True, False])
def test_the_projector_learns_and_the_tower_does_not(model: Any, lazy: bool) -> None:
    adapter = adapter_of(model, lazy=lazy)
    optimizer = torch.optim.Adam(adapter.projector.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        inputs = adapter(PROMPT + " yes", images=noise((150, 97)))
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -4:] = inputs["input_ids"][:, -4:]
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is None for parameter in adapter.tower.parameters())


@pytest.mark.parametrize("lazy", [True, False])
def test_which_features_carry_the_projectors_gradient(model: Any, lazy: bool) -> None:
    adapter = adapter_of(model, lazy=lazy)
    ((stream,),) = adapter(PROMPT, images=noise((150, 97)))["flex_streams"].samples
    assert stream.coarse_embeds.requires_grad
    assert stream.source.features(torch.tensor([0])).requires_grad == (not lazy)
    with torch.no_grad():
        ((stream,),) = adapter(PROMPT, images=noise((150, 97)))["flex_streams"].samples
    assert not stream.coarse_embeds.requires_grad


def test_a_projector_of_ones_own(model: Any) -> None:
    own = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, WIDTH)).double()
    adapter = adapter_of(model, projector=own)
    assert adapter.projector is own
    ((stream,),) = adapter(PROMPT, images=noise((150, 97)))["flex_streams"].samples
    # features take the tower's dtype, whatever the projector works in
    assert stream.coarse_embeds.dtype == stream.source.dtype == torch.float32
    stream.coarse_embeds.sum().backward()
    assert float(own[0].weight.grad.abs().sum()) > 0


def test_a_deep_copy_shares_tower_and_projector(model: Any) -> None:
    adapter = adapter_of(model)
    again = copy.deepcopy(adapter)
    assert again.tower is adapter.tower and again.projector is adapter.projector and again.model is model
    assert again.processor is not adapter.processor


# ---------------------------------------------------------------------- errors


def test_what_is_missing_is_said(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM has none: give one with tower=.*AnyRes"
    ):
        ImageAdapter(model, tokenizer)
    with pytest.raises(ValueError, match="image_processor must be the tower's own"):
        ImageAdapter(model, tokenizer, tower=tower_of("clip"))
    with pytest.raises(
        TypeError, match=r"EmbeddingImageAdapter has no option 'zom'; its options are tower, proj"
    ):
        adapter_of(model, zom=3)
    with pytest.raises(ValueError, match="zoom must be an integer >= 1, got 0"):
        adapter_of(model, zoom=0)
    with pytest.raises(StreamError, match=r"1 <image> placeholder\(s\)"):
        adapter_of(model)(PROMPT, images=MEDIA[2])


def test_towers_and_projectors_that_do_not_fit(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"projector must map .* \[1, 36, 64\] for one tile; got \[1, 36, 63\]"
    ):
        adapter_of(model, projector=nn.Linear(32, 63))
    with pytest.raises(UnsupportedModelError, match=r"with image_size in its config; LlamaForCausalLM has"):
        adapter_of(model, tower=tiny_llama(layers=1))
    swin = hf.SwinModel(
        hf.SwinConfig(
            image_size=SIDE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=3
        )
    )
    with pytest.raises(StreamError, match="tower must make a feature per patch"):
        adapter_of(model, tower=swin)


def test_the_official_lattice_is_refused() -> None:
    official = flexcore.wrap(
        tiny_llama(layers=4, vocab=260), flexcore.FlexConfig(first_layer=1, regions="official")
    )
    with pytest.raises(ValueError, match="EmbeddingImageAdapter takes regions='blocks'"):
        adapter_of(official)(PROMPT, images=noise((150, 97)))
