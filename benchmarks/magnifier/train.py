"""Make the benchmark's weights: encoder, base, encoded pictures, and every arm, each where it left off.

    python -m benchmarks.magnifier.train all                      # everything, three seeds of each arm
    python -m benchmarks.magnifier.train arm --arm flex --seed 0  # one arm
    python -m benchmarks.magnifier.train base                     # a part: encoder, pictures, ceiling, base, ablations
    python -m benchmarks.magnifier.train all --task video         # the same for clips, or for recordings (audio)

A run that is killed goes on from its last checkpoint. Two processes may work side by side: each takes arms that the
other doesn't hold.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from flexcore.hf.training import AlphaWarmup, Exploration

from .arms import ARMS, EVERY, Arm, Inputs, build, fitted
from .base import train_base, with_encoder
from .ceiling import train_ceiling
from .image_task import IMAGE
from .loop import generator
from .task import Media, Task
from .tasks import TASKS

FOLDER = Path("outputs/magnifier")
CEILING_STEPS = 3000
STEPS, BATCH, LEARNING_RATE = IMAGE.steps, 8, 5e-4
SEEDS = (0, 1, 2)
# what says most comes first
ORDER = ("flex", "dense", "coarse", "all", "random", "threshold", "oracle")
# Of the other media one seed, and the arms that say what the pictures' say
OTHER_ORDER = ("flex", "coarse", "dense", "random", "all")


class Batches(Dataset):
    """Batch after batch of pictures, the same for every arm; which ones depends on the seed and the step alone."""

    def __init__(self, pictures: Media, seed: int, steps: int, batch: int = BATCH):
        self.pictures, self.seed, self.steps, self.batch = pictures, seed, steps, batch

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        return picture_batch(
            self.pictures, generator(self.seed, 6, step).integers(len(self.pictures), size=self.batch)
        )


def picture_batch(pictures: Media, which: Any) -> dict[str, Any]:
    """What `Inputs` takes, for some of the pictures."""
    return {
        "encoded": pictures.look_up(which),
        "digits": pictures.digits[which],
        "boxes": pictures.boxes[which],
    }


class ArmTrainer(Trainer):
    """Trainer over ready-made batches of encoded pictures, in their order."""

    def __init__(self, *args: Any, inputs: Inputs, alpha: AlphaWarmup | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.inputs, self.alpha = inputs, alpha

    def _get_train_sampler(self, *args: Any) -> Sampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        made = self.inputs(model, **inputs)
        if self.alpha is not None:
            made["alpha"] = self.alpha.alpha
        out = model(**made, use_cache=False)
        return (out.loss, out) if return_outputs else out.loss


class Progress(TrainerCallback):
    """Validation accuracy every so often, into a log that outlives the run."""

    def __init__(self, log: Path, inputs: Inputs, held: Media, every: int):
        self.log, self.inputs, self.held, self.every = log, inputs, held, every

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        model.eval()
        found = {"step": state.global_step, **validate(model, self.inputs, self.held)}
        model.train()
        with self.log.open("a") as log:
            log.write(json.dumps(found) + "\n")
        print(self.log.parent.name, json.dumps(found), flush=True)


@torch.no_grad()
def validate(model: Any, inputs: Inputs, held: Media, n: int = 60) -> dict[str, float]:
    """Share of answers that are right on the first pictures, for each kind of question."""
    right = []
    for start in range(0, n, 20):
        made = inputs(model, **picture_batch(held, np.arange(start, min(start + 20, n))))
        rows = inputs.questions.rows(inputs.before)
        wanted = made["labels"][:, rows + 1]  # kept in the call, where labels say which rows read
        right.append(model(**made, use_cache=False).logits[:, rows].argmax(-1) == wanted)
    share = torch.cat(right).float().mean(0)
    kinds = inputs.questions.kind_of
    return {k: float(share[torch.tensor([of == k for of in kinds])].mean()) for k in inputs.questions.kinds}


def train_arm(
    name: str,
    arm: Arm,
    seed: int,
    folder: Path,
    steps: int = STEPS,
    batch: int = BATCH,
    task: Task = IMAGE,
) -> None:
    """Train one arm with one seed, or go on with it."""
    done = folder / "done"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    arm = fitted(arm, task)
    llava = prepared_base(task=task)
    train, held = (media(llava, split, task) for split in ("train", "val"))
    torch.manual_seed(seed)
    model = build(arm, lambda: llava).train()
    inputs = Inputs(arm, task=task)
    callbacks: list[TrainerCallback] = [Progress(folder / "log.jsonl", inputs, held, max(1, steps // 10))]
    alpha = None
    if arm.explore:
        callbacks.append(Exploration(anneal=0.5, floor=0.1))
    elif arm.flex is not None:
        alpha = AlphaWarmup()
        callbacks.append(alpha)
    settings = TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 40),
        save_strategy="steps",
        save_steps=max(1, steps // 10),
        save_total_limit=1,
        seed=seed,
        data_seed=seed,
        use_cpu=True,
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        average_tokens_across_devices=False,
    )
    run = ArmTrainer(
        model,
        settings,
        train_dataset=Batches(train, seed, steps, batch),
        data_collator=lambda items: items[0],
        callbacks=callbacks,
        inputs=inputs,
        alpha=alpha,
    )
    run.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    trained = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / "model.safetensors")
    (folder / "history.json").write_text(json.dumps(run.state.log_history))
    done.touch()


# ---------------------------------------------------------------------- the parts


def prepare(what: str, task: Task = IMAGE) -> None:
    """Make what the arms are built on, as far as `what` needs it."""
    encoder = prepared_encoder(task)
    if what in ("all", "base"):
        prepared_base(encoder, task)
    if what in ("all", "pictures"):
        for split in ("train", "val"):
            media(with_encoder(encoder, task=task), split, task)
    if what in ("all", "ceiling") and task is IMAGE:
        with held_alone(FOLDER / "ceiling.lock", wait=True):
            for name, fine in (("fine", True), ("coarse", False)):
                train_ceiling(FOLDER / f"ceiling-{name}", fine, CEILING_STEPS)


def prepared_encoder(task: Task = IMAGE) -> Any:
    """The trained encoder, with its tower; trains it first if it isn't there."""
    folder = task.folder(FOLDER)
    with held_alone(folder / "encoder.lock", wait=True):
        return task.train_encoder(folder / "encoder", task.encoder_steps)


def prepared_base(encoder: Any = None, task: Task = IMAGE) -> Any:
    """The trained base, a LLaVA; trains it first if it isn't there."""
    folder = task.folder(FOLDER)
    encoder = prepared_encoder(task) if encoder is None else encoder
    with held_alone(folder / "base.lock", wait=True):
        if task.finding_steps and not (folder / "base" / "finding" / "done").exists():
            for split in ("train", "val"):  # under their own locks: another process may be making them
                media(with_encoder(encoder, task=task), split, task)
        return train_base(folder / "base", encoder, task.base_steps, task=task)


def media(llava: Any, split: str, task: Task = IMAGE) -> Media:
    """The split's encoded pictures, or whatever the task is about."""
    n, seed = task.splits[split]
    folder = task.folder(FOLDER)
    with held_alone(folder / f"pictures-{split}.lock", wait=True):
        return task.cached(folder / f"pictures-{split}", llava, split, n, seed)


@contextmanager
def held_alone(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds a lock, or may wait for it; a process that ends lets go of it, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("all", "encoder", "pictures", "ceiling", "base", "arm", "ablations"))
    parser.add_argument("--arm", choices=tuple(EVERY), default="flex")
    parser.add_argument("--task", choices=tuple(TASKS), default="image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the task's own")
    parser.add_argument("--name", help="where under the outputs an arm goes; default: arms/ARM-SEED")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    task = TASKS[args.task]
    prepare(args.what, task)
    order = [(name, seed) for seed in SEEDS for name in ORDER]
    jobs = {
        "all": order if task is IMAGE else [(name, 0) for name in OTHER_ORDER],
        "ablations": [(name, 0) for name in EVERY if name not in ARMS],
        "arm": [(args.arm, args.seed)],
    }.get(args.what, [])
    for name, seed in jobs:
        folder = task.folder(FOLDER) / (args.name or f"arms/{name}-{seed}")
        with held_alone(folder / "lock") as mine:
            if mine:
                train_arm(name, EVERY[name], seed, folder, args.steps or task.steps, task=task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
