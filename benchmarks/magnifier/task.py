"""What a medium brings to the benchmark: its lattice and questions, its encoder, and how media are made and kept.

Everything else, decoder, stages, arms and evaluation, is the same for pictures, clips and recordings.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import flexcore


@dataclass(frozen=True)
class Wording:
    """What can be asked about a medium.

    Args:
        questions: Sentence by kind of question; `{}` is where a name goes.
        names: What a question can name, such as the colours of frames.
        asked: By kind, how many of the names have an answer in each medium.
    """

    questions: Mapping[str, str]
    names: tuple[str, ...]
    asked: Mapping[str, int]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of question."""
        return tuple(self.questions)

    def question(self, kind: str, name: int) -> str:
        """A question, by the index of what it names."""
        return self.questions[kind].format(self.names[name])


class Media(Protocol):
    """Encoded media and the answers to all questions about them."""

    @property
    def digits(self) -> np.ndarray:
        """`[n, kinds, names]` answers, -1 where there is none."""

    @property
    def boxes(self) -> np.ndarray:
        """`[n, kinds, names, 2]` where the answer is, as the task's `touched` takes it."""

    def __len__(self) -> int: ...

    def look_up(self, which: np.ndarray) -> Tensor:
        """`[B, coarse + fine, C]` float32 features of some media."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Media whose features lie side by side, in memory or on disk.

    Args:
        features: `[n, coarse + fine, C]` float16, before the projector, coarse view first, each in raster order.
        digits: `[n, kinds, names]` answers, -1 where there is none.
        boxes: `[n, kinds, names, 2]` where they are.
    """

    features: np.ndarray
    digits: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.features)

    def look_up(self, which: np.ndarray) -> Tensor:
        """`[B, coarse + fine, C]` float32 features of some media."""
        return torch.from_numpy(np.asarray(self.features[which], np.float32))


PLACES = 16  # how finely the base is taught where things are, along one axis


class Readable(Protocol):
    """What the base learns on: media that the coarse view can read, encoded."""

    @property
    def features(self) -> Tensor:
        """`[n, coarse, C]`."""

    @property
    def digits(self) -> np.ndarray:
        """`[n, kinds, names]` answers."""

    @property
    def aims(self) -> np.ndarray:
        """`[n, kinds, names]` index of the name of what each question is about."""

    @property
    def places(self) -> np.ndarray | None:
        """`[n, kinds, names]` where what each question names is, among `PLACES`; None if no question needs it."""


@dataclass(frozen=True, eq=False)
class Close:
    """The plain kind of `Readable`."""

    features: Tensor
    digits: np.ndarray
    aims: np.ndarray
    places: np.ndarray | None = None


class Task(ABC):
    """A medium's part of the benchmark.

    Subclasses set the fields and say how media are drawn and encoded; `splits` gives how many media each split has,
    and the seed that they are drawn from.
    """

    name: str
    about: str
    wording: Wording
    grid: flexcore.Grid
    region_size: int
    top_k: int
    encoder_steps: int
    base_steps: int
    base_media: int
    steps: int
    finding_steps: ClassVar[int] = 0
    splits: ClassVar[Mapping[str, tuple[int, int]]]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of question."""
        return self.wording.kinds

    @property
    def coarse(self) -> int:
        """Coarse tokens."""
        return self.grid.n_coarse

    @property
    def fine(self) -> int:
        """Fine tokens."""
        return self.grid.n_fine

    def folder(self, root: Path) -> Path:
        """Where the task's outputs go below the benchmark's."""
        return root / self.name

    @abstractmethod
    def tower_config(self) -> Any:
        """Config of the encoder, as transformers builds it."""

    @abstractmethod
    def train_encoder(self, folder: Path, steps: int) -> Any:
        """Train the encoder, or load it if it is done; it holds the tower under that name."""

    @abstractmethod
    def readable(self, tower: nn.Module, split: str, n: int, seed: int) -> Readable:
        """Draw and encode what the base learns on."""

    def small(self, folder: Path, llava: Any, split: str) -> Readable:
        """The task's own media as the coarse view has them, for `finding_steps` more steps of the base.

        Args:
            folder: Of the task's outputs.
            llava: Holds the frozen encoder.
            split: Whose.
        """
        raise NotImplementedError(f"{self.name}: the base learns on readable media alone")

    @abstractmethod
    def cached(self, folder: Path, llava: Any, split: str, n: int, seed: int) -> Media:
        """Encoded media from disk, made and written there first if they aren't there yet."""

    @abstractmethod
    def touched(self, boxes: Tensor) -> Tensor:
        """`[..., n_regions]` bool: regions that hold some of the answers at `boxes` `[..., 2]`."""


def spans_touch(grid: flexcore.Grid, spans: Tensor) -> Tensor:
    """`[..., n_regions]` bool: regions that spans of time touch, in a lattice whose regions span all other axes.

    Args:
        grid: The lattice, time first.
        spans: `[..., 2]` first fine step and the one after the last.
    """
    edges = torch.tensor(grid.edges[0])
    assert grid.n_regions == len(edges) - 1
    return (edges[:-1] < spans[..., 1:]) & (edges[1:] > spans[..., :1])


def kept(
    folder: Path,
    key: Mapping[str, Any],
    shape: tuple[int, ...],
    make: Callable[[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]],
    step: int = 10,
) -> Encoded:
    """Encoded media from disk, written there a part at a time if they aren't there yet.

    Args:
        folder: Where.
        key: What they are; media of another key in the folder are refused.
        shape: `(n, tokens, C)`.
        make: Called with the first medium and the one after the last; makes their features, digits and boxes.
        step: Media in a part.

    Raises:
        ValueError: The folder holds others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ready = folder / "media.json"
    if not ready.exists():
        whole = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, shape)
        digits, boxes = [], []
        for start in tqdm(range(0, shape[0], step), desc=folder.name, disable=None):
            stop = min(start + step, shape[0])
            features, *rest = make(start, stop)
            whole[start:stop] = features
            digits.append(rest[0])
            boxes.append(rest[1])
        whole.flush()
        np.save(folder / "digits.npy", np.concatenate(digits))
        np.save(folder / "boxes.npy", np.concatenate(boxes))
        ready.write_text(json.dumps(dict(key)))
    elif (found := json.loads(ready.read_text())) != dict(key):
        raise ValueError(f"{folder} holds media of {found}, asked for are {dict(key)}")
    return Encoded(
        np.load(folder / "features.npy", mmap_mode="r"),
        np.load(folder / "digits.npy"),
        np.load(folder / "boxes.npy"),
    )
