"""Training runs that tests start in this process or in others: a tiny model, a tiny dataset, a plain Trainer."""

from __future__ import annotations

import os
import signal
import sys

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from flexcore.hf.training import AlphaWarmup, FlexCollator, freeze_base

from .helpers import GRID, WIDE, Sample, batch, wrapped

SAMPLES = [
    Sample(after=8),
    Sample(grids=[GRID, WIDE], seed=1, after=7),
    Sample(grids=[], seed=2, after=6),
    Sample(grids=[WIDE], seed=3, before=7),
    Sample(seed=4, after=9),
    Sample(seed=5, before=2),
]


class Questions(torch.utils.data.Dataset):
    """Samples as an adapter makes them, with labels on the last four tokens."""

    def __init__(self, kind: str = "llama", samples=SAMPLES):
        self.items = []
        for sample in samples:
            item = batch(kind, [sample], side="right")
            labels = torch.full_like(item["input_ids"], -100)
            labels[:, -4:] = item["input_ids"][:, -4:]
            self.items.append({**item, "labels": labels})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]


def trainer(
    folder, model=None, kind: str = "llama", warmup: bool = False, callbacks=(), eval=None, **arguments
):
    """A Trainer of the fine projections."""
    if model is None:
        model = wrapped(kind, layers=4)
        freeze_base(model)
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 7,
        **arguments,
    }
    alpha = AlphaWarmup(rate=0.5) if warmup else None
    return Trainer(
        model,
        TrainingArguments(str(folder), **settings),
        train_dataset=Questions(kind),
        eval_dataset=eval,
        data_collator=FlexCollator(pad_token_id=0, alpha=alpha),
        callbacks=[*callbacks, *([] if alpha is None else [alpha])],
    )


class Kill(TrainerCallback):
    """Ends the process the hard way in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def resumable(folder, callbacks=(), resume: bool = False) -> dict[str, torch.Tensor]:
    """Train with dropout, shuffling, a schedule and checkpoints; returns the trained weights."""
    torch.manual_seed(3)
    model = wrapped("llama", layers=4, model=None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("flex_fine", "lm_head")))
    model.config.attention_dropout = 0.1
    run = trainer(
        folder,
        model,
        warmup=True,
        callbacks=callbacks,
        gradient_accumulation_steps=2,
        max_steps=5,
        save_strategy="steps",
        save_steps=2,
        lr_scheduler_type="cosine",
        warmup_steps=2,
    )
    run.train(resume_from_checkpoint=resume)
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    torch.set_num_threads(1)
    resumable(sys.argv[1], [Kill(int(sys.argv[2]))])
