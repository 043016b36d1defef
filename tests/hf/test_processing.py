import copy
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, pipeline

from flexcore.errors import StreamError
from flexcore.grid import Grid
from flexcore.hf.processing import Adapter, FlexInputs, View, collate, find_positions
from flexcore.hf.tiny import tiny_llama, tiny_llava, tiny_tokenizer
from flexcore.sources import FineSource, TensorSource
from flexcore.streams import FineStream, StreamBatch

SIDE, CELLS, WIDTH = 48, 36, 64
GRID = Grid.blocks((6, 6), (12, 12), region=4)


class Checkers(Adapter):
    """The least an adapter is: one lattice, a coarse view, features made of thin air."""

    def __init__(self, model: Any, processor: Any, *, loud: bool = False, **unknown: Any):
        super().__init__(model, processor, **unknown)
        self.loud = loud
        self.encoded = 0

    def views(self, media: Sequence[Any]) -> list[View]:
        return [View(GRID, np.full((SIDE, SIDE, 3), m, np.uint8)) for m in media]

    def sources(self, views: Sequence[View]) -> list[FineSource]:
        self.encoded += len(views)
        return [TensorSource(torch.full((GRID.n_fine, WIDTH), float(v.coarse[0, 0, 0])), GRID) for v in views]


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    return tiny_llava()


@pytest.fixture
def adapter(llava: tuple[Any, Any]) -> Checkers:
    return Checkers(*llava)


# ---------------------------------------------------------------------- Adapter


def test_a_small_adapter_makes_whole_inputs(adapter: Checkers, llava: tuple[Any, Any]) -> None:
    inputs = adapter(["<image> a <image>", "b", "<image>"], images=[1, 2, 3])
    assert isinstance(inputs, FlexInputs)
    values = [
        [stream.source.features(torch.tensor([0]))[0, 0, 0].item() for stream in s]
        for s in inputs["flex_streams"]
    ]
    assert values == [[1, 2], [], [3]]
    for row, sample in zip(inputs["input_ids"], inputs["flex_streams"], strict=True):
        found = torch.nonzero(row == llava[0].config.image_token_id).squeeze(1)
        assert torch.equal(found, torch.cat([torch.empty(0).long()] + [s.coarse_positions for s in sample]))


def test_streams_wait_for_their_positions(adapter: Checkers) -> None:
    first, second = adapter.streams([1, 2])
    assert first.coarse_positions is None
    assert second.at(torch.arange(CELLS) + 5).coarse_positions.tolist() == list(range(5, 5 + CELLS))
    (only,) = adapter.streams(7)
    assert only.source.tensor[0, 0] == 7


def test_a_count_mismatch_shows_before_encoding(adapter: Checkers) -> None:
    with pytest.raises(
        StreamError, match=r"2 <image> placeholder\(s\), \[1, 1\] by sample, but 1 images .* sample 1"
    ):
        adapter(["<image>", "<image>"], images=[1])
    with pytest.raises(ValueError, match="image"):
        adapter("<image>", images=[1], truncation=True, max_length=20)
    with pytest.raises(TypeError, match="text must be a string"):
        adapter([b"bytes"], images=[])
    with pytest.raises(TypeError, match="text must be a string"):
        adapter([], images=[])
    assert adapter.encoded == 0


def test_unknown_options_are_named_with_the_known_ones(llava: tuple[Any, Any]) -> None:
    assert Checkers(*llava, loud=True).loud
    with pytest.raises(TypeError, match="Checkers has no option 'lout', 'zoom'; its options are loud"):
        Checkers(*llava, lout=True, zoom=2)


def test_an_adapter_passes_for_its_processor(adapter: Checkers, llava: tuple[Any, Any]) -> None:
    processor = llava[1]
    assert adapter.tokenizer is processor.tokenizer
    assert adapter.image_processor is processor.image_processor
    assert adapter.chat_template == processor.chat_template
    ids = processor.tokenizer("grüße", add_special_tokens=False).input_ids
    assert adapter.batch_decode([ids]) == ["grüße"]
    assert adapter.decode(ids) == "grüße"
    with pytest.raises(AttributeError, match="no_such_thing"):
        adapter.no_such_thing  # noqa: B018


def test_copies_share_the_model(adapter: Checkers) -> None:
    for twin in (copy.copy(adapter), copy.deepcopy(adapter)):
        assert twin.model is adapter.model
        assert twin("<image>", images=4)["flex_streams"].n_media == 1
    assert copy.deepcopy(adapter).processor is not adapter.processor
    model, twin = copy.deepcopy((adapter.model, adapter))
    assert twin.model is model
    assert model is not adapter.model


def test_pickle_round_trip(adapter: Checkers) -> None:
    adapter.loud = True
    twin = pickle.loads(pickle.dumps(adapter))
    assert twin.loud
    assert torch.equal(twin("<image>", images=4)["input_ids"], adapter("<image>", images=4)["input_ids"])
    # Half-made objects must fail with the right error, not recurse.
    with pytest.raises(AttributeError):
        Checkers.__new__(Checkers).processor  # noqa: B018


def chat(*media: int) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image", "image": m} for m in media]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}]


def test_chat_templates_bring_their_media(adapter: Checkers, llava: tuple[Any, Any]) -> None:
    text = adapter.apply_chat_template(chat(3), add_generation_prompt=True)
    assert text == "USER: <image>\nWhat? ASSISTANT:"
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = adapter.apply_chat_template(chat(3), **options, return_tensors="pt")
    expected = adapter(text, images=3)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    ((stream,),) = inputs["flex_streams"].samples
    assert stream.source.tensor[0, 0] == 3
    batch = adapter.apply_chat_template(
        [chat(1), chat(), chat(2, 3)], **options, processor_kwargs={"padding": True}
    )
    assert [len(s) for s in batch["flex_streams"]] == [1, 0, 2]
    assert torch.equal(
        adapter.apply_chat_template(chat(3), tokenize=True, add_generation_prompt=True), inputs["input_ids"]
    )
    # The processor itself is left as it was.
    assert type(adapter.processor) is type(llava[1])


def test_pipelines_take_an_adapter(
    adapter: Checkers, llava: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llava[0]
    seen: list[StreamBatch] = []
    original = model.generate

    def generate(flex_streams: StreamBatch, **kwargs: Any) -> Any:
        seen.append(flex_streams)
        return original(**kwargs)

    monkeypatch.setattr(model, "generate", generate)
    adapter.views = lambda media: Checkers.views(adapter, [9 for _ in media])  # type: ignore[method-assign]
    pipe = pipeline("image-text-to-text", model=model, processor=adapter)
    from PIL import Image

    picture = Image.new("RGB", (20, 20))
    pipe(images=[picture], text="<image>\nWhat?", max_new_tokens=2)
    message = {
        "role": "user",
        "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}],
    }
    pipe(text=[message], max_new_tokens=2)
    assert [batch.n_media for batch in seen] == [1, 1]


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize("side", ["left", "right"])
def test_find_positions_in_padded_rows(side: str) -> None:
    rows = [[9, 9, 9, 5, 9, 9, 9], [1, 9, 9, 9, 2], [3]]
    width = 9
    padded = [r + [0] * (width - len(r)) if side == "right" else [0] * (width - len(r)) + r for r in rows]
    found = find_positions(torch.tensor(padded), 9, [[2, 4], [3], []])
    shift = [0 if side == "right" else width - len(r) for r in rows]
    expected = [[[0, 1], [2, 4, 5, 6]], [[1, 2, 3]], []]
    got = [[p.tolist() for p in sample] for sample in found]
    assert got == [[[i + s for i in p] for p in sample] for sample, s in zip(expected, shift, strict=True)]


def test_find_positions_steps_over_leading_tokens() -> None:
    (sample,) = find_positions(torch.tensor([[9, 9, 9, 9, 9, 9, 4]]), 9, [[2, 2]], lead=1)
    assert [p.tolist() for p in sample] == [[1, 2], [4, 5]]


@pytest.mark.parametrize(
    ("row", "cells", "message"),
    [
        ([9, 9, 1], [3], r"sample 1 holds 2 image tokens, but its 1 image\(s\) need 3"),
        ([9, 9, 1], [], r"sample 1 holds 2 image tokens, but its 0 image\(s\) need 0"),
        ([1, 1, 1], [2], "sample 1 holds 0 image tokens"),
    ],
    ids=["truncated", "text-only", "none"],
)
def test_find_positions_names_the_sample(row: list[int], cells: list[int], message: str) -> None:
    with pytest.raises(StreamError, match=message):
        find_positions(torch.tensor([[9, 9, 9], row]), 9, [[3], cells])


# ---------------------------------------------------------------------- FlexInputs


@pytest.mark.parametrize(
    ("args", "kwargs", "dtype"),
    [
        (("cpu",), {}, torch.float32),
        ((torch.bfloat16,), {}, torch.bfloat16),
        (("cpu", torch.bfloat16), {}, torch.bfloat16),
        ((torch.device("cpu"),), {"dtype": torch.float16, "non_blocking": True}, torch.float16),
        ((), {"device": "cpu", "dtype": torch.float64}, torch.float64),
    ],
    ids=str,
)
def test_flex_inputs_move_their_streams(
    adapter: Checkers, args: Any, kwargs: Any, dtype: torch.dtype
) -> None:
    inputs = adapter("<image>", images=3)
    before = inputs["flex_streams"]
    assert inputs.to(*args, **kwargs) is inputs
    assert inputs["pixel_values"].dtype == dtype
    assert inputs["input_ids"].dtype == torch.int64
    assert inputs["flex_streams"].samples[0][0].source.dtype == dtype
    # The one that was there is immutable, so whoever holds it keeps what they had.
    assert before.samples[0][0].source.dtype == torch.float32


def test_flex_inputs_go_to_another_device(adapter: Checkers) -> None:
    inputs = adapter("<image>", images=3).to("meta")
    assert inputs["input_ids"].device.type == "meta"
    assert inputs["flex_streams"].samples[0][0].source.device.type == "meta"


def test_flex_inputs_unpack_and_pickle(adapter: Checkers) -> None:
    def take(input_ids: Any, attention_mask: Any, pixel_values: Any, flex_streams: Any) -> Any:
        return flex_streams

    inputs = adapter("<image>", images=3)
    assert take(**inputs) is inputs["flex_streams"] is inputs.flex_streams
    twin = pickle.loads(pickle.dumps(inputs))
    assert torch.equal(
        twin["flex_streams"].samples[0][0].source.tensor, inputs.flex_streams.samples[0][0].source.tensor
    )


# ---------------------------------------------------------------------- collate


def sample(length: int, *starts: int, value: float = 1.0) -> dict[str, Any]:
    """A made-up sample with a medium at each start."""
    streams = [
        FineStream(
            GRID, torch.arange(CELLS) + s, None, TensorSource(torch.full((GRID.n_fine, 4), value), GRID)
        )
        for s in starts
    ]
    ids = torch.arange(length) + 100
    out: dict[str, Any] = {"input_ids": ids[None], "labels": ids[None].clone()}
    out["flex_streams"] = StreamBatch((tuple(streams),))
    if starts:
        out["pixel_values"] = torch.full((len(starts), 3, 8, 8), value)
    return out


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_joins_samples_with_different_media_counts(side: str) -> None:
    features = [sample(50, 3), sample(120, 1, 60, value=2.0), sample(7)]
    del features[2]["flex_streams"]  # text only, from a plain tokenizer
    batch = collate(features, pad_token_id=5, padding_side=side, label_pad=-7)
    assert isinstance(batch, FlexInputs)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape == (3, 120)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 2, 2]
    assert [len(s) for s in batch["flex_streams"]] == [1, 2, 0]
    for i, length in enumerate((50, 120, 7)):
        mask = batch["attention_mask"][i].bool()
        start = 120 - length if side == "left" else 0
        assert torch.nonzero(mask).squeeze(1).tolist() == list(range(start, start + length))
        assert (
            batch["input_ids"][i][mask].tolist()
            == batch["labels"][i][mask].tolist()
            == list(range(100, 100 + length))
        )
        assert set(batch["input_ids"][i][~mask].tolist()) <= {5}
        assert set(batch["labels"][i][~mask].tolist()) <= {-7}
        starts = [int(stream.coarse_positions[0]) for stream in batch["flex_streams"].samples[i]]
        assert starts == [start + at for at in ([3], [1, 60], [])[i]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_equals_one_call_of_the_adapter(adapter: Checkers, side: str) -> None:
    texts, images = ["<image> long enough", "text", "<image><image>"], [[1], [], [2, 3]]
    whole = adapter(texts, images=images, padding_side=side)
    parts = [adapter(t, images=m) for t, m in zip(texts, images, strict=True)]
    batch = collate(parts, tokenizer=adapter, padding_side=side)
    assert set(batch) == set(whole)
    for key in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[key], whole[key]), key
    for got, expected in zip(batch["flex_streams"], whole["flex_streams"], strict=True):
        assert [s.coarse_positions.tolist() for s in got] == [s.coarse_positions.tolist() for s in expected]
        assert [float(s.source.tensor[0, 0]) for s in got] == [float(s.source.tensor[0, 0]) for s in expected]


def test_collate_takes_small_batches_and_unbatched_rows() -> None:
    pair = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "readout_mask": torch.ones(2, 2, dtype=torch.bool)}
    row = {"input_ids": [5, 6, 7], "readout_mask": torch.tensor([True, False, True])}
    batch = collate([pair, row], tokenizer=tiny_tokenizer(), padding_side="left")
    assert batch["input_ids"].tolist() == [[0, 1, 2], [0, 3, 4], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 1]]
    assert batch["readout_mask"].tolist() == [[False, True, True], [False, True, True], [True, False, True]]
    assert "flex_streams" not in batch
    assert "pixel_values" not in batch


BROKEN: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "empty": ([], {}, "at least one sample"),
    "side": ([sample(3)], {"padding_side": "top"}, "padding_side must be one of right, left, got 'top'"),
    "no input_ids": ([{"labels": [1]}], {}, r"features\[0\] must hold input_ids, got \['labels'\]"),
    "three axes": ([{"input_ids": torch.zeros(1, 1, 1)}], {}, r"must be \[T\] or \[b, T\], got \[1, 1, 1\]"),
    "no pad token": ([sample(3), sample(4)], {}, "need pad_token_id, or a tokenizer"),
    "labels missing": (
        [sample(3), {"input_ids": [1, 2, 3]}],
        {},
        r"labels must be in all .* missing from features \[1\]",
    ),
    "odd shape": (
        [{"input_ids": [1, 2], "labels": [1]}],
        {},
        r"\['labels'\] must have the shape of input_ids, \[2\]",
    ),
    "pixels differ": (
        [sample(90, 0), {**sample(90, 0), "pixel_values": torch.zeros(1, 3, 9, 9)}],
        {},
        r"pixel_values must agree .*\(3, 8, 8\), \(3, 9, 9\)",
    ),
    "streams of another kind": (
        [{"input_ids": [1], "flex_streams": []}],
        {},
        "must be a StreamBatch, got list",
    ),
    "streams of other samples": (
        [{"input_ids": [1], "flex_streams": StreamBatch(((), ()))}],
        {},
        r"features\[0\]\['flex_streams'\] is for 2 sample\(s\), input_ids for 1",
    ),
    "pixels without streams": (
        [{**sample(90, 0), "pixel_values": torch.zeros(2, 3, 8, 8)}],
        {},
        r"features\[0\]\['flex_streams'\] holds 1 media, pixel_values 2",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_collate_names_what_does_not_fit(case: str) -> None:
    features, options, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        collate(features, **options)


def test_collate_needs_no_pad_token_where_nothing_is_padded() -> None:
    assert collate([sample(4), sample(4)])["input_ids"].shape == (2, 4)


# ---------------------------------------------------------------------- tiny models


def test_tiny_llava_and_its_processor_survive_saving(tmp_path: Any) -> None:
    model, processor = tiny_llava(layers=2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    other = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    reader = AutoProcessor.from_pretrained(tmp_path)
    text, image = "USER: <image>\nWas heißt 看板? ASSISTANT:", np.full((48, 48, 3), 90, np.uint8)
    first = processor(text=text, images=image, return_tensors="pt")
    second = reader(text=text, images=image, return_tensors="pt")
    assert set(first) == set(second)
    for key in first:
        # where torchvision is installed the reader normalises with it, in another order
        assert torch.allclose(first[key], second[key], rtol=0, atol=1e-6), key
    assert torch.equal(model(**first).logits, other.eval()(**first).logits)
    assert reader.apply_chat_template(chat(1)) == processor.apply_chat_template(chat(1))


def test_tiny_tokenizer_keeps_any_text() -> None:
    tokenizer = tiny_tokenizer()
    for text in ("plain", " two  spaces\n\ttab ", "naïve 日本語 🐈", "a<image>b", "</s><pad>", "\x00\x7f"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer("<image>", add_special_tokens=False).input_ids == [
        tokenizer.convert_tokens_to_ids("<image>")
    ]


def test_tiny_models_repeat_by_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, third = (tiny_llama(seed=s, layers=1) for s in (1, 1, 2))
    tiny_llava(layers=1)
    assert torch.equal(torch.rand(1), expected)
    weights = [m.model.layers[0].self_attn.q_proj.weight for m in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_tiny_models_attend_unevenly() -> None:
    model = tiny_llama(attn_implementation="eager")
    maps = model(torch.arange(1, 41)[None], output_attentions=True).attentions
    for layer in maps:
        # A uniform row of 40 keys has 1/40; selection tests need some that stand out.
        assert layer[0, :, -1].amax(-1).mean() > 3 / 40
    config = model.config
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (2, 16, 97)


def test_functions_keep_their_names_whatever_was_imported_first() -> None:
    import flexcore.hf.collation
    import flexcore.hf.wrapping

    assert callable(flexcore.hf.collate) and callable(flexcore.hf.wrap) and callable(flexcore.wrap)
