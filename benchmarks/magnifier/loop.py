"""A training loop that a kill can't undo: weights, optimizer and step are saved every so often, whole or not at all.

What a step sees is drawn from (seed, step), so that a resumed run goes on as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

STATE, OPTIMIZER = "model.safetensors", "optimizer.pt"


def generator(*seeds: int) -> np.random.Generator:
    """A generator for these numbers, such as a seed and a step."""
    return np.random.default_rng(seeds)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: a linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    folder: Path,
    model: nn.Module,
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.05,
    warmup: int = 100,
    save_every: int = 250,
    report: Callable[[], dict[str, float]] | None = None,
    report_every: int = 250,
) -> nn.Module:
    """Train the parameters of `model` that require it; go on from `folder` if it holds a checkpoint.

    Args:
        folder: Where checkpoints go; `done` is written there at the end.
        model: What trains.
        loss: Called with the step; returns the loss and numbers to show.
        steps: In all.
        learning_rate: At the top of its schedule.
        weight_decay: Of matrices.
        warmup: Steps of linear warm-up.
        save_every: Steps between checkpoints.
        report: Validation, shown every `report_every` steps.
        report_every: Steps between reports.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "done").exists():
        model.load_state_dict(load_file(folder / STATE))
        return model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    start = 0
    if (folder / OPTIMIZER).exists():
        saved = torch.load(folder / OPTIMIZER, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        model.load_state_dict(saved["model"])
        start = saved["step"]
    means: dict[str, float] = {}
    started = time.monotonic()
    model.train()
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=folder.name, disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * cosine(step, steps, warmup)
        value, numbers = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for name, number in {"loss": float(value.detach()), **numbers}.items():
            means[name] = 0.98 * means.get(name, number) + 0.02 * number
        if (step + 1) % report_every == 0 or step + 1 == steps:
            model.eval()
            with torch.no_grad():
                found = {**means, **({} if report is None else report())}
            model.train()
            seconds = (time.monotonic() - started) / (step + 1 - start)
            line = " ".join(f"{k} {v:.4f}" for k, v in found.items())
            bar.write(f"{folder.name} {step + 1}/{steps} {seconds:.2f} s/step {line}")
        if (step + 1) % save_every == 0:
            state = {"optimizer": optimizer.state_dict(), "model": model.state_dict(), "step": step + 1}
            torch.save(state, folder / (OPTIMIZER + ".part"))
            (folder / (OPTIMIZER + ".part")).replace(folder / OPTIMIZER)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / STATE)
    (folder / "done").touch()
    (folder / OPTIMIZER).unlink(missing_ok=True)
    return model.eval()
