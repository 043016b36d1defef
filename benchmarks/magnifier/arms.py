"""The arms: the same base, pictures, steps and learning rate; what differs is which fine tokens are read, and how."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flexcore
from flexcore.config import FlexConfig
from flexcore.grid import Grid
from flexcore.plugins import register_selector
from flexcore.selection import RandomSelector, Selector

from .image_task import IMAGE
from .model import LAYERS
from .questions import IMAGE_AT, Questions
from .task import Task


@dataclass(frozen=True)
class FreshRandomSelector(RandomSelector):
    """Random regions that differ from picture to picture: the built-in `random` depends on layer and row alone."""

    def choose(self, scores: Tensor, grid: Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        # the scores' bits stand for the picture
        bits = scores.contiguous().view(torch.int32).long().sum(dim=1, keepdim=True) & 0xFFFFFF
        return super().choose(scores, grid, selectable, torch.cat([keys[:, :1] * 131 + bits, keys[:, 1:]], 1))


class ToldGrid(Grid):
    """A lattice with a note for the oracle: `[rows, n_regions]` bool by row, counted from the picture."""

    told: Tensor

    @classmethod
    def of(cls, plain: Grid, told: Tensor) -> ToldGrid:
        """A lattice with this note."""
        grid = copy.copy(plain)  # what the lattice has worked out about itself goes along
        object.__setattr__(grid, "__class__", cls)
        object.__setattr__(grid, "told", told)
        return grid  # type: ignore[return-value]


class OracleSelector(Selector):
    """The regions that the answer's digit touches."""

    def choose(self, scores: Tensor, grid: Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        assert isinstance(grid, ToldGrid)
        return grid.told[keys[:, 1]]


register_selector("magnifier_random", FreshRandomSelector)
register_selector("magnifier_oracle", OracleSelector)


@dataclass(frozen=True)
class Arm:
    """One way to see fine tokens.

    Args:
        flex: How the model is wrapped; None leaves it plain.
        dense: Put all fine tokens in the sequence.
        oracle: Tell the selector where the answer is.
        explore: Start with everything visible and keep reading random regions in training.
    """

    flex: FlexConfig | None = None
    dense: bool = False
    oracle: bool = False
    explore: bool = False


def _flex(first_layer: int = 1, **changes: Any) -> FlexConfig:
    settings = {
        **{"selector": "top_k", "top_k": IMAGE.top_k, "region_size": IMAGE.region_size},
        # the last layer's reading adds nothing: the ablation `last-layer-reads` answers no better
        **{"first_layer": first_layer, "layers": tuple(range(first_layer + 1, LAYERS - 1))},
        # the projector's features are several times as large as what a layer's K/V projections are used to
        "fine_norm": True,
        **changes,
    }
    return FlexConfig(**settings)


OURS = {"selection_loss": 1.0}
ARMS: dict[str, Arm] = {
    "coarse": Arm(),
    "random": Arm(_flex(selector="magnifier_random")),
    "threshold": Arm(_flex(selector="threshold", top_k=None)),
    "flex": Arm(_flex(**OURS), explore=True),
    "oracle": Arm(_flex(selector="magnifier_oracle", top_k=None), oracle=True),
    "all": Arm(_flex(selector="all", top_k=None)),
    "dense": Arm(dense=True),
}
ABLATIONS: dict[str, Arm] = {
    "threshold-ours": Arm(_flex(selector="threshold", top_k=None, **OURS), explore=True),
    "plain-top-k": Arm(_flex()),
    "no-selection-loss": Arm(_flex(), explore=True),
    "no-exploration": Arm(_flex(**OURS)),
    "positions-official": Arm(_flex(positions="official", **OURS), explore=True),
    "positions-fractional": Arm(_flex(positions="fractional", **OURS), explore=True),
    "readout-text": Arm(_flex(readout="text", **OURS), explore=True),
    "raw-features": Arm(_flex(fine_norm=False, **OURS), explore=True),
    "last-layer-reads": Arm(_flex(layers=tuple(range(2, LAYERS)), **OURS), explore=True),
    "start-layer-0": Arm(_flex(first_layer=0, **OURS), explore=True),
    "start-layer-2": Arm(_flex(first_layer=2, **OURS), explore=True),
    "start-layer-3": Arm(_flex(first_layer=3, **OURS), explore=True),
}
EVERY = {**ARMS, **ABLATIONS}


def fitted(arm: Arm, task: Task) -> Arm:
    """An arm with the regions of a task's medium; all that differs between media."""
    if arm.flex is None:
        return arm
    top_k = None if arm.flex.top_k is None else task.top_k
    return replace(arm, flex=arm.flex.replace(region_size=task.region_size, top_k=top_k))


class Inputs:
    """Turns encoded pictures and all questions about them into a model's inputs, for one arm.

    Args:
        arm: The arm.
        kinds: Of question; None is all.
        task: The medium.
    """

    def __init__(self, arm: Arm, kinds: Sequence[str] | None = None, task: Task = IMAGE):
        self.arm, self.task = arm, task
        self.questions = Questions(kinds, task.wording)
        self.before = IMAGE_AT + task.coarse + (task.fine if arm.dense else 0)
        picture = dense_positions(task) if arm.dense else torch.arange(self.before)
        self.mask = self.questions.mask(self.before)
        self.positions = self.questions.positions(picture)[None]

    def __call__(self, model: Any, encoded: Tensor, digits: np.ndarray, boxes: np.ndarray) -> dict[str, Any]:
        """Model inputs, labels among them.

        Args:
            model: The arm's model; its embeddings and its projector are used.
            encoded: `[B, coarse + fine, C]` the encoder's features; the projector, frozen as well, is applied here.
            digits: `[B, kinds, names]` answers by kind and what is named.
            boxes: `[B, kinds, names, 2]` where they are.
        """
        asked = self.questions
        with torch.no_grad():
            features = model.model.multi_modal_projector(encoded)
        colours = asked.colours(digits)
        text = asked.text(colours)
        embeds = model.get_input_embeddings()(
            torch.cat([text.new_full((len(text), IMAGE_AT), asked.begin), text], dim=1)
        )
        coarse = self.task.coarse
        seen = features if self.arm.dense else features[:, :coarse]
        out: dict[str, Any] = {
            "inputs_embeds": torch.cat([embeds[:, :IMAGE_AT], seen, embeds[:, IMAGE_AT:]], dim=1),
            "attention_mask": self.mask,
            "position_ids": self.positions.expand(len(text), -1),
            "labels": asked.labels(asked.of(digits, colours), self.before),
        }
        if self.arm.flex is not None:
            targets = self.task.touched(asked.of(boxes, colours)) if self.arm.oracle else None
            out["flex_streams"] = self.streams(features[:, coarse:], targets)
            if self.arm.flex.readout == "text":
                rows = torch.zeros(out["labels"].shape, dtype=torch.bool)
                rows[:, self.before : self.before + asked.length - 1] = True
                out["readout_mask"] = rows
        return out

    def streams(self, fine: Tensor, targets: Tensor | None = None) -> flexcore.StreamBatch:
        """The pictures' fine sides.

        Args:
            fine: `[B, fine, C]`.
            targets: `[B, Q, n_regions]` bool, for the oracle: what the row that answers each question may read.
        """
        grid: Any = self.task.grid
        grids = grid
        if targets is not None:
            told = torch.zeros(
                len(fine), self.before + self.questions.length, grid.n_regions, dtype=torch.bool
            )
            told[:, self.questions.rows(self.before) - IMAGE_AT] = targets
            grids = [ToldGrid.of(grid, rows) for rows in told]
        at = torch.arange(IMAGE_AT, IMAGE_AT + self.task.coarse)
        return flexcore.StreamBatch.from_features(list(fine), grids, [at] * len(fine))


def dense_positions(task: Task = IMAGE) -> Tensor:
    """`[1 + coarse + fine]` rotary positions of what comes before the text, a fine token's its cell's."""
    fine = task.grid.parents(torch.arange(task.fine))
    return torch.cat([torch.arange(IMAGE_AT + task.coarse), IMAGE_AT + fine])


def build(arm: Arm, load: Callable[[], Any]) -> Any:
    """The base, wrapped as the arm says, with its vision side frozen."""
    from .model import freeze_vision

    model = load()
    freeze_vision(model)
    if arm.flex is not None:
        flexcore.wrap(model, arm.flex)
    return model
