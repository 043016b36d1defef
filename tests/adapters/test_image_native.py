"""The image adapter for native-resolution models on tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

import flexcore
from flexcore.errors import SourceError, StreamError, UnsupportedModelError
from flexcore.hf.tiny import tiny_llava
from flexcore.tiled_source import gather
from flexcore_adapters.image_native import NativeImageAdapter
from flexcore_adapters.native_tower import fit_cells

from .native_helpers import (
    END,
    FAMILIES,
    IMAGE,
    SIDE,
    STACK,
    START,
    WIDTH,
    Brightness,
    Stubborn,
    answer,
    by_hand,
    features_of,
    forced,
    gap,
    heard,
    image_processor,
    logits,
    plain,
    steps,
    tiny_native,
    wrap,
)

PROMPT = f"USER: {START}{IMAGE}{END}\nWhat is this? ASSISTANT:"
TEXT = "USER: Hello? ASSISTANT:"
TWO = f"{START}{IMAGE}{END} or {START}{IMAGE}{END}? It is"
BUDGET = 20 * SIDE**2  # of the coarse view, in pixels
TOLERANCE, CONTROL = 5e-5, 1e-3


@pytest.fixture(scope="module", params=FAMILIES)
def native(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model, processor = tiny_native(request.param)
    return wrap(model), processor


@pytest.fixture(scope="module")
def one() -> tuple[Any, Any]:
    model, processor = tiny_native("qwen2_5_vl")
    return wrap(model), processor


def noise(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def adapter_of(native: tuple[Any, Any], **options: Any) -> NativeImageAdapter:
    return NativeImageAdapter(*native, **{"coarse_pixels": BUDGET, "zoom": 2, **options})


# ---------------------------------------------------------------------- views and features


@pytest.mark.parametrize(
    "size", [(60, 80), (80, 60), (48, 48), (31, 500), (900, 40), (13, 11), (300, 301), (60, 60)], ids=str
)
@pytest.mark.parametrize("budget", [5, 20, 64], ids="{} cells".format)
def test_the_coarse_view_is_the_processors_own_under_the_budget(one, size, budget):
    picture = Image.fromarray(noise(*size))
    small = image_processor(size={"shortest_edge": 4 * SIDE**2, "longest_edge": budget * SIDE**2})
    expected = small(picture, return_tensors="pt")
    ((_, rows, cols),) = (expected["image_grid_thw"] // 2).tolist()
    inputs = adapter_of(one, coarse_pixels=budget * SIDE**2)(PROMPT, images=picture)
    ((stream,),) = inputs["flex_streams"].samples
    if rows * cols > budget:  # the processor's rule gives up on pictures that are very long or very small
        assert stream.grid.n_coarse <= budget
        return
    assert stream.grid.coarse == (rows, cols)
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["image_grid_thw"], expected["image_grid_thw"])


def test_cells_stay_within_their_budget_and_near_the_pictures_shape():
    for height in (1, 9, 100, 1000, 40000):
        for width in (1, 14, 220, 3000):
            for budget in (1, 2, 7, 256):
                rows, cols = fit_cells(height, width, 28, budget * 784, 4 * 784)
                assert rows >= 1 and cols >= 1 and rows * cols <= budget
                if min(rows, cols) > 4:
                    assert 0.75 < (rows / cols) / (height / width) < 1.34


def test_both_views_match_on_each_axis(native):
    picture = Image.fromarray(noise(60, 80))
    (view,) = adapter_of(native, zoom=3).views([picture])
    assert view.grid.coarse == (3, 5) and view.grid.fine == (9, 15)
    assert view.coarse.size == (5 * SIDE, 3 * SIDE)
    whole = picture.resize((15 * SIDE, 9 * SIDE), Image.Resampling.BICUBIC)
    for index in range(9):
        row, col = divmod(index, 3)
        box = (col * 5 * SIDE, row * 3 * SIDE, (col + 1) * 5 * SIDE, (row + 1) * 3 * SIDE)
        difference = np.abs(
            np.asarray(whole.crop(box)).astype(int) - view.tile(index).permute(1, 2, 0).numpy()
        )
        assert difference.max() <= 1
    assert view.describe(5) == "row 2 and column 3 of 3x3 tiles"


@pytest.mark.parametrize("mark", [(0, 0), (4, 9), (5, 3), (2, 7)], ids=str)
def test_a_marked_place_lands_in_its_coarse_cell_and_fine_token(native, mark, monkeypatch):
    row, col = mark  # of 6x10 squares, each of them a fine token of 2x2 to a coarse cell
    canvas = np.zeros((6 * 20, 10 * 20, 3), dtype=np.uint8)
    canvas[row * 20 : (row + 1) * 20, col * 20 : (col + 1) * 20] = 255
    model, _ = native
    encoded: list[int] = []

    def tower(pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> Any:
        encoded.append(len(image_grid_thw))
        return Brightness()(pixel_values, image_grid_thw)

    monkeypatch.setattr(model, "get_image_features", tower, raising=False)
    inputs = adapter_of(native)(PROMPT, images=canvas)
    ((stream,),) = inputs["flex_streams"].samples
    grid, source = stream.grid, stream.source
    assert (grid.coarse, grid.fine) == ((3, 5), (6, 10))
    (coarse,) = Brightness()(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    token = row * 10 + col
    assert int(coarse[:, 0].argmax()) == int(grid.parents(torch.tensor(token))) == row // 2 * 5 + col // 2
    # only the region that holds the token, and so only its tile
    region = next(r for r in range(grid.n_regions) if token in grid.tokens(torch.tensor([r])))
    found = source.features(torch.tensor([region]))[0, :, 0]
    tokens = grid.tokens(torch.tensor([region]))[0]
    assert encoded == [1] and source.stats.units == 1
    assert int(tokens[found.argmax()]) == token
    assert int(features_of(source)[:, 0].argmax()) == token and sum(encoded) == 4


def test_fine_features_are_the_towers_own_of_each_tile(native):
    adapter = adapter_of(native)
    pictures = [noise(60, 80), noise(90, 30, seed=1)]
    for picture, stream in zip(pictures, adapter.streams(pictures), strict=True):
        rows, cols = stream.grid.coarse
        size = (2 * cols * SIDE, 2 * rows * SIDE)
        whole = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        found = features_of(stream.source).view(2 * rows, 2 * cols, WIDTH)
        for r, c in np.ndindex(2, 2):
            top, left = r * rows, c * cols
            tile = whole[top * SIDE : (top + rows) * SIDE, left * SIDE : (left + cols) * SIDE]
            expected = by_hand(native[0], np.stack([tile] * STACK)).view(rows, cols, WIDTH)
            assert gap(found[top : top + rows, left : left + cols], expected) < 2e-3
            other = by_hand(native[0], np.stack([tile[:, ::-1]] * STACK)).view(rows, cols, WIDTH)
            assert gap(found[top : top + rows, left : left + cols], other) > 0.1


def test_tiles_of_any_shape_share_a_batch(one):
    adapter = adapter_of(one)
    shapes = [(60, 80), (90, 30), (40, 40)]
    streams = adapter.streams([noise(*shape, seed=i) for i, shape in enumerate(shapes)])
    assert len({s.grid.coarse for s in streams}) == 3
    together = gather([(s.source, torch.tensor([0])) for s in streams])
    stats = streams[0].source.stats
    assert stats.units == 3 and stats is streams[2].source.stats
    for i, shape in enumerate(shapes):
        (own,) = adapter.streams([noise(*shape, seed=i)])
        assert torch.allclose(together[i], own.source.features(torch.tensor([0])), rtol=1e-5, atol=1e-5)


def test_fine_pixels_choose_the_zoom_of_each_picture(one):
    adapter = adapter_of(one, zoom=None, fine_pixels=20 * BUDGET)
    (large, small, tiny) = adapter.views([noise(600, 800), noise(100, 120), noise(24, 36)])
    rows, cols = large.grid.coarse
    assert large.zoom == 5 and 25 * rows * cols * SIDE**2 <= 20 * BUDGET < 36 * rows * cols * SIDE**2
    # a picture that shows no more when it is larger
    assert small.zoom == 3 and small.grid.fine[0] * SIDE >= 100 > 2 * small.grid.coarse[0] * SIDE
    assert tiny.zoom == 1
    assert adapter_of(one, zoom=None).views([noise()])[0].zoom == 3


@pytest.mark.parametrize("size", [(60, 80), (130, 61)])
def test_a_large_picture_is_read_by_window(one, tmp_path, size):
    path = tmp_path / "large.png"
    Image.fromarray(noise(*size)).save(path)
    pytest.importorskip("pyvips", reason="pictures are read by window with pyvips")
    (held,) = adapter_of(one).views([str(path)])
    adapter = adapter_of(one, window_pixels=1000, spool_dir=tmp_path)
    (windowed,) = adapter.views([str(path)])
    levels = [np.asarray(held.coarse).astype(int) - np.asarray(windowed.coarse)]
    levels += [held.tile(i).numpy().astype(int) - windowed.tile(i).numpy() for i in range(held.zoom**2)]
    assert max(np.abs(difference).max() for difference in levels) <= 1
    assert held.tile(0).shape == held.tile(1).shape and not torch.equal(held.tile(0), windowed.tile(1))
    (source,) = adapter.sources([windowed])
    source.features(torch.tensor([0]))
    assert source.windows.windows > 0 and source.windows.spool_bytes == 3 * size[0] * size[1]


# ---------------------------------------------------------------------- inputs


def test_inputs_are_the_processors_own_and_streams(native):
    model, processor = native
    pictures = [noise(60, 80), noise(90, 30)]
    inputs = adapter_of(native)([TWO, TEXT], images=pictures)
    shown = [view.coarse for view in adapter_of(native).views(pictures)]
    text = processor(
        text=[TWO, TEXT], images=shown, return_tensors="pt", padding=True, images_kwargs={"do_resize": False}
    )
    assert set(inputs) == {*text, "flex_streams"}
    # which transformers' first releases neither made nor took
    assert ("mm_token_type_ids" in inputs) == (
        "mm_token_type_ids" in inspect.signature(model.forward).parameters
    )
    for name in text:
        assert torch.equal(inputs[name], text[name])
    first, second = inputs["flex_streams"].samples[0]
    found = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    assert torch.equal(torch.cat([first.coarse_positions, second.coarse_positions]), found)
    assert len(first.coarse_positions) == first.grid.n_coarse == 15
    assert inputs["flex_streams"].samples[1] == ()


def test_a_conversation_gets_its_streams(one, monkeypatch):
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{START}{IMAGE}{END}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    monkeypatch.setattr(one[1], "chat_template", template)
    picture = Image.fromarray(noise())
    said = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}
    ]
    inputs = adapter_of(one).apply_chat_template(said, tokenize=True, return_dict=True, return_tensors="pt")
    expected = adapter_of(one)([f"{START}{IMAGE}{END}What?"], images=[picture])
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert inputs["flex_streams"].samples[0][0].grid == expected["flex_streams"].samples[0][0].grid


def test_the_torchvision_processor_makes_the_same(one, monkeypatch):
    pytest.importorskip("torchvision")
    if not hasattr(hf, "Qwen2VLImageProcessorPil"):
        pytest.skip("this transformers has one image processor only")
    made = []
    for settings in (one[1].image_processor, hf.Qwen2VLImageProcessor(**settings_of(one[1].image_processor))):
        monkeypatch.setattr(one[1], "image_processor", settings)
        inputs = adapter_of(one)([PROMPT, TEXT], images=noise())
        made.append((inputs["pixel_values"], features_of(inputs["flex_streams"].samples[0][0].source)))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*made, strict=True))


def settings_of(image_processor: Any) -> dict[str, Any]:
    return {k: v for k, v in image_processor.to_dict().items() if not k.endswith("_type")}


def test_text_alone(native):
    inputs = adapter_of(native)(TEXT)
    assert "pixel_values" not in inputs and "image_grid_thw" not in inputs
    assert torch.equal(logits(native[0], inputs), logits(native[0], plain(inputs)))


def test_a_fine_token_stands_between_the_cells_around_it(native):
    """On the axes of height and width, as far as it lies between their centres; time is the picture's own."""
    model, _ = native
    inputs = adapter_of(native)([TEXT, PROMPT], images=[None, noise(60, 80)])
    coarse, *fine = heard(model, inputs)
    stream = inputs["flex_streams"].samples[1][0]
    at = coarse[:, 1, stream.coarse_positions]
    start = float(at[0, 0])
    assert torch.equal(at[1:] - start, torch.cartesian_prod(torch.arange(3.0), torch.arange(5.0)).T)
    expected = set()
    for row, col in np.ndindex(stream.grid.fine):
        # two fine tokens a cell: their centres lie a quarter of a cell before and behind the cell's
        high, wide = min(max(row / 2 - 0.25, 0), 2), min(max(col / 2 - 0.25, 0), 4)
        expected.add((start, start + high, start + wide))
    found = {tuple(p) for f in fine for p in f[:, 0, :-1].T.tolist()}
    assert len(found) >= 4 and found <= expected
    assert any(h % 1 and w % 1 for _, h, w in found)


# ---------------------------------------------------------------------- invariants


def mixed(native: tuple[Any, Any], **options: Any) -> tuple[Any, list[Any]]:
    """A batch of pictures of different shapes and text, and its samples alone."""
    adapter = adapter_of(native, **options)
    texts = [PROMPT, TEXT, TWO]
    images = [[noise(60, 80)], [], [noise(90, 30, seed=1), noise(44, 50, seed=2)]]
    return adapter(texts, images=images), [
        adapter([t], images=[i]) for t, i in zip(texts, images, strict=True)
    ]


def test_i1_nothing_selected_is_the_plain_model_bit_for_bit(native):
    family = native[0].config.model_type
    model, processor = tiny_native(family)
    inputs, _ = mixed((model, processor))
    before, spoken = logits(model, plain(inputs)), answer(model, plain(inputs))
    wrap(model, top_k=None, fraction=0.0)
    for given in (plain(inputs), inputs):
        assert torch.equal(logits(model, given), before)
        again = answer(model, given)
        assert torch.equal(again.sequences, spoken.sequences) and torch.equal(steps(again), steps(spoken))
    stream = inputs["flex_streams"].samples[0][0]
    assert stream.source.stats.units == 0  # and so nothing was encoded
    flexcore.unwrap(model)
    assert gap(logits(wrap(model), inputs), before) > CONTROL


def test_i2_all_selected_equals_a_dense_softmax(native):
    """The last readout layer against softmax over [own keys; all fine keys], written out."""
    family = native[0].config.model_type
    model, processor = tiny_native(family)
    wrap(model, selector="all", top_k=None)
    inputs = adapter_of((model, processor))(PROMPT, images=noise(60, 80))
    stream = inputs["flex_streams"].samples[0][0]
    layer = model.flex_config.layers[0]
    module = model._flex_binding.sites[layer].attention
    calls: list[Any] = []
    hook = module.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((kwargs.get("hidden_states", *args), out[0])),
        with_kwargs=True,
    )
    at, *_ = heard(model, inputs)
    hook.remove()
    ((hidden, out),) = calls
    grid = stream.grid
    cells = at[:, 0, stream.coarse_positions].view(1, 3, *grid.coarse)
    # the cells' positions, interpolated by torch's own; at the border it repeats the last one
    between = torch.nn.functional.interpolate(cells, size=grid.fine, mode="bilinear")[0].flatten(1)
    cos, sin = rotary(model, between[:, None])
    fine = features_of(stream.source)
    projection = model.flex_fine[str(layer)]

    def heads(x: torch.Tensor, n: int) -> torch.Tensor:
        return x.view(len(x), n, 16).transpose(0, 1)

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat([-x[..., 8:], x[..., :8]], dim=-1) * sin

    def norm(which: str, x: torch.Tensor) -> torch.Tensor:
        found = getattr(module, which, None)
        if found is None:
            return x
        weight = projection._modules.get(which, found).weight if which == "k_norm" else found.weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + found.variance_epsilon) * weight

    hidden = hidden[0]
    own_cos, own_sin = rotary(model, at)
    with torch.no_grad():
        q = rotate(norm("q_norm", heads(module.q_proj(hidden[-1:]), 4)), own_cos[-1:], own_sin[-1:])
        own = getattr(module, "k_norm", None)
        k = heads(module.k_proj(hidden), 2)
        if own is not None:
            k = k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True) + own.variance_epsilon) * own.weight
        keys = [
            rotate(k, own_cos, own_sin),
            rotate(norm("k_norm", heads(projection.k_proj(fine), 2)), cos, sin),
        ]
        values = [heads(module.v_proj(hidden), 2), heads(projection.v_proj(fine), 2)]
        together = [torch.cat(x, dim=1).repeat_interleave(2, dim=0) for x in (keys, values)]
        expected = (q @ together[0].transpose(1, 2) / 4).softmax(-1) @ together[1]
        expected = module.o_proj(expected.transpose(0, 1).reshape(1, -1))
    assert gap(out[0, -1:], expected) < TOLERANCE


def rotary(model: Any, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's tables `[N, D]` at positions `[3, 1, N]`, each channel turned by the axis that is its own."""
    module = model.model.language_model.rotary_emb
    cos, sin = module(torch.zeros(1, positions.shape[-1], WIDTH), positions)
    if cos.ndim == 3:
        return cos[0], sin[0]
    split = torch.tensor([2, 3, 3] * 2).tolist()  # earlier families pick the axes in the attention
    tables = [
        torch.cat([p[i % 3] for i, p in enumerate(t.split(split, dim=-1))], dim=-1)[0] for t in (cos, sin)
    ]
    return tables[0], tables[1]


def test_i3_a_mixed_batch_equals_its_samples_alone(native):
    model, _ = native
    inputs, alone = mixed(native)
    together = steps(answer(model, inputs))
    off = steps(answer(model, plain(inputs)))
    for row, own in enumerate(alone):
        assert gap(together[row], steps(answer(model, own))[0]) < TOLERANCE
    assert gap(together[1], off[1]) < TOLERANCE
    assert min(gap(together[i], off[i]) for i in (0, 2)) > CONTROL


@pytest.mark.parametrize("side", ["left", "right"])
def test_collated_samples_are_the_batch(native, side):
    model, processor = native
    _, alone = mixed(native)
    joined = flexcore.hf.collate(alone, tokenizer=processor, padding_side=side)
    found = logits(model, joined)
    for row, own in enumerate(alone):
        valid = joined["attention_mask"][row].bool()
        assert gap(found[row, valid], logits(model, own)[0]) < TOLERANCE


def test_i4_teacher_forcing_equals_decoding(native):
    model, _ = native
    inputs = adapter_of(native)(TWO, images=[noise(60, 80), noise(50, 40, seed=3)])
    out = answer(model, inputs)
    new = out.sequences[0, -4:]
    assert gap(forced(model, inputs, new), steps(out)) < TOLERANCE
    assert gap(forced(model, plain(inputs), new), steps(out)) > CONTROL


def test_i5_beams_equal_each_beam_scored_alone(native):
    model, _ = native
    inputs = adapter_of(native)(PROMPT, images=noise(60, 80))
    out = answer(model, inputs, num_beams=3, num_return_sequences=3, length_penalty=0.0, output_scores=True)
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        new = sequence[-4:]
        totals = [
            forced(model, given, new)[0].log_softmax(-1).gather(1, new[:, None]).sum()
            for given in (inputs, plain(inputs))
        ]
        assert abs(float(totals[0] - score)) < TOLERANCE
        assert abs(float(totals[1] - score)) > CONTROL


def test_i6_on_demand_equals_up_front(native):
    model, _ = native
    (late, _), (early, _) = mixed(native), mixed(native, lazy=False)
    stats = [inputs["flex_streams"].samples[0][0].source.stats for inputs in (late, early)]
    assert (stats[0].units, stats[1].units) == (0, 12)
    a, b = steps(answer(model, late)), steps(answer(model, early))
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert 0 < stats[0].units <= stats[1].units == 12
    assert gap(a, steps(answer(model, plain(late)))) > CONTROL


def test_only_tiles_that_are_chosen_are_encoded(native):
    family = native[0].config.model_type
    model, processor = tiny_native(family)
    wrap(model, top_k=2)
    units = {}
    for zoom in (3, 9):
        inputs = adapter_of((model, processor), zoom=zoom)(PROMPT, images=noise(300, 400))
        with flexcore.trace(model) as trace:
            answer(model, inputs)
        source = inputs["flex_streams"].samples[0][0].source
        read = (trace.looked_at(0, 0) > 0).nonzero()[:, 0]
        tokens = source.grid.tokens(read)
        tiles = source.locate(tokens[tokens >= 0])[0].unique()
        units[zoom] = source.stats.units
        assert source.n_tiles == zoom**2 and 0 < source.stats.units <= len(tiles)
    assert units[9] < 81 / 4


def test_a_small_cache_gives_the_same_answer(one):
    full = adapter_of(one)(PROMPT, images=noise())
    tight = adapter_of(one, tile_cache_bytes=1)(PROMPT, images=noise())
    assert torch.allclose(steps(answer(one[0], full)), steps(answer(one[0], tight)), rtol=1e-5, atol=1e-5)
    assert tight["flex_streams"].samples[0][0].source.stats.bytes == 0


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "option",
    [
        {"zoom": 0},
        {"zoom": True},
        {"coarse_pixels": SIDE**2 - 1},
        {"coarse_pixels": 2.5},
        {"fine_pixels": BUDGET - 1, "zoom": None},
        {"fine_pixels": 9 * BUDGET, "zoom": 3},
        {"region_size": 0},
        {"micro_batch": None},
        {"max_pixels": -1},
        {"lazy": 1},
        {"progress": "yes"},
    ],
    ids=str,
)
def test_bad_options(one, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        adapter_of(one, **option)


def test_what_is_unsuitable_is_named(one):
    model, processor = one
    with pytest.raises(TypeError, match=r"no option 'aspect'; its options are coarse_pixels, zoom"):
        NativeImageAdapter(model, processor, aspect="pad")
    with pytest.raises(UnsupportedModelError, match=r"no vision tower that takes pictures of any size"):
        NativeImageAdapter(*tiny_llava())
    with pytest.raises(ValueError, match=r"own, with an image_processor; got \w+$"):
        NativeImageAdapter(model, processor.tokenizer)
    with pytest.raises(ValueError, match=r"image_processor.patch_size is None and the vision tower's is 6"):
        NativeImageAdapter(model, tiny_llava()[1])


def test_a_processor_of_other_patches_is_named(native):
    model, processor = tiny_native(native[0].config.model_type)
    processor.image_processor.merge_size = 1
    with pytest.raises(ValueError, match=r"merge_size is 1 and the vision tower's is 2"):
        NativeImageAdapter(model, processor)


def test_bad_calls(one, tmp_path):
    adapter = adapter_of(one)
    with pytest.raises(StreamError, match=r"text has 1 .* but 2 images"):
        adapter(PROMPT, images=[noise(), noise()])
    with pytest.raises(ValueError, match=r"do_resize: image settings hold for both views"):
        adapter(PROMPT, images=noise(), do_resize=True)
    with pytest.raises(ValueError, match=r"more than max_pixels=100"):
        adapter_of(one, max_pixels=100)(PROMPT, images=noise())
    with pytest.raises(FileNotFoundError):
        adapter(PROMPT, images=tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"truncat"):
        adapter(PROMPT, images=noise(), truncation=True, max_length=12)


def test_a_processor_that_resizes_all_the_same_is_named(one):
    adapter = adapter_of(one)
    size = {"shortest_edge": 4 * SIDE**2, "longest_edge": 9 * SIDE**2}
    adapter.processor = Stubborn(one[1], images_kwargs={"do_resize": True, "size": size})
    with pytest.raises(
        ValueError, match=r"image_grid_thw \[\[1, 4, 6\]\] from coarse views of \[\[1, 6, 10\]\]"
    ):
        adapter(PROMPT, images=noise())


def test_the_official_scheme_is_refused():
    model, processor = tiny_native("qwen2_5_vl")
    flexcore.wrap(model, flexcore.FlexConfig(first_layer=1, regions="official", positions="parent"))
    with pytest.raises(ValueError, match=r"regions='official'"):
        NativeImageAdapter(model, processor)(PROMPT, images=noise())


def test_a_tile_that_cannot_be_made_is_named(one, monkeypatch):
    adapter = adapter_of(one)
    _, stream = adapter.streams([noise(), noise()])
    monkeypatch.setattr(one[1].image_processor, "image_mean", [0.5] * 2)
    with pytest.raises(
        SourceError, match=r"^image 1, tile 0 of 4, row 1 and column 1 of 2x2 tiles can't be read: mean"
    ):
        stream.source.features(torch.tensor([0]))
