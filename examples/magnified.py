"""The pictures that `image.py` shows to the model that ships: a test canvas, and its frames in a large photo."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from flexcore.hf.magnifier import MAGNIFIER

QUESTION = "What is in the {} frame?"
CANVAS, SCENE = MAGNIFIER / "canvas.png", MAGNIFIER / "canvas.json"


@dataclass(frozen=True)
class Frame:
    """One coloured frame with a digit in it.

    Args:
        colour: Its name.
        digit: What is in it.
        box: Left, top, right and bottom in pixels.
    """

    colour: str
    digit: int
    box: tuple[int, int, int, int]


def canvas() -> tuple[Image.Image, list[Frame]]:
    """A picture of 192x192 pixels of the magnifier benchmark's test split, and the frames in it."""
    with Image.open(CANVAS) as image:
        picture = image.convert("RGB")
    frames = json.loads(SCENE.read_text(encoding="utf-8"))["frames"]
    return picture, [Frame(f["colour"], f["digit"], tuple(f["box"])) for f in frames]


def placed(photo: Image.Image) -> tuple[Image.Image, list[Frame]]:
    """A photo of any size with the canvas's frames in it, scaled to look the same once the photo is shrunk.

    Raises:
        ValueError: The photo is so narrow that the frames would overlap or stick out.
    """
    picture, frames = canvas()
    out, scale, moved = photo.convert("RGB"), max(photo.size) / max(picture.size), []
    for frame in frames:
        patch = picture.crop(frame.box)
        sides = [round(scale * side) for side in patch.size]
        # as far between the edges of the photo as between those of the canvas
        left, top = (
            round(at * (whole - side) / (of - was))
            for at, whole, side, of, was in zip(
                frame.box[:2], photo.size, sides, picture.size, patch.size, strict=True
            )
        )
        box = (left, top, left + sides[0], top + sides[1])
        if min(box) < 0 or any(
            box[0] < b.box[2] and b.box[0] < box[2] and box[1] < b.box[3] and b.box[1] < box[3] for b in moved
        ):
            raise ValueError(
                f"--image must leave room for six frames, got {photo.width}x{photo.height} pixels"
            )
        out.paste(patch.resize(sides, Image.Resampling.BICUBIC), box[:2])
        moved.append(Frame(frame.colour, frame.digit, box))
    return out, moved


@torch.no_grad()
def report_all(model: Any, processor: Any, adapter: Any, picture: Image.Image, frames: list[Frame]) -> None:
    """Ask about every frame, with a closer look and without, and say what is right."""
    content = [[{"type": "image"}, {"type": "text", "text": QUESTION.format(f.colour)}] for f in frames]
    texts = [
        adapter.apply_chat_template(
            [{"role": "user", "content": c}], add_generation_prompt=True, tokenize=False
        )
        for c in content
    ]
    inputs = adapter(text=texts, images=[picture] * len(texts)).to(model.device)
    plain = {name: value for name, value in inputs.items() if name != "flex_streams"}
    answers = []
    for given in (plain, inputs):
        out = model.generate(**given, max_new_tokens=1, do_sample=False)
        answers.append([processor.decode(row[-1:]).strip() for row in out])
    print("\nall six frames:\n\n  frame    digit   coarse only   flex")
    for frame, coarse, flex in zip(frames, *answers, strict=True):
        print(f"  {frame.colour:<9}{frame.digit:<8}{coarse:<14}{flex}")
    right = [sum(a == str(f.digit) for a, f in zip(said, frames, strict=True)) for said in answers]
    print(f"  right            {right[0]} of {len(frames)}        {right[1]} of {len(frames)}")
