"""The arms: what a sample gives the model when it sees coarse tokens only, looks closer, or reads all fine tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import flexcore
from flexcore.streams import FineStream

COARSE, FLEX, DENSE = "coarse", "flex", "dense"
ARMS = (COARSE, FLEX, DENSE)
# Models whose tokens take one position each, and whose decoder needs to know no more than embeddings.
_DENSE_MODELS = ("llava", "vipllava")
_AT_ONCE = 32  # regions that dense encodes at once


class TooLongError(ValueError):
    """A sample's fine tokens don't fit into the sequence."""


def cannot(arm: str, model: Any) -> str:
    """Why a model can't be asked in this way; nothing if it can."""
    if arm == FLEX and not flexcore.is_wrapped(model):
        return "the model isn't wrapped"
    if arm == DENSE and model.config.model_type not in _DENSE_MODELS:
        return (
            f"fine tokens go into the sequence of LLaVA-architecture models ({', '.join(_DENSE_MODELS)}), this one is "
            f"{model.config.model_type}"
        )
    return ""


def see(arm: str, model: Any, inputs: Any, limit: int, reserve: int) -> dict[str, Any]:
    """What one sample gives the model.

    Args:
        arm: One of `ARMS`.
        model: Wrapped for flex.
        inputs: The adapter's, of one sample, on the model's device.
        limit: Tokens that a dense sequence may have, answer included.
        reserve: Tokens of the longest answer.

    Returns:
        Inputs with `input_ids` `[1, T]`, or with `inputs_embeds` `[1, T, C]` and `attention_mask` `[1, T]`.

    Raises:
        TooLongError: A dense sequence would be longer than `limit`.
    """
    if arm == FLEX:
        return dict(inputs)
    (streams,) = inputs["flex_streams"].samples
    if arm == DENSE:
        length = inputs["input_ids"].shape[1] + sum(int(s.region_valid.sum()) for s in streams) + reserve
        # Checked before anything is encoded.
        if length > limit:
            raise TooLongError(f"{length:,} tokens with all fine ones and the answer, the limit is {limit:,}")
    elif all(stream.coarse_embeds is None for stream in streams):
        return {name: value for name, value in inputs.items() if name != "flex_streams"}
    embeds = decoder_embeds(model, inputs)
    # From the back, so that what is put in doesn't move the positions of what is still to come.
    for stream in sorted(streams, key=lambda s: -int(s.coarse_positions.max())) if arm == DENSE else ():
        after = int(stream.coarse_positions.max()) + 1
        embeds = torch.cat(
            [embeds[:, :after], fine_tokens(stream)[None].to(embeds), embeds[:, after:]], dim=1
        )
    return {"inputs_embeds": embeds, "attention_mask": embeds.new_ones(embeds.shape[:2], dtype=torch.long)}


@torch.inference_mode()
def fine_tokens(stream: FineStream) -> Tensor:
    """`[n, C]` a medium's fine tokens in raster order, margins left out."""
    source, grid = stream.source, stream.grid
    every = torch.arange(grid.n_regions)
    features = [
        source.features(some)[stream.region_valid[some].to(source.device)] for some in every.split(_AT_ONCE)
    ]
    order = grid.tokens(every)[stream.region_valid.cpu()].argsort()
    return torch.cat(features)[order.to(source.device)]


class _ReachedError(Exception):
    """The decoder was called; nothing behind it matters."""


@torch.inference_mode()
def decoder_embeds(model: Any, inputs: Any) -> Tensor:
    """`[1, T, C]` what the decoder is given: words, and the coarse tokens among them."""
    found: list[Tensor] = []

    def take(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs.get("inputs_embeds")
        found.append(module.get_input_embeddings()(kwargs["input_ids"]) if given is None else given)
        raise _ReachedError

    hook = model.get_decoder().register_forward_pre_hook(take, with_kwargs=True)
    wrapped = flexcore.is_wrapped(model)
    try:
        model(**{name: value for name, value in inputs.items() if wrapped or name != "flex_streams"})
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return found[0]
