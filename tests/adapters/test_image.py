import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flexcore_adapters.image_views as image_views
from flexcore import FlexConfig
from flexcore.errors import StreamError, UnsupportedModelError
from flexcore.grid import Grid
from flexcore.hf.tiny import tiny_llama, tiny_llava
from flexcore.sources import FineSource, TensorSource
from flexcore.tiled_source import TiledSource, gather
from flexcore_adapters.image import ImageAdapter
from flexcore_adapters.image_views import fit_square, margins, tile_layout
from flexcore_adapters.tiling import downscale

Photo = Callable[[str], Path]
SIDE, CELLS = 48, 6
MEAN = (122, 116, 104)  # 255 * CLIP's mean, cut off
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


@pytest.fixture
def coffee(photo: Photo) -> Image.Image:
    return Image.open(photo("coffee.png")).convert("RGB")


def padded(image: Image.Image) -> Image.Image:
    """The centred square, written out: the shorter axis gets floor(difference / 2) pixels in front."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), MEAN)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def encoded(llava: tuple[Any, Any], view: Image.Image, rows: int, cols: int) -> torch.Tensor:
    """Fine features of a view by a loop: each tile alone through processor, tower and projector."""
    model, processor = llava
    out = torch.full((rows * CELLS, cols * CELLS, model.config.text_config.hidden_size), float("nan"))
    for r in range(rows):
        for c in range(cols):
            tile = view.crop((c * SIDE, r * SIDE, (c + 1) * SIDE, (r + 1) * SIDE))
            pixels = processor.image_processor(tile, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
                features = model.model.multi_modal_projector(hidden)
            for i, feature in enumerate(features):
                out[r * CELLS + i // CELLS, c * CELLS + i % CELLS] = feature
    return out.flatten(0, 1)


def features_of(source: FineSource) -> torch.Tensor:
    """All of a source's features in raster order, asked for region by region."""
    grid = source.grid
    tokens = grid.tokens(torch.arange(grid.n_regions))
    out = torch.full((grid.n_fine, source.width), float("nan"), dtype=source.dtype)
    for region in torch.randperm(grid.n_regions).split(7):
        found = source.features(region)
        out[tokens[region][tokens[region] >= 0]] = found[tokens[region] >= 0]
    return out


class Wrapped:
    """A model as `wrap` leaves it, as far as an adapter can see."""

    def __init__(self, model: Any, config: FlexConfig):
        self.flex_config = config
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


# ---------------------------------------------------------------------- views and features


@pytest.mark.parametrize("zoom", [1, 2, 3, 4])
@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_padded_views_and_features(
    llava: tuple[Any, Any], coffee: Image.Image, zoom: int, turned: bool
) -> None:
    model, processor = llava
    image = coffee.transpose(Image.Transpose.ROTATE_90) if turned else coffee
    inputs = ImageAdapter(model, processor, zoom=zoom)(PROMPT, images=image)
    ((stream,),) = inputs["flex_streams"].samples

    square = padded(image)
    view = square.resize((zoom * SIDE, zoom * SIDE), Image.Resampling.BICUBIC)
    # Alone or in a batch of tiles: the same up to the order of sums.
    assert torch.allclose(features_of(stream.source), encoded(llava, view, zoom, zoom), atol=1e-5)
    # The coarse view is to the last bit what the plain processor makes of the square.
    plain = processor(text=PROMPT, images=square, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], plain["pixel_values"])
    assert torch.equal(inputs["input_ids"], plain["input_ids"])
    assert stream.grid.coarse == (CELLS, CELLS)
    assert stream.grid.fine == (zoom * CELLS, zoom * CELLS)


def test_features_at_zoom_one_are_the_coarse_ones(llava: tuple[Any, Any], coffee: Image.Image) -> None:
    model, processor = llava
    inputs = ImageAdapter(model, processor, zoom=1)(PROMPT, images=coffee)
    ((stream,),) = inputs["flex_streams"].samples
    with torch.no_grad():
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    assert torch.allclose(features_of(stream.source), features, atol=1e-5)


@pytest.mark.parametrize("resample", list(Image.Resampling), ids=lambda r: r.name)
@pytest.mark.parametrize("size", [(600, 400), (37, 11), (11, 37), (64, 64), (201, 7)], ids=str)
def test_fit_square_equals_padding_then_resizing(
    coffee: Image.Image, monkeypatch: pytest.MonkeyPatch, resample: Image.Resampling, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(image_views, "_STRIP", 2000)  # several strips
    image = coffee.resize(size)
    for side in (48, 145):
        expected = padded(image).resize((side, side), resample)
        assert np.array_equal(np.asarray(fit_square(image, side, MEAN, resample)), np.asarray(expected))


def test_a_picture_too_elongated_for_a_square_is_refused(llava: tuple[Any, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(image_views, "_SQUEEZED", 100_000)
    image = Image.new("RGB", (5000, 2))
    with pytest.raises(ValueError, match=r"5000x2 is too elongated .* aspect='native'"):
        ImageAdapter(*llava)(PROMPT, images=image)
    ImageAdapter(*llava, aspect="native")(PROMPT, images=image)


@pytest.mark.parametrize("size", [(600, 400), (400, 600), (333, 200), (200, 333), (90, 90)], ids=str)
def test_margins_are_the_shares_of_the_padding(llava: tuple[Any, Any], size: tuple[int, int]) -> None:
    # A white picture on grey: every pixel row and column that differs from the padding is content.
    image = Image.new("RGB", size, "white")
    side = max(size)
    content = np.asarray(padded(image))[..., 0] == 255
    rows, cols = np.flatnonzero(content.any(1)), np.flatnonzero(content.any(0))
    (top, bottom), (left, right) = margins(*size)
    assert (top, bottom) == (rows[0] / side, (side - 1 - rows[-1]) / side)
    assert (left, right) == (cols[0] / side, (side - 1 - cols[-1]) / side)

    (stream,) = ImageAdapter(*llava).streams(image)
    assert stream.grid.padding == ((top, bottom), (left, right))
    fine = stream.valid.reshape(stream.grid.fine)
    cell = side / stream.grid.fine[0]
    for axis, kept in ((0, fine.any(1)), (1, fine.any(0))):
        there = content.any(1 - axis)
        for i, valid in enumerate(kept.tolist()):
            pixels = there[int(np.floor(i * cell)) : int(np.ceil((i + 1) * cell))]
            assert valid == bool(pixels.any()), (axis, i)


def test_native_aspect_shows_all_of_the_picture_on_every_tile(
    llava: tuple[Any, Any], coffee: Image.Image
) -> None:
    model, processor = llava
    inputs = ImageAdapter(model, processor, aspect="native")(PROMPT, images=coffee)
    ((stream,),) = inputs["flex_streams"].samples
    assert coffee.size == (600, 400)
    rows, cols = 2, 3
    view = coffee.resize((cols * SIDE, rows * SIDE), Image.Resampling.BICUBIC)
    assert torch.allclose(features_of(stream.source), encoded(llava, view, rows, cols), atol=1e-5)
    coarse = coffee.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert torch.equal(
        inputs["pixel_values"], processor.image_processor(coarse, return_tensors="pt")["pixel_values"]
    )
    assert stream.grid == Grid.blocks((CELLS, CELLS), (rows * CELLS, cols * CELLS), 8, tile=CELLS)
    assert bool(stream.valid.all())
    # The map is exact on each axis: fine row i lies in coarse row i / rows.
    parents = stream.grid.parents(torch.arange(stream.grid.n_fine)).reshape(rows * CELLS, cols * CELLS)
    expected = (torch.arange(rows * CELLS) // rows)[:, None] * CELLS + torch.arange(cols * CELLS) // cols
    assert torch.equal(parents, expected)


@pytest.mark.parametrize(
    ("size", "tiles", "layout"),
    [
        ((100, 100), 9, (3, 3)),
        ((100, 100), 1, (1, 1)),
        ((600, 400), 9, (2, 3)),
        ((400, 600), 9, (3, 2)),
        ((1920, 1080), 9, (2, 4)),
        ((1600, 800), 9, (2, 4)),
        ((800, 1600), 9, (4, 2)),
        ((640, 480), 25, (4, 5)),
        ((9000, 100), 9, (1, 9)),
        ((100, 9000), 9, (9, 1)),
        ((300, 100), 4, (1, 3)),
    ],
    ids=str,
)
def test_tile_layout(size: tuple[int, int], tiles: int, layout: tuple[int, int]) -> None:
    assert tile_layout(*size, tiles) == layout


def test_official_regions_follow_the_official_pipeline(llava: tuple[Any, Any], coffee: Image.Image) -> None:
    model, processor = llava
    adapter = ImageAdapter(Wrapped(model, FlexConfig.reference()), processor)
    inputs = adapter(PROMPT, images=coffee)
    ((stream,),) = inputs["flex_streams"].samples
    assert stream.grid == Grid.official(CELLS, 3 * CELLS, size=coffee.size)
    view = padded(coffee).resize((3 * SIDE, 3 * SIDE), Image.Resampling.BICUBIC)
    settings = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    fine = processor.image_processor(view, **settings)["pixel_values"]
    assert torch.equal(inputs["pixel_values"], downscale(fine, SIDE))
    assert torch.allclose(features_of(stream.source), encoded(llava, view, 3, 3), atol=1e-5)
    # Negative control: the default coarse view is another.
    default = ImageAdapter(model, processor)(PROMPT, images=coffee)["pixel_values"]
    assert (inputs["pixel_values"] - default).abs().max() > 1e-2

    for options in ({"aspect": "native"}, {"region_size": 4}):
        with pytest.raises(ValueError, match="regions='official'"):
            ImageAdapter(Wrapped(model, FlexConfig.reference()), processor, **options)(PROMPT, images=coffee)


def test_region_size_comes_from_option_then_model_then_default(
    llava: tuple[Any, Any], coffee: Image.Image
) -> None:
    model, processor = llava
    wrapped = Wrapped(model, FlexConfig(region_size=2))
    edges = {
        3: ImageAdapter(wrapped, processor, region_size=3),
        2: ImageAdapter(wrapped, processor),
        6: ImageAdapter(model, processor),  # 8, but a tile has 6
    }
    for step, adapter in edges.items():
        (stream,) = adapter.streams(coffee)
        assert stream.grid.edges[0] == tuple(range(0, 19, step))


@pytest.mark.parametrize("micro_batch", [1, 4, 100])
def test_micro_batches_do_not_change_the_features(
    llava: tuple[Any, Any], coffee: Image.Image, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = llava
    sizes = []
    original = model.get_image_features

    def spy(pixel_values: torch.Tensor) -> Any:
        sizes.append(len(pixel_values))
        return original(pixel_values=pixel_values)

    expected = ImageAdapter(model, processor, lazy=False).streams([coffee, coffee.resize((50, 70))])
    monkeypatch.setattr(model, "get_image_features", spy)
    adapter = ImageAdapter(model, processor, micro_batch=micro_batch, lazy=False)
    for stream, other in zip(adapter.streams([coffee, coffee.resize((50, 70))]), expected, strict=True):
        assert torch.allclose(features_of(stream.source), features_of(other.source), atol=1e-5)
    # Batches run across pictures: only the last one may be smaller.
    assert sizes == [micro_batch] * (18 // micro_batch) + [18 % micro_batch] * (18 % micro_batch > 0)


@pytest.mark.parametrize("official", [False, True], ids=["blocks", "official"])
def test_encoding_the_tiles_of_some_regions(
    llava: tuple[Any, Any], coffee: Image.Image, official: bool
) -> None:
    model, processor = llava
    config = FlexConfig.reference() if official else FlexConfig(region_size=4)
    adapter = ImageAdapter(Wrapped(model, config), processor)
    (view,) = adapter.views([coffee])
    (all_tiles,) = adapter.encode([view])
    n_regions = view.grid.n_regions
    for regions in ([0], [n_regions - 1], [1, n_regions // 2]):
        wanted = torch.tensor(regions)
        tiles = view.tiles_of(wanted).tolist()
        tokens = [int(t) for t in view.grid.tokens(wanted).flatten() if t >= 0]
        expected = {(t // 18) // CELLS * 3 + (t % 18) // CELLS for t in tokens}
        assert tiles == sorted(expected)
        (some,) = adapter.encode([view], [wanted])
        assert torch.allclose(some, all_tiles[tiles], atol=1e-5)


def test_features_take_the_towers_dtype_and_no_gradient(coffee: Image.Image) -> None:
    model, processor = tiny_llava()
    (stream,) = ImageAdapter(model.bfloat16(), processor).streams(coffee)
    assert stream.source.dtype == torch.bfloat16
    assert not features_of(stream.source).requires_grad


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_text_only_one_and_two_images_in_a_batch(
    llava: tuple[Any, Any], photo: Photo, padding_side: str
) -> None:
    model, processor = llava
    adapter = ImageAdapter(model, processor, zoom=2)
    texts = ["Just text, and quite a lot of it.", "A <image> here", "<image> or <image>?"]
    photos = [photo("coffee.png"), photo("chelsea.png"), photo("rocket.jpg")]
    inputs = adapter(texts, images=photos, padding_side=padding_side)
    assert [len(sample) for sample in inputs["flex_streams"]] == [0, 1, 2]
    assert inputs["pixel_values"].shape == (3, 3, SIDE, SIDE)

    token = model.config.image_token_id
    for row, mask, sample in zip(
        inputs["input_ids"], inputs["attention_mask"], inputs["flex_streams"], strict=True
    ):
        assert bool(mask[-1 if padding_side == "left" else 0])
        positions = torch.cat([torch.empty(0).long()] + [stream.coarse_positions for stream in sample])
        assert torch.equal(positions, torch.nonzero(row == token).squeeze(1))
        assert bool(mask[positions].all())
    # Every sample is what it is alone, but for where it starts.
    for i, (text, images) in enumerate(zip(texts, ([], photos[:1], photos[1:]), strict=True)):
        alone = adapter(text, images=images)
        length = alone["input_ids"].shape[1]
        offset = inputs["input_ids"].shape[1] - length if padding_side == "left" else 0
        assert torch.equal(inputs["input_ids"][i, offset : offset + length], alone["input_ids"][0])
        for stream, single in zip(
            inputs["flex_streams"].samples[i], alone["flex_streams"].samples[0], strict=True
        ):
            assert torch.equal(stream.coarse_positions, single.coarse_positions + offset)
            assert torch.allclose(features_of(stream.source), features_of(single.source), atol=1e-5)


def test_flat_and_nested_images_deal_the_same(llava: tuple[Any, Any], coffee: Image.Image) -> None:
    adapter = ImageAdapter(*llava, zoom=1)
    texts = ["no picture", "<image>", "<image><image>"]
    pictures = [coffee, coffee.rotate(90), coffee.rotate(180)]
    flat = adapter(texts, images=pictures)
    for images in ([[], pictures[:1], pictures[1:]], [None, pictures[0], tuple(pictures[1:])]):
        nested = adapter(texts, images=images)
        assert torch.equal(nested["pixel_values"], flat["pixel_values"])
        assert [len(s) for s in nested["flex_streams"]] == [0, 1, 2]


@pytest.mark.parametrize("images", [None, [], [[]], [None]], ids=str)
def test_without_images_there_are_no_pixels(llava: tuple[Any, Any], images: Any) -> None:
    inputs = ImageAdapter(*llava)("Just text", images=images)
    assert "pixel_values" not in inputs
    assert inputs["flex_streams"].samples == ((),)


def test_processor_options_pass_through(llava: tuple[Any, Any], coffee: Image.Image) -> None:
    adapter = ImageAdapter(*llava, zoom=1)
    inputs = adapter(PROMPT, images=coffee, padding="max_length", max_length=120, return_tensors="pt")
    assert inputs["input_ids"].shape == (1, 120)
    positions = inputs["flex_streams"].samples[0][0].coarse_positions
    assert bool((inputs["input_ids"][0, positions] == llava[0].config.image_token_id).all())
    with pytest.raises(ValueError, match=r"do_center_crop, size: .* set them on processor\.image_processor"):
        adapter(PROMPT, images=coffee, do_center_crop=True, size=100)
    with pytest.raises(ValueError, match="return_tensors must be 'pt', got 'np'"):
        adapter(PROMPT, images=coffee, return_tensors="np")


def test_a_class_token_in_the_sequence_is_stepped_over(coffee: Image.Image) -> None:
    model, processor = tiny_llava()
    reference = ImageAdapter(model, processor, lazy=False).streams(coffee)[0]
    model.config.vision_feature_select_strategy = processor.vision_feature_select_strategy = "full"
    adapter = ImageAdapter(model, processor, lazy=False)
    inputs = adapter("a<image>b<image>", images=[coffee, coffee])
    found = torch.nonzero(inputs["input_ids"][0] == model.config.image_token_id).squeeze(1)
    assert len(found) == 2 * (CELLS * CELLS + 1)
    for i, stream in enumerate(inputs["flex_streams"].samples[0]):
        assert torch.equal(stream.coarse_positions, found.reshape(2, -1)[i, 1:])
        assert torch.allclose(features_of(stream.source), features_of(reference.source), atol=1e-5)
    model(**{k: v for k, v in inputs.items() if k != "flex_streams"})
    # Only one of the two changed: the map would be off by one.
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(
        StreamError, match=r"sample 0 holds 37 image tokens, .* need 36 .*vision_feature_select"
    ):
        adapter("<image>", images=coffee)
    processor.num_additional_image_tokens = 0
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(StreamError, match=r"makes \[37\] features of a tile, .*num_additional_image_tokens"):
        adapter("<image>", images=coffee)


# ---------------------------------------------------------------------- errors


class Silent:
    """A model that must not be asked to encode anything."""

    def __init__(self, model: Any):
        self.config = model.config

    def get_image_features(self, **_: Any) -> None:
        raise AssertionError("the encoder ran before the inputs were checked")


COUNTS = [
    ("<image>", 0, None, r"1 <image> placeholder\(s\), \[1\] by sample, but 0 images .* sample 0"),
    ("no placeholder", 1, None, r"0 <image> placeholder\(s\), \[0\] by sample, but 1 images .* sample 0"),
    (
        ["<image>", "<image><image>"],
        2,
        None,
        r"3 .*\[1, 2\] by sample, but 2 images .* first differ at sample 1",
    ),
    (["<image>", "text", "<image>"], 3, None, r"2 .*\[1, 0, 1\] by sample, but 3 images .* sample 2"),
    (["<image>", "text"], 2, [1, 1], r"sample 1 has 0 <image> placeholder\(s\) and 1 images"),
    (["<image>", "text"], 1, [1], r"lists for 1 sample\(s\), text has 2"),
]


@pytest.mark.parametrize(("text", "count", "nested", "message"), COUNTS, ids=range(len(COUNTS)))
def test_counts_that_differ_are_refused_before_any_work(
    llava: tuple[Any, Any], text: Any, count: int, nested: Any, message: str
) -> None:
    # Not even the files are looked at: there are none.
    images: Any = ["missing.png"] * count
    images = images if nested is None else [["missing.png"] * n for n in nested]
    with pytest.raises(StreamError, match=message):
        ImageAdapter(Silent(llava[0]), llava[1])(text, images=images)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 3)), "image 1 has no pixels"),
        (np.full((4, 4, 3), np.nan), "image 1 holds values that are not finite"),
        (np.zeros((40, 40, 3), np.uint8), "image 1 has 40x40 = 1600 pixels, more than max_pixels=1000"),
    ],
    ids=["zero-size", "nan", "max_pixels"],
)
def test_bad_images_are_refused_before_any_work(llava: tuple[Any, Any], image: Any, message: str) -> None:
    adapter = ImageAdapter(Silent(llava[0]), llava[1], max_pixels=1000)
    with pytest.raises(ValueError, match=message):
        adapter("<image><image>", images=[Image.new("RGB", (9, 9)), image])
    with pytest.raises(ValueError, match=message.replace("image 1", "image 0")):
        adapter.streams(image)


def test_max_pixels_defaults_to_pillows_limit(
    llava: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", (20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399)
    with pytest.raises(ValueError, match="max_pixels=399"):
        ImageAdapter(*llava).streams(image)
    assert ImageAdapter(*llava, max_pixels=400).streams(image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert ImageAdapter(*llava).streams(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zoom": 0}, "zoom must be an integer >= 1, got 0"),
        ({"zoom": 2.5}, r"zoom must be an integer >= 1, got 2\.5"),
        ({"zoom": None}, "zoom must be an integer >= 1, got None"),
        ({"micro_batch": True}, "micro_batch must be"),
        ({"max_pixels": -1}, "max_pixels must be"),
        ({"region_size": "8"}, "region_size must be an integer >= 1, got '8'"),
        ({"aspect": "crop"}, "aspect must be one of pad, native, got 'crop'"),
        ({"progress": 1}, "progress must be a bool or None, got 1"),
    ],
    ids=str,
)
def test_options_out_of_range(llava: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageAdapter(*llava, **options)


def test_unknown_options_are_named(llava: tuple[Any, Any]) -> None:
    with pytest.raises(
        TypeError, match=r"ImageAdapter has no option 'zom'; its options are zoom, aspect, .*progress"
    ):
        ImageAdapter(*llava, zom=3)


def test_models_and_processors_that_do_not_fit(llava: tuple[Any, Any]) -> None:
    model, processor = llava
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has none"):
        ImageAdapter(tiny_llama(layers=1), processor)
    with pytest.raises(ValueError, match="with an image_processor"):
        ImageAdapter(model, processor.tokenizer)
    _, other = tiny_llava(layers=1, patch_size=12)
    with pytest.raises(ValueError, match=r"patch_size is 12 and the vision tower's 8"):
        ImageAdapter(model, other)


def test_the_processors_own_size_and_crop_do_not_matter(llava: tuple[Any, Any], coffee: Image.Image) -> None:
    model, _ = llava
    _, processor = tiny_llava(layers=1)
    expected = ImageAdapter(model, processor)(PROMPT, images=coffee)
    processor.image_processor.size = {"shortest_edge": 100}
    processor.image_processor.crop_size = {"height": 32, "width": 64}
    got = ImageAdapter(model, processor)(PROMPT, images=coffee)
    assert torch.equal(got["pixel_values"], expected["pixel_values"])
    assert torch.equal(got["input_ids"], expected["input_ids"])


# ---------------------------------------------------------------------- the door, and what comes through it


def test_registered_through_the_hook() -> None:
    from flexcore_adapters import image

    found = {}
    image.flexcore_register_adapters(register=found.__setitem__)
    assert found == {"image": ImageAdapter}


def test_importing_the_plugin_is_cheap() -> None:
    code = (
        "import sys, flexcore_adapters.image\n"
        "print([m for m in ('PIL', 'transformers', 'torchvision') if m in sys.modules])"
    )
    paths = [str(Path(__file__).parents[2] / part) for part in ("", "adapters")]
    code = f"import sys; sys.path[:0] = {paths!r}\n" + code
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_progress_bar(
    llava: tuple[Any, Any], coffee: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    ImageAdapter(*llava, progress=True, lazy=False).streams(coffee)
    assert "encoding tiles: 100%" in capsys.readouterr().err
    for progress in (None, False):
        ImageAdapter(*llava, progress=progress, lazy=False).streams(coffee)
        assert capsys.readouterr().err == ""


def test_tiles_on_demand_equal_tiles_up_front(llava: tuple[Any, Any], coffee: Image.Image) -> None:
    (late,), (early,) = (ImageAdapter(*llava, lazy=lazy).streams(coffee) for lazy in (True, False))
    assert isinstance(late.source, TiledSource) and isinstance(early.source, TensorSource)
    assert late.grid == early.grid and late.source.width == early.source.width
    assert torch.allclose(features_of(late.source), features_of(early.source), rtol=1e-5, atol=1e-6)


def test_only_tiles_with_chosen_regions_are_encoded(llava: tuple[Any, Any], coffee: Image.Image) -> None:
    model, processor = llava
    batches = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(args[0] if args else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    try:
        adapter = ImageAdapter(model, processor, zoom=4, micro_batch=3)
        inputs = adapter(text=[PROMPT] * 2, images=[coffee, coffee.rotate(90)])
        assert batches == []
        one, two = (sample[0].source for sample in inputs["flex_streams"].samples)
        one.features(torch.tensor([5, 6]))  # at 6 tokens a tile, a region of 8 is a tile
        assert batches == [2] and one.stats.units == 2
        gather([(one, torch.tensor([5, 7])), (two, torch.tensor([8, 9, 10]))])
        assert batches == [2, 3, 1] and one.stats is two.stats and one.stats.hits == 1
    finally:
        hook.remove()


def test_streams_that_go_to_another_process_carry_their_features(
    llava: tuple[Any, Any], coffee: Image.Image
) -> None:
    inputs = ImageAdapter(*llava)(text=PROMPT, images=coffee)
    (stream,) = inputs["flex_streams"].samples[0]
    (again,) = pickle.loads(pickle.dumps(inputs["flex_streams"])).samples[0]
    assert isinstance(again.source, TensorSource)
    assert torch.equal(features_of(again.source), features_of(stream.source))
    assert torch.equal(again.coarse_positions, stream.coarse_positions)
