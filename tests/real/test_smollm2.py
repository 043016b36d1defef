"""A trained language model, wrapped: nothing changes but what reads fine tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import flexcore

pytestmark = pytest.mark.slow

GRID = flexcore.Grid.blocks((6, 6), (18, 18), region=6)
START = 8
# A cell must exceed 255/255 of the best one, so none is chosen.
NOTHING = flexcore.FlexConfig(selector="threshold", threshold=255)
SOME = flexcore.FlexConfig(selector="top_k", top_k=3)


@pytest.fixture(scope="module")
def inputs(smollm2: tuple[Any, Any]) -> dict[str, Any]:
    """Text around 36 words that play the coarse tokens, and features on the scale of embeddings."""
    model, tokenizer = smollm2
    words = tokenizer("The list of words is as follows:", return_tensors="pt").input_ids[0]
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(1000, 20000, (GRID.n_coarse,), generator=generator)
    after = tokenizer("\n\nThe capital of France is", return_tensors="pt").input_ids[0]
    assert len(words) == START
    ids = torch.cat([words, coarse, after])[None]
    features = 0.13 * torch.randn(GRID.n_fine, model.config.hidden_size, generator=generator)
    streams = flexcore.StreamBatch.from_features(
        [features], GRID, [torch.arange(START, START + GRID.n_coarse)]
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "flex_streams": streams}


@pytest.fixture
def wrapped(smollm2: tuple[Any, Any], request: pytest.FixtureRequest) -> Iterator[Any]:
    with flexcore.attached(smollm2[0], request.param) as model:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.flex_fine.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        yield model


def without_media(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k != "flex_streams"}


def answers(model: Any, inputs: dict[str, Any], new: int = 12) -> Any:
    return model.generate(
        **inputs, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True
    )


@pytest.fixture(scope="module")
def before(smollm2: tuple[Any, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """What the plain model says."""
    model = smollm2[0]
    with torch.no_grad():
        return {"logits": model(**without_media(inputs)).logits, "out": answers(model, without_media(inputs))}


@pytest.mark.parametrize(
    ("wrapped", "media"),
    [(NOTHING, True), (SOME, False)],
    indirect=["wrapped"],
    ids=["nothing selected", "no media"],
)
def test_bit_identical_when_nothing_is_selected(
    wrapped: Any, inputs: dict[str, Any], before: dict[str, Any], media: bool
) -> None:
    given = inputs if media else without_media(inputs)
    with torch.no_grad():
        assert torch.equal(wrapped(**given).logits, before["logits"])
    out = answers(wrapped, given)
    assert torch.equal(out.sequences, before["out"].sequences)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, before["out"].logits, strict=True))


@pytest.mark.parametrize("wrapped", [SOME], indirect=True)
def test_what_is_selected_changes_the_readout_row_only(
    wrapped: Any, inputs: dict[str, Any], before: dict[str, Any]
) -> None:
    with torch.no_grad():
        logits = wrapped(**inputs).logits
    assert torch.equal(logits[:, :-1], before["logits"][:, :-1])
    assert float((logits[:, -1] - before["logits"][:, -1]).abs().max()) > 1e-2


@pytest.mark.parametrize("wrapped", [SOME], indirect=True)
def test_teacher_forcing_agrees_with_decoding(wrapped: Any, inputs: dict[str, Any]) -> None:
    out = answers(wrapped, inputs)
    length = inputs["input_ids"].shape[1]
    labels = out.sequences.clone()
    labels[:, :length] = -100
    with torch.no_grad():
        logits = wrapped(input_ids=out.sequences, labels=labels, flex_streams=inputs["flex_streams"]).logits
    steps = torch.cat(out.logits)
    # Logits of a trained model reach 30, so the tolerance is relative to them.
    torch.testing.assert_close(logits[0, length - 1 : -1], steps, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("wrapped", [SOME], indirect=True)
def test_text_stays_as_fluent_as_it_was(wrapped: Any, smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = answers(wrapped, inputs)
    text = tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "The capital of France is Paris" in text
    flexcore.unwrap(wrapped)
    try:
        plain = answers(wrapped, inputs)
    finally:
        flexcore.wrap(wrapped, SOME)
    assert torch.equal(out.sequences, plain.sequences)
