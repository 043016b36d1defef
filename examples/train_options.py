"""The options of `train.py`, and what of them a run that is resumed must share with the one before."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flexcore
from flexcore.hf.conversation import KINDS
from flexcore.hf.cost_report import ITEMSIZE
from flexcore.hf.training_data import Example
from flexcore.hf.training_groups import TRAINS
from flexcore.hf.training_samples import TOO_LONG
from flexcore.roofline import machine

SETTINGS = "settings.json"
# What a result doesn't depend on.
_FREE = (
    "output",
    "workers",
    "log_every",
    "save_every",
    "keep",
    "machine",
    "images",
    "check_pictures",
    "max_minutes",
)
_FLEX = ("first_layer", "selector", "threshold", "top_k", "fraction", "alpha_warmup", "selection_loss")


def parser(description: str) -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=description)
    add = made.add_argument_group("what").add_argument
    add("--model", help="a checkpoint, plain or saved from a wrapped model; default: a tiny random LLaVA")
    add("--data", type=Path, help="JSON lines, or LLaVA's JSON; default: a few fabricated pictures")
    add("--images", type=Path, help="the pictures' folder; default: the data's own")
    add("--eval", type=Path, help="the same for evaluation, pictures from the same folder")
    add("--output", type=Path, default=Path("outputs/train"), help="the same folder again resumes")
    add(
        "--conversation",
        choices=KINDS,
        default="auto",
        help="auto: v1, unless a chat template speaks otherwise",
    )
    add("--max-length", type=int, help="tokens of a sequence, coarse ones included")
    add("--too-long", choices=TOO_LONG, default="skip")
    add("--check-pictures", choices=("header", "decode", "no"), default="header", help="before training")

    add = made.add_argument_group("how long").add_argument
    add("--epochs", type=float, default=1.0)
    add("--max-steps", "--steps", type=int, dest="max_steps", help="instead of epochs")
    add("--max-minutes", type=float, help="stop then, with a model; the same command goes on")
    add("--batch", type=int, default=1, help="samples on each device")
    add("--accumulate", type=int, default=1, help="batches per step")
    add("--save-every", type=int, default=500, help="steps between checkpoints, and between evaluations")
    add("--keep", type=int, default=2, help="checkpoints")
    add("--log-every", type=int, default=10)

    add = made.add_argument_group("what trains").add_argument
    add("--trains", choices=TRAINS, default="fine", help="the fine projections; the paper: all-but-tower")
    add("--lora", type=int, metavar="RANK", help="LoRA on the decoder beside the fine projections")
    add("--learning-rate", type=float, default=2e-5)
    add("--fine-learning-rate", type=float, help="of the fine projections; default: --learning-rate")
    add("--weight-decay", type=float, default=0.0)
    add("--schedule", default="cosine", help="as transformers names it")
    add("--warmup-ratio", type=float, default=0.03)

    add = made.add_argument_group("looking closer").add_argument
    add("--zoom", type=int, default=3, help="fine tokens per coarse token and axis")
    add("--reference", action="store_true", help="everything else as in the official code")
    add("--first-layer", type=int, help="first layer that selects; default: a quarter of the depth")
    add("--selector", help="threshold, top_k, top_p, random, all, or a plug-in's; default: threshold")
    add("--threshold", type=int, help="in 1/255ths")
    add("--top-k", type=int, help="regions per layer and row")
    add("--fraction", type=float, help="the same as a share")
    add("--alpha-warmup", type=float, help="alpha rises by this much per epoch; 0: it is 1; default: 10")
    add("--selection-loss", type=float, help="weight of a loss that teaches selection")
    add(
        "--exploration",
        type=float,
        metavar="PART",
        help="read more than was selected over this part of the steps",
    )
    add("--exploration-floor", type=float, default=0.1, help="the share that is explored from then on")

    add = made.add_argument_group("the machine").add_argument
    add("--device", choices=("auto", "cpu"), default="auto")
    add(
        "--dtype",
        choices=ITEMSIZE,
        default="float32",
        help="that weights are held in; DeepSpeed wants 16 bits",
    )
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--fp16", action="store_true", help="compute in float16, with loss scaling")
    add("--gradient-checkpointing", action="store_true")
    add("--deepspeed", type=Path, help="its JSON")
    add("--deterministic", action="store_true", help="on GPUs: only kernels that give the same bits again")
    add("--workers", type=int, default=0, help="processes that read pictures")
    add("--seed", type=int, default=0)
    add("--machine", default="a100", help="for the cost: v100, a100, h100 or FLOPS:BYTES_PER_SECOND")
    return made


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """Find out before a model loads what would go wrong later.

    Raises:
        ValueError: An option is out of range, or doesn't go with another.
    """
    for name in (
        "batch",
        "accumulate",
        "save_every",
        "keep",
        "log_every",
        "zoom",
        "max_length",
        "max_steps",
        "lora",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.epochs <= 0:
        raise ValueError(f"--epochs must be more than 0, got {args.epochs}")
    if args.max_minutes is not None and not args.max_minutes > 0:
        raise ValueError(f"--max-minutes must be more than 0, got {args.max_minutes}")
    if not 0 <= args.warmup_ratio <= 1:
        raise ValueError(f"--warmup-ratio must be in [0, 1], got {args.warmup_ratio}")
    if args.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {args.workers}")
    if args.bf16 and args.fp16:
        raise ValueError("--bf16 and --fp16: take one of them")
    if args.lora and args.trains != "fine":
        raise ValueError(f"--lora trains beside the fine projections: leave out --trains, got {args.trains}")
    if args.deepspeed is not None and not args.deepspeed.is_file():
        raise ValueError(f"--deepspeed: there is no file {args.deepspeed}")
    if (args.eval or args.images) and not args.data:
        raise ValueError("--eval and --images need --data")
    machine(args.machine)
    args.images = args.images or (args.data.parent if args.data else None)
    return args


def flex_config(args: argparse.Namespace, saved: Any = None) -> flexcore.FlexConfig:
    """What the options ask for, on top of what a checkpoint was wrapped with.

    Raises:
        ValueError: A field is out of range.
    """
    given = {name: value for name in _FLEX if (value := getattr(args, name)) is not None}
    if args.reference:
        return flexcore.FlexConfig.reference(**given)
    return (saved or flexcore.FlexConfig()).replace(**given)


def processes() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def settings(args: argparse.Namespace, examples: Sequence[Example]) -> dict[str, Any]:
    """What the result depends on."""
    found = {n: str(v) if isinstance(v, Path) else v for n, v in vars(args).items() if n not in _FREE}
    digest = hashlib.sha256()
    for example in examples:
        names = [path.name for path in example.media]
        digest.update(repr((example.where, names, example.turns)).encode())
    return {**found, "processes": processes()[1], "examples": f"{len(examples)} ({digest.hexdigest()[:16]})"}


def settle(folder: Path, wanted: dict[str, Any]) -> None:
    """Make sure that what is in a folder belongs to the same run; the folder is made if there is none.

    Raises:
        ValueError: It doesn't; the message says in what it differs.
    """
    path = folder / SETTINGS
    wanted = json.loads(json.dumps(wanted))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(wanted, indent=1) + "\n")
        part.replace(path)
        return
    there = json.loads(path.read_text())
    if different := [name for name in wanted if there.get(name) != wanted[name]]:
        changes = ", ".join(f"{name} ({there.get(name)!r}, now {wanted[name]!r})" for name in different)
        raise ValueError(f"--output {folder} holds a run with another {changes}; choose another folder")
