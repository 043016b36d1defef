"""The ceiling: what a small CNN reads when it is shown the target's true crop, of fine or of coarse pixels.

No attention, no search, no language: the digit's frame is cut out exactly. What this network can't read, no arm can be
blamed for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .loop import generator, train
from .scenes import CANVAS, DIGIT, Scene, background, canvas, draw, places

# Canvas pixels around a digit that are cut out, on each side; a multiple of three after adding the digit.
_AROUND = 3
COARSE_SIDE = CANVAS // 3


class CropReader(nn.Module):
    """Three convolutions and two linear layers."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(4, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
            *(
                nn.MaxPool2d(2),
                nn.Conv2d(2 * width, 2 * width, 3, padding=1),
                nn.BatchNorm2d(2 * width),
                nn.ReLU(),
            ),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2)),
            *(nn.Linear(2 * width * 9, 128), nn.ReLU(), nn.Linear(128, 10)),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits `[B, 10]` of `[B, 3, 12, 12]` pixels; a grey channel of unit contrast is added."""
        grey = pixels.mean(1, keepdim=True)
        middle = grey[..., 3:-3, 3:-3]
        mean, spread = middle.mean((2, 3), keepdim=True), middle.std((2, 3), keepdim=True)
        return self.body(torch.cat([pixels, (grey - mean) / (spread + 0.05)], dim=1))


def crop(pixels: np.ndarray, box: np.ndarray, fine: bool) -> np.ndarray:
    """`[12, 12, 3]` uint8 around a digit: canvas pixels, or the shrunken canvas' enlarged again to the same size.

    Args:
        pixels: The canvas, or the canvas shrunk three times.
        box: Top, left and side of the digit on the canvas.
        fine: Which of the two `pixels` is.
    """
    scale = 1 if fine else 3
    top, left = ((int(v) - _AROUND) / scale for v in box[:2])
    side = (int(box[2]) + 2 * _AROUND) / scale
    area = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(pixels).resize((12, 12), Image.Resampling.BILINEAR, box=area))


def crops(scenes: list[Scene], fine: bool) -> tuple[Tensor, Tensor]:
    """Crops of all digits of some canvases, as the network takes them, and their labels."""
    out, labels = [], []
    for scene in scenes:
        shown = scene.pixels
        if not fine:
            shown = np.asarray(scene.image.resize((COARSE_SIDE,) * 2, Image.Resampling.BILINEAR))
        for box, digit in zip(scene.boxes, scene.digits, strict=True):
            out.append(crop(shown, box, fine))
            labels.append(digit)
    pixels = torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, torch.tensor(np.array(labels))


def train_ceiling(folder: Path, fine: bool, steps: int = 3000, seed: int = 0) -> CropReader:
    """Train a reader of crops, or load it if it is done."""
    torch.manual_seed(seed)
    model = CropReader()
    held = crops([canvas(generator(seed, 1, i), "val") for i in range(150)], fine)

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = generator(seed, 2, step)
        scenes = []
        for _ in range(3):
            at = places(rng, 36, CANVAS, 2 * DIGIT, apart=2 * DIGIT + 2, columns=0)
            scenes.append(draw(rng, "train", background(rng, "train", CANVAS), at, rng.integers(6, size=36)))
        pixels, labels = crops(scenes, fine)
        return F.cross_entropy(model(pixels), labels, label_smoothing=0.05), {}

    def validate() -> dict[str, float]:
        return {"val": float((model(held[0]).argmax(1) == held[1]).float().mean())}

    train(
        folder,
        model,
        step_loss,
        steps=steps,
        learning_rate=2e-3,
        report=validate,
        save_every=100,
        report_every=500,
    )
    return model
