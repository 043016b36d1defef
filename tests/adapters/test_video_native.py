"""The video adapter on tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL, which take frames of any size."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flexcore
from flexcore.errors import SourceError, StreamError, UnsupportedModelError
from flexcore.hf.tiny import tiny_llava
from flexcore.tiled_source import gather
from flexcore_adapters.video import VideoAdapter
from flexcore_adapters.video_io import ArrayVideo

from .native_helpers import (
    END,
    FAMILIES,
    IMAGE,
    SIDE,
    START,
    VIDEO,
    WIDTH,
    Brightness,
    Stubborn,
    answer,
    by_hand,
    features_of,
    forced,
    gap,
    heard,
    logits,
    plain,
    steps,
    tiny_native,
    wrap,
)
from .video_helpers import bunny, stripes

pytest.importorskip("torchvision", reason="the models' video processors need torchvision")

PROMPT = f"USER: {START}{VIDEO}{END}\nWhat happens? ASSISTANT:"
TEXT = "USER: Hello? ASSISTANT:"
TWO = f"{START}{VIDEO}{END} or {START}{VIDEO}{END}? It is"
BUDGET = 6 * SIDE**2
TOLERANCE, CONTROL = 5e-5, 1e-3


@pytest.fixture(scope="module", params=FAMILIES)
def native(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model, processor = tiny_native(request.param)
    return wrap(model), processor


@pytest.fixture(scope="module")
def one() -> tuple[Any, Any]:
    model, processor = tiny_native("qwen3_vl")
    return wrap(model), processor


def adapter_of(native: tuple[Any, Any], **options: Any) -> VideoAdapter:
    options = {"coarse_frames": 6, "fine_fps": 4, "fps": 4, "coarse_pixels": BUDGET, **options}
    return VideoAdapter(*native, **options)


class Uneven(ArrayVideo):
    """Frames at the given times."""

    def __init__(self, frames: np.ndarray, times: list[float], end: float):
        super().__init__(list(frames), 1.0, "uneven")
        self.times, self.duration = np.array(times), end


# ---------------------------------------------------------------------- views and features


def test_views_of_a_clip(native):
    frames = stripes(24, 24, 36)
    inputs = adapter_of(native)(PROMPT, videos=frames)
    ((stream,),) = inputs["flex_streams"].samples
    # 24 frames in 6 seconds: six coarse ones at the middles of their seconds, by twos; the fine ones all of them
    assert (stream.grid.coarse, stream.grid.fine) == ((3, 2, 3), (12, 4, 6))
    assert inputs["video_grid_thw"].tolist() == [[3, 4, 6]]
    few = frames[[2, 6, 10, 14, 18, 22]]
    shown = [
        np.asarray(Image.fromarray(f).resize((3 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)) for f in few
    ]
    own = native[1].video_processor(
        [np.stack(shown)], do_resize=False, do_sample_frames=False, return_tensors="pt"
    )
    assert torch.equal(inputs["pixel_values_videos"], own["pixel_values_videos"])
    found = features_of(stream.source).view(12, 4, 6, WIDTH)
    for step, r, c in ((0, 0, 0), (5, 1, 0), (11, 1, 1)):
        large = [
            np.asarray(Image.fromarray(f).resize((6 * SIDE, 4 * SIDE), Image.Resampling.BICUBIC))
            for f in frames[2 * step : 2 * step + 2]
        ]
        tile = np.stack(large)[:, r * 2 * SIDE : (r + 1) * 2 * SIDE, c * 3 * SIDE : (c + 1) * 3 * SIDE]
        expected = by_hand(native[0], tile).view(2, 3, WIDTH)
        assert gap(found[step, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3], expected) < 1e-4
        backwards = by_hand(native[0], tile[::-1]).view(2, 3, WIDTH)
        assert gap(found[step, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3], backwards) > 0.1


@pytest.mark.parametrize("mark", [(0, 0, 0), (7, 3, 5), (10, 1, 2)], ids=str)
def test_a_marked_moment_and_place_land_in_their_cell_and_fine_token(native, mark, monkeypatch):
    step, row, col = mark  # of 12 pairs of frames and 4x6 squares, each of them a fine token
    frames = np.zeros((24, 4 * 20, 6 * 20, 3), dtype=np.uint8)
    frames[2 * step : 2 * step + 2, row * 20 : (row + 1) * 20, col * 20 : (col + 1) * 20] = 255
    monkeypatch.setattr(native[0], "get_video_features", Brightness(), raising=False)
    adapter = adapter_of(native, coarse_frames=24, fine_fps=4)
    inputs = adapter(PROMPT, videos=frames)
    ((stream,),) = inputs["flex_streams"].samples
    grid, source = stream.grid, stream.source
    assert (grid.coarse, grid.fine) == ((12, 2, 3), (12, 4, 6))
    (coarse,) = Brightness()(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
    token = (step * 4 + row) * 6 + col
    assert (
        int(coarse[:, 0].argmax())
        == int(grid.parents(torch.tensor(token)))
        == (step * 2 + row // 2) * 3 + col // 2
    )
    region = next(r for r in range(grid.n_regions) if token in grid.tokens(torch.tensor([r])))
    found = source.features(torch.tensor([region]))[0, :, 0]
    assert int(grid.tokens(torch.tensor([region]))[0][found.argmax()]) == token
    assert source.stats.units == 1 and int(features_of(source)[:, 0].argmax()) == token


def test_clips_of_any_shape_share_a_batch(one):
    adapter = adapter_of(one)
    clips = [stripes(24, 24, 36), stripes(16, 60, 24)]
    streams = adapter.streams(clips)
    assert streams[0].grid.coarse[1:] != streams[1].grid.coarse[1:]
    together = gather([(s.source, torch.tensor([1])) for s in streams])
    for i, clip in enumerate(clips):
        (own,) = adapter.streams([clip])
        assert torch.allclose(together[i], own.source.features(torch.tensor([1])), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- where and when coarse tokens are


def test_coarse_tokens_are_found_step_by_step(native):
    model, _ = native
    inputs = adapter_of(native)([TWO, TEXT], videos=[[stripes(24, 24, 36), stripes(10, 36, 24)], []])
    video = model.config.video_token_id
    first, second = inputs["flex_streams"].samples[0]
    found = (inputs["input_ids"][0] == video).nonzero()[:, 0]
    assert torch.equal(torch.cat([first.coarse_positions, second.coarse_positions]), found)
    assert (first.grid.coarse, second.grid.coarse) == ((3, 2, 3), (3, 3, 2))
    jumps = (first.coarse_positions.diff() != 1).nonzero()[:, 0].tolist()
    # Qwen3-VL writes the time before every step
    assert jumps == ([5, 11] if model.config.model_type == "qwen3_vl" else [])
    if "mm_token_type_ids" in inputs:  # transformers' first releases did without
        assert torch.equal(inputs["mm_token_type_ids"], 2 * (inputs["input_ids"] == video).long())
    assert inputs["flex_streams"].samples[1] == ()


def test_qwen3_is_told_the_time_of_every_step(one):
    frames, times = stripes(8, 24, 36), [0.0, 0.1, 0.2, 1.0, 3.0, 3.5, 9.0, 12.0]
    adapter = adapter_of(one, fine_fps=1)
    for options, expected in (({}, None), ({"start": 2.0, "end": 10.0}, None)):
        adapter = adapter_of(one, fine_fps=1, **options)
        clip = Uneven(frames, times, 16.0)
        (view,) = adapter.views([clip])
        inputs = adapter(PROMPT, videos=clip)
        said = re.findall(r"<(\d+\.\d) seconds>", one[1].decode(inputs["input_ids"][0]))
        expected = [f"{np.mean([times[i] for i in pair]):.1f}" for pair in view.coarse_index]
        assert said == expected and len(said) == len(set(said)) == len(view.coarse_index)
    assert float(said[0]) >= 2.0


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_time_positions_are_seconds_where_the_model_counts_them(family):
    model, processor = tiny_native(family)
    wrap(model)
    adapter = adapter_of((model, processor), fps=2)
    inputs = adapter([TEXT, PROMPT], videos=[[], [stripes(24, 24, 36)]])
    ((stream,),) = inputs["flex_streams"].samples[1:]
    (at, *_) = heard(model, inputs)
    at = at[:, 1, stream.coarse_positions].view(3, *stream.grid.coarse)
    seconds = 4.0  # between two of the three steps of 12 seconds
    rate = model.config.vision_config.tokens_per_second if family == "qwen2_5_vl" else 1 / seconds
    expected = at[0, 0, 0, 0] + rate * seconds * torch.arange(3)
    assert torch.equal(at[0], expected[:, None, None].expand(3, 2, 3))
    if family == "qwen2_5_vl":
        assert [round(float(s), 3) for s in inputs["second_per_grid_ts"]] == [seconds]


def test_a_fine_token_stands_between_the_steps_around_it(native):
    model, _ = native
    inputs = adapter_of(native)(PROMPT, videos=stripes(24, 24, 36))
    ((stream,),) = inputs["flex_streams"].samples
    coarse, *fine = heard(model, inputs)
    cells = coarse[:, 0, stream.coarse_positions].view(1, 3, *stream.grid.coarse)
    # trilinear interpolation by torch's own; at the border it repeats the last cell
    between = torch.nn.functional.interpolate(cells, size=stream.grid.fine, mode="trilinear")[0].flatten(1)
    expected = between.T
    found = torch.cat([f[:, 0, :-1] for f in fine], dim=1).T
    distance = (found[:, None] - expected[None]).abs().amax(-1).amin(1)
    assert len(found) and float(distance.max()) < 1e-4
    for axis in range(3):  # some stand between two cells
        assert not set(found[:, axis].tolist()) <= set(cells[0, axis].flatten().tolist())


# ---------------------------------------------------------------------- invariants


def mixed(native: tuple[Any, Any], **options: Any) -> tuple[Any, list[Any]]:
    """A batch of clips of different shapes and lengths and text, and its samples alone."""
    adapter = adapter_of(native, **options)
    texts = [PROMPT, TEXT, TWO]
    # 24, 10 and a single frame; the last is merged with itself
    clips = [[stripes(24, 24, 36)], [], [stripes(10, 36, 24), stripes(1, 24, 24)]]
    return adapter(texts, videos=clips), [adapter([t], videos=[c]) for t, c in zip(texts, clips, strict=True)]


def test_i1_nothing_selected_is_the_plain_model_bit_for_bit(native):
    model, processor = tiny_native(native[0].config.model_type)
    inputs, _ = mixed((model, processor))
    before, spoken = logits(model, plain(inputs)), answer(model, plain(inputs))
    wrap(model, top_k=None, fraction=0.0)
    for given in (plain(inputs), inputs):
        assert torch.equal(logits(model, given), before)
        again = answer(model, given)
        assert torch.equal(again.sequences, spoken.sequences) and torch.equal(steps(again), steps(spoken))
    assert inputs["flex_streams"].samples[0][0].source.stats.units == 0
    flexcore.unwrap(model)
    assert gap(logits(wrap(model), inputs), before) > CONTROL


def test_i3_a_mixed_batch_equals_its_samples_alone(native):
    model, _ = native
    inputs, alone = mixed(native)
    assert [[s.grid.coarse[0] for s in sample] for sample in inputs["flex_streams"].samples] == [
        [3],
        [],
        [3, 1],
    ]
    together, off = steps(answer(model, inputs)), steps(answer(model, plain(inputs)))
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
    inputs = adapter_of(native)(TWO, videos=[stripes(24, 24, 36), stripes(10, 36, 24)])
    out = answer(model, inputs)
    new = out.sequences[0, -4:]
    assert gap(forced(model, inputs, new), steps(out)) < TOLERANCE
    assert gap(forced(model, plain(inputs), new), steps(out)) > CONTROL


def test_i5_beams_equal_each_beam_scored_alone(native):
    model, _ = native
    inputs = adapter_of(native)(PROMPT, videos=stripes(24, 24, 36))
    out = answer(model, inputs, num_beams=2, num_return_sequences=2, length_penalty=0.0, output_scores=True)
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        new = sequence[-4:]
        totals = [
            forced(model, given, new)[0].log_softmax(-1).gather(1, new[:, None]).sum()
            for given in (inputs, plain(inputs))
        ]
        assert abs(float(totals[0] - score)) < TOLERANCE
        assert abs(float(totals[1] - score)) > CONTROL


def test_i6_on_demand_equals_up_front_and_decodes_what_is_chosen(native):
    model, _ = native
    clips = [ArrayVideo(list(stripes(24, 24, 36)), 4, "clip") for _ in range(2)]
    late, early = (
        adapter_of(native, lazy=lazy, coarse_frames=2, region=(1, 2, 3))(PROMPT, videos=clip)
        for lazy, clip in zip((True, False), clips, strict=True)
    )
    stats = [inputs["flex_streams"].samples[0][0].source.stats for inputs in (late, early)]
    assert (stats[0].units, stats[1].units) == (0, 48)
    assert len(clips[0].decoded) == 2 and len(clips[1].decoded) == 24
    a, b = logits(model, late), logits(model, early)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    # three regions, each a tile, in each of two layers
    assert 3 <= stats[0].units <= 6 and len(clips[0].decoded) <= 2 + 2 * 6
    assert gap(a, logits(model, plain(late))) > CONTROL


def test_a_real_clip(one):
    path = bunny()
    adapter = VideoAdapter(*one, coarse_frames=4, fine_fps=4, coarse_pixels=12 * SIDE**2)
    inputs = adapter(PROMPT, videos=path)
    ((stream,),) = inputs["flex_streams"].samples
    assert stream.grid.coarse == (2, 2, 4) and stream.grid.fine[1:] == (4, 8)
    (view,) = adapter.views([path])
    said = re.findall(r"<(\d+\.\d) seconds>", one[1].decode(inputs["input_ids"][0]))
    assert said == [f"{view.video.times[pair].mean():.1f}" for pair in view.coarse_index]
    with flexcore.trace(one[0]) as trace:
        answer(one[0], inputs)
    assert 0 < stream.source.stats.units < stream.source.n_tiles
    sheet = view.contact_sheet(trace.looked_at(0, 0))
    assert min(sheet.size) > 50
    adapter.decoder.close()


# ---------------------------------------------------------------------- errors


def test_a_frame_that_cannot_be_read_is_named(one):
    class Torn(ArrayVideo):
        def read(self, indices: list[int]) -> list[Any]:
            return [RuntimeError("torn") if i == 9 else self.arrays[i] for i in indices]

    clip = Torn(list(stripes(24, 24, 36)), 4, "clip")
    (stream,) = adapter_of(one).streams([clip])
    tile = 4 * 4  # of the fifth step of two frames
    token = stream.grid.fine[1] * stream.grid.fine[2] * 4
    assert int(stream.source.locate(torch.tensor([token]))[0]) == tile
    region = next(r for r in range(stream.grid.n_regions) if token in stream.grid.tokens(torch.tensor([r])))
    with pytest.raises(
        SourceError, match=r"video 0 \(clip\), tile 16 of 48, frame 8 at 0:02.00, row 1 .*torn"
    ):
        stream.source.features(torch.tensor([region]))
    (stream,) = adapter_of(one, on_error="skip").streams([clip])
    with pytest.warns(UserWarning, match="torn"):
        stream.source.features(torch.tensor([region]))
    assert stream.source.readable(torch.arange(stream.grid.n_regions)).tolist().count(False) > 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"coarse_pixels": SIDE**2 - 1},
            r"coarse_pixels must be an integer that allows for one token, .* 12x12 = 144 pixels",
        ),
        ({"coarse_pixels": 0}, r"coarse_pixels must be an integer .* got 0$"),
        ({"coarse_pixels": 1e6}, r"coarse_pixels must be an integer .* got 1000000.0$"),
        ({"aspect": "pad"}, r"aspect must be None or 'stretch' for Qwen3VL"),
    ],
    ids=str,
)
def test_bad_options(one, option, message):
    with pytest.raises(ValueError, match=message):
        adapter_of(one, **option)


def test_what_is_unsuitable_is_named(one):
    model, processor = one
    with pytest.raises(ValueError, match=r"coarse_pixels is for models that take frames of any size; Llava"):
        VideoAdapter(*tiny_llava(), coarse_pixels=10_000)
    with pytest.raises(ValueError, match=r"Qwen3VL\w+'s own, with a video_processor; got"):
        VideoAdapter(model, processor.tokenizer)
    with pytest.raises(StreamError, match=r"text has 0 "):
        adapter_of(one)(f"{START}{IMAGE}{END}", videos=stripes())


def test_a_processor_that_resizes_all_the_same_is_named(native):
    adapter = adapter_of(native)
    size = {"shortest_edge": SIDE**2, "longest_edge": 2 * SIDE**2}
    adapter.family.processor = Stubborn(native[1], videos_kwargs={"do_resize": True, "size": size})
    with pytest.raises(
        ValueError, match=r"video_grid_thw \[\[3, 2, \d\]\] from coarse clips of \[\[3, 4, 6\]\]"
    ):
        adapter(PROMPT, videos=stripes(24, 24, 36))


def test_a_processor_of_other_patches_is_named():
    model, processor = tiny_native("qwen2_5_vl")
    processor.video_processor.temporal_patch_size = 1
    with pytest.raises(
        ValueError, match=r"video_processor.temporal_patch_size is 1 and the vision tower's is 2"
    ):
        VideoAdapter(model, processor)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"audio_tower": 1}, "has an audio tower, and takes sound alone or clips with theirs"),
        ({"audio_tower": 1, "visual": 1}, "has an audio tower"),
        ({"visual": 1}, "one of any size whose config says how it is patched .*; Strange has neither"),
    ],
    ids=["sound", "sound and sight", "unknown patches"],
)
def test_other_models_are_refused_with_the_reason(one, parts, reason):
    strange = type("Strange", (), {"model": type("Inner", (), parts)()})()
    with pytest.raises(UnsupportedModelError, match=reason):
        VideoAdapter(strange, one[1])
