"""Readable twins in torch of kernels that have no place of their own for them; they need no Triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gather_project_rotate_reference(
    features: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    *,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The readable twin of `gather_project_rotate`; same arguments."""
    if tokens is not None:
        features = features[tokens.clamp(min=0)].masked_fill((tokens < 0)[:, None], 0)
    key = F.linear(features, key_weight, key_bias).unflatten(1, (heads, -1))
    value = F.linear(features, value_weight, value_bias).unflatten(1, (heads, -1))
    half = key.shape[2] // 2
    turned = torch.cat([-key[..., half:], key[..., :half]], dim=-1)
    return key * cos[:, None] + turned * sin[:, None], value
