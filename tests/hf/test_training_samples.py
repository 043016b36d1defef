"""Examples as a Trainer's samples: labels on the answers alone, media made in forward, bad pictures stepped over."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flexcore
from flexcore.hf.conversation import Turn
from flexcore.hf.tiny import tiny_llava
from flexcore.hf.training import FlexCollator
from flexcore.hf.training_data import Example
from flexcore.hf.training_groups import train_only
from flexcore.hf.training_samples import TrainingSamples, answer_labels, media_in_forward

from .helpers import perturb


@pytest.fixture(scope="module")
def model():
    found, processor = tiny_llava(layers=4)
    flexcore.wrap(found, flexcore.FlexConfig(first_layer=1, selector="top_k", fraction=0.3))
    perturb(found)
    return found, flexcore.load_adapter("image", found, processor, zoom=2)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[Example]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    made = []
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        turns = (Turn(f"What is {i}?", f"It is {i}.", 1), Turn("Sure?", "Yes"))
        made.append(Example(f"x:{i}", (folder / f"{i}.png",), turns))
    return [*made, Example("x:3", (), (Turn("Hi", "Ho"),))]


def test_labels_are_the_answers_and_where_they_end(model, examples):
    samples = TrainingSamples(examples, model[1])
    tokenizer = samples.tokenizer
    for sample, said in ((samples[0], " It is 0.</s> Yes</s>"), (samples[3], " Ho</s>")):
        ids, labels = sample["input_ids"][0], sample["labels"][0]
        asked = labels != -100
        assert torch.equal(labels[asked], ids[asked]) and tokenizer.decode(labels[asked]) == said
    # the first answer starts where the prompt that generation is given ends
    text = samples.adapter(text=["<image>"], images=[list(examples[0].media)])
    assert text["input_ids"].shape[1] < int((samples[0]["labels"][0] != -100).nonzero()[0])


class Merging:
    """A tokenizer that joins what it can: `: y` is one token, as is every letter but for that."""

    def __call__(self, text: str) -> dict:
        ids, i = [0], 0
        while i < len(text):
            step = 3 if text[i : i + 3] == ": y" else 1
            ids.append(sum(ord(c) for c in text[i : i + step]))
            i += step
        return {"input_ids": [*ids, 1]}  # begins and ends as BERT's do


def test_a_token_that_joins_prompt_and_answer_belongs_to_the_answer():
    text = "Q A: yes."
    ids = torch.tensor(Merging()(text)["input_ids"])
    labels = answer_labels(Merging(), text, [(4, len(text))], ids)
    asked = (labels != -100).nonzero()[:, 0].tolist()
    # the token of ": y" starts at letter 3: of the start token, "Q", " ", "A" nothing is asked
    assert asked[0] == 4 and asked == list(range(4, len(ids)))
    with pytest.raises(ValueError, match="media must come before it"):
        answer_labels(Merging(), text, [(4, len(text))], ids.flip(0))


def test_media_are_made_when_the_batch_reaches_the_model(model, examples):
    wrapped, adapter = model
    samples = TrainingSamples(examples, adapter)
    collator = FlexCollator(adapter)
    # as from a worker process
    features = pickle.loads(pickle.dumps([samples[i] for i in (0, 3, 2)]))
    with pytest.raises(ValueError, match="media_in_forward"), torch.no_grad():
        wrapped(**collator(features))
    hooks = media_in_forward(wrapped, adapter)
    with torch.no_grad():
        found = wrapped(**collator(features)).loss
        (stream,) = collator(features)["flex_streams"].samples[0]
        made = adapter.streams([str(examples[0].media[0]), str(examples[2].media[0])])
        streams = [(made[0].at(stream.coarse_positions),), (), (made[1].at(stream.coarse_positions),)]
        batch = {**collator(features), "flex_streams": flexcore.StreamBatch(tuple(streams))}
        for hook in hooks:
            hook.remove()
        assert float(found) == float(wrapped(**batch).loss)
        del batch["flex_streams"]
        assert float(found) != float(wrapped(**batch).loss)
    hooks = media_in_forward(wrapped, adapter, needed=True)
    with pytest.raises(ValueError, match="every process' batch must hold a medium"):
        wrapped(**collator(features[1:2]))
    wrapped(**collator(features))  # one of three has none
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("trains", ["fine", "fine-and-projector", "all-but-tower"])
def test_a_batch_without_media_is_a_step_whatever_trains(model, examples, trains):
    wrapped, adapter = model
    train_only(wrapped, trains)
    text = FlexCollator(adapter)([TrainingSamples(examples, adapter)[3]])
    with torch.no_grad():
        expected = wrapped(**text).loss
    assert wrapped(**text).loss.requires_grad == (trains == "all-but-tower")
    hooks = media_in_forward(wrapped, adapter)
    loss = wrapped(**text).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    assert float(loss.detach()) == float(expected)
    trained = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    if trains != "all-but-tower":  # there, what media alone reach has none
        assert all(grad is not None and not grad.any() for grad in trained.values())
    wrapped.zero_grad(set_to_none=True)
    wrapped.requires_grad_(True)


def test_a_picture_that_does_not_decode_gives_way_to_the_next(model, examples, tmp_path):
    whole = Path(examples[0].media[0]).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    bad = Example("x:9", (tmp_path / "half.png",), examples[0].turns)
    problems: list[str] = []
    samples = TrainingSamples(
        [examples[0], bad, examples[1]], model[1], report=lambda p: problems.append(str(p))
    )
    for _ in range(2):
        assert torch.equal(samples[1]["input_ids"], samples[2]["input_ids"])
    assert samples.lost == 1 and len(problems) == 1 and problems[0].startswith("x:9: ")
    assert torch.equal(samples[0]["input_ids"], TrainingSamples(examples, model[1])[0]["input_ids"])
    with pytest.raises(ValueError, match="none of 1 examples can be used"):
        TrainingSamples([bad], model[1], report=lambda p: None)[0]


def test_too_long(model, examples):
    length = TrainingSamples(examples, model[1])[0]["input_ids"].shape[1]
    problems: list[str] = []
    skipping = TrainingSamples(
        examples, model[1], max_length=length - 1, report=lambda p: problems.append(str(p))
    )
    assert skipping[0]["input_ids"].shape[1] < length  # the text without a picture
    assert f"{length} tokens (with its coarse tokens), max_length is {length - 1}" in problems[0]
    skipping.check(examples[0])  # its text alone would fit
    with pytest.raises(ValueError, match=r"text alone"):
        TrainingSamples(examples, model[1], max_length=20).check(examples[0])

    cut = TrainingSamples(examples, model[1], max_length=length - 1, too_long="truncate")[0]
    whole = TrainingSamples(examples, model[1])[0]
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cut[name], whole[name][:, : length - 1])
    # nothing of an answer is left
    shorter = TrainingSamples(
        examples[:1], model[1], max_length=60, too_long="truncate", report=lambda p: None
    )
    with pytest.raises(ValueError, match="can be used"):
        shorter[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"too_long": "cut"}, "too_long must be one of skip, truncate, got 'cut'"),
        ({"max_length": 0}, "max_length must be at least 1 or None, got 0"),
        ({"conversation": "v2"}, "conversation must be one of"),
    ],
)
def test_arguments(model, examples, options, message):
    with pytest.raises(ValueError, match=message):
        TrainingSamples(examples, model[1], **options)
    with pytest.raises(ValueError, match="examples must hold at least one"):
        TrainingSamples([], model[1])
