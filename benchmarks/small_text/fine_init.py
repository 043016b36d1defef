"""Fine projections that start where a linear map takes features to the keys and values of coarse tokens.

Copies of a layer's own K/V weights expect what a token has become in that layer. In the sixteenth of thirty, that is
far from the projector's features, of which fine keys and values are made. But the base has seen the same features as
coarse tokens, and what became of them: least squares from the one to the other, in closed form, makes fine tokens look
like coarse ones to the layers that read, before any training. Ours and not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

_BATCH, _RIDGE = 16, 1e-3


def least_squares(x: Tensor, y: Tensor, ridge: float = _RIDGE) -> Tensor:
    """`[out, in]` the weight of the linear layer without bias that takes `[n, in]` nearest to `[n, out]`.

    Args:
        x: Inputs.
        y: Outputs.
        ridge: Weight of the solution's size, as a part of the inputs' mean square.
    """
    gram = x.T @ x
    return torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ y).T


@torch.no_grad()
def fit_fine(
    llava: Any,
    layers: tuple[int, ...],
    n: int,
    inputs: Callable[[Tensor], tuple[Tensor, dict[str, Any]]],
    at: slice,
) -> dict[int, tuple[Tensor, Tensor]]:
    """Weights of fine projections that take normed features (`fine_norm=True`), `(k, v)` by layer.

    Args:
        llava: A model with a Llama decoder that isn't wrapped, in eval mode.
        layers: That will read.
        n: How many views to fit on.
        inputs: For some views, the projected features `[B, cells², hidden]` and what the model takes.
        at: Where the features are in the sequence.
    """
    decoder = llava.model.language_model.layers
    became: dict[int, Tensor] = {}

    def keep(layer: int, module: Any, given: Any, out: Tensor) -> None:
        became[layer] = out[:, at].flatten(0, 1)

    hooks = [decoder[i].input_layernorm.register_forward_hook(partial(keep, i)) for i in layers]
    features, hidden = [], {i: [] for i in layers}
    try:
        for which in tqdm(torch.arange(n).split(_BATCH), desc="fitting fine projections", disable=None):
            seen, made = inputs(which)
            llava(**made)
            features.append(seen.flatten(0, 1))
            for i in layers:
                hidden[i].append(became[i])
    finally:
        for hook in hooks:
            hook.remove()
    x, out = torch.cat(features), {}
    for i in layers:
        attention, normed = decoder[i].self_attn, decoder[i].input_layernorm(x)
        own = torch.cat(hidden[i])
        out[i] = tuple(
            least_squares(normed, project(own)) for project in (attention.k_proj, attention.v_proj)
        )
    return out


@torch.no_grad()
def set_fine(llava: Any, weights: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Give a wrapped model these fine projections."""
    for i, (key, value) in weights.items():
        llava.flex_fine[str(i)].k_proj.weight.copy_(key)
        llava.flex_fine[str(i)].v_proj.weight.copy_(value)
