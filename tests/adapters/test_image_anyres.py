"""The image adapter for AnyRes models, on tiny LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flexcore
from flexcore.errors import SourceError
from flexcore.sources import FineSource, TensorSource
from flexcore.tiled_source import TiledSource
from flexcore_adapters.anyres_tower import overview_of
from flexcore_adapters.image import ImageAdapter
from flexcore_adapters.image_anyres import AnyResImageAdapter, content
from tests.hf.helpers import embeddings, forward, naive_forward, plain

from .anyres_helpers import (
    CELLS,
    IMAGE,
    KINDS,
    PATCH,
    PINPOINTS,
    PROMPT,
    answer,
    marked,
    tiny_anyres,
    wrap,
)

TOLERANCE, CONTROL = 5e-5, 1e-3
TALL, WIDE, SQUARE = (61, 143), (150, 97), (90, 90)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stock(kind: str) -> tuple[Any, Any]:
    """A plain model and its processor."""
    return tiny_anyres(kind)


@pytest.fixture(scope="module")
def model(kind: str) -> tuple[Any, Any]:
    """A wrapped one."""
    model, processor = tiny_anyres(kind)
    return wrap(model), processor


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture in which every place looks different."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


MEDIA = [[noise(WIDE, 1)], [], [noise(TALL, 2), noise(SQUARE, 3)], [noise((300, 20), 4)]]
TEXTS = [PROMPT, "USER: Hello? ASSISTANT:", f"USER: {IMAGE} or {IMAGE}? ASSISTANT:", PROMPT + " In short:"]


def features_of(source: FineSource) -> torch.Tensor:
    """All of a source's features in raster order, asked for region by region."""
    grid = source.grid
    tokens = grid.tokens(torch.arange(grid.n_regions))
    out = torch.full((grid.n_fine, source.width), float("nan"))
    for region in torch.randperm(grid.n_regions).split(5):
        found = source.features(region)
        out[tokens[region][tokens[region] >= 0]] = found[tokens[region] >= 0]
    return out


def steps(out: Any) -> torch.Tensor:
    """`[B, new, V]` logits of a generated answer."""
    return torch.stack(out.logits, dim=1)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# ---------------------------------------------------------------------- the two views


def whole_view(view: Any) -> torch.Tensor:
    """`[3, H, W]` pixels of the fine view, pasted together from its tiles, as the tower gets them."""
    tiles = view.tiles().unflatten(0, (view.rows, view.cols))
    return tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def brightness(pixels: torch.Tensor) -> torch.Tensor:
    """Of every patch of `[3, H, W]` pixels, `[H / PATCH, W / PATCH]`."""
    return pixels[0].float().unflatten(1, (-1, PATCH)).unflatten(0, (-1, PATCH)).mean(dim=(1, 3))


@pytest.mark.parametrize("size", [TALL, WIDE, SQUARE, (210, 30)], ids=str)
@pytest.mark.parametrize("options", [{}, {"zoom": 3}, {"max_tiles": 2}], ids=str)
def test_a_mark_is_seen_at_the_same_place_in_both_views(
    stock: tuple[Any, Any], size: tuple[int, int], options: dict[str, Any]
) -> None:
    adapter = AnyResImageAdapter(*stock, **options)
    for cell in (0, 9, 22, 35):
        row, col = divmod(cell, CELLS)
        # the middle third of a coarse cell, in the picture's pixels
        y, x = (row + 0.5) * size[1] / CELLS, (col + 0.5) * size[0] / CELLS
        dy, dx = max(1.0, size[1] / CELLS / 6), max(1.0, size[0] / CELLS / 6)
        left, top, right, bottom = round(x - dx), round(y - dy), round(x + dx), round(y + dy)
        (view,) = adapter.views([marked(*size, (left, top, right, bottom))])
        coarse = brightness(torch.from_numpy(np.array(view.coarse)).permute(2, 0, 1))
        assert int(coarse.argmax()) == cell
        height, width = view.grid.fine
        fine = brightness(whole_view(view))[:height, :width]
        best = int(fine.argmax())
        # every token that shows something of the mark lies over it, and none but a blur beside it
        for token in (fine > 80).flatten().nonzero().flatten().tolist():
            (r, c), blur = divmod(token, width), 2
            assert r * size[1] / height < bottom + blur and (r + 1) * size[1] / height > top - blur
            assert c * size[0] / width < right + blur and (c + 1) * size[0] / width > left - blur
        if min(height, width) >= CELLS:
            assert int(view.grid.parents(torch.tensor(best))) == cell
        region = view.grid.pool(torch.arange(CELLS**2) == cell).nonzero().flatten()
        assert best in view.grid.tokens(region)  # what is read once the cell is chosen


@pytest.mark.parametrize("size", [TALL, WIDE, SQUARE, (500, 3)], ids=str)
def test_what_lies_beyond_the_picture_is_no_fine_token(stock: tuple[Any, Any], size: tuple[int, int]) -> None:
    white = Image.new("RGB", size, "white")
    (view,) = AnyResImageAdapter(*stock).views([white])
    whole = whole_view(view)
    height, width = view.grid.fine
    inside = whole[:, : height * PATCH, : width * PATCH]
    assert bool((inside == 255).all()) and int(whole.sum()) == int(inside.sum())
    # no tile is empty, and the picture keeps its shape but for less than one token
    assert (view.rows, view.cols) == (-(-height // CELLS), -(-width // CELLS))
    for here, (other, length), across in (
        (height, (width, size[0]), size[1]),
        (width, (height, size[1]), size[0]),
    ):
        if other % CELLS == 0:
            assert abs(here - max(1.0, across * other / length)) <= 0.5
    assert not view.grid.has_margin and bool(view.grid.fine_valid.all())


def test_the_overview_is_the_processors_own(stock: tuple[Any, Any]) -> None:
    model, processor = stock
    adapter = AnyResImageAdapter(model, processor)
    for size in (TALL, WIDE, SQUARE):
        picture = noise(size)
        inputs = adapter(PROMPT, images=picture)
        made = processor.image_processor(picture, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"][0, 0], made["pixel_values"][0, 0])
        # and so is what the model makes of it
        ((stream,),) = inputs["flex_streams"].samples
        with torch.no_grad():
            packed = model.get_image_features(made["pixel_values"], made["image_sizes"]).pooler_output[0]
        seen = embeddings(model, inputs)[0, stream.coarse_positions]
        assert gap(seen, packed[: CELLS**2]) < 1e-5


@pytest.mark.parametrize("pinpoint", PINPOINTS, ids=str)
def test_tiles_of_a_picture_that_fills_its_layout_are_the_models_own(
    stock: tuple[Any, Any], pinpoint: list[int]
) -> None:
    model, processor = stock
    height, width = pinpoint
    picture = noise((width, height))
    (stream,) = AnyResImageAdapter(model, processor).streams(picture)
    assert stream.grid.fine == (height // PATCH, width // PATCH)
    made = processor.image_processor(picture, return_tensors="pt")
    with torch.no_grad():
        packed = model.get_image_features(made["pixel_values"], made["image_sizes"]).pooler_output[0]
    rows = packed[CELLS**2 :].unflatten(0, (height // PATCH, -1))[:, :-1]  # less a newline for each row
    assert gap(features_of(stream.source), rows.flatten(0, 1)) < 1e-5


@pytest.mark.parametrize(
    ("size", "options", "fine"),
    [
        ((96, 48), {}, (6, 12)),
        ((150, 97), {}, (8, 12)),
        ((1000, 1000), {}, (12, 12)),
        ((1000, 1000), {"max_tiles": 2}, (6, 6)),
        ((1000, 1000), {"zoom": 4}, (24, 24)),
        ((40, 40), {"zoom": 2}, (12, 12)),
        ((300, 100), {"zoom": 3}, (6, 18)),
        ((1200, 100), {"zoom": 3}, (4, 54)),
        ((9000, 10), {}, (1, 12)),
    ],
    ids=str,
)
def test_layouts(
    stock: tuple[Any, Any], size: tuple[int, int], options: dict[str, Any], fine: tuple[int, int]
) -> None:
    (stream,) = AnyResImageAdapter(*stock, **options).streams(Image.new("RGB", size))
    assert stream.grid.fine == fine


def test_content_keeps_within_its_layout() -> None:
    for width, height in ((1, 1), (7, 5000), (5000, 7), (333, 334)):
        rows, cols = content(width, height, 12, 18)
        assert 1 <= rows <= 12 and 1 <= cols <= 18 and (rows == 12 or cols == 18)


@pytest.mark.parametrize("cells", [6, 5])
@pytest.mark.parametrize("pinpoints", [None, [[1, 1], [1, 2]], [[2, 1]], [[3, 2]]], ids=str)
def test_any_tower_and_layout_embeds_the_overview_alone(kind: str, cells: int, pinpoints: Any) -> None:
    side = cells * PATCH
    model, processor = tiny_anyres(
        kind, cells, pinpoints and [[side * r, side * c] for r, c in pinpoints], layers=2
    )
    inputs = AnyResImageAdapter(model, processor)(PROMPT, images=noise(WIDE))
    ((stream,),) = inputs["flex_streams"].samples
    overview = overview_of(model, side, cells)
    tokens = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    assert torch.equal(stream.coarse_positions, tokens[: cells**2])
    # newline tokens behind the overview: one in LLaVA-OneVision, none in LLaVA-NeXT where a layout is even
    assert len(tokens) == cells**2 + overview.trail
    even = cells % 2 == 0 or (pinpoints and pinpoints[0][0] % 2 == 0)
    assert overview.trail == 1 if kind == "llava_onevision" else (overview.trail == 0) == bool(even)
    with torch.no_grad():
        model(**plain(inputs))  # it refuses another number of tokens
        made = processor.image_processor(noise(WIDE), return_tensors="pt")
        packed = model.get_image_features(made["pixel_values"], made["image_sizes"]).pooler_output[0]
    assert gap(embeddings(model, inputs)[0, stream.coarse_positions], packed[: cells**2]) < 1e-5


# ---------------------------------------------------------------------- tiles on demand


def test_tiles_on_demand_equal_tiles_up_front(stock: tuple[Any, Any]) -> None:
    for size in (TALL, WIDE):
        (late,), (early,) = (
            AnyResImageAdapter(*stock, lazy=lazy, region_size=4).streams(noise(size))
            for lazy in (True, False)
        )
        assert isinstance(late.source, TiledSource) and isinstance(early.source, TensorSource)
        assert late.grid == early.grid and late.source.width == early.source.width
        assert torch.allclose(features_of(late.source), features_of(early.source), rtol=1e-5, atol=1e-6)


def test_only_tiles_with_chosen_regions_are_encoded(model: tuple[Any, Any]) -> None:
    batches = []
    hook = model[0].model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(args[0] if args else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    try:
        adapter = AnyResImageAdapter(*model, zoom=5, micro_batch=3)
        inputs = adapter(PROMPT, images=noise((800, 800)))
        ((stream,),) = inputs["flex_streams"].samples
        assert batches == [] and stream.source.n_tiles == 25
        answer(model[0], inputs, new=1)
        # three regions a layer, each within a tile; the overview itself comes first, with its blank tiles
        assert batches.pop(0) == 1 + adapter.overview.blanks
        assert 0 < sum(batches) == stream.source.stats.units <= 3 * len(model[0].flex_config.layers) < 25
        assert max(batches) <= 3
    finally:
        hook.remove()


def test_a_byte_budget_of_tiles_is_kept(model: tuple[Any, Any]) -> None:
    one_tile = CELLS**2 * 64 * 4
    picture = noise(SQUARE)
    (small,) = AnyResImageAdapter(*model, tile_cache_bytes=one_tile).streams(picture)
    (large,) = AnyResImageAdapter(*model).streams(picture)
    assert torch.allclose(features_of(small.source), features_of(large.source), atol=1e-6)
    assert small.source.stats.bytes == one_tile and large.source.stats.bytes == 4 * one_tile
    assert small.source.stats.units > large.source.stats.units == 4


def test_a_picture_read_by_window_is_the_same(stock: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "noise.bmp"
    noise((150, 97)).save(path)
    (held,) = AnyResImageAdapter(*stock).streams(path)
    (windowed,) = AnyResImageAdapter(*stock, window_pixels=1000, spool_dir=tmp_path).streams(path)
    assert windowed.source.windows.spool_bytes == 150 * 97 * 3
    assert torch.equal(features_of(windowed.source), features_of(held.source))
    inputs = [AnyResImageAdapter(*stock, window_pixels=n)(PROMPT, images=path) for n in (1000, 10**6)]
    assert torch.equal(inputs[0]["pixel_values"], inputs[1]["pixel_values"])


def test_encoding_the_tiles_of_some_regions(stock: tuple[Any, Any]) -> None:
    adapter = AnyResImageAdapter(*stock, region_size=4)
    (view,) = adapter.views([noise(WIDE)])
    (every,) = adapter.encode([view])
    for region in range(view.grid.n_regions):
        tokens = [int(t) for t in view.grid.tokens(torch.tensor([region])).flatten() if t >= 0]
        width = view.grid.fine[1]
        tiles = sorted({t // width // CELLS * view.cols + t % width // CELLS for t in tokens})
        assert view.tiles_of(torch.tensor([region])).tolist() == tiles
        (some,) = adapter.encode([view], [torch.tensor([region])])
        assert torch.allclose(some, every[tiles], atol=1e-5)


# ---------------------------------------------------------------------- the design's invariants


def test_i1_nothing_selected_is_the_plain_model(kind: str, stock: tuple[Any, Any]) -> None:
    model, processor = tiny_anyres(kind)
    wrap(model, fraction=0.0, top_k=None)
    inputs = AnyResImageAdapter(model, processor)(TEXTS, images=MEDIA)
    before = forward(stock[0], plain(inputs))
    assert torch.equal(forward(model, inputs), before)
    assert torch.equal(forward(model, plain(inputs)), before)
    for options in ({}, {"num_beams": 2}):
        expected = answer(stock[0], plain(inputs), **options)
        found = answer(model, inputs, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(steps(found), steps(expected))


def test_i2_everything_selected_is_the_dense_reference(kind: str) -> None:
    model, processor = tiny_anyres(kind)
    wrap(model, selector="all")
    adapter = AnyResImageAdapter(model, processor, lazy=False)
    inputs = adapter(f"USER: {IMAGE} or {IMAGE}?", images=[noise(WIDE), noise(TALL)])
    embeds = embeddings(model, inputs)[0]
    found = forward(model, inputs)[0]
    expected = naive_forward(model, embeds, inputs["flex_streams"].samples[0], [len(embeds) - 1])
    assert gap(found, expected.detach()) < TOLERANCE
    assert gap(found[-1], forward(model, plain(inputs))[0, -1]) > CONTROL


@pytest.mark.parametrize("side", ["left", "right"])
def test_i3_a_batch_equals_its_samples_alone(model: tuple[Any, Any], side: str) -> None:
    adapter = AnyResImageAdapter(*model)
    together = adapter(TEXTS, images=MEDIA, padding_side=side)
    # the model itself numbers padded rows from the padding on, unless it is told
    positions = (together["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = forward(model[0], together, position_ids=positions)
    off = forward(model[0], plain(together), position_ids=positions)
    for row, (text, own) in enumerate(zip(TEXTS, MEDIA, strict=True)):
        alone = forward(model[0], adapter([text], images=[own]))[0]
        valid = together["attention_mask"][row].bool()
        assert gap(found[row, valid], alone) < TOLERANCE
        assert bool(own) == (gap(found[row, valid], off[row, valid]) > CONTROL)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collated_samples_are_the_batch(model: tuple[Any, Any], side: str):
    wrapped, processor = model
    adapter = AnyResImageAdapter(*model)
    alone = [adapter([text], images=[own]) for text, own in zip(TEXTS, MEDIA, strict=True)]
    joined = flexcore.hf.collate(alone, tokenizer=processor, padding_side=side)
    positions = (joined["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = forward(wrapped, joined, position_ids=positions)
    for row, own in enumerate(alone):
        expected = forward(wrapped, own)[0]
        assert gap(found[row, joined["attention_mask"][row].bool()], expected) < TOLERANCE


def test_i3_a_generated_batch_equals_its_samples_alone(model: tuple[Any, Any]) -> None:
    adapter = AnyResImageAdapter(*model)
    found = steps(answer(model[0], adapter(TEXTS, images=MEDIA)))
    for row, (text, own) in enumerate(zip(TEXTS, MEDIA, strict=True)):
        alone = adapter([text], images=[own])
        assert gap(found[row], steps(answer(model[0], alone))[0]) < TOLERANCE
        assert bool(own) == (gap(found[row], steps(answer(model[0], plain(alone)))[0]) > CONTROL)


def test_i4_teacher_forcing_equals_decoding(model: tuple[Any, Any]) -> None:
    inputs = AnyResImageAdapter(*model)(TEXTS, images=MEDIA)
    out = answer(model[0], inputs)
    stepwise = steps(out)
    new, length = stepwise.shape[1], out.sequences.shape[1]
    labels = torch.full_like(out.sequences, -100)
    labels[:, -new:] = out.sequences[:, -new:]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(TEXTS), new, dtype=torch.long)], dim=1)
    forced = {**inputs, "input_ids": out.sequences, "attention_mask": mask}
    forced["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    found = forward(model[0], forced, labels=labels)[:, length - new - 1 : -1]
    assert gap(found, stepwise) < TOLERANCE
    unread = forward(model[0], forced, labels=torch.full_like(labels, -100))[:, length - new - 1 : -1]
    assert gap(unread, stepwise) > CONTROL


def test_i5_beams_equal_each_beam_scored_alone(model: tuple[Any, Any]) -> None:
    adapter = AnyResImageAdapter(*model)
    texts, media = [TEXTS[0], TEXTS[3]], [MEDIA[0], MEDIA[3]]
    inputs = adapter(texts, images=media)
    beams = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "output_scores": True}
    out = answer(model[0], inputs, **beams)
    prompt = inputs["input_ids"].shape[1]
    for row, tokens in enumerate(out.sequences):
        alone = adapter([texts[row // 3]], images=[media[row // 3]])
        new = tokens[prompt:]
        ids = torch.cat([alone["input_ids"][0], new])[None]
        labels = torch.full_like(ids, -100)
        labels[0, -len(new) :] = new
        forced = {**alone, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = forward(model[0], forced, labels=labels)[0, -len(new) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, new[:, None]).sum()
        assert abs(float(own - out.sequences_scores[row])) < TOLERANCE


def test_i6_answers_on_demand_are_those_up_front(model: tuple[Any, Any]) -> None:
    late, early = (
        steps(answer(model[0], AnyResImageAdapter(*model, lazy=lazy)(TEXTS, images=MEDIA)))
        for lazy in (True, False)
    )
    assert torch.allclose(late, early, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- around it


def test_a_chat_template_and_text_options_reach_the_tokenizer(model: tuple[Any, Any]) -> None:
    adapter = AnyResImageAdapter(*model)
    adapter.processor.chat_template = (
        "{% for m in messages %}{% for part in m['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %}"
    )
    content = [{"type": "image", "image": noise(WIDE)}, {"type": "text", "text": " what?"}]
    chat = adapter.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True
    )
    direct = adapter(f"{IMAGE} what?", images=noise(WIDE))
    assert torch.equal(chat["pixel_values"], direct["pixel_values"])
    assert chat["flex_streams"].samples[0][0].grid == direct["flex_streams"].samples[0][0].grid
    wide = adapter(PROMPT, images=noise(WIDE), padding="max_length", text_kwargs={"max_length": 120})
    assert wide["input_ids"].shape == (1, 120)
    with pytest.raises(flexcore.StreamError, match="truncated"):
        adapter(PROMPT, images=noise(WIDE), truncation=True, max_length=20)


def test_text_alone_has_no_pixels(model: tuple[Any, Any]) -> None:
    inputs = AnyResImageAdapter(*model)("Just text")
    assert set(inputs) == {"input_ids", "attention_mask", "flex_streams"}
    assert inputs["flex_streams"].samples == ((),)


def test_the_image_adapter_picks_this_one(stock: tuple[Any, Any]) -> None:
    for adapter in (flexcore.load_adapter("image", *stock, zoom=2), ImageAdapter(*stock)):
        assert type(adapter) is AnyResImageAdapter
    with pytest.raises(
        TypeError,
        match=r"AnyResImageAdapter has no option 'aspect'; its options are zoom, max_tiles, region_size, ",
    ):
        flexcore.load_adapter("image", *stock, aspect="native")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zoom": 0}, "zoom must be an integer >= 1 or None, got 0"),
        ({"max_tiles": True}, "max_tiles must be an integer >= 1 or None, got True"),
        ({"zoom": 2, "max_tiles": 4}, "max_tiles=4 .* takes zoom=None, got 2"),
        ({"max_tiles": 1}, "max_tiles must be >= 2, the processor's smallest layout, got 1"),
        ({"region_size": 0}, "region_size must be an integer >= 1"),
    ],
    ids=str,
)
def test_options_out_of_range(stock: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnyResImageAdapter(*stock, **options)


def test_processors_that_lack_a_piece(kind: str) -> None:
    model, processor = tiny_anyres(kind, layers=2)
    with pytest.raises(ValueError, match="with an image_processor; got"):
        ImageAdapter(model, processor.tokenizer)
    _, other = tiny_anyres(kind, cells=5, layers=1)
    with pytest.raises(ValueError, match="cuts tiles of 40 pixels and the vision tower takes 48"):
        ImageAdapter(model, other)
    processor.image_processor.image_grid_pinpoints = [[48, 50]]
    with pytest.raises(ValueError, match=r"image_grid_pinpoints must hold multiples of .* 48 pixels"):
        ImageAdapter(model, processor)
    processor.image_processor.image_grid_pinpoints = None  # the model's config has them too
    assert ImageAdapter(model, processor).pinpoints == [tuple(p) for p in PINPOINTS]


def test_what_cannot_be_asked_of_a_call(model: tuple[Any, Any], kind: str) -> None:
    adapter = AnyResImageAdapter(*model)
    with pytest.raises(ValueError, match=r"do_resize: .* set them on processor\.image_processor"):
        adapter(PROMPT, images=noise(WIDE), do_resize=False)
    with pytest.raises(ValueError, match="the video adapter takes clips"):
        adapter(PROMPT, images=noise(WIDE), videos=[0])
    with pytest.raises(flexcore.StreamError, match=r"1 <image> placeholder\(s\)"):
        adapter(PROMPT, images=[noise(WIDE)] * 2)
    with pytest.raises(ValueError, match="image 0 has 150x97"):
        AnyResImageAdapter(*model, max_pixels=1000)(PROMPT, images=noise(WIDE))
    official, processor = tiny_anyres(kind, layers=2)
    flexcore.wrap(official, flexcore.FlexConfig(first_layer=0, regions="official"))
    with pytest.raises(ValueError, match="AnyResImageAdapter takes regions='blocks'"):
        AnyResImageAdapter(official, processor)(PROMPT, images=noise(WIDE))


def test_a_tower_that_fails_names_picture_and_tile(model: tuple[Any, Any]) -> None:
    adapter = AnyResImageAdapter(*model)

    def broken(tiles: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of luck")

    adapter.encode_tiles = broken
    (_, stream) = adapter.streams([noise(WIDE), noise(SQUARE)])
    with pytest.raises(
        SourceError, match=r"image 1, tile 0 of 4, row 1 and column 1 of 2x2 tiles.*out of luck"
    ):
        stream.source.features(torch.tensor([0]))
