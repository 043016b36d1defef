"""A decode step's ordinary attention with its log-sum-exp, where torch's own operation hands it out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..row_attention import cpu_flash


def sdpa_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    others: dict[str, Any],
) -> tuple[Tensor, Tensor] | None:
    """What the `sdpa` backend gives for one new token, the same bits by the same operation, with its log-sum-exp.

    Args:
        query: `[B, H, 1, D]`.
        key: `[B, H, S, D]`.
        value: `[B, H, S, D]`.
        mask: As the backend is to get it.
        dropout: As the backend is to get it.
        scaling: As the backend is to get it.
        others: The attention call's other arguments.

    Returns:
        `[B, 1, H, D]` and `[B, H, 1]`, or None where torch would run another operation or the backend would prepare
        something first; then the backend has to be called.
    """
    if mask is not None or dropout or query.shape[2] != 1 or query.shape[1] != key.shape[1]:
        return None
    if others.get("position_bias") is not None or others.get("softcap") is not None:
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled(query.device.type):
        return None
    flash = cpu_flash(query, key, value)
    if (
        flash is None
        or torch._fused_sdp_choice(query, key, value, scale=scaling) != SDPBackend.FLASH_ATTENTION.value
    ):
        return None
    out, lse = flash(query, key, value, scale=scaling)
    return out.transpose(1, 2).contiguous(), lse
