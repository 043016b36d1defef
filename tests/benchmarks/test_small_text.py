"""The small-text recipe: its pictures, the paths a model is trained and asked on, and a whole run, on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import flexcore
from benchmarks.magnifier.loop import generator
from benchmarks.small_text import __main__ as small_text
from benchmarks.small_text import evaluate, fine_init, projector, signs, stages
from flexcore.hf.tiny import tiny_llava
from flexcore_adapters.tiling import paste_tiles

SIDE = 56  # of the tiny encoder's view: 7x7 cells
N_WORDS = len(signs.WORDS)


@pytest.fixture
def tiny():
    model, processor = tiny_llava(layers=4, image_size=SIDE)
    return model, processor, flexcore.load_adapter("image", model, processor, zoom=signs.ZOOM, region_size=4)


@pytest.fixture
def words(monkeypatch):
    """Token ids of the words: the tiny tokenizer, which spells, has a letter for each."""
    ids = torch.arange(30, 30 + N_WORDS)
    monkeypatch.setattr(small_text, "word_ids", lambda tokenizer: ids)
    return ids


@pytest.fixture
def few(monkeypatch):
    """A font that fits the tiny view."""
    monkeypatch.setattr(signs, "LARGE", (10, 12))
    monkeypatch.setattr(signs, "SMALL", (10, 12))


def test_a_sign_is_drawn_in_its_box_and_nowhere_else():
    plain = Image.fromarray(np.full((112, 112, 3), 128, np.uint8))
    for seed in range(20):
        sign = signs.put(generator(seed), plain, signs.LARGE)
        x, y, width, height = sign.box
        changed = (np.asarray(sign.image) != 128).any(-1)
        assert changed[y : y + height, x : x + width].mean() > 0.9
        changed[y : y + height, x : x + width] = False
        assert not changed.any()
    other = signs.put(generator(19), plain, signs.LARGE)
    assert np.array_equal(other.image, sign.image) and other.word == sign.word
    assert {signs.put(generator(seed), plain, signs.LARGE).word for seed in range(300)} == set(range(N_WORDS))


def test_shares_of_cells():
    boxes = torch.tensor([[0, 0, 8, 8], [4, 8, 8, 4], [0, 0, 16, 16]])
    found = signs.shares(boxes, 2, 16)
    assert torch.equal(found, torch.tensor([[1, 0, 0, 0], [0, 0, 0.25, 0.25], [1, 1, 1, 1]]))


def test_training_sees_what_the_adapter_makes_of_the_same_pictures(tiny, few):
    model, _, adapter = tiny
    small = signs.small(model, adapter, "train", 5, 2)
    assert len(small.changed) < 5 * signs.ZOOM**2  # most tiles are the photograph's
    rng = generator(2, sum(b"train"))
    side = adapter.side * signs.ZOOM
    grounds = [signs.ground(rng, "train", side) for _ in range(2)]
    assert adapter.side == SIDE
    project = model.model.multi_modal_projector
    for i in range(5):
        sign = signs.put(rng, grounds[int(rng.integers(2))], signs.SMALL)
        assert sign.word == small.words[i] and np.array_equal(sign.box, small.boxes[i])
        (view,) = adapter.views([sign.image])
        (maps,) = adapter.encode([view])
        whole = paste_tiles(maps, view.rows, view.cols)[0]
        with torch.no_grad():
            fine = project(small.fine(torch.tensor([i])).float())[0]
        torch.testing.assert_close(fine, whole, rtol=1e-2, atol=2e-3)  # features are kept in half precision
        assert signs.grid(adapter.cells) == view.grid


def test_training_and_generate_ask_the_same(tiny, few, words):
    model, processor, adapter = tiny
    flexcore.wrap(model, stages.flex_config(1, (2, 3), top_k=3))
    small = signs.small(model, adapter, "train", 2, 1)
    rng = generator(2, sum(b"train"))
    ground = signs.ground(rng, "train", SIDE * signs.ZOOM)
    pictures = []
    for _ in range(2):
        rng.integers(1)
        pictures.append(signs.put(rng, ground, signs.SMALL).image)
    inputs = adapter([stages.chat(processor)] * 2, images=pictures)
    talk = stages.Talk(model, processor, words)
    which, project = torch.arange(2), model.model.multi_modal_projector
    with torch.no_grad():
        asked = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, 0]
        taught = talk(project(small.coarse[which].float()), small.words)
        taught = talk.streams(taught, project(small.fine(which).float()))
        out = model(**taught)
    torch.testing.assert_close(out.logits[:, 0], asked, rtol=1e-2, atol=2e-3)
    assert out.logits.shape[1] == 3 and out.loss > 0
    wanted = torch.nn.functional.cross_entropy(
        out.logits[:, :2].flatten(0, 1),
        torch.stack([words[small.words], torch.full((2,), talk.end)], 1).flatten(),
    )
    torch.testing.assert_close(out.loss, wanted)
    blind = talk(project(small.coarse[which].float()), small.words)
    with torch.no_grad():
        assert not torch.allclose(model(**blind).logits, out.logits, atol=1e-4)  # fine tokens are read


def test_alignment_learns_words_and_folds_into_the_projector(tmp_path, tiny):
    model, _, _ = tiny
    rng = torch.Generator().manual_seed(0)
    ids = torch.arange(30, 30 + N_WORDS)
    looks = torch.randn(N_WORDS, 32, generator=rng)  # a word looks the same on all patches of its sign

    def views(n: int) -> signs.Large:
        of = torch.randint(N_WORDS, (n,), generator=rng)
        boxes = torch.tensor([[8, 16, 24, 16]]).expand(n, -1)
        features = torch.randn(n, 49, 32, generator=rng) * 0.3
        covered = signs.shares(boxes, 7, SIDE) > 0.5
        features[covered] += looks[of].repeat_interleave(6, 0)
        return signs.Large((3 * features + 5).half(), of, boxes)

    data, held = views(300), views(50)
    covered = signs.shares(held.boxes, 7, SIDE) > 0.5
    untrained = projector.Aligned(data.features, model.get_input_embeddings().weight.detach(), ids)
    assert untrained.right(held, covered) < 0.5
    args = (tmp_path / "align", model, ids, data, held, SIDE, 150)
    assert projector.align(*args) > 0.9
    aligned = projector.Aligned(data.features, model.get_input_embeddings().weight.detach(), ids)
    aligned.load_state_dict(load_file(tmp_path / "align" / "model.safetensors"))
    seen = held.features.float()
    with torch.no_grad():
        got = model.model.multi_modal_projector(seen)
    torch.testing.assert_close(got, aligned(seen).detach(), rtol=1e-4, atol=1e-4)
    before = got.clone()
    assert projector.align(*args) > 0.9  # done: loaded, not trained again
    with torch.no_grad():
        assert torch.equal(model.model.multi_modal_projector(seen), before)


def test_words_must_be_single_tokens(tiny):
    with pytest.raises(ValueError, match="stop, exit"):
        projector.word_ids(tiny[1].tokenizer)


def test_where_an_arm_looked(tiny, few):
    model, processor, adapter = tiny
    flexcore.wrap(model, stages.flex_config(1, (2, 3), top_k=None, selector="all"))
    model.generation_config.suppress_tokens = None
    some = evaluate.test_signs(2, SIDE * signs.ZOOM, signs.SMALL)
    found = evaluate.evaluate(model, processor, adapter, some, "all", True)
    assert found["hits"] == {"2": 1.0, "3": 1.0} and found["hit_any"] == found["regions"] == 1.0
    withheld = evaluate.evaluate(model, processor, adapter, some, "withheld", False)
    assert "hits" not in withheld and withheld["gflops"] < found["gflops"] < found["gflops, dense"]
    assert [answer for answer, _ in found["said"]] == [signs.WORDS[sign.word] for sign in some]


def test_a_whole_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch, words, few):
    steps = {"align": 3, "base": 2, "arms": 2}
    sizes = {"large train": 40, "large val": 20, "small train": 10, "small val": 5, "test": 3}

    monkeypatch.setattr(small_text, "assembled", lambda: tiny_llava(layers=4, image_size=SIDE))
    monkeypatch.setattr(small_text, "STEPS", steps)
    monkeypatch.setattr(small_text, "SIZES", sizes)
    monkeypatch.setattr(small_text, "FIRST_LAYER", 1)
    monkeypatch.setattr(small_text, "READING", (2, 3))
    asked = []
    real = small_text.evaluate

    def stop(*args, **kwargs):
        asked.append(args[4])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(small_text, "evaluate", stop)
    command = ["--folder", str(tmp_path / "run"), "--results", str(tmp_path / "benchmarks")]
    (tmp_path / "benchmarks").mkdir()
    assert small_text.main(command) == 130 and len(asked) == 2
    assert small_text.main(command) == 0 and len(asked) == 8  # what was asked wasn't asked again
    found = json.loads((tmp_path / "benchmarks" / "results" / "small_text.json").read_text())
    asked_of = ["coarse", "flex, withheld", "flex, random", "flex", "flex, all", "coarse, longer"]
    assert list(found["arms"]) == asked_of
    assert found["steps"] == steps and found["base"]["large signs"]["questions"] == 3
    assert all(0 <= arm["accuracy"] <= 1 and arm["questions"] == 3 for arm in found["arms"].values())
    for name, share in (("flex", 6 / 64), ("flex, random", 6 / 64), ("flex, all", 1)):
        assert abs(found["arms"][name]["regions"] - share) < 1e-6
    text = (tmp_path / "benchmarks" / "RESULTS.md").read_text()
    assert "<!-- small-text: begin -->\n## Small text\n" in text and "| coarse only | " in text
    assert "of 3 small words" in (tmp_path / "README.md").read_text()


def test_an_arm_keeps_what_it_learned(tmp_path, words, few):
    steps = {"align": 2, "base": 2, "arms": 3}
    sizes = {"large train": 40, "large val": 20, "small train": 10, "small val": 5, "test": 3}
    run = small_text.Run(tmp_path, lambda: tiny_llava(layers=4, image_size=SIDE), steps, sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_text, "FIRST_LAYER", 1)
        patch.setattr(small_text, "READING", (2, 3))
        first, _ = run.arm("flex")
        base, _, _ = run.base()
        again, _ = run.arm("flex")
    own, untrained, loaded = (m.state_dict() for m in (first, base, again))
    assert all(torch.equal(own[name], loaded[name]) for name in own)
    moved = {name for name, value in untrained.items() if not torch.equal(value, own[name])}
    assert moved and all("language_model.layers" in name or "language_model.norm" in name for name in moved)
    fine = {name for name in own if name not in untrained}
    assert fine and all("flex_fine" in name for name in fine)
    for name in fine:
        layer, kind = name.split("flex_fine.")[1].split(".")[:2]
        start = untrained[f"model.language_model.layers.{layer}.self_attn.{kind}.weight"]
        assert not torch.equal(own[name], start)


def test_fine_projections_are_fitted_to_what_features_became(tiny):
    """Where a layer sees the features as they are, the fit finds the layer's own weights."""
    model, _, _ = tiny
    seen = torch.randn(40, 7, 64, generator=torch.Generator().manual_seed(0))

    def inputs(which):
        return seen[which], {"inputs_embeds": seen[which], "use_cache": False}

    weights = fine_init.fit_fine(model, (0, 2), 40, inputs, slice(0, 7))
    attention = model.model.language_model.layers[0].self_attn
    normed = model.model.language_model.layers[0].input_layernorm(seen)
    for weight, own in zip(weights[0], (attention.k_proj, attention.v_proj), strict=True):
        torch.testing.assert_close(normed @ weight.T, own(normed), rtol=0.02, atol=0.02)
    assert not model.model.language_model.layers[0].input_layernorm._forward_hooks
    flexcore.wrap(model, stages.flex_config(1, (2, 3)))
    fine_init.set_fine(model, {2: weights[2]})
    assert torch.equal(model.flex_fine["2"].k_proj.weight, weights[2][0])
    assert torch.equal(model.flex_fine["2"].v_proj.weight, weights[2][1])
