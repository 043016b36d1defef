"""The magnifier's recordings: what is heard when, what the adapter makes of them, and that the recipe takes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flexcore
from tests.benchmarks.magnifier_helpers import settle
from tests.hf.helpers import perturb

pytest.importorskip("torchaudio")

from benchmarks.magnifier import recordings, sounds, train
from benchmarks.magnifier.arms import ARMS, Inputs, build, fitted
from benchmarks.magnifier.base import Base, assembled
from benchmarks.magnifier.evaluate import evaluate
from benchmarks.magnifier.loop import generator
from benchmarks.magnifier.model import tokenizer
from benchmarks.magnifier.recording_encoder import (
    Levels,
    SoundReader,
    TowerWindows,
    batch_of,
    labels,
    loss_of,
)
from benchmarks.magnifier.recordings import AUDIO, room_window


@pytest.fixture(scope="module", autouse=True)
def voices():
    """Ten hums of different pitches stand in for the spoken digits, which have to be downloaded."""
    t = np.arange(4000) / sounds.RATE
    hums = tuple((d, np.sign(np.sin(2 * np.pi * (110 + 15 * d) * t)).astype(np.float32)) for d in range(10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sounds, "takes", lambda: hums)
        yield


@pytest.fixture(scope="module")
def llava():
    model = assembled(AUDIO)
    settle(model.model.vision_tower, batch_of(generator(1), Levels(), 4, 1)[0][0])
    return model


@pytest.fixture(scope="module")
def media(llava):
    return AUDIO.drawn(llava.model.vision_tower, 3, 7, rooms=1)


def test_a_window_sounds_as_it_says():
    room = sounds.Room(generator(0))
    quiet = sounds.window(generator(1), room)
    assert quiet.samples.shape == (sounds.SAMPLES,) and not quiet.bells and not quiet.digits
    for seed in range(6):
        shown = sounds.window(generator(seed), room, [(seed, 4), ((seed + 1) % 6, 9)], others=1)
        assert [name for name, _ in shown.bells] == [seed, (seed + 1) % 6]
        assert [digit for digit, _, _ in shown.digits[:2]] == [4, 9] and len(shown.digits) == 3
        for (name, at), (_, begin, end) in zip(shown.bells, shown.digits, strict=False):
            assert at < begin < end <= sounds.WINDOW and 0.6 <= begin - at <= 1.4
            after = shown.samples[int(at * sounds.RATE) :][: sounds.RATE // 2]
            spectrum = np.abs(np.fft.rfft(after * np.hanning(len(after))))
            loudest = spectrum.argmax() * sounds.RATE / len(after)
            assert loudest == pytest.approx(sounds.BELLS[sounds.NAMES[name]], rel=0.03)
            assert not any(
                at < other < begin or begin < other < end for _, other, _ in shown.digits if other != begin
            )
        again = sounds.window(generator(seed), room, [(seed, 4), ((seed + 1) % 6, 9)], others=1)
        assert np.array_equal(again.samples, shown.samples)


def test_frames_know_the_digits_and_bells_in_them():
    shown = sounds.Window(np.zeros(1), ((2, 3.0),), ((7, 4.0, 4.7), (1, 9.5, 10.0)))
    digit, bells = labels(shown, 0.8, 20, digits=True)
    assert digit.tolist() == [-1] * 5 + [7] + [-1] * 5 + [-2, 1] + [-1] * 7
    assert bells[:, 2].nonzero()[0].tolist() == [3, 4, 5] and bells.sum() == 3
    coarse, ringing = labels(shown, 8.0, 2, digits=False)
    assert coarse.tolist() == [-2, -2] and ringing[:, 2].tolist() == [1, 0]
    value, numbers = loss_of(SoundReader(), batch_of(generator(0), Levels(), 2, 2))
    assert bool(value.isfinite()) and set(numbers) == {"read", "there", "ring", "ring_coarse"}


def test_splits_share_no_room():
    seeds = [seed for _, seed in AUDIO.splits.values()]
    assert len(set(seeds)) == len(seeds) == 3 and set(AUDIO.splits) == set(recordings.ROOMS)
    rooms = [sounds.Room(generator(seed, 33, 0)).envelope for seed in seeds]
    assert not np.allclose(rooms[0], rooms[1]) and not np.allclose(rooms[0], rooms[2])


def test_a_recording_says_each_answer_once_after_its_bell(media):
    assert recordings.SECONDS >= 600
    for i in range(3):
        shown = [room_window(7, which) for which in media.windows[i]]
        strokes = {w.bells[0][0]: (at, w.digits[0]) for at, w in enumerate(shown) if w.bells}
        assert sorted(strokes) == list(range(6)) and len(set(media.windows[i])) == recordings.WINDOWS
        for name, (at, (digit, begin, end)) in strokes.items():
            assert media.digits[i, 0, name] == digit
            start, stop = media.boxes[i, 0, name]
            assert start * 0.8 <= 16 * at + begin < (start + 1) * 0.8
            assert (stop - 1) * 0.8 < 16 * at + end <= stop * 0.8


def test_touched_regions_by_looking_at_every_frame(media):
    grid = AUDIO.grid
    owner = np.zeros(grid.n_fine, int)
    for region in range(grid.n_regions):
        tokens = grid.tokens(torch.tensor([region])).flatten()
        owner[tokens[tokens >= 0].numpy()] = region
    found = AUDIO.touched(torch.from_numpy(media.boxes))
    for at in np.ndindex(3, 1, 6):
        start, stop = media.boxes[at]
        assert set(found[at].nonzero()[:, 0].tolist()) == set(owner[start:stop].tolist())


def test_features_and_lattice_are_what_the_audio_adapter_makes(llava, media):
    arm = fitted(ARMS["flex"], AUDIO)
    model, inputs = build(arm, lambda: assembled(AUDIO)).eval(), Inputs(arm, task=AUDIO)
    model.model.vision_tower.load_state_dict(llava.model.vision_tower.state_dict())
    perturb(model)
    samples = np.concatenate([room_window(7, which).samples for which in media.windows[1]])
    adapter = flexcore.load_adapter(
        "audio", model, tokenizer(AUDIO.wording), encoder=TowerWindows(model), progress=False
    )
    colour = 3
    question = AUDIO.wording.question("after", colour)
    alone = adapter(text=[f"<audio> {question}"], audio=[(samples, sounds.RATE)])
    stream = alone["flex_streams"].samples[0][0]
    assert stream.grid == AUDIO.grid
    assert stream.coarse_positions.tolist() == list(range(1, 77))
    with torch.no_grad():
        encoded = model.model.multi_modal_projector(media.look_up(np.array([1])))[0]
    scale = float(encoded.abs().max())
    assert float((encoded[:76] - stream.coarse_embeds).abs().max()) < 2e-3 * scale
    regions = torch.arange(0, AUDIO.grid.n_regions, 7)
    fine = encoded[76:][AUDIO.grid.tokens(regions)]
    assert float((fine - stream.source.features(regions)).abs().max()) < 2e-3 * scale
    assert float((fine[0] - fine[1]).abs().max()) > 5e-2 * scale
    made = inputs(model, **train.picture_batch(media, np.array([1])))
    rows = inputs.questions.rows(inputs.before)
    made["readout_mask"] = torch.zeros(made.pop("labels").shape, dtype=torch.bool)
    made["readout_mask"][:, rows] = True
    with torch.no_grad():
        together, expected = model(**made).logits[0, rows], model(**alone).logits[0, -1]
    assert torch.allclose(together[colour], expected, atol=5e-3)
    assert float((together[0] - expected).abs().max()) > 2e-2


def test_the_base_asks_about_a_minute_at_the_fine_rate(llava):
    close = AUDIO.readable(llava.model.vision_tower, "val", 2, 0)
    assert close.features.shape == (2, 76, 128) and close.digits.shape == (2, 1, 6)
    base = Base(assembled(AUDIO), AUDIO)
    for early, n in ((True, 12), (False, 6)):
        logits, wanted = base(close.features, close.digits, early=early)
        assert logits.shape[:2] == wanted.shape == (2, n)
    # "... after the silver bell ?": two tokens follow the name, and the last of them answers
    assert base.questions.naming(77).tolist() == (base.questions.rows(77) - 2).tolist()


@pytest.mark.parametrize("name", ["coarse", "flex", "oracle", "dense"])
def test_an_arm_trains_and_is_evaluated(name, media):
    arm = fitted(ARMS[name], AUDIO)
    model, inputs = build(arm, lambda: assembled(AUDIO)).train(), Inputs(arm, task=AUDIO)
    made = inputs(model, **train.picture_batch(media, np.arange(1)))
    model(**made, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    result = evaluate(name, model.eval(), arm, media, "after", progress=False, task=AUDIO)
    assert len(result.right) == 18 and result.flops > 0
    if name == "oracle":
        assert result.hit_any == 1.0 and set(result.whole.values()) == {1.0}
    if name == "flex":
        assert result.regions == pytest.approx(dict.fromkeys(range(2, 5), 15 / 152))


def test_media_on_disk_are_kept(tmp_path, llava, monkeypatch):
    monkeypatch.setattr(recordings, "ROOMS", {"val": 1})
    first, again = (AUDIO.cached(tmp_path, llava, "val", 2, 3) for _ in range(2))
    assert torch.equal(first.look_up(np.arange(2)), again.look_up(np.arange(2)))
    with pytest.raises(ValueError, match="asked for are"):
        AUDIO.cached(tmp_path, llava, "val", 2, 4)
