"""The frozen encoder: a small convolutional network that learned to read digits that are large in its own view.

"Large" is six pixels and more of the 64 that it sees. Of a canvas shrunk to 64 pixels, where digits are two pixels,
it learns the frames' colours and where they are, as CLIP knows that there is a sign without reading it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from flexcore.hf.conv_tower import ConvTower, ConvTowerConfig

from .loop import generator, train
from .scenes import CANVAS, NAMES, Scene, crowded

SIDE, PATCH, CELLS, WIDTH = 64, 8, 8, 128
# Pixels of a frame within a patch, and the share of a digit's box, from where on the patch has to know about it.
_FRAME_PIXELS, _DIGIT_SHARE = 10, 0.25


def vision_config() -> ConvTowerConfig:
    """One feature per 8x8 pixels of a picture of 64."""
    return ConvTowerConfig(image_size=SIDE, patch_size=PATCH, widths=(24, 64, WIDTH))


class Reader(nn.Module):
    """The encoder with linear heads on what LLaVA will read of it: digit, is there one, colours, row and column."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = ConvTower(vision_config())
        self.heads = nn.Linear(WIDTH, 10 + 1 + len(NAMES) + 2 * CELLS)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Logits `[B, 64, n]` of each head for `[B, 3, 64, 64]` pixels in `[-1, 1]`."""
        hidden = self.tower(pixels).last_hidden_state
        return self.heads(hidden).split((10, 1, len(NAMES), CELLS, CELLS), dim=-1)


def overlap(boxes: np.ndarray) -> np.ndarray:
    """`[n, 64]` pixels that square boxes `[n, 3]` (top, left, side) share with each of a view's patches."""
    start = np.arange(CELLS) * PATCH
    sides = []
    for axis in (0, 1):
        low = np.maximum(boxes[:, axis, None], start)
        high = np.minimum(boxes[:, axis, None] + boxes[:, 2, None], start + PATCH)
        sides.append((high - low).clip(0))
    return (sides[0][:, :, None] * sides[1][:, None, :]).reshape(len(boxes), -1)


def labels(scene: Scene, top: int, left: int, shrink: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Per patch of a view of a scene: the digit, -1 for none and -2 for one that can't be read, and the colours.

    Args:
        scene: The scene.
        top: Where the view begins.
        left: Likewise.
        shrink: How many times smaller than the scene the view is.
    """
    shift = np.array([top, left, 0])
    shared = overlap((scene.boxes - shift) / shrink)
    digit = np.where(shared.max(0) > 0, -2, -1)
    if shrink == 1:
        share = shared / (scene.boxes[:, 2:] ** 2)
        digit = np.where(share.max(0) >= _DIGIT_SHARE, scene.digits[share.argmax(0)], digit)
    seen = overlap((scene.frames() - shift) / shrink) >= (_FRAME_PIXELS if shrink == 1 else 4)
    colours = np.stack([seen[scene.colours == c].any(0) for c in range(len(NAMES))], axis=1)
    return digit, colours


def views(
    rng: np.random.Generator, split: str, fine: int, coarse: int, ease: float = 0.0, frames: int = 12
) -> tuple[Tensor, Tensor, Tensor]:
    """Views with labels: the nine tiles of `fine` scenes, then `coarse` shrunk scenes with fewer frames.

    Args:
        rng: Where scenes are drawn from.
        split: Whose digits and photographs.
        fine: How many scenes are seen in tiles.
        coarse: How many are seen shrunk.
        ease: See `scenes.draw`.
        frames: In a scene that is seen shrunk, if its digits are six pixels high.

    Returns:
        Pixels `[B, 3, 64, 64]`, digits `[B, 64]` and colours `[B, 64, 6]`.
    """
    pixels, digits, colours = [], [], []

    def add(picture: np.ndarray, marks: tuple[np.ndarray, np.ndarray]) -> None:
        pixels.append(picture)
        digits.append(marks[0])
        colours.append(marks[1])

    for _ in range(fine):
        scene = crowded(rng, split, int(rng.choice((16, 64, 64))), ease)
        for tile in range(9):
            top, left = SIDE * (tile // 3), SIDE * (tile % 3)
            add(scene.pixels[top : top + SIDE, left : left + SIDE], labels(scene, top, left))
    for _ in range(coarse):
        scene = crowded(rng, split, frames)
        small = scene.image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        add(np.asarray(small), labels(scene, 0, 0, CANVAS // SIDE))
    shown = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return shown, torch.from_numpy(np.stack(digits)), torch.from_numpy(np.stack(colours)).float()


def loss_of(
    model: Reader, batch: tuple[Tensor, Tensor, Tensor], paint_weight: float = 3.0
) -> tuple[Tensor, dict[str, float]]:
    """The sum of the heads' losses, and how many digits were read right."""
    pixels, digit, colour = batch
    found, there, colours, row, column = model(pixels)
    known = digit >= 0
    read = F.cross_entropy(found[known], digit[known], label_smoothing=0.05)
    sure = digit > -2
    presence = F.binary_cross_entropy_with_logits(there[..., 0][sure], known[sure].float())
    paint = F.binary_cross_entropy_with_logits(colours, colour)
    at = torch.arange(CELLS)
    place = F.cross_entropy(row.flatten(0, 1), at.repeat_interleave(CELLS).repeat(len(pixels)))
    place = place + F.cross_entropy(column.flatten(0, 1), at.repeat(CELLS * len(pixels)))
    right = (found[known].argmax(-1) == digit[known]).float().mean()
    total = read + presence + paint_weight * paint + 0.1 * place
    numbers = {"read": right, "there": presence, "paint": paint, "place": place}
    return total, {name: float(number.detach()) for name, number in numbers.items()}


@torch.no_grad()
def frames_found(model: Reader, pixels: Tensor, colours: Tensor) -> float:
    """Share of colours in views that name a patch in which they are, as the likeliest of all.

    Args:
        model: The encoder with its heads.
        pixels: `[B, 3, 64, 64]` in `[-1, 1]`.
        colours: `[B, 64, 6]` what is in each patch.
    """
    best = model(pixels)[2].argmax(1, keepdim=True)
    shown = colours.any(1)
    return float(colours.gather(1, best)[:, 0][shown].mean())


def train_encoder(folder: Path, steps: int, finding_steps: int = 0, seed: int = 0) -> Reader:
    """Train the encoder, or load it if it is done.

    Reading comes first and takes most of the views. Then there are more shrunk scenes, in which a frame is four pixels
    wide, and naming colours weighs more: after the first part a frame on a colourful photograph is often lost, also on
    one that it learned on.

    Args:
        folder: Where its checkpoints go.
        steps: Of learning to read.
        finding_steps: With more shrunk scenes, afterwards.
        seed: Of the weights and the data.
    """
    torch.manual_seed(seed)
    model = Reader()
    finding = folder / "finding"
    ended = (finding if finding_steps else folder) / "done"
    fresh = not ended.exists()
    held = views(generator(seed, 1), "val", 16, 20) if fresh else None
    small = views(generator(seed, 8), "val", 0, 200, frames=6) if fresh else None

    def validate() -> dict[str, float]:
        assert held is not None and small is not None
        value, numbers = loss_of(model, held)
        found = frames_found(model, small[0], small[2])
        return {"val": float(value), **{f"val_{k}": v for k, v in numbers.items()}, "val_found": found}

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        ease = max(0.0, 1 - step / (steps / 4))
        return loss_of(model, views(generator(seed, 2, step), "train", 4, 6, ease))

    def finding_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        return loss_of(model, views(generator(seed, 9, step), "train", 4, 16, frames=8), paint_weight=15.0)

    train(folder, model, loss, steps=steps, learning_rate=2e-3, report=validate, report_every=100)
    if finding_steps:
        train(
            finding,
            model,
            finding_loss,
            steps=finding_steps,
            learning_rate=1e-3,
            save_every=50,
            report=validate,
            report_every=50,
        )
    return model
