"""Evaluate clips and recordings as the pictures are evaluated, and write their table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from . import train
from .arms import ARMS, fitted
from .evaluate import evaluate
from .task import Task
from .tasks import TASKS
from .weights import arm_model, shared


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`mean ± half range` in percent."""
    mean, half = 100 * statistics.mean(values), 50 * (max(values) - min(values))
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def measure_media(found: dict[str, Any], task: Task, folder: Path, save: Callable[[], None]) -> None:
    """Evaluate every finished arm of another medium that isn't in `found` yet.

    Args:
        found: What was found so far; the arm's numbers are added under `media`.
        task: The medium.
        folder: Where its training wrote.
        save: Called after each arm.
    """
    mine = found.get("media", {}).get(task.name, {})
    new = [path.parent for path in sorted(folder.glob("arms/*/done")) if path.parent.name not in mine]
    new = [run for run in new if run.name.rpartition("-")[0] in ARMS]
    if not new:
        return
    llava = train.prepared_base(task=task)
    load = shared(llava, task)
    held = train.media(llava, "test", task)
    for run in new:
        arm = fitted(ARMS[run.name.rpartition("-")[0]], task)
        model = arm_model(arm, load, load_file(run / "model.safetensors"))
        print(f"{task.name}, {run.name}", flush=True)
        one = {kind: evaluate(run.name, model, arm, held, kind, task=task).summary() for kind in task.kinds}
        log = (run / "log.jsonl").read_text().splitlines()
        one["validation"] = [json.loads(line) for line in log]
        one["steps"] = one["validation"][-1]["step"]
        found.setdefault("media", {}).setdefault(task.name, {})[run.name] = one
        save()


def media_lines(media: dict[str, Any], labels: Mapping[str, str]) -> list[str]:
    """The table of clips and recordings.

    Args:
        media: What was found, by medium and run.
        labels: What to call the arms, in their order.
    """
    if not media:
        return []
    lines = [
        "",
        "Other media: the same decoder, stages, learning rate and settings of Flex, on clips and on recordings; one "
        "seed.",
        "",
    ]
    lines += [f"- {name}: {TASKS[name].about}" for name in media]
    lines += [
        "",
        "| | accuracy | chosen in any layer | in the worst layer | regions read | GFLOP | questions | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in media.items():
        task = TASKS[name]
        for key, label in {**labels, "flex": f"Flex, top {task.top_k} of {task.grid.n_regions}"}.items():
            for run in (r for of, r in sorted(runs.items()) if of.rpartition("-")[0] == key):
                one = run[task.kinds[0]]
                looks = ["", "", ""]
                if one["hits"]:
                    found = (
                        one["hit_any"],
                        min(one["hits"].values()),
                        statistics.mean(one["regions"].values()),
                    )
                    looks = [spread([share]) for share in found]
                cells = [f"{name}, {label}", spread([one["accuracy"]]), *looks]
                cells += [f"{one['gflops']:.3f}", f"{one['questions']:,}", str(run["steps"])]
                lines.append("| " + " | ".join(cells) + " |")
    return lines
