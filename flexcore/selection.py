"""Selection: from a readout row's coarse attention to the regions it may read in the next layer.

All arithmetic is float32 on detached scores, per row and per medium. A row that put no attention on a medium (it
comes before it, or the medium is masked) selects nothing of it, whatever the selector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import FlexConfig
from .grid import Grid
from .hookspecs import hookimpl

SCORE_SCALE = 255  # the paper thresholds scores as 8-bit grey values


class Selector(ABC):
    """Base of all selectors: owns margins and eligibility, so that a new one is a `choose` of a few lines.

    No dataclass itself: a plug-in's selector may be one, frozen or not, or have an `__init__` of its own.
    """

    @classmethod
    def from_config(cls, config: FlexConfig) -> Selector:
        """Build from a FlexConfig; a plug-in's selector takes `selector_options`."""
        return cls(**config.selector_options)

    @abstractmethod
    def choose(self, scores: Tensor, grid: Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        """Choose regions for rows that attend to the medium.

        Args:
            scores: `[R, n_coarse]` float32 head-summed attention probabilities, zero in the margins.
            grid: The medium's lattice.
            selectable: `[n_regions]` bool, regions with something to read; `[R, n_regions]` on the finer levels of a
                pyramid, where each row has its own.
            keys: `[R, 2]` int64 (layer, row position counted from the medium's first coarse token): what a
                stochastic selector may depend on and stay the same in a batch, alone, or in a decode step.

        Returns:
            `[R, n_regions]` bool.
        """

    def select(self, scores: Tensor, grid: Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        """Apply margins, `choose`, and drop rows that attend to nothing; arguments as for `choose`.

        Raises:
            ValueError: `scores` doesn't fit the grid.
        """
        if scores.ndim != 2 or scores.shape[1] != grid.n_coarse:
            raise ValueError(f"scores must be [R, n_coarse={grid.n_coarse}], got {list(scores.shape)}")
        # every operation costs a decode step more than its arithmetic, so those that would change nothing are left out
        scores = (scores.detach() if scores.requires_grad else scores).float()
        attends = scores.amax(dim=1, keepdim=True) > 0
        scores = self.margins(scores, grid)
        selectable = selectable.to(scores.device)
        chosen = self.choose(scores, grid, selectable, keys) & attends
        return chosen if selectable is grid.everything else chosen & selectable

    @staticmethod
    def margins(scores: Tensor, grid: Grid) -> Tensor:
        """Zero the cells that are wholly padding (semantics section 3, step 2)."""
        if not grid.has_margin:
            return scores
        return scores.masked_fill(~grid.coarse_valid.to(scores.device), 0.0)


@dataclass(frozen=True)
class ThresholdSelector(Selector):
    """The paper's selection: min-max normalise, threshold, and open every region a chosen cell touches."""

    threshold: int = 48

    @classmethod
    def from_config(cls, config: FlexConfig) -> ThresholdSelector:
        return cls(threshold=config.threshold)

    def cells(self, scores: Tensor) -> Tensor:
        """`[R, n_coarse]` bool: cells above the threshold (steps 3 and 4). Uniform scores choose nothing."""
        low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
        return SCORE_SCALE * ((scores - low) / (high - low)) > self.threshold  # 0/0 = NaN compares false

    def choose(self, scores: Tensor, grid: Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        return grid.pool(self.cells(scores))


def _count(k: int | None, fraction: float, grid: Grid) -> int:
    # the tiny slack keeps 0.07 * 100 = 7.000000000000001 from counting as eight
    return min(grid.n_regions, math.ceil(fraction * grid.n_regions - 1e-9) if k is None else k)


def _first_k(order: Tensor, k: int) -> Tensor:
    """`[R, n]` bool marking the first k entries of each row's ranking."""
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :k], True)


@dataclass(frozen=True)
class TopKSelector(Selector):
    """The k regions with the highest-scoring cell; ties go to the lower index."""

    k: int | None = None
    fraction: float = 0.1

    @classmethod
    def from_config(cls, config: FlexConfig) -> TopKSelector:
        return cls(k=config.top_k, fraction=config.fraction)

    def choose(self, scores: Tensor, grid: Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        ranked = grid.pool(scores)
        if selectable is not grid.everything:
            ranked = ranked.masked_fill(~selectable, -1.0)
        order = ranked.sort(dim=1, descending=True, stable=True).indices
        return _first_k(order, _count(self.k, self.fraction, grid))


@dataclass(frozen=True)
class TopPSelector(Selector):
    """The fewest cells that hold a share p of the medium's attention, and every region they touch."""

    p: float = 0.5

    @classmethod
    def from_config(cls, config: FlexConfig) -> TopPSelector:
        return cls(p=config.top_p)

    def choose(self, scores: Tensor, grid: Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        total = scores.sum(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        ranked, order = (scores / total).sort(dim=1, descending=True, stable=True)
        # a cell is needed while those ranked before it hold less than p, so p > 0 always takes one; at p = 1 rounding
        # in the sum would drop the small ones
        needed = ((ranked.cumsum(dim=1) - ranked < self.p) | (self.p >= 1)) & (ranked > 0)
        return grid.pool(torch.zeros_like(needed).scatter(1, order, needed))


@dataclass(frozen=True)
class RandomSelector(Selector):
    """Regions drawn by a counter-based hash: the control that shows what attention-driven choice is worth."""

    k: int | None = None
    fraction: float = 0.1
    seed: int = 0

    @classmethod
    def from_config(cls, config: FlexConfig) -> RandomSelector:
        return cls(k=config.top_k, fraction=config.fraction, seed=config.seed)

    def choose(self, scores: Tensor, grid: Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        # hashing (seed, layer, position, region) instead of drawing keeps batches, beams and decode steps equal
        region = torch.arange(grid.n_regions, device=keys.device)
        x = _mix(torch.full_like(keys[:, :1], self.seed))
        for part in (keys[:, :1], keys[:, 1:2], region[None]):
            x = _mix(x * 31 + part)
        rank = x.masked_fill(~selectable.to(x.device), torch.iinfo(torch.int64).max).argsort(
            dim=1, stable=True
        )
        return _first_k(rank, _count(self.k, self.fraction, grid)).to(scores.device)


def _mix(x: Tensor) -> Tensor:
    """A 31-bit integer finaliser in int64 arithmetic (xor-shift and multiply)."""
    mask = 0x7FFFFFFF
    x = (x + 0x165667B1) & mask
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return x ^ (x >> 15)


@dataclass(frozen=True)
class AllSelector(Selector):
    """Every region: the upper bound, equal to dense attention over all fine keys."""

    @classmethod
    def from_config(cls, config: FlexConfig) -> AllSelector:
        return cls()

    def choose(self, scores: Tensor, grid: Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        return torch.ones(scores.shape[0], grid.n_regions, dtype=torch.bool, device=scores.device)


@hookimpl
def flexcore_register_selectors(register: Callable[[str, Any], None]) -> None:
    """The built-in selectors come in through the same door as a plug-in's."""
    register("threshold", ThresholdSelector)
    register("top_k", TopKSelector)
    register("top_p", TopPSelector)
    register("random", RandomSelector)
    register("all", AllSelector)


def make_selector(config: FlexConfig) -> Selector:
    """The selector that a config names.

    Raises:
        ValueError: No selector of that name is registered; the message lists those that are.
    """
    from .plugins import load_selector_class

    return load_selector_class(config.selector).from_config(config)
