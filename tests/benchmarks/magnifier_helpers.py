"""What the tests of the magnifier's media share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def settle(tower: nn.Module, pixels: Tensor) -> None:
    """Give an untrained tower's batch norms the statistics of what it sees: fresh ones let little of it through."""
    norms = [m for m in tower.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    assert norms
    for norm in norms:
        norm.momentum = 1.0
    tower.train()(pixels)
    tower.eval()
