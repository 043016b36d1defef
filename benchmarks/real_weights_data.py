"""Fabricated pictures for `benchmarks.real_weights`: a word on a small plate somewhere in a photograph.

Training pictures come as JSON lines for `examples/train.py`; the test pictures, on other photographs, in TextVQA's
layout. The words are the same: nobody learns to read in half an hour.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from .magnifier.scenes import background
from .vqa.base import SHORT
from .vqa.textvqa import ANNOTATORS, FILE, PICTURES

WORDS = ("stop", "exit", "open", "taxi", "bank", "hotel", "sale", "fire", "left", "park", "7", "42")
QUESTION = "What does the sign say?"
TRAINING, HELD, TEST = 1000, 8, 16
_FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
_SMALL = 24  # a word's size, as a part of the picture's side: five pixels in a coarse view of 112


def fabricate(folder: Path, side: int) -> None:
    """Write all pictures and questions, unless they are there.

    Args:
        folder: Gets `train.jsonl`, `held.jsonl`, their pictures, and `textvqa/`.
        side: Of a picture in pixels.
    """
    if folder.is_dir():
        return
    part = folder.with_name(f"{folder.name}.part")
    shown = part / "textvqa" / PICTURES
    shown.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[dict[str, str]]] = {"train": [], "held": []}
    for name, split, number in (("train", "train", TRAINING), ("held", "val", HELD)):
        for i, (picture, word) in enumerate(pictures(split, side, number)):
            file = f"{name}-{i:04d}.jpg"
            picture.save(part / file, quality=92)
            lines[name].append({"image": file, "question": QUESTION + SHORT, "answer": word})
    for name, own in lines.items():
        (part / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    data = []
    for i, (picture, word) in enumerate(pictures("test", side, TEST)):
        picture.save(shown / f"{i}.jpg", quality=92)
        entry = {"question_id": i, "question": QUESTION, "image_id": str(i), "answers": [word] * ANNOTATORS}
        data.append(entry)
    (part / "textvqa" / FILE).write_text(json.dumps({"data": data}))
    part.rename(folder)


def pictures(split: str, side: int, number: int) -> Iterator[tuple[Image.Image, str]]:
    """Pictures and their words.

    Args:
        split: Whose photographs.
        side: In pixels.
        number: How many.
    """
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rng = np.random.default_rng(sum(split.encode()))
    for _ in tqdm(range(number), desc=f"{split} pictures", disable=None, leave=False):
        ground = (255 * background(rng, split, side)).astype(np.uint8)
        picture, word = Image.fromarray(ground), str(rng.choice(WORDS))
        # no smaller than what a font can be drawn in
        font = ImageFont.truetype(str(fonts / rng.choice(_FONTS)), max(8, side // _SMALL))
        draw = ImageDraw.Draw(picture)
        left, top, right, bottom = draw.textbbox((0, 0), word, font=font)
        gap = max(2, (bottom - top) // 3)
        width, height = (min(side, round(v + 2 * gap)) for v in (right - left, bottom - top))
        x, y = (int(rng.integers(0, side - extent + 1)) for extent in (width, height))
        dark, light = (tuple(int(v) for v in rng.integers(*some, 3)) for some in ((0, 70), (190, 256)))
        plate, ink = (light, dark) if rng.random() < 0.5 else (dark, light)
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=plate)
        draw.text((x + gap - left, y + gap - top), word, fill=ink, font=font)
        yield picture, word
