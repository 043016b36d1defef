"""The video adapter on a tiny LLaVA: views, what is decoded when, batches, errors, answers."""

from __future__ import annotations

import copy
from importlib import metadata
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import flexcore
from flexcore.errors import SourceError, StreamError, UnsupportedModelError
from flexcore.hf.processing import collate
from flexcore.hf.tiny import tiny_llama, tiny_llava
from flexcore.tiled_source import gather
from flexcore_adapters.video import VideoAdapter
from flexcore_adapters.video_io import open_video
from flexcore_adapters.video_time import clock, frames_at, span, steps

from .video_helpers import bunny, fake_decord, stripes

SIDE, CELLS = 48, 6
PROMPT = "USER: <video>\nWhat happens? ASSISTANT:"


@pytest.fixture
def model() -> tuple[Any, Any]:
    """Wrapped, with fine weights that aren't copies."""
    model, processor = tiny_llava()
    flexcore.wrap(model, flexcore.FlexConfig(first_layer=1, selector="top_k", top_k=3, region_size=3))
    with torch.no_grad():
        for parameter in model.flex_fine.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, processor


def adapter_of(model: tuple[Any, Any], **options: Any) -> VideoAdapter:
    return VideoAdapter(*model, **{"coarse_frames": 3, "fine_fps": 4, "fps": 2, "zoom": 2, **options})


def answer(model: Any, inputs: Any, **kwargs: Any) -> Any:
    settings = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "suppress_tokens": [3],
        **kwargs,
    }
    return model.generate(**inputs, **settings)


def features_of(source: Any) -> torch.Tensor:
    """All of a source's features in raster order."""
    grid = source.grid
    regions = torch.arange(grid.n_regions)
    tokens = grid.tokens(regions)
    out = torch.full((grid.n_fine, source.width), float("nan"))
    out[tokens[tokens >= 0]] = source.features(regions)[tokens >= 0]
    return out


def encoded(model: tuple[Any, Any], tile: Image.Image) -> torch.Tensor:
    """`[cells, cells, C]` of a picture of the tower's size, through the processor and the model's own code."""
    pixels = model[1].image_processor(tile, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model[0].get_image_features(pixel_values=pixels).pooler_output[0].view(CELLS, CELLS, -1)


# ---------------------------------------------------------------------- views and features


@pytest.mark.parametrize("aspect", ["pad", "stretch"])
def test_views_and_features(model, aspect):
    frames = stripes(12, 24, 32)
    inputs = adapter_of(model, aspect=aspect)(PROMPT, videos=frames)
    ((stream,),) = inputs["flex_streams"].samples
    grid = stream.grid
    assert (grid.coarse, grid.fine) == ((3, CELLS, CELLS), (12, 2 * CELLS, 2 * CELLS))

    def shown(frame: np.ndarray, side: int) -> Image.Image:
        picture = Image.fromarray(frame)
        if aspect == "pad":
            square = Image.new("RGB", (32, 32), (122, 116, 104))  # 255 * CLIP's mean, cut off
            square.paste(picture, (0, 4))
            picture = square
        return picture.resize((side, side), Image.Resampling.BICUBIC)

    # 6 seconds at 2 fps: coarse frames at 1, 3 and 5 s, fine ones each half second
    few = [frames[i] for i in (2, 6, 10)]
    text = PROMPT.replace("<video>", "<image>\n<image>\n<image>")
    plain = model[1](text=text, images=[shown(f, SIDE) for f in few], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], plain["pixel_values"])
    assert torch.equal(inputs["input_ids"], plain["input_ids"])
    found = features_of(stream.source).view(12, 2 * CELLS, 2 * CELLS, -1)
    for step, r, c in ((0, 0, 0), (5, 1, 0), (11, 1, 1)):
        tile = shown(frames[step], 2 * SIDE).crop((c * SIDE, r * SIDE, (c + 1) * SIDE, (r + 1) * SIDE))
        own = found[step, r * CELLS : (r + 1) * CELLS, c * CELLS : (c + 1) * CELLS]
        assert torch.allclose(own, encoded(model, tile), atol=1e-5)
    # rows 0..0.125 of the square are padding: less than one of 6 coarse cells, one of 12 fine tokens
    margin = grid.fine_valid.view(grid.fine)[4, :, 4]
    assert margin.tolist() == ([False] + [True] * 10 + [False] if aspect == "pad" else [True] * 12)


def test_coarse_tokens_are_the_frames_in_order(model):
    frames = stripes(12)
    inputs = adapter_of(model)(PROMPT, videos=frames)
    ((stream,),) = inputs["flex_streams"].samples
    positions = stream.coarse_positions
    assert len(positions) == 3 * CELLS**2 and bool((inputs["input_ids"][0, positions] == 3).all())
    # a line break between frames, nothing within one
    jumps = positions.diff()
    assert (jumps != 1).nonzero()[:, 0].tolist() == [CELLS**2 - 1, 2 * CELLS**2 - 1]


def test_regions_follow_options(model):
    frames = stripes(24)
    grid = adapter_of(model).views([frames])[0].grid
    assert grid.edges == ((0, 4, 8, 12, 16, 20, 24), (0, 3, 6, 9, 12), (0, 3, 6, 9, 12))
    grid = adapter_of(model, region=(8, 6, 4)).views([frames])[0].grid
    assert grid.edges == ((0, 8, 16, 24), (0, 6, 12), (0, 4, 6, 10, 12))
    grid = adapter_of(tiny_llava()).views([frames])[0].grid  # a plain model: blocks of 8 within each tile
    assert grid.edges[1] == (0, 6, 12)


@pytest.mark.parametrize(
    "options, coarse, fine",
    [
        ({}, 3, 24),
        ({"fine_fps": 1}, 3, 12),
        ({"fine_fps": 0.9}, 3, 9),
        ({"fine_fps": 0.01}, 3, 3),
        ({"max_frames": 7}, 3, 6),
        ({"coarse_frames": 30, "max_frames": 99}, 24, 24),
        ({"start": 2.0, "end": 4.0}, 3, 3),
        ({"start": 11.5}, 1, 1),
        ({"coarse_frames": 1}, 1, 24),
    ],
    ids=str,
)
def test_numbers_of_frames(model, options, coarse, fine):
    (view,) = adapter_of(model, **options).views([stripes(24, 8, 8)])  # 12 seconds
    assert (view.grid.coarse[0], view.grid.fine[0]) == (coarse, fine)
    assert len(view.coarse) == coarse and view.fine_index.shape == (fine, 1)
    assert (np.diff(view.fine_index[:, 0]) > 0).all()
    if "start" in options:
        first, last = options["start"], options.get("end", 12.0)
        assert (view.video.times[view.fine_index] >= first - 1e-9).all()
        assert (view.video.times[view.fine_index] < last).all()


def test_time_rules():
    video = open_video(stripes(100, 4, 4), fps=10)
    # frames are those on show at the middles of equal parts
    assert frames_at(video, 0.0, 10.0, 4).tolist() == [12, 37, 62, 87]
    assert span(video, None, None) == (0.0, 10.0) and span(video, 2, 99) == (2.0, 10.0)
    assert steps(video, 0.0, 10.0, 5, 2.0, 256, 1) == (5, 20)
    with pytest.raises(
        ValueError, match=r"start=12 and end=None must leave some of video, .*0:00.00 to 0:10.00"
    ):
        span(video, 12, None)
    assert [clock(s) for s in (0, 61.239, 3600, -1)] == ["0:00.00", "1:01.24", "1:00:00.00", "0:00.00"]

    class Sparse(type(video)):
        keys = np.array([0, 20, 40, 76])

    video.__class__ = Sparse
    # parts of 5 s: 20 is 0.5 s from 2.5 s and taken, 76 is 0.1 s from 7.5 s and taken
    assert frames_at(video, 0.0, 10.0, 2).tolist() == [20, 76]
    # parts of 1 s, middles at 1.5, 2.5, 3.5 and 4.5 s: every key frame is further away than a quarter
    assert frames_at(video, 0.0, 10.0, 10)[1:5].tolist() == [15, 25, 35, 45]


def test_variable_frame_rate_is_even_in_time(model):
    video = open_video(stripes(20, 8, 8), fps=1)
    # 5 frames in 10 s, then 15 in 10 s
    video.times = np.concatenate([np.arange(5) * 2.0, 10 + np.arange(15) / 1.5])
    (view,) = adapter_of(model, coarse_frames=2, fine_fps=0.5).views([video])
    assert video.times[view.coarse_index[:, 0]].round(2).tolist() == [4.0, 14.67]  # shown at 5 and 15 s
    assert view.fine_index[:5, 0].tolist() == [0, 1, 2, 3, 4] and view.fine_index[5:, 0].tolist() == [
        6,
        9,
        12,
        15,
        18,
    ]


# ---------------------------------------------------------------------- on demand


def test_frames_are_decoded_when_chosen(model):
    adapter = adapter_of(model, region=(1, 6, 6))
    clip = open_video(stripes(40, 24, 32), fps=4)
    inputs = adapter(PROMPT, videos=clip)
    ((stream,),) = inputs["flex_streams"].samples
    assert (
        sorted(clip.decoded) == adapter.views([clip])[0].coarse_index[:, 0].tolist()
        and len(clip.decoded) == 3
    )
    clip.decoded.clear()
    with flexcore.trace(model[0]) as trace:
        answer(model[0], inputs, max_new_tokens=1, min_new_tokens=1)
    # regions are one tile of one frame here
    read = torch.stack([r.regions for r in trace if r.read_in is not None]).any(dim=0).nonzero()[:, 0]
    chosen = sorted({int(r) // 4 for r in read})
    index = adapter.views([open_video(clip.arrays, fps=4)])[0].fine_index[:, 0]
    assert sorted(clip.decoded) == [int(index[step]) for step in chosen]
    assert stream.source.stats.units == len(read) < stream.source.n_tiles / 4
    assert set(clip.decoded.values()) == {1}


def test_on_demand_equals_up_front(model):
    frames = stripes(12)
    outs, all_features = [], []
    for lazy in (True, False):
        inputs = adapter_of(model, lazy=lazy)(PROMPT, videos=frames)
        ((stream,),) = inputs["flex_streams"].samples
        assert (stream.source.stats.units == stream.source.n_tiles) == (not lazy)
        outs.append(answer(model[0], inputs, output_logits=True, return_dict_in_generate=True))
        all_features.append(features_of(stream.source))
    assert torch.allclose(*all_features, rtol=1e-5, atol=1e-5)
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    for a, b in zip(outs[0].logits, outs[1].logits, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    plain = {k: v for k, v in inputs.items() if k != "flex_streams"}
    off = answer(model[0], plain, output_logits=True, return_dict_in_generate=True)
    assert float((off.logits[0] - outs[0].logits[0]).abs().max()) > 1e-3


def test_clips_of_a_call_share_micro_batches(model):
    adapter = adapter_of(model, region=(1, 6, 6), micro_batch=16)
    batches: list[int] = []
    encode = adapter.family.encode
    adapter.family.encode = lambda tiles: batches.append(len(tiles)) or encode(tiles)
    inputs = adapter([PROMPT, PROMPT], videos=[stripes(12), stripes(9)])
    a, b = (s[0].source for s in inputs["flex_streams"].samples)
    together = gather([(a, torch.tensor([1, 5])), (b, torch.tensor([0]))])
    assert batches == [3]
    alone = adapter_of(model, region=(1, 6, 6)).streams([stripes(9)])[0].source.features(torch.tensor([0]))
    assert torch.allclose(together[1], alone, atol=1e-5)


def test_a_batch_of_clips_and_text_equals_its_samples_alone(model):
    adapter = adapter_of(model)
    texts = [PROMPT, "USER: Hello? ASSISTANT:", "USER: <video>\n<video>\nSame? ASSISTANT:"]
    videos = [[stripes(12)], [], [stripes(2, 30, 20), list(stripes(8, 16, 16))]]
    together = adapter(texts, videos=videos)
    assert together["attention_mask"][:, 0].tolist() == [0, 0, 1]  # left padding
    found = answer(model[0], together, output_logits=True, return_dict_in_generate=True)
    for row, (text, own) in enumerate(zip(texts, videos, strict=True)):
        alone = answer(
            model[0], adapter([text], videos=[own]), output_logits=True, return_dict_in_generate=True
        )
        for a, b in zip(found.logits, alone.logits, strict=True):
            assert float((a[row] - b[0]).abs().max()) < 5e-5


def test_real_clip_from_file_to_answer(model):
    adapter = flexcore.load_adapter("video", *model, coarse_frames=2, fine_fps=2, zoom=1, progress=False)
    inputs = adapter(PROMPT, videos=bunny())
    ((stream,),) = inputs["flex_streams"].samples
    assert (stream.grid.coarse[0], stream.grid.fine[0]) == (2, 10)
    with flexcore.trace(model[0]) as trace:
        out = answer(model[0], inputs)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4
    (view,) = adapter.views([bunny()])
    sheet = view.contact_sheet(trace.looked_at(), most=4, width=600)
    assert sheet.width == 600 and len(np.unique(np.asarray(sheet))) > 100
    assert view.describe(3) == f"frame {view.fine_index[3, 0]} at 0:01.84, row 1 and column 1 of 1x1 tiles"


def test_lists_deal_out_like_pictures(model):
    adapter = adapter_of(model)
    one, two = stripes(12), stripes(5)
    flat = adapter([PROMPT, PROMPT], videos=[one, two])
    nested = adapter([PROMPT, PROMPT], videos=[[one], [two]])
    assert torch.equal(flat["input_ids"], nested["input_ids"])
    assert len(adapter(PROMPT, videos=[Image.fromarray(f) for f in one])["flex_streams"].samples[0]) == 1
    assert "pixel_values" not in adapter("USER: Hi ASSISTANT:")
    with pytest.raises(StreamError, match=r"sample 0 has 1 <video> placeholder\(s\) and 2 videos"):
        adapter(PROMPT, videos=[[one, two]])
    with pytest.raises(StreamError, match="1 <video> placeholder"):
        adapter(PROMPT)
    with pytest.raises(ValueError, match="no <image>: pictures beside clips"):
        adapter("USER: <video><image> ASSISTANT:", videos=one)


def test_collate_joins_clips_and_text(model):
    adapter = adapter_of(model)
    parts = [
        adapter(PROMPT, videos=stripes(12)),
        adapter("USER: Hi ASSISTANT:"),
        adapter(PROMPT, videos=stripes(2)),
    ]
    batch = collate(parts, tokenizer=model[1], padding_side="left")
    together = adapter([PROMPT, "USER: Hi ASSISTANT:", PROMPT], videos=[[stripes(12)], [], [stripes(2)]])
    assert torch.equal(batch["input_ids"], together["input_ids"])
    assert torch.equal(batch["pixel_values"], together["pixel_values"])
    for one, other in zip(batch["flex_streams"], together["flex_streams"], strict=True):
        assert [s.coarse_positions.tolist() for s in one] == [s.coarse_positions.tolist() for s in other]
    with pytest.raises(StreamError, match="holds 1 media, pixel_values 2"):
        collate([{**parts[0], "pixel_values": parts[0]["pixel_values"][:2]}])


def test_copies_share_the_model(model):
    adapter = adapter_of(model)
    twin = copy.deepcopy(adapter)
    assert twin.model is adapter.model and twin.family.model is adapter.model
    assert torch.equal(
        twin(PROMPT, videos=stripes())["input_ids"], adapter(PROMPT, videos=stripes())["input_ids"]
    )


# ---------------------------------------------------------------------- what can go wrong


class Broken(type(open_video(stripes()))):
    """A clip with frames that can't be decoded."""

    bad: frozenset[int] = frozenset()

    def read(self, indices: list[int]) -> list[Any]:
        return [
            RuntimeError("the decoder gave up") if i in self.bad else super(Broken, self).read([i])[0]
            for i in indices
        ]


def broken(bad: set[int], frames: int = 12) -> Broken:
    video = open_video(stripes(frames), fps=2, name="clip.mp4")
    video.__class__ = Broken
    video.bad = frozenset(bad)
    return video


def test_an_unreadable_fine_frame_is_one_named_error(model):
    inputs = adapter_of(model)(PROMPT, videos=broken({7}))
    ((stream,),) = inputs["flex_streams"].samples
    with pytest.raises(
        SourceError,
        match=r"video 0 \(clip.mp4\), tile 28 of 48, frame 7 at 0:03.50, row 1 and column 1 of 2x2 tiles "
        "can't be read: the decoder gave up",
    ):
        stream.source.features(torch.arange(stream.grid.n_regions))
    # the model and other requests are fine
    assert answer(model[0], adapter_of(model)(PROMPT, videos=stripes())).shape[0] == 1


def test_unreadable_frames_can_be_left_out(model):
    adapter = adapter_of(model, on_error="skip", region=(1, 6, 6))
    flexcore.unwrap(model[0])
    flexcore.wrap(model[0], flexcore.FlexConfig(first_layer=1, selector="all"))
    with pytest.warns(UserWarning, match="frame 7 at 0:03.50.*it is left out"):
        inputs = adapter(PROMPT, videos=broken({7}))
        ((stream,),) = inputs["flex_streams"].samples
        out = answer(model[0], inputs, output_logits=True, return_dict_in_generate=True)
    assert bool(torch.isfinite(torch.stack(out.logits)[..., :3]).all())
    regions = torch.arange(stream.grid.n_regions)
    lost = (~stream.source.readable(regions)).nonzero()[:, 0]
    assert lost.tolist() == list(range(28, 32))


def test_an_unreadable_coarse_frame(model):
    with pytest.raises(SourceError, match=r"video 0 \(clip.mp4\), coarse frame 6 at 0:03.00, can't be read"):
        adapter_of(model)(PROMPT, videos=broken({6}))
    with pytest.warns(UserWarning, match="shown blank"):
        (view,) = adapter_of(model, on_error="skip").views([broken({6})])
    assert view.coarse[1].getcolors(1) and not view.coarse[0].getcolors(1)


def test_a_file_that_hangs_while_it_is_read(model, tmp_path, monkeypatch):
    body = """
    def next(self):
        if self.at == 30: time.sleep(60)
        return super().next()
    """
    monkeypatch.syspath_prepend(fake_decord(tmp_path, body))
    (tmp_path / "clip.bin").write_bytes(b"x")
    adapter = adapter_of(model, timeout=1.5, end=2.0, coarse_frames=1)
    stream = adapter.streams(tmp_path / "clip.bin")[0]
    assert stream.source.features(torch.tensor([0])).isfinite().all()
    later = adapter_of(model, timeout=1.5, coarse_frames=1, fine_fps=20)
    stream = later.streams(tmp_path / "clip.bin")[0]
    region = 7 * stream.grid.n_regions // stream.grid.region_shape[0]  # of frames 28 to 31
    with pytest.raises(SourceError, match=r"clip.bin.*frame 30 at 0:03.00.*no progress for 1.5 s"):
        stream.source.features(torch.tensor([region]))


@pytest.mark.parametrize(
    "option",
    [
        {"coarse_frames": 0},
        {"max_frames": True},
        {"zoom": 1.5},
        {"micro_batch": -1},
        {"fine_fps": 0},
        {"fine_fps": float("nan")},
        {"fps": "25"},
        {"region": (2, 2)},
        {"region": (2, 2, 0)},
        {"aspect": "crop"},
        {"start": 3.0, "end": 2.0},
        {"on_error": "ignore"},
        {"timeout": 0},
        {"lazy": 1},
        {"coarse_frames": 9, "max_frames": 8},
    ],
    ids=str,
)
def test_bad_options(model, option):
    with pytest.raises(ValueError, match="|".join(option)):
        VideoAdapter(*model, **option)


def test_unknown_option_and_unsuitable_model(model):
    with pytest.raises(TypeError, match=r"no option 'frames'; its options are coarse_frames, fine_fps"):
        VideoAdapter(*model, frames=3)
    with pytest.raises(UnsupportedModelError):
        VideoAdapter(tiny_llama(), model[1])


def test_is_registered():
    names = {e.name for e in metadata.entry_points(group="flexcore")}
    if "video" not in names:
        pytest.skip("flexcore isn't installed with its video adapter")
    assert flexcore.plugins.load_adapter_class("video") is VideoAdapter
