"""The pictures' task: what `scenes`, `encoder`, `base` and `pictures` say, as a `Task`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from . import encoder, pictures
from .model import WORDING, processor
from .task import Media, Readable, Task


class ImageTask(Task):
    """Six small digits in coloured frames on a photograph."""

    name = "image"
    about = "Pictures of 192x192 pixels with six digits of six pixels in coloured frames."
    wording = WORDING
    grid = pictures.GRID
    region_size, top_k = pictures.REGION, 8  # of 81 regions: 9.9 %
    encoder_steps, base_steps, base_media, steps = 2000, 2500, 8000, 600
    encoder_finding_steps, finding_steps = 700, 600
    splits: ClassVar = {"train": (6000, 100), "val": (200, 101)}

    def folder(self, root: Path) -> Path:
        return root

    def tower_config(self) -> Any:
        return encoder.vision_config()

    def train_encoder(self, folder: Path, steps: int) -> Any:
        return encoder.train_encoder(folder, steps, self.encoder_finding_steps)

    def readable(self, tower: nn.Module, split: str, n: int, seed: int) -> Readable:
        from .base import readable_pictures

        return readable_pictures(tower, split, n, seed)

    def small(self, folder: Path, llava: Any, split: str) -> Readable:
        n, seed = self.splits[split]
        some = pictures.cached(folder / f"pictures-{split}", llava, processor(), split, n, seed)
        return pictures.found(some)

    def cached(self, folder: Path, llava: Any, split: str, n: int, seed: int) -> Media:
        return pictures.cached(folder, llava, processor(), split, n, seed)

    def touched(self, boxes: Tensor) -> Tensor:
        return pictures.touched(boxes)


IMAGE = ImageTask()
