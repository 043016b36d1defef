"""What looking closer costs: prefill, decode and training step of coarse-only, Flex, the official scheme and dense.

    python -m benchmarks.speed                      # the default sizes, medians of interleaved runs
    python -m benchmarks.speed --quick --json       # under a minute; the last line is JSON
    python -m benchmarks.speed --fraction 0.1 --batch 4 --drift

All arms share one random Llama-shaped decoder with LLaVA's geometry (24x24 coarse tokens, 72x72 fine, 60 text)
and the same inputs. The floor is the coarse-only model; the selected share of regions is forced, and held after the
first steps unless `--drift` is given. Timings on a shared machine are noisy, so arms are interleaved and ratios are
taken pair by pair within a round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import __version__ as transformers_version

import flexcore
from flexcore.hf.kv_cache import cache_argument
from flexcore.plugins import register_selector
from flexcore.selection import TopKSelector

from .official_scheme import OfficialScheme

COARSE, TEXT, BEFORE, ANSWER = 24, 60, 20, 32


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
        past = self.seen.setdefault(int(keys[0, 0]), [0, None])
        past[0] += 1
        if past[0] <= self.after or past[1] is None or past[1].shape != chosen.shape:
            past[1] = chosen
        return past[1]


class Bench:
    """The model, its inputs, and one timed run of every arm."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        self.args, self.device = args, torch.device(args.device)
        config = LlamaConfig(
            hidden_size=args.hidden,
            intermediate_size=args.hidden * 11 // 4,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads or args.hidden // 64,
            num_key_value_heads=args.kv_heads or args.heads or args.hidden // 64,
            vocab_size=32000,
            max_position_embeddings=8192,
        )
        self.model = LlamaForCausalLM(config).eval().to(self.device, getattr(torch, args.dtype))
        register_selector("benchmark_held", HeldSelector)
        options = {"fraction": args.fraction, "after": 1 << 60 if args.drift else 4}
        self.config = flexcore.FlexConfig(
            first_layer=args.first_layer, selector="benchmark_held", selector_options=options
        )
        fine = COARSE * args.zoom
        self.grid = flexcore.Grid.blocks((COARSE,) * 2, (fine, fine), region=8, tile=COARSE)
        self.ids = torch.randint(
            0, 32000, (args.batch, BEFORE + COARSE**2 + TEXT - BEFORE), device=self.device
        )
        features = torch.randn(args.batch, self.grid.n_fine, args.hidden, dtype=self.model.dtype)
        features = features.to(self.device)
        at = torch.arange(BEFORE, BEFORE + COARSE**2)
        self.streams = flexcore.StreamBatch.from_features(list(features), self.grid, [at] * args.batch)
        self.features = features
        flexcore.wrap(self.model, self.config)

    def timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        if self.device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = run()
            stop.record()
            torch.cuda.synchronize()
            return start.elapsed_time(stop) / 1e3, out
        started = time.perf_counter()
        out = run()
        return time.perf_counter() - started, out

    @torch.no_grad()
    def coarse_prefill(self) -> tuple[float, Any]:
        return self.timed(lambda: self.model(self.ids, use_cache=True, logits_to_keep=1))

    @torch.no_grad()
    def flex_prefill(self) -> tuple[float, Any]:
        self.forget()
        return self.timed(
            lambda: self.model(self.ids, flex_streams=self.streams, use_cache=True, logits_to_keep=1)
        )

    @torch.no_grad()
    def dense_prefill(self) -> tuple[float, Any]:
        text = self.model.get_input_embeddings()(self.ids[:, :TEXT])
        embeds = torch.cat([text[:, :BEFORE], self.features, text[:, BEFORE:]], dim=1)
        return self.timed(lambda: self.model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1))

    @torch.no_grad()
    def official_prefill(self) -> tuple[float, Any]:
        scheme = OfficialScheme(self.model, self.streams.samples[0][0], self.forced())
        embeds = self.model.get_input_embeddings()(self.ids[:1])
        seconds, _ = self.timed(lambda: scheme.step(embeds))
        return seconds, scheme

    def forced(self) -> Tensor:
        count = round(self.args.fraction * self.grid.n_regions)
        generator = torch.Generator().manual_seed(0)
        chosen = torch.zeros(self.grid.n_regions, dtype=torch.bool)
        chosen[torch.randperm(self.grid.n_regions, generator=generator)[:count]] = True
        return chosen

    def forget(self) -> None:
        self.model._flex_binding.selector.seen.clear()

    @torch.no_grad()
    def step(self, cache: Any) -> float:
        return self.timed(
            lambda: self.model(self.ids[:, :1], **cache_argument(self.model, cache), use_cache=True)
        )[0]

    @torch.no_grad()
    def official_step(self, scheme: OfficialScheme) -> float:
        embeds = self.model.get_input_embeddings()(self.ids[:1, :1])
        return self.timed(lambda: scheme.step(embeds))[0]

    def training(self, flex: bool) -> float:
        labels = torch.full_like(self.ids, -100)
        labels[:, -ANSWER:] = self.ids[:, -ANSWER:]
        self.model.zero_grad(set_to_none=True)
        media = {"flex_streams": self.streams} if flex else {}

        def run() -> None:
            self.model(self.ids, labels=labels, use_cache=False, **media).loss.backward()

        return self.timed(run)[0]


def measure(bench: Bench) -> dict[str, Any]:
    """Seconds of every arm in interleaved rounds."""
    args = bench.args
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    official = args.batch == 1  # the official code can't do more
    for _ in range(2):
        bench.coarse_prefill(), bench.flex_prefill()
    for _ in tqdm(range(args.repeats), desc="prefill", disable=None):
        note("prefill coarse", bench.coarse_prefill()[0])
        note("prefill flex", bench.flex_prefill()[0])
    for _ in tqdm(range(args.slow_repeats), desc="prefill, dense and official scheme", disable=None):
        note("prefill flex beside dense", bench.flex_prefill()[0])
        note("prefill dense", bench.dense_prefill()[0])
        if official:
            note("prefill official", bench.official_prefill()[0])
    coarse = bench.coarse_prefill()[1].past_key_values
    flex = bench.flex_prefill()[1].past_key_values
    scheme = bench.official_prefill()[1] if official else None
    dense = bench.dense_prefill()[1].past_key_values
    for i in tqdm(range(8 + args.repeats), desc="decode", disable=None):
        times = {"coarse": bench.step(coarse), "flex": bench.step(flex)}
        if scheme is not None:
            times["official"] = bench.official_step(scheme)
        if i < 8 + args.slow_repeats:
            times["dense"] = bench.step(dense)
        for name, value in times.items() if i >= 8 else ():  # after 8 tokens
            note(f"decode {name}", value)
    if not args.quick:
        for i in tqdm(range(1 + args.slow_repeats), desc="training step", disable=None):
            bench.forget()
            pair = bench.training(False), bench.training(True)
            for name, value in zip(("coarse", "flex"), pair, strict=True) if i else ():
                note(f"training {name}", value)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median of paired ratios with its quartiles."""
    pairs = sorted(a / b for a, b in zip(above, below, strict=True))
    low, high = pairs[len(pairs) // 4], pairs[-1 - len(pairs) // 4]
    return {"median": statistics.median(pairs), "low": low, "high": high}


def report(args: argparse.Namespace, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Ratios, medians and what they were measured on."""
    wanted = {
        "prefill_flex_over_coarse": ("prefill flex", "prefill coarse"),
        "decode_flex_over_coarse": ("decode flex", "decode coarse"),
        "decode_official_over_flex": ("decode official", "decode flex"),
        "decode_official_over_coarse": ("decode official", "decode coarse"),
        "prefill_dense_over_flex": ("prefill dense", "prefill flex beside dense"),
        "prefill_official_over_flex": ("prefill official", "prefill flex beside dense"),
        "training_flex_over_coarse": ("training flex", "training coarse"),
    }
    spread = {
        n: ratio(seconds[a], seconds[b]) for n, (a, b) in wanted.items() if a in seconds and b in seconds
    }
    return {
        "ratios": {n: r["median"] for n, r in spread.items()},
        "quartiles": {n: [r["low"], r["high"]] for n, r in spread.items()},
        "milliseconds": {n: 1e3 * statistics.median(s) for n, s in seconds.items()},
        "settings": {k: v for k, v in vars(args).items() if k != "json"},
        "versions": {
            "flexcore": flexcore.__version__,
            "torch": torch.__version__,
            "transformers": transformers_version,
            "python": platform.python_version(),
        },
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "command": " ".join(["python -m benchmarks.speed", *sys.argv[1:]]),
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=12)
    add("--first-layer", type=int, default=8)
    add("--heads", type=int, help="default: one per 64 of the width")
    add("--kv-heads", type=int)
    add("--fraction", type=float, default=0.2, help="share of the regions that each layer reads")
    add("--zoom", type=int, default=3, help="fine tokens per coarse token and axis")
    add("--batch", type=int, default=1)
    add("--drift", action="store_true", help="let the selection change at every step")
    add("--repeats", type=int, help="rounds; default 31, or 11 with --quick")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--seed", type=int, default=0)
    add("--quick", action="store_true")
    add("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (11 if args.quick else 31)
    args.slow_repeats = min(args.repeats, 1 if args.quick else 7)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    result = report(args, measure(Bench(args)))
    print(f"\n{result['command']}\n{result['versions']} {result['machine']}\n")
    for name, value in result["milliseconds"].items():
        print(f"{name:<28}{value:>12.2f} ms")
    print()
    for name, value in result["ratios"].items():
        low, high = result["quartiles"][name]
        print(f"{name:<28}{value:>12.3f} x   quartiles {low:.3f} to {high:.3f}")
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
