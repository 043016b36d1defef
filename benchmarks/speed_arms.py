"""The arms of `benchmarks.speed`: one model and one input, run coarse-only, with Flex, officially and dense."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import flexcore
from flexcore.hf.kv_cache import cache_argument, cache_of
from flexcore.plugins import register_selector
from flexcore.selection import TopKSelector
from flexcore.sources import FineSource, OnDemandSource, TensorSource

from .official_scheme import OfficialScheme

COARSE, TEXT, BEFORE, ANSWER = 24, 60, 20, 32
REGION = 8  # fine tokens per axis, as in the official code
ARMS = ("coarse", "flex", "official", "dense")


@dataclass(frozen=True)
class HeldSelector(TopKSelector):
    """Top-k that keeps its choice once a layer has made `after` of them: the steady state of a long answer."""

    after: int = 4
    seen: dict[int, list[Any]] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: flexcore.FlexConfig) -> HeldSelector:
        return cls(**config.selector_options)

    def choose(self, scores: Tensor, grid: flexcore.Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        chosen = super().choose(scores, grid, selectable, keys)  # the work of choosing is always done
        # read without a tensor operation, which would count as Flex's
        past = self.seen.setdefault(keys.tolist()[0][0], [0, None])
        past[0] += 1
        if past[0] <= self.after or past[1] is None or past[1].shape != chosen.shape:
            past[1] = chosen
        return past[1]


register_selector("benchmark_held", HeldSelector)


class Bench:
    """The model, its inputs, and timed runs of every arm.

    Args:
        args: The command line of `benchmarks.speed`.
        static: Wrap in static mode.
    """

    def __init__(self, args: argparse.Namespace, static: bool = False):
        torch.manual_seed(args.seed)
        self.args, self.device = args, torch.device(args.device)
        shape = LlamaConfig(
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 11 // 4,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads or args.hidden // 64,
            num_key_value_heads=args.kv_heads or args.heads or args.hidden // 64,
            vocab_size=32000,
            max_position_embeddings=8192,
        )
        self.model = LlamaForCausalLM(shape).eval().to(self.device, getattr(torch, args.dtype))
        side = COARSE * args.zoom
        self.grid = flexcore.Grid.blocks((COARSE,) * 2, (side, side), region=REGION, tile=COARSE)
        self.k = args.regions or max(1, round(args.fraction * self.grid.n_regions))
        if (
            static
        ):  # what it does doesn't depend on whether the choice changes, and holding one can't be compiled
            config = flexcore.FlexConfig(
                first_layer=args.first_layer, selector="top_k", top_k=self.k, static=True
            )
        else:
            options = {"k": self.k, "after": 1 << 60 if args.drift else 4}
            config = flexcore.FlexConfig(
                first_layer=args.first_layer, selector="benchmark_held", selector_options=options
            )
        flexcore.wrap(self.model, config)
        self.ids = torch.randint(0, 32000, (args.batch, COARSE**2 + TEXT), device=self.device)
        self.features: Tensor | None = None
        self.streams = self.media()

    def media(self) -> flexcore.StreamBatch:
        """One picture per sample; its features lie in a tensor, or are made when a region is first asked for."""
        args, at, sources = self.args, torch.arange(BEFORE, BEFORE + COARSE**2), []
        dtype, pages = self.model.dtype, self.grid.region_tokens
        if args.on_demand:
            # one page for all: what is timed is how pages are asked for and kept, not how they are made
            page = torch.randn(pages, args.hidden, dtype=dtype, device=self.device)

            def encode(regions: Tensor) -> Tensor:
                return page * (1 + regions.to(page.device, dtype)[:, None, None] / self.grid.n_regions)

            for _ in range(args.batch):
                source: FineSource = OnDemandSource(encode, self.grid, args.hidden, dtype, self.device)
                sources.append(source)
        else:
            if self.features is None:
                shape = (args.batch, self.grid.n_fine, args.hidden)
                self.features = torch.randn(shape, dtype=dtype).to(self.device)
            sources = [TensorSource(features, self.grid) for features in self.features]
        return flexcore.StreamBatch(
            tuple((flexcore.FineStream(self.grid, at, None, source),) for source in sources)
        )

    def timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds and what came out: by the clock on a CPU, by events on a GPU."""
        if self.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            out = run()
            stop.record()
            torch.cuda.synchronize()
            return start.elapsed_time(stop) / 1e3, out
        started = time.perf_counter()
        out = run()
        return time.perf_counter() - started, out

    # ------------------------------------------------------------------ prefill

    @torch.no_grad()
    def prefill(self, arm: str) -> tuple[float, Any]:
        """Seconds of one arm's prefill, and what its decoding goes on from."""
        if arm == "official":
            scheme = OfficialScheme(self.model, self.streams.samples[0][0], self.forced())
            embeds = self.model.get_input_embeddings()(self.ids[:1])
            seconds, _ = self.timed(lambda: scheme.step(embeds))
            return seconds, scheme
        inputs: dict[str, Any] = {"input_ids": self.ids}
        if arm == "flex":
            self.forget()
            # an on-demand source keeps what it made, so every run gets a new one
            inputs["flex_streams"] = self.media() if self.args.on_demand else self.streams
        elif arm == "dense":
            assert self.features is not None
            text = self.model.get_input_embeddings()(self.ids[:, :TEXT])
            inputs = {"inputs_embeds": torch.cat([text[:, :BEFORE], self.features, text[:, BEFORE:]], dim=1)}
        seconds, out = self.timed(lambda: self.model(**inputs, use_cache=True, logits_to_keep=1))
        return seconds, cache_of(out)

    def forced(self) -> Tensor:
        """`[n_regions]` bool, as many regions as Flex chooses, at random."""
        chosen = torch.zeros(self.grid.n_regions, dtype=torch.bool)
        generator = torch.Generator().manual_seed(0)
        chosen[torch.randperm(self.grid.n_regions, generator=generator)[: self.k]] = True
        return chosen

    def forget(self) -> None:
        """Choose anew: nothing that was held is held any longer."""
        getattr(self.model._flex_binding.selector, "seen", {}).clear()

    # ------------------------------------------------------------------ decoding and training

    @torch.no_grad()
    def step(self, arm: str, state: Any) -> float:
        """Seconds of one decoded token, after a prefill."""
        if arm == "official":
            embeds = self.model.get_input_embeddings()(self.ids[:1, :1])
            return self.timed(lambda: state.step(embeds))[0]
        cache = cache_argument(self.model, state)
        return self.timed(lambda: self.model(self.ids[:, :1], **cache, use_cache=True))[0]

    def training(self, arm: str) -> float:
        """Seconds of forward and backward, with the loss on the answer's rows; fine features are detached."""
        labels = torch.full_like(self.ids, -100)
        labels[:, -ANSWER:] = self.ids[:, -ANSWER:]
        self.model.zero_grad(set_to_none=True)
        media = {"flex_streams": self.streams} if arm == "flex" else {}
        self.forget()

        def run() -> None:
            self.model(self.ids, labels=labels, use_cache=False, **media).loss.backward()

        return self.timed(run)[0]

    @torch.no_grad()
    def union(self) -> dict[int, float]:
        """By reading layer: the share of the regions that the answer's rows read between them in training."""
        labels = torch.full_like(self.ids, -100)
        labels[:, -ANSWER:] = self.ids[:, -ANSWER:]
        self.forget()
        with flexcore.trace(self.model) as trace:
            self.model(self.ids, labels=labels, use_cache=False, flex_streams=self.streams)
        out = {}
        for layer in sorted({r.read_in for r in trace if r.read_in is not None}):
            records = [r for r in trace if r.read_in == layer and r.sample == 0]
            out[layer] = float(torch.stack([r.regions for r in records]).any(0).float().mean())
        return out
