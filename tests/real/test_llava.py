"""A LLaVA of trained parts, wrapped, on photographs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import pipeline

import flexcore
from benchmarks import packaged_weights as weights

pytestmark = pytest.mark.slow

QUESTION = "What is on the table?"
SOME = flexcore.FlexConfig(selector="threshold", threshold=48)
NOTHING = flexcore.FlexConfig(selector="threshold", threshold=255)
ANSWER = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def coffee(photo: Callable[[str], Image.Image]) -> Image.Image:
    return photo("coffee.png")


def chat(*pictures: Any) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="module")
def small(llava: tuple[Any, Any]) -> Any:
    """The same processor showing half the side: a quarter of the tokens, for tests that are about identity."""
    processor = copy.deepcopy(llava[1])
    processor.image_processor.crop_size = {"height": 112, "width": 112}
    return processor


@pytest.fixture
def wrapped(llava: tuple[Any, Any]) -> Iterator[Any]:
    with flexcore.attached(llava[0], SOME) as model:
        perturb(model)
        yield model


def perturb(model: Any, scale: float = 0.02) -> None:
    """Move the fine weights away from the copies they start as."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.flex_fine.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def inputs_of(adapter: Any, *pictures: Image.Image) -> Any:
    prompt = adapter.apply_chat_template(chat(*pictures), add_generation_prompt=True)
    return adapter(text=[prompt], images=list(pictures))


def without_media(inputs: Any) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k != "flex_streams"}


def test_the_parts_are_what_they_were(llava: tuple[Any, Any], coffee: Image.Image) -> None:
    model, processor = llava
    tower, (decoder, tokenizer) = weights.dinov2(), weights.smollm2()
    pixels = processor.image_processor(coffee, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    text = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        ours = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(ours, tower(pixels, output_hidden_states=True).hidden_states[-2])
        said = model(**text).logits
        assert torch.equal(said[..., : len(tokenizer)], decoder(**text).logits)
    assert tokenizer.decode(said[0, -1].argmax()) == " Paris"


def test_a_photo_is_looked_at_through_dinov2(
    wrapped: Any, llava: tuple[Any, Any], coffee: Image.Image, tmp_path: Path
) -> None:
    adapter = flexcore.load_adapter("image", wrapped, llava[1], zoom=3)
    assert (adapter.side, adapter.cells) == (224, 16)
    inputs = inputs_of(adapter, coffee)
    ((stream,),) = inputs["flex_streams"].samples
    assert (stream.grid.coarse, stream.grid.fine) == ((16, 16), (48, 48))
    with flexcore.trace(wrapped) as trace:
        out = wrapped.generate(**inputs, **ANSWER, output_logits=True, return_dict_in_generate=True)
    plain = wrapped.generate(
        **without_media(inputs), **ANSWER, output_logits=True, return_dict_in_generate=True
    )
    assert float((out.logits[0] - plain.logits[0]).abs().max()) > 1e-2
    looked = trace.looked_at()
    assert 0 < int((looked > 0).sum()) < stream.grid.n_regions
    trace.overlay(coffee).save(tmp_path / "looked_at.png")
    assert Image.open(tmp_path / "looked_at.png").size == coffee.size


def test_bit_identical_when_nothing_is_selected(
    llava: tuple[Any, Any], small: Any, coffee: Image.Image
) -> None:
    model = llava[0]
    with flexcore.attached(model, NOTHING):
        perturb(model)
        adapter = flexcore.load_adapter("image", model, small, zoom=2)
        inputs = inputs_of(adapter, coffee)
        with torch.no_grad():
            logits = model(**inputs).logits
        out = model.generate(**inputs, **ANSWER)
    with torch.no_grad():
        assert torch.equal(model(**without_media(inputs)).logits, logits)
    assert torch.equal(model.generate(**without_media(inputs), **ANSWER), out)


def test_pipelines_take_model_and_adapter(wrapped: Any, small: Any, coffee: Image.Image) -> None:
    adapter = flexcore.load_adapter("image", wrapped, small, zoom=2)
    inputs = inputs_of(adapter, coffee)
    out = wrapped.generate(**inputs, **ANSWER)
    expected = adapter.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    plain = wrapped.generate(**without_media(inputs), **ANSWER)
    assert not torch.equal(out, plain)

    pipe = pipeline("image-text-to-text", model=wrapped, processor=adapter)
    prompt = adapter.apply_chat_template(chat(coffee), add_generation_prompt=True)
    (said,) = pipe(images=[coffee], text=prompt, return_full_text=False, generate_kwargs=dict(ANSWER))
    assert said["generated_text"] == expected
    (said,) = pipe(text=chat(coffee), return_full_text=False, generate_kwargs=dict(ANSWER))
    assert said["generated_text"] == expected
