"""`pipeline("image-text-to-text", model=wrapped, processor=adapter)` says what adapter and generate say by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import flexcore
from flexcore.hf.tiny import tiny_llava

from .helpers import IMAGE, perturb, plain

ANSWER = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "suppress_tokens": [IMAGE]}
PROMPTS = (
    "USER: <image>\nWhat is this? ASSISTANT:",
    "USER: <image>\nAnd what colour has the other one? ASSISTANT:",
)


def picture(seed: int, size: tuple[int, int] = (60, 40)) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


PICTURES = (picture(0), picture(1, (40, 80)))


def chat(image: Image.Image, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def adapter() -> Any:
    """An image adapter over a wrapped tiny LLaVA whose fine weights have a say."""
    model, processor = tiny_llava()
    flexcore.wrap(model, flexcore.FlexConfig(first_layer=1, selector="top_k", top_k=4, region_size=3))
    perturb(model, scale=0.5)
    return flexcore.load_adapter("image", model, processor, zoom=2)


@pytest.fixture(scope="module")
def pipe(adapter: Any) -> Any:
    return pipeline("image-text-to-text", model=adapter.model, processor=adapter)


def by_hand(adapter: Any, prompts: list[str], images: list[Image.Image]) -> list[str]:
    """Answers of adapter and generate; those without the fine tokens must all be others."""
    inputs = adapter(text=prompts, images=images)
    length = inputs["input_ids"].shape[1]
    out, control = (
        adapter.model.generate(**given, **ANSWER)[:, length:] for given in (inputs, plain(inputs))
    )
    assert all(not torch.equal(a, b) for a, b in zip(out, control, strict=True))
    return adapter.batch_decode(out, skip_special_tokens=True)


def said(outputs: list[dict[str, Any]]) -> list[str]:
    return [output["generated_text"] for output in outputs]


@pytest.mark.parametrize("index", [0, 1])
def test_a_prompt_and_a_picture(adapter: Any, pipe: Any, index: int) -> None:
    prompt, image = PROMPTS[index], PICTURES[index]
    outputs = pipe(images=image, text=prompt, return_full_text=False, generate_kwargs=dict(ANSWER))
    assert said(outputs) == by_hand(adapter, [prompt], [image])


def test_a_batch_of_two(adapter: Any, pipe: Any) -> None:
    outputs = pipe(
        images=list(PICTURES), text=list(PROMPTS), return_full_text=False, generate_kwargs=dict(ANSWER)
    )
    together = by_hand(adapter, list(PROMPTS), list(PICTURES))
    assert said(outputs) == together
    # Two lengths in one batch: padding must have moved the pictures along.
    alone = [by_hand(adapter, [p], [i])[0] for p, i in zip(PROMPTS, PICTURES, strict=True)]
    assert together == alone


def test_chat_messages(adapter: Any, pipe: Any) -> None:
    messages = chat(PICTURES[0], "What is this?")
    outputs = pipe(text=messages, return_full_text=False, generate_kwargs=dict(ANSWER))
    prompt = adapter.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.count("<image>") == 1
    assert said(outputs) == by_hand(adapter, [prompt], [PICTURES[0]])


def test_two_chats(adapter: Any, pipe: Any) -> None:
    chats = [chat(PICTURES[0], "What is this?"), chat(PICTURES[1], "And what colour has the other one?")]
    outputs = pipe(text=chats, return_full_text=False, generate_kwargs=dict(ANSWER))
    prompts = [adapter.apply_chat_template(c, add_generation_prompt=True) for c in chats]
    expected = [by_hand(adapter, [p], [i])[0] for p, i in zip(prompts, PICTURES, strict=True)]
    assert [said(output)[0] for output in outputs] == expected


def test_text_alone_is_answered_as_by_the_plain_model(adapter: Any, pipe: Any) -> None:
    chatter = [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}]
    (output,) = pipe(text=chatter, return_full_text=False, generate_kwargs=dict(ANSWER))
    inputs = adapter.processor(text="USER: Hello? ASSISTANT:", return_tensors="pt")
    out = tiny_llava()[0].generate(**inputs, **ANSWER)[:, inputs["input_ids"].shape[1] :]
    assert output["generated_text"] == adapter.batch_decode(out, skip_special_tokens=True)[0]
