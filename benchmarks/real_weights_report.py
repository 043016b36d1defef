"""What `benchmarks.real_weights` says: the cost model's estimates, and the section of the results."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from flexcore.hf.cost import load_config, measure
from flexcore.hf.cost_report import Setting, quantity
from flexcore.hf.training_cost import (
    Parameters,
    TrainingCost,
    TrainingSetting,
    arguments,
    asked,
    training_cost,
)
from flexcore.roofline import MACHINES

from .real_weights_data import HELD
from .vqa.arms import ARMS
from .vqa.table import table

PAPER = Path(__file__).parents[1] / "examples" / "reproduce_paper.md"
GPUS = ("a100", "h100")
TRAINS = "fine-and-projector"  # the projector is random
_COMMAND = "python -m flexcore.hf.training_cost "


def costs(model: Path, training: dict[str, Any], side: int, zoom: int, batch: int) -> dict[str, Any]:
    """Steps of this training and of the paper's, on GPUs and at their rooflines.

    Args:
        model: The folder of what was trained.
        training: What `benchmarks.real_weights.train` found.
        side: Of the coarse view in pixels.
        zoom: Fine tokens per coarse token and axis.
        batch: Samples in a step.
    """
    config, sample = load_config(str(model)), training["sample"]
    measured = measure(config, side=side)
    seen = Setting(sample["text"], zoom, training["selected"], batch, coarse=sample["coarse"])
    setting = TrainingSetting(seen, answer=sample["answer"], trains=TRAINS)
    here = training_cost(measured, Parameters.of(config, measured, side), setting)
    return {"here": _on_gpus(here, training["steps"]), "paper": _on_gpus(*_paper())}


@cache
def _paper() -> tuple[TrainingCost, int]:
    args = arguments(paper_options())
    return asked(args), args.steps


def paper_options() -> list[str]:
    """What `examples/reproduce_paper.md` asks the cost model about the paper's recipe."""
    text = PAPER.read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(re.escape(_COMMAND) + "(.*)", text)
    return shlex.split(line)


def _on_gpus(cost: TrainingCost, steps: int) -> dict[str, dict[str, Any]]:
    found = {}
    for name in GPUS:
        # the work is the same on all of them
        seen = replace(cost.setting.seen, machine=MACHINES[name])
        one = replace(cost, setting=replace(cost.setting, seen=seen))
        found[name] = {
            "GPU": seen.machine.name,
            "devices": one.setting.devices,
            "dtype": seen.dtype,
            "trained": one.trained,
            "FLOPs of a step": one.flops,
            "seconds of a step": one.seconds,
            "bytes on a device": one.bytes,
            "steps": steps,
            "seconds of all steps": steps * one.seconds,
        }
    return found


def section(found: dict[str, Any]) -> str:
    """The section's text."""
    settings = found["settings"]
    what = settings["model"] or "DINOv2-small and SmolLM2-135M as a LLaVA, its projector untrained"
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items() if name != "cpu")
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    stopped, resumed = found["asked"]["runs"]
    asking = ", ".join(f"{arm} {value:,.1f}" for arm, value in found["asked"]["seconds"].items())
    return "\n".join(
        [
            "## Real weights",
            "",
            f"{what}: a coarse view of {settings['side']} pixels, zoom {settings['zoom']}, through "
            "`examples/train.py` and one benchmark, on fabricated photographs with a small word in each. That the "
            "path holds is what is shown: the accuracy of so short a training means nothing.",
            "",
            f"`{found['command']}`; {found['machine']['cpu']}; {machine}; {versions}. Whatever else the machine has "
            "to do makes seconds by the clock longer, those of CPU time hardly.",
            "",
            *_training(found),
            "",
            table("TextVQA's layout", found["asked"], ARMS),
            "",
            f"{_killed(stopped, 'answer')}; {resumed['to']} answers in all. Seconds spent asking: {asking}.",
            "",
            *_costs(found["cost"]),
        ]
    )


def _killed(run: dict[str, Any], unit: str) -> str:
    return (
        f"Killed (SIGKILL) after {unit} {run['to']:,}" if run["killed"] else "Over before it could be killed"
    )


def _training(found: dict[str, Any]) -> list[str]:
    training, settings = found["training"], found["settings"]
    first, second = training["runs"]
    flops = found["cost"]["here"][GPUS[0]]["FLOPs of a step"]
    some, again = training["steps averaged"], training["done twice"]
    rows = {
        "steps reached": f"{training['steps']:,}, in {(first['spent'] + second['spent']) / 60:.1f} minutes",
        "kill": f"{_killed(first, 'step')}, went on from step {second['resumed at']:,}",
        "steps done twice so, with the same loss": f"{again['steps']}, {again['same loss']}",
    }
    for name, unit in (("seconds", "seconds by the clock"), ("CPU seconds", "seconds of CPU time")):
        cells = [f"{run[name]:,.2f}" for run in (first, second) if run[name] is not None]
        rows[f"a step, {unit}: median before the kill, after it"] = ", ".join(cells)
    if spent := second["CPU seconds"] or first["CPU seconds"]:
        rate = quantity(flops / spent, "FLOP")
        rows["a step by the cost model, and that much per second of CPU time"] = (
            f"{quantity(flops, 'FLOP')}, {rate}"
        )
    losses = [training[name] for name in ("loss, first steps", "loss, last steps")]
    rows[f"loss, mean of the first {some} steps, of the last {some}"] = ", ".join(f"{v:.2f}" for v in losses)
    rows["regions selected, mean over steps"] = f"{training['selected']:.1%}"
    for entry in dict.fromkeys((0, len(training["evaluations"]) - 1)):
        one = training["evaluations"][entry]
        rows[f"{HELD} held-out questions after step {one['step']}: loss, tokens right, answers right"] = (
            f"{one['eval_loss']:.2f}, {one['eval_tokens']:.1%}, {one['eval_answers']:.1%}"
        )
    title = f"`examples/train.py --trains {TRAINS}`, batch {settings['batch']}"
    return [f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _costs(cost: dict[str, Any]) -> list[str]:
    lines = [
        "What GPUs would take by the cost model, in bfloat16 here and as the recipe says there. It is a lower bound, "
        "at the roofline, to which so small a batch of so small a model doesn't come near:",
        "",
        "| | GPUs | trained | a step | takes | memory on each | steps | take | device hours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, title in (("here", "this training"), ("paper", "LLaVA-1.5-7B, the paper's recipe")):
        for one in cost[name].values():
            whole = one["seconds of all steps"]
            cells = [
                *(title, f"{one['devices']} x {one['GPU']}", quantity(one["trained"], "")),
                *(quantity(one["FLOPs of a step"], "FLOP"), quantity(one["seconds of a step"], "s")),
                *(quantity(one["bytes on a device"], "B"), f"{one['steps']:,}"),
                f"{whole / 3600:.2f} h" if whole > 360 else quantity(whole, "s"),
                f"{whole * one['devices'] / 3600:.2g}"
                if whole <= 360
                else f"{whole * one['devices'] / 3600:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines
