"""The key and value rows of a fused projection, so that a fine layer holds no query weights that it never uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def used_rows(module: nn.Module, gradient: Tensor | None) -> Tensor | None:
    """Output rows of a linear layer that key or value depend on, or None if they are all or can't be told.

    Args:
        module: A submodule of an attention.
        gradient: Of its weight, from a function of key and value alone.
    """
    if gradient is None or not (type(module) is nn.Linear or isinstance(module, Conv1D)):
        return None
    rows = gradient.t() if isinstance(module, Conv1D) else gradient
    used = (rows != 0).any(dim=1).nonzero()[:, 0]
    return used.cpu() if 0 < len(used) < len(rows) else None


@torch.no_grad()
def rows_only(module: nn.Module, rows: Tensor) -> nn.Linear:
    """A linear layer of some output rows of a fused one."""
    weight: Tensor = module.weight.t() if isinstance(module, Conv1D) else module.weight  # type: ignore[assignment]
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    rows = rows.to(weight.device)
    part = nn.Linear(
        weight.shape[1], len(rows), bias=bias is not None, device=weight.device, dtype=weight.dtype
    )
    part.weight.copy_(weight[rows])
    if bias is not None:
        part.bias.copy_(bias[rows])
    return part


class Spread(nn.Module):
    """In a shadow, stands in for a fused projection: the given rows where they belong, zeros elsewhere.

    Args:
        part: What `rows_only` made, or whatever an adapter put in its place.
        rows: Which rows of the fused output those are.
        width: How many the fused output has.
    """

    def __init__(self, part: nn.Module, rows: Tensor, width: int):
        super().__init__()
        self.part, self.rows, self.width = part, rows, width

    def forward(self, x: Tensor) -> Tensor:
        found = self.part(x)
        out = found.new_zeros(*found.shape[:-1], self.width)
        return out.index_copy(-1, self.rows.to(found.device), found)
