"""The clips' task: 24 coarse frames, one a second, and six times as many fine ones; four tokens a frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import flexcore
from flexcore_adapters.image_tower import normalise

from .clip_encoder import WIDTH, frame_config, train_frame_encoder
from .clips import COARSE_AT, COARSE_FRAMES, FINE_AT, FINE_FRAMES, FPS, PER_COARSE, SIDE, Clip, clip
from .loop import generator
from .model import processor
from .scenes import NAMES
from .task import Close, Encoded, Media, Readable, Task, Wording, kept, spans_touch

REGION = (2, 2, 2)
# How `load_adapter("video", ...)` makes the same of a clip.
ADAPTER = {"coarse_frames": COARSE_FRAMES, "fine_fps": PER_COARSE, "zoom": 1, "region": REGION, "fps": FPS}


class VideoTask(Task):
    """Six digits, each for less than half a second while the border has one of six colours."""

    name = "video"
    about = (
        "clips of 24 s, 600 frames; 96 coarse tokens, a frame of four a second, and 576 fine ones, six frames a "
        "second. The border has each of six colours for two seconds and more, and in each a handwritten digit shows "
        'for .36 to .48 s while no coarse frame is taken: "What shows while the frame is red?" Digits and '
        "photographs of the test clips are in no training clip."
    )
    wording = Wording({"while": "What shows while the frame is {}?"}, NAMES, {"while": len(NAMES)})
    # What the video adapter lays out: blocks of two fine frames that restart at every coarse one.
    grid = flexcore.Grid.blocks((COARSE_FRAMES, 2, 2), (FINE_FRAMES, 2, 2), REGION, tile=(PER_COARSE, 2, 2))
    region_size, top_k = 2, 7  # of 72 regions: 9.7 %
    encoder_steps, base_steps, base_media, steps = 1200, 400, 3000, 300
    splits: ClassVar = {"train": (1200, 100), "val": (200, 101), "test": (700, 1000)}

    def processor(self) -> Any:
        """The model's processor: frames of 16 pixels, four tokens each."""
        return processor(self.wording, SIDE)

    def tower_config(self) -> Any:
        return frame_config()

    def train_encoder(self, folder: Path, steps: int) -> Any:
        return train_frame_encoder(folder, steps)

    @torch.no_grad()
    def encode(self, tower: nn.Module, clips: list[Clip], at: np.ndarray) -> Tensor:
        """`[n, 4 * len(at), C]` features of some frames of some clips."""
        shown = torch.from_numpy(np.concatenate([c.frames[at] for c in clips])).permute(0, 3, 1, 2)
        hidden = tower(normalise(self.processor().image_processor, shown)).last_hidden_state
        return hidden.reshape(len(clips), -1, hidden.shape[-1])

    def readable(self, tower: nn.Module, split: str, n: int, seed: int) -> Readable:
        features, digits = [], []
        for start in tqdm(range(0, n, 20), desc=f"readable {split}", disable=None):
            some = [clip(generator(seed, 23, i), split, seen=True) for i in range(start, min(start + 20, n))]
            features.append(self.encode(tower, some, COARSE_AT))
            digits += [c.by_colour()[0] for c in some]
        aims = np.tile(np.arange(len(NAMES)), (n, 1, 1))
        return Close(torch.cat(features), np.stack(digits)[:, None], aims)

    def make(
        self, tower: nn.Module, split: str, seed: int, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features, digits and boxes of some clips, as `Encoded` takes them."""
        some = [clip(generator(seed, 25, i), split) for i in range(start, stop)]
        features = self.encode(tower, some, np.concatenate([COARSE_AT, FINE_AT]))
        digits, steps = zip(*(c.by_colour() for c in some), strict=True)
        return features.to(torch.float16).numpy(), np.stack(digits)[:, None], np.stack(steps)[:, None]

    def drawn(self, tower: nn.Module, split: str, n: int, seed: int) -> Encoded:
        """Draw and encode clips, in memory."""
        return Encoded(*self.make(tower, split, seed, 0, n))

    def cached(self, folder: Path, llava: Any, split: str, n: int, seed: int) -> Media:
        tower = llava.model.vision_tower

        def make(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return self.make(tower, split, seed, start, stop)

        shape = (n, self.coarse + self.fine, WIDTH)
        return kept(folder, {"split": split, "n": n, "seed": seed}, shape, make)

    def touched(self, boxes: Tensor) -> Tensor:
        return spans_touch(self.grid, boxes)


VIDEO = VideoTask()
