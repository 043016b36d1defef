"""The clips' frozen encoder: the pictures' tower for single frames of 16x16, trained on digits it can read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexcore.hf.conv_tower import ConvTower, ConvTowerConfig

from .clips import DIGIT, SIDE, noisy, paint_border, write_digit
from .loop import generator, train
from .scenes import NAMES, background, ink

WIDTH = 128


def frame_config() -> ConvTowerConfig:
    """One feature per 8x8 pixels of a frame of 16."""
    return ConvTowerConfig(image_size=SIDE, widths=(24, 64, WIDTH))


class FrameReader(nn.Module):
    """The encoder with linear heads on each of a frame's features: digit, is there one, colour of the border."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = ConvTower(frame_config())
        self.heads = nn.Linear(WIDTH, 10 + 1 + len(NAMES))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Logits `[B, 4, n]` of each head for `[B, 3, 16, 16]` pixels in `[-1, 1]`."""
        return self.heads(self.tower(pixels).last_hidden_state).split((10, 1, len(NAMES)), dim=-1)


def frames(rng: np.random.Generator, split: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Single frames with labels.

    Returns:
        Pixels `[n, 3, 16, 16]`, digits `[n]`, -1 for none, and colours `[n, 6]`, all zero without a border.
    """
    bank, labels = ink(split, DIGIT, split == "train")
    pixels, digits, colours = [], np.full(n, -1), np.zeros((n, len(NAMES)), np.float32)
    while len(pixels) < n:
        # one photograph serves for several frames: cutting it out takes longer than the rest
        whole = background(rng, split, 3 * SIDE)
        for y, x in rng.integers(0, 2 * SIDE + 1, (8, 2)):
            i = len(pixels)
            if i == n:
                break
            one = whole[y : y + SIDE, x : x + SIDE].copy()
            if rng.random() < 0.8:
                which = rng.integers(len(bank))
                write_digit(rng, one[None], bank[which, rng.integers(bank.shape[1])])
                digits[i] = labels[which]
            if rng.random() < 0.8:
                colour = int(rng.integers(len(NAMES)))
                paint_border(one, colour)
                colours[i, colour] = 1
            pixels.append(one)
    shown = torch.from_numpy(noisy(rng, np.stack(pixels))).permute(0, 3, 1, 2).float() / 127.5 - 1
    return shown, torch.from_numpy(digits), torch.from_numpy(colours)


def loss_of(model: FrameReader, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The sum of the heads' losses, and how many digits were read right."""
    pixels, digit, colour = batch
    found, there, colours = model(pixels)
    each = found.shape[1]
    known = digit >= 0
    wanted = digit[known].repeat_interleave(each)
    read = F.cross_entropy(found[known].flatten(0, 1), wanted, label_smoothing=0.05)
    presence = F.binary_cross_entropy_with_logits(there[..., 0], known.float()[:, None].expand(-1, each))
    paint = F.binary_cross_entropy_with_logits(colours, colour[:, None].expand(-1, each, -1))
    right = (found[known].flatten(0, 1).argmax(-1) == wanted).float().mean()
    numbers = {"read": right, "there": presence, "paint": paint}
    return read + presence + 3 * paint, {name: float(number.detach()) for name, number in numbers.items()}


def train_frame_encoder(folder: Path, steps: int, seed: int = 0, batch: int = 128) -> FrameReader:
    """Train the encoder, or load it if it is done."""
    torch.manual_seed(seed)
    model = FrameReader()
    held = frames(generator(seed, 21), "val", 500)

    def validate() -> dict[str, float]:
        value, numbers = loss_of(model, held)
        return {"val": float(value), **{f"val_{k}": v for k, v in numbers.items()}}

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        return loss_of(model, frames(generator(seed, 22, step), "train", batch))

    train(folder, model, loss, steps=steps, learning_rate=2e-3, report=validate, report_every=100)
    return model
