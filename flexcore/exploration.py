"""Exploration: in training, rows read regions that no selector chose, so that better ones can be discovered.

Ours and not the paper's. A region that is never read can't be learned about. With a share of 1 everything is visible;
lowered over training it becomes the selector's own choice and a few regions more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .grid import Grid
from .selection import Selector


class ExploringSelector(Selector):
    """What another selector chose, and each other region with a certain probability.

    It draws from torch's global generator, which gradient checkpointing rewinds and `Trainer` saves. Without gradients
    it chooses what the other one does.

    Args:
        inner: The other selector.
        share: Called for the probability, in `[0, 1]`.
    """

    def __init__(self, inner: Selector, share: Callable[[], float]):
        self.inner = inner
        self.share = share

    def __getattr__(self, name: str) -> Any:
        # early in unpickling there is no inner selector yet
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def choose(self, scores: Tensor, grid: Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        chosen = self.inner.choose(scores, grid, selectable, keys)
        share = self.share() if torch.is_grad_enabled() else 0.0
        if share <= 0:
            return chosen
        return chosen | (torch.rand(chosen.shape, device=chosen.device) < share)
