"""Coarse tokens that come with their stream: put among the word embeddings of a model that reads text only."""

from __future__ import annotations

from typing import Any

from .context import FlexContext


def with_coarse_embeds(model: Any, kwargs: dict[str, Any], context: FlexContext | None) -> dict[str, Any]:
    """A forward's arguments, with `inputs_embeds` in place of `input_ids` where a stream brings its coarse tokens.

    It happens in the forward and not before, so that whoever calls it has plain token ids to pass on: chunks of a
    prompt, drafts of an assistant, an answer without a cache.

    Args:
        model: The wrapped model.
        kwargs: Arguments of its forward; they are left as they are.
        context: The forward's state, None without media.
    """
    ids = kwargs.get("input_ids")
    if context is None or ids is None:
        return kwargs
    beams, past = len(ids) // len(context.request.samples), context.past
    found = []
    for i, sample in enumerate(context.request.samples):
        for stream in sample.media:
            if stream.coarse_embeds is None or stream.coarse_positions is None:
                continue
            here = (stream.coarse_positions >= past) & (stream.coarse_positions < past + ids.shape[1])
            if here.any():
                found.append((i, stream.coarse_positions[here] - past, stream.coarse_embeds, here))
    if not found:
        return kwargs
    # a copy: an embedding's output may be a leaf that autograd lets nobody write to
    embeds = model.get_input_embeddings()(ids).clone()
    for i, at, coarse, here in found:
        # a sample's beams follow one another
        embeds[i * beams : (i + 1) * beams, at.to(embeds.device)] = coarse[here.to(coarse.device)].to(embeds)
    return {**kwargs, "input_ids": None, "inputs_embeds": embeds}
