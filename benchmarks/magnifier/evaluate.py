"""What every arm answers, where it looked and what that cost, on the same questions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import flexcore
from flexcore.cost import Cost, DecoderShape, coarse_prefill, dense_prefill, flex_prefill

from .arms import Arm, Inputs
from .ceiling import CropReader, crops
from .image_task import IMAGE
from .loop import generator
from .questions import IMAGE_AT, KINDS
from .scenes import canvas
from .task import Media, Task
from .train import picture_batch

BATCH = 20


@dataclass
class Result:
    """One arm on one kind of question.

    Args:
        right: `[q]` bool, picture by picture and question by question, so that arms can be paired.
        hits: By reading layer: share of questions for which a region that the digit's box touches was chosen.
        whole: The same, if all of those regions were.
        hit_any: Share for which one was chosen in at least one layer.
        regions: By reading layer: mean share of the regions that was chosen.
        flops: Of the language model's prefill, causal attention halved, output head left out.
    """

    right: np.ndarray
    hits: dict[int, float] = field(default_factory=dict)
    whole: dict[int, float] = field(default_factory=dict)
    hit_any: float | None = None
    regions: dict[int, float] = field(default_factory=dict)
    flops: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.mean())

    def summary(self) -> dict[str, Any]:
        """Plain JSON types, without the single answers."""
        return {
            "accuracy": self.accuracy,
            "questions": len(self.right),
            "hit_any": self.hit_any,
            "hits": {str(k): v for k, v in self.hits.items()},
            "whole": {str(k): v for k, v in self.whole.items()},
            "regions": {str(k): v for k, v in self.regions.items()},
            "gflops": self.flops / 1e9,
        }


@torch.no_grad()
def evaluate(
    name: str, model: Any, arm: Arm, pictures: Media, kind: str, progress: bool = True, task: Task = IMAGE
) -> Result:
    """Ask a model all questions of a kind.

    Args:
        name: For the progress bar.
        model: The arm's model, in eval mode.
        arm: The arm.
        pictures: The pictures, or what else the task is about.
        kind: Of question.
        progress: Show a bar, where there is a terminal.
        task: The medium.
    """
    inputs = Inputs(arm, (kind,), task)
    rows = inputs.questions.rows(inputs.before)
    right: list[Tensor] = []
    looks = Looks(rows, task)
    starts = range(0, len(pictures), BATCH)
    for start in tqdm(starts, desc=f"{name}, {kind}", leave=False, disable=None if progress else True):
        batch = picture_batch(pictures, np.arange(start, min(start + BATCH, len(pictures))))
        made = inputs(model, **batch)
        wanted = made.pop("labels")[:, rows + 1]
        if arm.flex is None:
            logits = model(**made, use_cache=False).logits
        else:
            made.setdefault("readout_mask", rows_only(rows, made["inputs_embeds"]))
            with flexcore.trace(model) as trace:
                logits = model(**made, use_cache=False).logits
            colours = inputs.questions.colours(batch["digits"])
            looks.add(trace, task.touched(inputs.questions.of(batch["boxes"], colours)))
        right.append(logits[:, rows].argmax(-1) == wanted)
    result = Result(torch.cat(right).flatten().numpy())
    shape = DecoderShape.from_config(model.config, reading=model.flex_config.layers if arm.flex else ())
    # what one question alone costs
    text = IMAGE_AT + inputs.questions.tokens[kind].shape[1]
    if arm.flex is not None:
        looks.finish(result, shape, text)
    else:
        cost = coarse_prefill(shape, text, task.coarse)
        if arm.dense:
            cost = dense_prefill(shape, text, task.coarse, task.fine)
        result.flops = without_head(cost)
    return result


def rows_only(rows: Tensor, embeds: Tensor) -> Tensor:
    """`[B, L]` bool: the rows that answer."""
    mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    mask[:, rows] = True
    return mask


class Looks:
    """Where the answering rows of many questions looked, and how much the rows of a question read.

    Args:
        rows: `[Q]` sequence indices of the answering rows.
        task: The medium.
    """

    def __init__(self, rows: Tensor, task: Task = IMAGE) -> None:
        self.task = task
        self.answering = {int(row): q for q, row in enumerate(rows)}
        self.chosen: dict[int, list[Tensor]] = {}
        self.targets: list[Tensor] = []
        self.rows: set[int] = set()
        self.read: dict[int, list[Tensor]] = {}
        self.projected: dict[int, list[Tensor]] = {}

    def add(self, trace: flexcore.Trace, targets: Tensor) -> None:
        """Take in one batch's trace, and the regions `[B, Q, n_regions]` that the answers touch."""
        tokens, regions_in_all = self.task.grid.region_lengths.float(), self.task.grid.n_regions
        pictures, n = targets.shape[:2]
        self.targets.append(targets.flatten(0, 1))
        ends = torch.tensor(sorted(self.answering))
        for layer in sorted({r.read_in for r in trace if r.read_in is not None}):
            records = trace.where(read_in=layer)
            regions = torch.stack([r.regions for r in records])
            # a row belongs to the question that is answered at or after it
            question = torch.searchsorted(ends, torch.tensor([r.position for r in records]))
            owner = torch.tensor([r.sample for r in records]) * n + question
            answers = torch.tensor([r.position in self.answering for r in records])
            chosen = torch.zeros(pictures * n, regions_in_all, dtype=torch.bool)
            chosen[owner[answers]] = regions[answers]
            self.chosen.setdefault(layer, []).append(chosen)
            counts = torch.zeros(pictures * n, regions_in_all).index_add_(0, owner, regions.float())
            self.read.setdefault(layer, []).append(counts @ tokens)
            self.projected.setdefault(layer, []).append((counts > 0).float() @ tokens)
            self.rows.add(round(len(records) / (pictures * n)))

    def finish(self, result: Result, shape: DecoderShape, text: int) -> None:
        """Write the shares and the cost into a result."""
        targets = torch.cat(self.targets)
        chosen = {layer: torch.cat(parts) for layer, parts in self.chosen.items()}
        hits = {layer: (c & targets).any(1) for layer, c in chosen.items()}
        result.hits = {layer: float(h.float().mean()) for layer, h in hits.items()}
        result.whole = {layer: float((c | ~targets).all(1).float().mean()) for layer, c in chosen.items()}
        result.hit_any = float(torch.stack(list(hits.values())).any(0).float().mean())
        result.regions = {layer: float(c.float().mean()) for layer, c in chosen.items()}
        projected, read = (
            [round(float(torch.cat(by_layer[layer]).mean())) for layer in shape.reading]
            for by_layer in (self.projected, self.read)
        )
        coarse = self.task.coarse
        result.flops = without_head(flex_prefill(shape, text, coarse, projected, read, max(self.rows)))


def without_head(cost: Cost) -> float:
    """FLOPs of a prefill but for the output head."""
    return cost.total - cost.lm_head


@torch.no_grad()
def ceiling(model: CropReader, fine: bool, split: str, n: int, seed: int) -> float:
    """Share of digits that a reader of true crops reads, those that `frame` questions of these canvases ask for."""
    right = total = 0
    for start in range(0, n, 50):
        scenes = [canvas(generator(seed, 5, i), split) for i in range(start, min(start + 50, n))]
        pixels, labels = crops(scenes, fine)
        right += int((model(pixels).argmax(1) == labels).sum())
        total += len(labels)
    return right / total


def accuracies(results: dict[str, dict[str, Result]], kind: str) -> dict[str, float]:
    """Accuracy by arm on one kind of question."""
    return {name: by_kind[kind].accuracy for name, by_kind in results.items() if kind in by_kind}


__all__ = ["KINDS", "Result", "accuracies", "ceiling", "evaluate"]
