"""EmbeddingAdapter: a medium of one's own in front of a text-only model."""

import dataclasses

import pytest
import torch

import flexcore
from flexcore.hf import EmbeddingAdapter, View
from flexcore.hf.collation import collate
from flexcore.hf.tiny import tiny_llama, tiny_tokenizer
from tests.hf.helpers import HIDDEN, naive_forward, perturb

FIRST, SECOND = torch.linspace(0, 1, 5), torch.linspace(-1, 1, 3)


@dataclasses.dataclass(frozen=True, eq=False)
class Curve(View):
    features: torch.Tensor


class Curves(EmbeddingAdapter):
    """A curve `[n]`: n coarse cells, four fine tokens each, features made of the numbers themselves."""

    medium, keyword = "curve", "curves"

    def views(self, media):
        out = []
        for curve in media:
            grid = flexcore.Grid.blocks((len(curve),), (4 * len(curve),), region=3)
            fine = torch.sin(curve.repeat_interleave(4)[:, None] * torch.arange(1, self.width + 1))
            out.append(Curve(grid, torch.cos(curve[:, None] * torch.arange(1, self.width + 1)), fine))
        return out

    def sources(self, views):
        return [flexcore.TensorSource(view.features, view.grid) for view in views]


@pytest.fixture(scope="module")
def model():
    return perturb(
        flexcore.wrap(
            tiny_llama(layers=4, vocab=260), flexcore.FlexConfig(first_layer=1, selector="top_k", top_k=2)
        )
    )


@pytest.fixture
def adapter(model):
    return Curves(model, tiny_tokenizer())


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def words(model, text):
    """Embeddings of a text's bytes, without the tokenizer's own `<s>`."""
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return model.get_input_embeddings()(torch.tensor(ids))


def test_equals_the_dense_reference(model, adapter):
    inputs = adapter(text="ab <curve> and <curve>?", curves=[FIRST, SECOND])
    streams = inputs["flex_streams"].samples[0]
    first, second = (view.coarse for view in adapter.views([FIRST, SECOND]))
    start = model.get_input_embeddings()(torch.tensor([1]))
    parts = [start, words(model, "ab "), first, words(model, " and "), second, words(model, "?")]
    embeds = torch.cat(parts).detach()
    assert inputs["input_ids"].shape == (1, len(embeds))
    expected = naive_forward(model, embeds, streams, [len(embeds) - 1])
    torch.testing.assert_close(logits(model, inputs)[0], expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_batch_with_lengths_of_all_kinds_is_its_samples(model, adapter):
    texts = ["<curve><curve> long enough to be the longest", "no curve", "<curve> up?"]
    media = [[FIRST, SECOND], None, [SECOND]]
    inputs = adapter(text=texts, curves=media)
    assert inputs["attention_mask"].sum(dim=1).tolist() != [inputs["input_ids"].shape[1]] * 3
    whole = logits(model, inputs)[:, -1]
    answers = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(answers[:, :-4], inputs["input_ids"])
    for i, (text, own) in enumerate(zip(texts, media, strict=True)):
        alone = adapter(text=text, curves=own)
        torch.testing.assert_close(whole[i], logits(model, alone)[0, -1], rtol=1e-4, atol=1e-5)
        answer = model.generate(**alone, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(answer[0, -4:], answers[i, -4:])


def test_a_text_without_media_is_the_plain_models(model, adapter):
    inputs, plain = adapter(text="no curve"), tiny_tokenizer()("no curve", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], plain["input_ids"])
    assert torch.equal(logits(model, inputs), logits(model, plain))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1, "cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": True},
        {"num_beams": 2},
    ],
    ids=lambda options: next(name for name in reversed(options)),
)
def test_every_way_to_generate(model, adapter, options):
    inputs = adapter(text="<curve> up and up and", curves=[FIRST])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    reference = model.generate(**inputs, **settings)
    if options.get("assistant_model"):
        options = {"assistant_model": tiny_llama(seed=3, layers=1, vocab=260)}
    out = model.generate(**inputs, **settings, **options)
    if "num_beams" in options and "cache_implementation" not in options:
        # beams find an answer of their own: it must not depend on whether its neighbours have a medium
        both = model.generate(
            **adapter(text=["none", "<curve> up and up and"], curves=[FIRST]), **settings, **options
        )
        assert torch.equal(both[1, -6:], out[0, -6:])
    else:
        assert torch.equal(out, reference)


def test_the_tokenizer_is_left_alone_and_the_vocabulary_is_enough(model):
    tokenizer = tiny_tokenizer()
    before = len(tokenizer)
    adapter = Curves(model, tokenizer)
    assert len(tokenizer) == before and not hasattr(tokenizer, "curve_token")
    assert adapter(text="<curve>", curves=FIRST)["input_ids"].max() < model.config.vocab_size
    assert adapter.decode([adapter.pad_token_id]) == "<pad>"  # still passes for a tokenizer


def test_a_tokenizer_that_has_a_placeholder_keeps_it(model):
    tokenizer = tiny_tokenizer()
    tokenizer.curve_token = "<image>"
    inputs = Curves(model, tokenizer)(text="see <image>!", curves=[SECOND])
    assert inputs["flex_streams"].samples[0][0].coarse_positions.tolist() == [5, 6, 7]


def test_a_chat_template_gives_text(adapter):
    adapter.processor.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    turn = [{"role": "user", "content": "<curve> up?"}]
    assert adapter.apply_chat_template(turn) == "<curve> up?"
    with pytest.raises(ValueError, match="tokenize must be False, got True"):
        adapter.apply_chat_template(turn, tokenize=True)


def test_training_reaches_what_made_the_coarse_cells(model, adapter):
    curve = FIRST.clone().requires_grad_()
    inputs = adapter(text="<curve> up", curves=[curve])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert curve.grad.abs().sum() > 0
    model.zero_grad()


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate(model, adapter, side):
    samples = [adapter(text="<curve> and a longer text", curves=FIRST), adapter(text="none")]
    batch = collate(samples, tokenizer=adapter, padding_side=side)
    ends = [-1, -1] if side == "left" else (batch["attention_mask"].sum(dim=1) - 1).tolist()
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[[0, 1], ends] = True
    found = logits(model, {**batch, "readout_mask": mask})
    for i, sample in enumerate(samples):
        torch.testing.assert_close(found[i, ends[i]], logits(model, sample)[0, -1], rtol=1e-4, atol=1e-5)


def test_moving_the_inputs_moves_the_coarse_cells(adapter):
    stream = adapter(text="<curve>", curves=[FIRST]).to(torch.float64)["flex_streams"].samples[0][0]
    assert stream.coarse_embeds.dtype == stream.source.dtype == torch.float64
    assert stream.to("cpu", torch.float64) is stream
    assert torch.equal(stream.at(stream.coarse_positions + 1).coarse_embeds, stream.coarse_embeds)


def test_errors(model, adapter):
    with pytest.raises(flexcore.StreamError, match="1 <curve> placeholder"):
        adapter(text="<curve>", curves=[FIRST, SECOND])
    with pytest.raises(flexcore.StreamError, match="truncated"):
        adapter(text="<curve>", curves=[FIRST], truncation=True, max_length=4)
    adapter.views = lambda media: [
        dataclasses.replace(v, coarse=v.coarse[:, :8]) for v in Curves.views(adapter, media)
    ]
    with pytest.raises(ValueError, match=rf"coarse_embeds must be \[5, {HIDDEN}\].*got \[5, 8\]"):
        adapter(text="<curve>", curves=[FIRST])
    with pytest.raises(TypeError, match="has no option 'zoom'"):
        Curves(model, tiny_tokenizer(), zoom=3)
