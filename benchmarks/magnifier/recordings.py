"""The recordings' task: ten minutes of noise with spoken digits, six of them after bells; 76 coarse tokens, 760 fine.

A recording is 38 windows of sixteen seconds, all of one room, whose noise goes on through them. The encoder takes
windows one by one, as the audio adapter hands them to it, so the features of a recording are those of its windows. A
room's hundred windows are encoded once, and recordings are drawn from them: every order and choice is a new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .loop import generator
from .recording_encoder import FRAMES, LAYOUT, POOL, WIDTH, Levels, SoundTowerConfig, train_sound_encoder
from .sounds import NAMES, WINDOW, Room, Window, window
from .task import Close, Encoded, Readable, Task, Wording, kept, spans_touch

WINDOWS = 38
SECONDS = WINDOWS * WINDOW
REGION = 5
ROOMS = {"train": 30, "val": 6, "test": 20}
# Of a room's windows: every bell with every digit, and some with digits only.
RINGING, OTHERS = 10 * len(NAMES), 40
IN_ROOM = RINGING + OTHERS
_CELLS = FRAMES // POOL


def room_window(seed: int, which: int) -> Window:
    """A window of the split's rooms, by its number: those of the first room come first."""
    room, i = divmod(which, IN_ROOM)
    rng = generator(seed, 34, room, i)
    strokes = [divmod(i, 10)] if i < RINGING else []
    others = int(rng.integers(0, 2)) if strokes else int(rng.integers(1, 3))
    return window(rng, Room(generator(seed, 33, room)), strokes, others)


def plan(rng: np.random.Generator, rooms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a recording: `[38]` numbers of its windows, and by bell `[6]` digits and `[6]` places of their windows."""
    first = IN_ROOM * int(rng.integers(rooms))
    digits = rng.integers(10, size=len(NAMES))
    places = rng.permutation(WINDOWS)[: len(NAMES)]
    order = first + RINGING + rng.permutation(OTHERS)[:WINDOWS]
    order[places] = first + 10 * np.arange(len(NAMES)) + digits
    return order, digits, places


@dataclass(frozen=True, eq=False)
class Recordings:
    """Recordings, put together from encoded windows.

    Args:
        bank: The windows: `[m, 2 + 20, C]` features, coarse first, and where the digit after a bell is.
        windows: `[n, 38]` numbers of each recording's windows.
        digits: `[n, 1, 6]` answers.
        boxes: `[n, 1, 6, 2]` fine frames in which they are said, first and one after the last.
    """

    bank: Encoded
    windows: np.ndarray
    digits: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.windows)

    def look_up(self, which: np.ndarray) -> Tensor:
        """`[B, 76 + 760, C]` float32 features of some recordings."""
        parts = self.bank.look_up(self.windows[which].ravel()).unflatten(0, (len(which), WINDOWS))
        coarse, fine = parts[:, :, :_CELLS], parts[:, :, _CELLS:]
        return torch.cat([coarse.flatten(1, 2), fine.flatten(1, 2)], dim=1)


class AudioTask(Task):
    """Six bells in ten minutes, and the digits that are said after them."""

    name = "audio"
    about = (
        "recordings of 10 min 8 s; 76 coarse tokens of 8 s, 760 fine ones of .8 s. Six bells ring once each, and "
        'after each a digit is said, others elsewhere: "Which digit was said after the silver bell?" All splits '
        "hold the same twenty takes of digits, by two speakers, at other speeds, tilts and levels; the noises of "
        "the test recordings are in no training recording."
    )
    wording = Wording({"after": "Which digit was said after the {} bell?"}, NAMES, {"after": len(NAMES)})
    grid = LAYOUT.grid(WINDOWS * _CELLS, WINDOWS * FRAMES, (REGION,))
    region_size, top_k = REGION, 15  # of 152 regions: 9.9 %
    encoder_steps, base_steps, base_media, steps = 800, 400, 3000, 300
    splits: ClassVar = {"train": (4000, 100), "val": (200, 101), "test": (700, 1000)}

    def __init__(self) -> None:
        self._levels: Levels | None = None

    def tower_config(self) -> Any:
        return SoundTowerConfig()

    def train_encoder(self, folder: Path, steps: int) -> Any:
        return train_sound_encoder(folder, steps)

    @torch.no_grad()
    def encode(self, tower: nn.Module, some: list[Window], pool: int = 1) -> Tensor:
        """`[k, 20 / pool, C]` features of windows."""
        self._levels = self._levels or Levels()
        samples = torch.from_numpy(np.stack([w.samples for w in some]))
        hidden: Tensor = tower(self._levels(samples, pool)).last_hidden_state
        return hidden

    def readable(self, tower: nn.Module, split: str, n: int, seed: int) -> Readable:
        """A minute at the fine rate in as many tokens as ten minutes have at the coarse one."""
        pairs = [(a, b) for a in range(len(NAMES)) for b in range(a)]
        each = 30 if split == "train" else 6
        split_seed = self.splits[split][1]
        bank: dict[tuple[int, ...], tuple[Tensor, np.ndarray]] = {}
        for number, pair in enumerate(tqdm([(), *pairs], desc=f"readable {split}", disable=None)):
            some = []
            for i in range(each):
                rng = generator(seed, 36, split_seed, number, i)
                strokes = [(name, int(rng.integers(10))) for name in pair]
                some.append(window(rng, Room(rng), strokes, int(rng.integers(0, 2)) if pair else 2))
            features = self.encode(tower, some)
            bank[pair] = (features, np.array([[d for d, _, _ in w.digits[: len(pair)]] for w in some]))
        cut = self.coarse - 3 * FRAMES
        out, digits = torch.empty(n, self.coarse, WIDTH), np.zeros((n, 1, len(NAMES)), np.int64)
        for i in range(n):
            rng = generator(seed, 37, split_seed, i)
            parts = [bank[()][0][rng.integers(each)][:cut]]
            for a, b in rng.permutation(len(NAMES)).reshape(3, 2):
                pair = (max(a, b), min(a, b))
                features, said = bank[pair]
                which = rng.integers(each)
                parts.append(features[which])
                digits[i, 0, list(pair)] = said[which]
            out[i] = torch.cat([parts[j] for j in rng.permutation(4)])
        return Close(out, digits, np.tile(np.arange(len(NAMES)), (n, 1, 1)))

    def windows(
        self, tower: nn.Module, seed: int, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features, digits and fine frames of some windows, as a bank holds them."""
        some = [room_window(seed, which) for which in range(start, stop)]
        features = torch.cat([self.encode(tower, some, POOL), self.encode(tower, some)], dim=1)
        digits, frames = np.full(len(some), -1), np.zeros((len(some), 2), np.int64)
        for i, shown in enumerate(some):
            if shown.bells:
                digit, begin, end = shown.digits[0]
                digits[i] = digit
                frames[i] = [int(begin * FRAMES / WINDOW), int(np.ceil(end * FRAMES / WINDOW))]
        return features.to(torch.float16).numpy(), digits, frames

    def assembled(self, bank: Encoded, rooms: int, n: int, seed: int) -> Recordings:
        """Draw recordings from the windows of so many rooms."""
        windows = np.zeros((n, WINDOWS), np.int64)
        digits, boxes = np.zeros((n, 1, len(NAMES)), np.int64), np.zeros((n, 1, len(NAMES), 2), np.int64)
        for i in range(n):
            windows[i], digits[i, 0], places = plan(generator(seed, 35, i), rooms)
            boxes[i, 0] = FRAMES * places[:, None] + bank.boxes[windows[i, places]]
        return Recordings(bank, windows, digits, boxes)

    def drawn(self, tower: nn.Module, n: int, seed: int, rooms: int) -> Recordings:
        """Draw and encode recordings, in memory."""
        return self.assembled(Encoded(*self.windows(tower, seed, 0, rooms * IN_ROOM)), rooms, n, seed)

    def cached(self, folder: Path, llava: Any, split: str, n: int, seed: int) -> Recordings:
        tower, rooms = llava.model.vision_tower, ROOMS[split]

        def make(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return self.windows(tower, seed, start, stop)

        shape = (rooms * IN_ROOM, _CELLS + FRAMES, WIDTH)
        bank = kept(folder, {"split": split, "rooms": rooms, "seed": seed}, shape, make, step=20)
        return self.assembled(bank, rooms, n, seed)

    def touched(self, boxes: Tensor) -> Tensor:
        return spans_touch(self.grid, boxes)


AUDIO = AudioTask()
