"""Evaluate everything that was trained, and write tables and plots of it.

    python -m benchmarks.magnifier.results    # needs what `benchmarks.magnifier.train` left in outputs/magnifier

Writes `benchmarks/results/magnifier.json`, plots beside it, and the section between the markers in
`benchmarks/RESULTS.md`. What was evaluated before isn't evaluated again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import __version__ as transformers_version

import flexcore

from ..sections import FOLDER, write_json, write_section
from . import train
from .arms import ARMS, EVERY, Arm
from .evaluate import ceiling, evaluate
from .image_task import IMAGE
from .media_results import measure_media, media_lines, spread
from .model import processor
from .pictures import GRID, cached
from .questions import KINDS
from .tasks import TASKS
from .weights import CEILINGS, arm_model, ceiling_model, shared

JSON = FOLDER / "magnifier.json"
README = Path(__file__).parents[2] / "README.md"
COMMAND = "python -m benchmarks.magnifier.results"
IMAGES, TEST_SEED = 700, 1000
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
_LABELS = {
    "coarse": "coarse only",
    "random": "Flex, random regions",
    "threshold": "Flex, the paper's threshold and training",
    "flex": "Flex, top 8 of 81",
    "oracle": "Flex, oracle regions",
    "all": "Flex, everything visible",
    "dense": "dense",
}


def measure(folder: Path) -> dict[str, Any]:
    """Evaluate every finished arm and ceiling that `magnifier.json` doesn't have yet."""
    kept = json.loads(JSON.read_text()) if JSON.exists() else {}
    found: dict[str, Any] = {"runs": {}, "fractions": {}, "ceilings": {}, **kept}
    llava = train.prepared_base()
    load = shared(llava)
    pictures = cached(folder / "pictures-test", llava, processor(), "test", IMAGES, TEST_SEED)
    for path in sorted((folder / "arms").glob("*/done")):
        run = path.parent.name
        name = run.rpartition("-")[0]
        if name not in EVERY or run in found["runs"]:
            continue
        weights = load_file(path.parent / "model.safetensors")
        model = arm_model(EVERY[name], load, weights)
        print(run, flush=True)
        found["runs"][run] = {
            kind: evaluate(run, model, EVERY[name], pictures, kind).summary() for kind in KINDS
        }
        history = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
        found["runs"][run]["validation"] = history
        if run == "flex-0":
            found["fractions"] = fractions(load, weights, pictures)
        write_json(JSON, found)
    for name, fine in CEILINGS.items():
        path = folder / f"ceiling-{'fine' if fine else 'coarse'}"
        if (path / "done").exists() and name not in found["ceilings"]:
            reader = ceiling_model(path / "model.safetensors")
            found["ceilings"][name] = ceiling(reader, fine, "test", IMAGES, TEST_SEED)
    for task in TASKS.values():
        if task is not IMAGE:
            measure_media(found, task, task.folder(folder), lambda: write_json(JSON, found))
    found["images"] = IMAGES
    found["training"] = {"steps": train.STEPS, "batch": train.BATCH, "learning_rate": train.LEARNING_RATE}
    found["versions"] = {
        "flexcore": flexcore.__version__,
        "torch": torch.__version__,
        "transformers": transformers_version,
        "python": platform.python_version(),
    }
    found["machine"] = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    write_json(JSON, found)
    return found


def fractions(load: Callable[[], Any], weights: dict[str, Any], pictures: Any) -> dict[str, Any]:
    """The Flex model with more or fewer regions than it was trained with."""
    out = {}
    for fraction in FRACTIONS:
        k = max(1, round(fraction * GRID.n_regions))
        flex = ARMS["flex"].flex
        assert flex is not None
        arm = Arm(flex.replace(top_k=k))
        out[str(fraction)] = evaluate(
            f"top {k}", arm_model(arm, load, weights), arm, pictures, "frame"
        ).summary()
    return out


# ---------------------------------------------------------------------- the table


def runs_of(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """An arm's runs, by seed."""
    return [r for run, r in sorted(found["runs"].items()) if run.rpartition("-")[0] == name]


def row(found: dict[str, Any], name: str, label: str) -> str:
    """One arm's row."""
    runs = runs_of(found, name)
    frame = [r["frame"] for r in runs]
    cells = [label, *(spread([r[kind]["accuracy"] for r in runs]) for kind in KINDS)]
    if frame[0]["hits"]:
        cells += [
            spread([f["hit_any"] for f in frame]),
            spread([min(f["hits"].values()) for f in frame]),
            spread([statistics.mean(f["regions"].values()) for f in frame]),
        ]
    else:
        cells += ["", "", ""]
    cells += [f"{statistics.mean(f['gflops'] for f in frame):.3f}", str(len(runs))]
    return "| " + " | ".join(cells) + " |"


def section(found: dict[str, Any]) -> str:
    """The section's text."""
    training = found["training"]
    questions = {k: next(iter(found["runs"].values()))[k]["questions"] for k in KINDS}
    lines = [
        "## Magnifier",
        "",
        f"Six digits of six pixels in coloured frames on a photograph of 192x192: 64 coarse tokens, 576 fine ones. "
        f"Digits and photographs of the {found['images']} test pictures are in no training picture. Accuracy in "
        f"percent over {questions['frame']:,} questions for the digit in a frame of a colour and "
        f"{questions['left']:,} for the digit in the frame left of it; mean over seeds, ± half the range. All arms "
        f"start from one base and were trained on the same {training['steps']} batches of {training['batch']} "
        f"pictures, eleven questions about each, at the same learning rate ({training['learning_rate']}).",
        "",
        f"`{COMMAND}` after `python -m benchmarks.magnifier.train all` and `... ablations`; {found['machine']}, "
        + ", ".join(f"{k} {v}" for k, v in found["versions"].items())
        + ". `python -m benchmarks.magnifier` measures the weights that ship.",
        "",
        "| | in the frame | left of it | chosen in any layer | in the worst layer | regions read | GFLOP | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, label in (
        ("ceiling", "small CNN, true crop of the canvas"),
        ("ceiling_coarse", "... of the coarse view"),
    ):
        if key in found["ceilings"]:
            lines.append(f"| {label} | {100 * found['ceilings'][key]:.1f} | | | | | | 1 |")
    lines += [row(found, name, label) for name, label in _LABELS.items() if runs_of(found, name)]
    lines += [
        "",
        "A region counts as chosen right if the digit's box touches it. GFLOP: the language model's prefill, causal "
        "attention halved, output head left out.",
        "",
        *by_layer(found),
        "",
        *bars(found),
    ]
    ablated = [name for name in EVERY if name not in ARMS and runs_of(found, name)]
    if ablated:
        lines += ["", "Ablations of Flex, one seed:", "", *lines_of_table(found, ["flex", *ablated])]
    if found["fractions"]:
        lines += [
            "",
            "The same Flex model (seed 0) with another number of regions than it was trained with:",
            "",
        ]
        lines += ["| regions read | in the frame | chosen in any layer |", "|---|---|---|"]
        for fraction, r in found["fractions"].items():
            lines.append(
                f"| {100 * float(fraction):.0f} % | {100 * r['accuracy']:.1f} | {100 * r['hit_any']:.1f} |"
            )
    lines += media_lines(found.get("media", {}), _LABELS)
    for plot, text in (
        ("accuracy_over_flops", "Accuracy over FLOPs"),
        ("accuracy_over_fraction", "Accuracy over the share of regions read"),
        ("hits_per_layer", "Share of questions whose target was chosen, by layer"),
    ):
        if (JSON.parent / f"magnifier_{plot}.png").exists():
            lines += ["", f"![{text}](results/magnifier_{plot}.png)"]
    return "\n".join(lines)


def by_layer(found: dict[str, Any]) -> list[str]:
    """Share of questions whose target was chosen, by layer that reads; means over seeds."""
    names = [name for name in _LABELS if runs_of(found, name) and runs_of(found, name)[0]["frame"]["hits"]]
    layers = sorted({layer for name in names for layer in runs_of(found, name)[0]["frame"]["hits"]}, key=int)
    lines = [
        f"| target chosen, % | {' | '.join(f'layer {layer}' for layer in layers)} |",
        "|---" * (len(layers) + 1) + "|",
    ]
    for name in names:
        hits = [r["frame"]["hits"] for r in runs_of(found, name)]
        cells = (f"{100 * statistics.mean(h[layer] for h in hits):.1f}" for layer in layers)
        lines.append(f"| {_LABELS[name]} | {' | '.join(cells)} |")
    return lines


def summary(found: dict[str, Any]) -> str:
    """What the README shows: the arms that say whether it works."""
    training, questions = found["training"], next(iter(found["runs"].values()))["frame"]["questions"]
    frames = {name: [r["frame"] for r in runs_of(found, name)] for name in _LABELS}
    cost = {name: statistics.mean(f["gflops"] for f in some) for name, some in frames.items() if some}
    shares = {name: spread([f["accuracy"] for f in some]) for name, some in frames.items() if some}
    counts = [len(frames[name]) for name in ("coarse", "random", "flex", "all", "dense") if frames[name]]
    least, most = min(counts), max(counts)
    of = f"mean of {most}" if least == most else f"mean of {least} to {most}"
    seeds = "one seed" if most == 1 else f"{of} seeds ± half the range"
    lines = [
        "| | right answers, % | language model's prefill, GFLOP |",
        "|---|---|---|",
        *(
            f"| {_LABELS[name]} | {shares[name]} | {cost[name]:.3f} |"
            for name in ("coarse", "random", "flex", "all", "dense")
            if name in cost
        ),
        "",
        f"{questions:,} questions about {found['images']} pictures whose digits and photographs no training has seen; "
        f"a decoder of 0.9 M weights, {training['steps']} steps on two CPU cores, {seeds}. Chance is 10 %.",
    ]
    return "\n".join(lines)


def lines_of_table(found: dict[str, Any], names: Sequence[str]) -> list[str]:
    """A table of some arms' first seeds."""
    first = {**found, "runs": {k: v for k, v in found["runs"].items() if k.endswith("-0")}}
    head = "| | in the frame | left of it | chosen in any layer | in the worst layer | regions read | GFLOP | seeds |"
    return [
        head,
        "|---|---|---|---|---|---|---|---|",
        *(row(first, n, n) for n in names if runs_of(first, n)),
    ]


def bars(found: dict[str, Any]) -> list[str]:
    """What was aimed at, and what was reached."""

    def mean(name: str, kind: str = "frame") -> float | None:
        runs = runs_of(found, name)
        return statistics.mean(r[kind]["accuracy"] for r in runs) if runs else None

    def flops(name: str) -> float | None:
        runs = runs_of(found, name)
        return statistics.mean(r["frame"]["gflops"] for r in runs) if runs else None

    def points(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else 100 * (a - b)

    flex = runs_of(found, "flex")
    some = [r["frame"] for r in flex]
    top, cost = found["ceilings"].get("ceiling"), {n: flops(n) for n in ("coarse", "flex", "dense")}
    hit = 100 * statistics.mean(f["hit_any"] for f in some) if some else None
    worst = 100 * statistics.mean(min(f["hits"].values()) for f in some) if some else None
    over = {
        pair: None if cost[pair[0]] is None or cost[pair[1]] is None else cost[pair[0]] / cost[pair[1]]
        for pair in (("dense", "flex"), ("flex", "coarse"))
    }
    wanted: list[tuple[str, float | None, str, float]] = [
        ("ceiling less dense, points", points(top, mean("dense")), "<=", 5),
        ("dense less Flex, points", points(mean("dense"), mean("flex")), "<=", 3),
        ("everything visible less Flex, points", points(mean("all"), mean("flex")), "<=", 3),
        ("Flex less coarse only, points", points(mean("flex"), mean("coarse")), ">=", 40),
        ("Flex less random, points", points(mean("flex"), mean("random")), ">=", 30),
        ("target chosen in any layer, %", hit, ">=", 97),
        ("target chosen in the worst layer, %", worst, ">=", 90),
        ("FLOPs, dense over Flex", over["dense", "flex"], ">=", 10),
        ("FLOPs, Flex over coarse only", over["flex", "coarse"], "<=", 1.2),
        ("left of it: dense less Flex, points", points(mean("dense", "left"), mean("flex", "left")), "<=", 4),
    ]
    lines = ["| aim | measured | reached |", "|---|---|---|"]
    for text, value, sign, bar in wanted:
        if value is None:
            continue
        reached = value <= bar if sign == "<=" else value >= bar
        lines.append(f"| {text} {sign} {bar:g} | {value:.2f} | {'yes' if reached else 'no'} |")
    return lines


# ---------------------------------------------------------------------- the plots


def plot(found: dict[str, Any]) -> None:
    """Accuracy over FLOPs, accuracy over share read, hit rate by layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(JSON.parent / f"magnifier_{name}.png", dpi=130)
        plt.close(figure)

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, label in _LABELS.items():
        runs = [r["frame"] for r in runs_of(found, name)]
        if runs:
            axes.scatter([r["gflops"] for r in runs], [100 * r["accuracy"] for r in runs], label=label, s=24)
    for key, style in (("ceiling", "--"), ("ceiling_coarse", ":")):
        if key in found["ceilings"]:
            axes.axhline(100 * found["ceilings"][key], color="grey", linestyle=style, linewidth=1)
    axes.set(
        xscale="log", xlabel="GFLOP of the language model's prefill", ylabel="accuracy, %", ylim=(0, 100)
    )
    axes.legend(fontsize=7)
    save(figure, "accuracy_over_flops")

    if found["fractions"]:
        figure, axes = plt.subplots(figsize=(6, 4))
        shares = [100 * float(f) for f in found["fractions"]]
        axes.plot(
            shares, [100 * r["accuracy"] for r in found["fractions"].values()], marker="o", label="accuracy"
        )
        axes.plot(
            shares,
            [100 * r["hit_any"] for r in found["fractions"].values()],
            marker=".",
            label="target chosen",
        )
        axes.set(xscale="log", xlabel="regions read, % (trained with 10)", ylabel="%", ylim=(0, 100))
        axes.legend()
        save(figure, "accuracy_over_fraction")

    figure, axes = plt.subplots(figsize=(6, 4))
    for name in ("flex", "threshold", "random"):
        for i, run in enumerate(runs_of(found, name)):
            hits = run["frame"]["hits"]
            colour = {"flex": "C0", "threshold": "C1", "random": "C2"}[name]
            label = _LABELS[name] if i == 0 else None
            axes.plot(
                [int(k) for k in hits],
                [100 * v for v in hits.values()],
                marker="o",
                color=colour,
                label=label,
            )
    axes.set(xlabel="layer that reads", ylabel="target chosen, %", ylim=(0, 100))
    axes.legend()
    save(figure, "hits_per_layer")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=train.FOLDER)
    args = parser.parse_args(argv)
    found = measure(args.folder)
    if not found["runs"]:
        print("no finished arm in the outputs; run benchmarks.magnifier.train first", file=sys.stderr)
        return 1
    plot(found)
    text = section(found)
    write_section("magnifier", text)
    write_section("magnifier", summary(found), README)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
