"""The magnifier's clips: what shows when, what the adapter makes of them, and that the pictures' recipe takes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flexcore
from tests.benchmarks.magnifier_helpers import settle
from tests.hf.helpers import perturb

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from benchmarks.magnifier import clips, results, scenes, train
from benchmarks.magnifier.arms import ARMS, Inputs, build, fitted
from benchmarks.magnifier.base import Base, assembled
from benchmarks.magnifier.clip_encoder import FrameReader, frames, loss_of
from benchmarks.magnifier.evaluate import evaluate
from benchmarks.magnifier.loop import generator
from benchmarks.magnifier.video_task import ADAPTER, VIDEO


@pytest.fixture(scope="module")
def llava():
    model = assembled(VIDEO)
    settle(model.model.vision_tower, frames(generator(1), "val", 64)[0])
    torch.nn.init.zeros_(model.model.vision_tower.position)  # what is in a frame must tell, not where
    return model


@pytest.fixture(scope="module")
def media(llava):
    return VIDEO.drawn(llava.model.vision_tower, "val", 3, 0)


def test_a_clip_shows_what_it_says():
    ring = clips.border()
    palette = np.array(list(scenes.COLOURS.values()))
    for i in range(4):
        clip = clips.clip(generator(i), "test")
        assert clip.frames.shape == (600, 16, 16, 3) and sorted(clip.colours) == list(range(6))
        for (start, stop), (first, last), colour in zip(
            clip.stretches, clip.shown, clip.colours, strict=True
        ):
            assert 2.0 <= (stop - start) / clips.FPS <= 2.5
            assert start <= first and last <= stop and (last - first) / clips.FPS < 0.5
            seen = clip.frames[start:stop][:, ring].reshape(-1, 3).mean(0) / 255
            assert int(np.abs(palette - seen).sum(1).argmin()) == colour
        others = np.ones(600, bool)
        for start, stop in clip.stretches:
            others[start:stop] = False
        near = np.abs(clip.frames[others][:, ring] / 255 - palette[:, None, None]).mean((2, 3))
        assert float(near.min()) > 0.1


def test_no_coarse_frame_sees_a_digit_that_is_asked_for_and_fine_ones_do():
    for i in range(30):
        clip = clips.clip(generator(i), "val")
        digits, steps = clip.by_colour()
        for colour in range(6):
            at = int(np.flatnonzero(clip.colours == colour)[0])
            start, stop = clip.shown[at]
            assert digits[colour] == clip.digits[at]
            assert not ((start <= clips.COARSE_AT) & (stop > clips.COARSE_AT)).any()
            inside = np.flatnonzero((start <= clips.FINE_AT) & (stop > clips.FINE_AT))
            assert steps[colour].tolist() == [inside[0], inside[-1] + 1] and len(inside) >= 2
            coloured = (clip.stretches[at, 0] <= clips.COARSE_AT) & (clip.stretches[at, 1] > clips.COARSE_AT)
            assert coloured.sum() >= 2
        seen = clips.clip(generator(i), "val", seen=True)
        for start, stop in seen.shown:
            assert ((start <= clips.COARSE_AT) & (stop > clips.COARSE_AT)).sum() == 1


def test_touched_regions_by_looking_at_every_token():
    grid = VIDEO.grid
    owner = np.zeros(grid.n_fine, int)
    for region in range(grid.n_regions):
        tokens = grid.tokens(torch.tensor([region])).flatten()
        owner[tokens[tokens >= 0].numpy()] = region
    owner = owner.reshape(grid.fine)
    spans = torch.tensor([[[0, 2], [5, 8]], [[141, 144], [7, 9]]])
    found = VIDEO.touched(spans)
    for i, j in np.ndindex(2, 2):
        start, stop = spans[i, j].tolist()
        assert set(found[i, j].nonzero()[:, 0].tolist()) == set(owner[start:stop].flatten().tolist())


def test_features_and_lattice_are_what_the_video_adapter_makes(llava, media):
    clip = clips.clip(generator(0, 25, 1), "val")
    adapter = flexcore.load_adapter("video", llava, VIDEO.processor(), lazy=False, **ADAPTER)
    question = VIDEO.wording.question("while", 2)
    inputs = adapter(text=[f"<video> {question}"], videos=[clip.frames])
    stream = inputs["flex_streams"].samples[0][0]
    assert stream.grid == VIDEO.grid
    assert stream.coarse_positions.tolist() == list(range(1, 97))
    with torch.no_grad():
        encoded = llava.model.multi_modal_projector(media.look_up(np.array([1])))[0]
        coarse = llava.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    coarse = torch.cat(list(coarse))
    scale = float(coarse.abs().max())
    regions = torch.arange(VIDEO.grid.n_regions)
    fine = encoded[96:][VIDEO.grid.tokens(regions)]
    assert float((fine - stream.source.features(regions)).abs().max()) < 2e-3 * scale
    assert float((encoded[:96] - coarse).abs().max()) < 2e-3 * scale
    assert float((encoded[0] - encoded[4]).abs().max()) > 5e-2 * scale
    assert float((fine[0] - fine[1]).abs().max()) > 5e-2 * scale


def test_the_adapter_s_model_inputs_get_the_answer_that_the_kept_features_get(llava, media):
    arm = fitted(ARMS["flex"], VIDEO)
    model, inputs = build(arm, lambda: assembled(VIDEO)).eval(), Inputs(arm, task=VIDEO)
    model.model.vision_tower.load_state_dict(llava.model.vision_tower.state_dict())
    perturb(model)
    made = inputs(model, **train.picture_batch(media, np.array([1])))
    made.pop("labels")
    rows = inputs.questions.rows(inputs.before)
    made["readout_mask"] = torch.zeros(made["inputs_embeds"].shape[:2], dtype=torch.bool)
    made["readout_mask"][:, rows] = True
    adapter = flexcore.load_adapter("video", model, VIDEO.processor(), **ADAPTER)
    clip = clips.clip(generator(0, 25, 1), "val")
    with torch.no_grad():
        together = model(**made).logits[0, rows]
        for colour in (0, 4):
            question = VIDEO.wording.question("while", colour)
            alone = adapter(text=[f"<video> {question}"], videos=[clip.frames])
            expected = model(**alone).logits[0, -1]
            assert torch.allclose(together[colour], expected, atol=5e-3)
            assert float((together[(colour + 1) % 6] - expected).abs().max()) > 2e-2


def test_the_encoder_s_frames_say_what_is_in_them():
    pixels, digits, colours = frames(generator(0), "val", 200)
    assert pixels.shape == (200, 3, 16, 16) and set(digits.tolist()) == set(range(-1, 10))
    assert set(colours.sum(1).tolist()) == {0.0, 1.0}
    value, numbers = loss_of(FrameReader(), (pixels[:16], digits[:16], colours[:16]))
    assert bool(value.isfinite()) and set(numbers) == {"read", "there", "paint"}


def test_the_base_asks_about_clips_whose_digits_the_coarse_frames_see(llava):
    close = VIDEO.readable(llava.model.vision_tower, "val", 2, 0)
    base = Base(assembled(VIDEO), VIDEO)
    assert close.features.shape == (2, 96, 128) and len(base.questions) == 6
    assert base.questions.naming(97).tolist() == (base.questions.rows(97) - 1).tolist()
    for early, n in ((True, 12), (False, 6)):
        logits, wanted = base(close.features, close.digits, early=early)
        assert logits.shape[:2] == wanted.shape == (2, n)
    assert close.aims.tolist() == [[list(range(6))]] * 2
    loss, right = base.lookups(close, np.arange(2))
    assert float(loss.detach()) > 0 and set(right) == {"aim_while"}


@pytest.mark.parametrize("name", ["coarse", "flex", "all", "random", "oracle", "dense"])
def test_an_arm_trains_and_is_evaluated(name, media):
    arm = fitted(ARMS[name], VIDEO)
    model, inputs = build(arm, lambda: assembled(VIDEO)).train(), Inputs(arm, task=VIDEO)
    made = inputs(model, **train.picture_batch(media, np.arange(2)))
    assert made["inputs_embeds"].shape[1] == 1 + 96 + (576 if name == "dense" else 0) + 49
    model(**made, use_cache=False).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    result = evaluate(name, model.eval(), arm, media, "while", progress=False, task=VIDEO)
    assert len(result.right) == 18 and result.flops > 0
    if name == "oracle":
        assert result.hit_any == 1.0 and set(result.whole.values()) == {1.0}
    if name == "flex":
        assert result.regions == pytest.approx(dict.fromkeys(range(2, 5), 7 / 72))


def test_media_on_disk_are_kept_and_others_refused(tmp_path, llava, media):
    first = VIDEO.cached(tmp_path, llava, "val", 3, 0)
    assert np.array_equal(first.digits, media.digits) and np.array_equal(first.boxes, media.boxes)
    assert torch.equal(first.look_up(np.arange(3)), media.look_up(np.arange(3)))
    assert len(VIDEO.cached(tmp_path, llava, "val", 3, 0)) == 3
    with pytest.raises(ValueError, match="asked for are"):
        VIDEO.cached(tmp_path, llava, "val", 3, 1)


def test_the_table_of_other_media_says_what_was_measured():
    def run(accuracy: float, flops: float, hits: dict | None = None) -> dict:
        one = {"accuracy": accuracy, "questions": 4200, "gflops": flops, "hits": hits or {}, "whole": {}}
        looks = {"hit_any": 0.98 if hits else None, "regions": {k: 7 / 72 for k in hits or {}}}
        return {"while": {**one, **looks}, "steps": 300}

    runs = {"dense-0": run(0.9, 12.0), "flex-0": run(0.86, 1.1, {"2": 0.95, "3": 0.91})}
    text = "\n".join(results.media_lines({"video": runs}, results._LABELS))
    assert results.media_lines({}, {}) == []
    assert "| video, Flex, top 7 of 72 | 86.0 | 98.0 | 91.0 | 9.7 | 1.100 | 4,200 | 300 |" in text
    assert "| video, dense | 90.0 |  |  |  | 12.000 | 4,200 | 300 |" in text
    assert text.index("Flex, top 7") < text.index("video, dense") and VIDEO.about in text
