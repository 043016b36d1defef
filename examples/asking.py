"""One question, asked in three ways: with coarse tokens only, with a closer look, with all fine tokens."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

import flexcore
from flexcore.tiled_source import TiledSource

COARSE, FLEX, DENSE = "coarse only", "flex", "dense high resolution"
_AT_ONCE = 32  # regions that dense asks for at once, so that there's progress to show


@dataclass
class Answer:
    """One question, asked in three ways.

    Args:
        tokens: The answer's, prompt left out, of the one that looks closer.
        trace: What it looked at.
        stream: The medium.
        length: Tokens in the prompt's sequence.
        seconds: To the first token, by way.
    """

    tokens: torch.Tensor
    trace: flexcore.Trace
    stream: flexcore.FineStream
    length: int
    seconds: dict[str, float]


class Progress(BaseStreamer):
    """Moves a bar on by every token, and notes when the first one came."""

    def __init__(self, bar: tqdm):
        self.bar, self.started, self.first = bar, time.perf_counter(), 0.0

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:  # the prompt comes first, as a batch
            self.first = self.first or time.perf_counter() - self.started
            self.bar.update(len(value))

    def end(self) -> None:
        self.bar.close()


def ask(
    model: Any, inputs: Any, args: argparse.Namespace, fresh: Callable[[], flexcore.FineSource], unit: str
) -> Answer:
    """Ask with coarse tokens only, with a closer look, and with all fine tokens in the sequence.

    Args:
        model: A wrapped model.
        inputs: Of one sample with one medium.
        args: The options.
        fresh: Makes a source of which nothing has been encoded yet, for dense.
        unit: What is encoded at once: tile, window.
    """
    (stream,) = inputs["flex_streams"].samples[0]
    length, source = inputs["attention_mask"].shape[1], stream.source
    plain = without_fine(model, inputs)
    first_token(model, plain)  # the first call pays for set-up
    seconds = {COARSE: first_token(model, plain)}
    bar = tqdm(total=args.max_new_tokens, desc="answering", unit="token", leave=False, disable=None)
    if isinstance(source, TiledSource):
        show_encoding(source, bar, unit)
    settings = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "streamer": Progress(bar)}
    with flexcore.trace(model) as trace, bar:
        out = model.generate(**inputs, **settings)
    seconds[FLEX] = settings["streamer"].first
    if length + int(stream.region_valid.sum()) <= args.dense_limit:
        seconds[DENSE] = dense_first_token(model, inputs, fresh())
    return Answer(out[0, length:], trace, stream, length, seconds)


def show_encoding(source: TiledSource, bar: tqdm, unit: str) -> None:
    """Say on a bar what is being encoded: most of the wait for the first token."""
    encode = source.encoder.encode

    def counted(units: Any) -> torch.Tensor:
        out = encode(units)
        bar.set_postfix_str(f"{source.stats.units + len(units)} {unit}s encoded")
        return out

    source.encoder.encode = counted


@torch.no_grad()
def first_token(model: Any, inputs: Any) -> float:
    """Seconds to the first token of an answer."""
    started = time.perf_counter()
    model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def without_fine(model: Any, inputs: Any) -> dict[str, Any]:
    """The same inputs with their coarse tokens only."""
    (stream,) = inputs["flex_streams"].samples[0]
    plain = {name: value for name, value in inputs.items() if name != "flex_streams"}
    if stream.coarse_embeds is not None:  # they travel with the stream
        plain["inputs_embeds"] = embeddings(model, inputs)
        del plain["input_ids"]
    return plain


def dense_first_token(model: Any, inputs: Any, source: flexcore.FineSource) -> float:
    """Seconds to encode everything and read it in the sequence, right after the coarse tokens."""
    started, parts = time.perf_counter(), []
    (stream,) = inputs["flex_streams"].samples[0]
    regions = torch.arange(source.grid.n_regions).split(_AT_ONCE)
    for some in tqdm(regions, desc="dense, to compare", unit="part", leave=False, disable=None):
        parts.append(source.features(some)[stream.region_valid[some].to(source.device)])
    embeds, after = embeddings(model, inputs)[0], int(stream.coarse_positions.max()) + 1
    whole = torch.cat([embeds[:after], torch.cat(parts).to(embeds), embeds[after:]])[None]
    mask = torch.ones(whole.shape[:2], dtype=torch.long, device=whole.device)
    first_token(model, {"inputs_embeds": whole, "attention_mask": mask})
    return time.perf_counter() - started


class _Reached(Exception):
    """The decoder was called; nothing behind it matters."""


@torch.no_grad()
def embeddings(model: Any, inputs: Any) -> torch.Tensor:
    """`[1, T, C]` what the decoder is given: words, and the medium's coarse tokens among them."""
    found: list[torch.Tensor] = []

    def take(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs.get("inputs_embeds")
        found.append(module.get_input_embeddings()(kwargs["input_ids"]) if given is None else given)
        raise _Reached

    hook = model.get_decoder().register_forward_pre_hook(take, with_kwargs=True)
    try:
        model(**inputs)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]
