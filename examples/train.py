"""Fine-tune a model that looks closer on a folder of pictures with questions; the same command resumes it.

    python examples/train.py --max-steps 2                          # a tiny random model, fabricated pictures
    python examples/train.py --model PATH --data train.jsonl --images DIR --eval held_out.jsonl --output trained
    torchrun --nproc-per-node 8 examples/train.py ...               # see reproduce_paper.md

A line of data is `{"image": "a.jpg", "question": "...", "answer": "..."}`, or an entry of LLaVA's mix665k. The trained
model goes to OUTPUT/model, for `flexcore.from_pretrained` and `examples/image.py --model`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from tqdm import tqdm
from train_options import checked, flex_config, parser, processes, settings, settle

import flexcore
from flexcore.errors import UnsupportedModelError
from flexcore.hf.checkpoints import drop_unfinished, last_checkpoint
from flexcore.hf.cost import measure
from flexcore.hf.cost_report import Setting
from flexcore.hf.saving import Checkpoint
from flexcore.hf.training_cost import Parameters, TrainingSetting, training_cost
from flexcore.hf.training_data import Example, Problem, read_examples
from flexcore.hf.training_samples import IGNORED, TrainingSamples, media_in_forward
from flexcore.roofline import machine
from flexcore_adapters.image_io import check_size, load_image

# Examples that the cost is worked out from.
_LOOKED_AT = 8
_DEMO = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}


def main(argv: Sequence[str] | None = None) -> int:
    """Train; 2 if what was asked for can't be done, 130 if it was stopped."""
    try:
        return common.main(run, lambda: arguments(argv))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    return checked(parser((__doc__ or "").splitlines()[0]).parse_args(argv))


def say(text: str) -> None:
    """Print, in one process of several."""
    if processes()[0] == 0:
        print(text, flush=True)


def run(args: argparse.Namespace) -> None:
    """Load, read, say what it costs, train, save."""
    from transformers import set_seed

    from flexcore.hf.training_metrics import other_outputs

    if args.data is None:
        args.data, args.images = fabricate(args.output)
    set_seed(args.seed)
    checkpoint = last_checkpoint(args.output, processes()[1])
    # Before TrainingArguments: with those of DeepSpeed, models are made in pieces, which can't be wrapped or measured.
    model, processor = load(args, checkpoint)
    adapter = flexcore.load_adapter("image", model, processor, zoom=args.zoom, progress=False)
    train, held = data(args, adapter)
    steps = count_steps(args, len(train))
    say(cost(args, model, train, steps))
    arguments = training_arguments(args, steps)
    with arguments.main_process_first(local=False):
        if processes()[0] == 0:
            settle(args.output, settings(args, train.examples))
            for gone in drop_unfinished(args.output, arguments.world_size):
                say(f"{gone} was not finished: deleted")
    model = choose(args, model)
    trainer, share = make_trainer(args, arguments, model, adapter, train, held)
    say(f"going on from {checkpoint}" if checkpoint else f"training {len(train):,} examples, {steps:,} steps")
    trainer.train(str(checkpoint) if checkpoint else None, ignore_keys_for_eval=other_outputs())
    found = trainer.evaluate(ignore_keys=other_outputs()) if held is not None else {}
    share.close()
    finish(trainer, processor, args)
    report(trainer, found, train, args.output / "model")


# ---------------------------------------------------------------------- the model


def load(args: argparse.Namespace, checkpoint: Path | None) -> tuple[Any, Any]:
    """The model, wrapped, and its processor; with the weights of a checkpoint to go on from."""
    import torch

    dtype = getattr(torch, args.dtype)
    if args.model is None:
        from flexcore.hf.tiny import tiny_llava

        say("no --model: a tiny LLaVA with random weights; what it learns means nothing")
        model, processor = tiny_llava(args.seed, layers=4)
    else:
        from transformers import AutoProcessor

        say(f"loading {args.model}")
        model, processor = None, loaded(args.model, AutoProcessor.from_pretrained)
    if checkpoint is not None and not args.lora:
        # Trainer takes the names of weights in a checkpoint for those in memory. In LLaVA and its kin they differ: it
        # would go on with the weights that training began with, and say so in a warning.
        logging.getLogger("transformers.trainer").addFilter(
            lambda line: "keys in the checkpoint" not in str(line.msg)
        )
        return loaded(str(checkpoint), flexcore.from_pretrained, dtype=dtype), processor
    if model is not None:
        return flexcore.wrap(model.to(dtype), flex_config(args)), processor
    saved = loaded(args.model, lambda name: Checkpoint(name, {}).config())
    config = flex_config(args, saved[0] if saved else None)
    return loaded(args.model, flexcore.from_pretrained, config=config, dtype=dtype), processor


def loaded(name: str, read: Any, **options: Any) -> Any:
    """What a checkpoint holds, or one line that says why not."""
    try:
        return read(name, **options)
    except (OSError, KeyError, AttributeError, TypeError, UnsupportedModelError) as error:
        raise ValueError(f"{name} can't be trained: {error}") from error


def choose(args: argparse.Namespace, model: Any) -> Any:
    """The model with what trains switched on."""
    from flexcore.hf.training_groups import lora, train_only

    if args.lora:
        return lora(model, args.lora)
    train_only(model, args.trains)
    return model


# ---------------------------------------------------------------------- the data


def data(args: argparse.Namespace, adapter: Any) -> tuple[TrainingSamples, TrainingSamples | None]:
    """What to train on and what to evaluate on; every line that is left out is reported."""
    options = {"conversation": args.conversation, "max_length": args.max_length, "too_long": args.too_long}
    main = processes()[0] == 0
    made = []
    for file in (args.data, args.eval):
        problems: list[Problem] = []

        def report(problem: Problem, problems: list[Problem] = problems) -> None:
            problems.append(problem)
            if main:
                tqdm.write(f"left out: {problem}", file=sys.stderr)

        if file is None:
            made.append(None)
            continue
        hidden = None if main else False
        found = read_examples(file, args.images, report, [pictures(args.check_pictures)], hidden)
        samples = TrainingSamples(found, adapter, **options)
        found = [example for example in found if fits(samples, example, report)]
        if not found:
            raise ValueError(f"{file} holds nothing that can be used: all of it is longer than --max-length")
        made.append(TrainingSamples(found, adapter, **options))
        say(f"{file.name}: {len(found):,} usable examples, {len(problems):,} left out")
    return made[0], made[1]


def pictures(how: str) -> Any:
    """What is asked of an example's pictures before training."""
    look = {"header": lambda path: check_size(path, None), "decode": load_image, "no": lambda path: None}[how]

    def check(example: Example) -> None:
        for path in example.media:
            look(path)

    return check


def fits(samples: TrainingSamples, example: Example, report: Any) -> bool:
    """Whether an example's text is short enough."""
    try:
        samples.check(example)
    except ValueError as error:
        report(Problem(example.where, str(error)))
        return False
    return True


def fabricate(output: Path, n: int = 12) -> tuple[Path, Path]:
    """A few pictures of coloured squares with questions, made only once."""
    from PIL import Image

    folder = output / "demo"
    path = folder / "demo.jsonl"
    while processes()[0] != 0 and not path.exists():
        time.sleep(0.1)  # the first process makes them
    if path.exists():
        return path, folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(n):
        colour = list(_DEMO)[i % len(_DEMO)]
        picture = Image.new("RGB", (120, 80), (128, 128, 128))
        picture.paste(_DEMO[colour], (9 * i, 5 * i, 9 * i + 16, 5 * i + 16))
        picture.save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "question": "What colour is the square?", "answer": colour})
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.replace(path)
    return path, folder


# ---------------------------------------------------------------------- training


def count_steps(args: argparse.Namespace, n: int) -> int:
    """Optimizer steps that `n` examples make."""
    batches = math.ceil(n / (args.batch * processes()[1]))
    return args.max_steps or math.ceil(args.epochs * math.ceil(batches / args.accumulate))


def training_arguments(args: argparse.Namespace, steps: int) -> Any:
    """Trainer's own."""
    from transformers import TrainingArguments

    if args.deepspeed is not None:
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise ImportError(f"--deepspeed: pip install deepspeed: {error}") from error
    evaluates = args.eval is not None
    checkpointing: dict[str, Any] = {}
    if args.gradient_checkpointing:
        checkpointing = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
    return TrainingArguments(
        str(args.output),
        max_steps=steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        lr_scheduler_type=args.schedule,
        warmup_steps=math.ceil(args.warmup_ratio * steps),
        logging_steps=min(args.log_every, steps),
        save_strategy="steps",
        save_steps=args.save_every,
        save_total_limit=args.keep,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=args.save_every if evaluates else None,
        seed=args.seed,
        data_seed=args.seed,
        bf16=args.bf16,
        fp16=args.fp16,
        deepspeed=str(args.deepspeed) if args.deepspeed else None,
        full_determinism=args.deterministic,
        use_cpu=args.device == "cpu",
        dataloader_num_workers=args.workers,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        report_to=[],
        **checkpointing,
    )


def make_trainer(
    args: argparse.Namespace, arguments: Any, model: Any, adapter: Any, train: Any, held: Any
) -> tuple[Any, Any]:
    """A plain Trainer with all that the options ask for."""
    from transformers import Trainer

    from flexcore.hf.training import AlphaWarmup, Exploration, FlexCollator, TimeLimit
    from flexcore.hf.training_groups import parameter_groups
    from flexcore.hf.training_metrics import SelectedShare, right_tokens

    share = SelectedShare(model)
    warmup = None if args.alpha_warmup == 0 else AlphaWarmup()
    callbacks = [share, *([] if warmup is None else [warmup])]
    if args.exploration is not None:
        callbacks.append(Exploration(args.exploration, args.exploration_floor))
    if args.max_minutes is not None:
        callbacks.append(TimeLimit(args.max_minutes))
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    rates = (args.learning_rate, args.fine_learning_rate, args.weight_decay)
    options = {**options, "params": parameter_groups(model, *rates)}
    media_in_forward(model, adapter, needed=args.deepspeed is not None)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=held,
        data_collator=FlexCollator(train.tokenizer, alpha=warmup),
        callbacks=callbacks,
        compute_metrics=share.metrics,
        preprocess_logits_for_metrics=right_tokens,
        optimizer_cls_and_kwargs=(cls, options),
    )
    return trainer, share


def finish(trainer: Any, processor: Any, args: argparse.Namespace) -> None:
    """Write the trained model; it has its name once it is whole."""
    part, final = args.output / "model.part", args.output / "model"
    if args.lora:
        if trainer.is_world_process_zero():
            trainer.model.merge_and_unload().save_pretrained(part)
    else:
        trainer.save_model(str(part))
    if trainer.is_world_process_zero():
        processor.save_pretrained(part)
        trainer.save_state()
        shutil.rmtree(final, ignore_errors=True)
        part.replace(final)


# ---------------------------------------------------------------------- what it says


def cost(args: argparse.Namespace, model: Any, train: TrainingSamples, steps: int) -> str:
    """Memory and time per step by the cost model, or why there is none."""
    texts, answers, cells = [], [], []
    for i in range(0, len(train), max(1, len(train) // _LOOKED_AT)):
        made = train[i]
        streams = made["flex_streams"].samples[0] if "flex_streams" in made else ()
        if streams:
            cells.append(sum(stream.grid.n_coarse for stream in streams))
            texts.append(made["input_ids"].shape[1] - cells[-1])
            answers.append(int((made["labels"] != IGNORED).sum()))
            regions = sum(stream.grid.n_regions for stream in streams)
    if not cells:
        return "cost model: not worked out, as none of the examples looked at has a picture"
    text, answer, coarse = (round(sum(counts) / len(counts)) for counts in (texts, answers, cells))
    config = model.flex_config
    known = {"all": 1.0, "top_k": config.fraction, "random": config.fraction}
    fraction = known.get(config.selector, 0.1)
    if config.top_k is not None and config.selector in ("top_k", "random"):
        fraction = min(1.0, config.top_k / regions)
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else args.dtype
    seen = Setting(text, args.zoom, fraction, args.batch, dtype, machine(args.machine), coarse=coarse)
    setting = TrainingSetting(
        seen,
        answer=max(1, answer),
        accumulate=args.accumulate,
        devices=processes()[1],
        trains="lora" if args.lora else args.trains,
        rank=args.lora or 1,
        weights=args.dtype,
        checkpointing=args.gradient_checkpointing,
        sharded=args.deepspeed is not None,
    )
    try:
        # some towers take pictures of another size than their config says
        side = getattr(train.adapter, "side", None)
        measured = measure(model.config, first_layer=config.first_layer, side=side)
        made = training_cost(measured, Parameters.of(model.config, measured, side), setting).text(steps)
    except (ValueError, UnsupportedModelError) as error:
        return f"cost model: not known for this model ({error})"
    assumed = (
        "" if config.selector in known else f"\n  (taken that a row reads {fraction:.0%} of the fine tokens)"
    )
    return made + assumed


def report(trainer: Any, found: dict[str, float], train: TrainingSamples, path: Path) -> None:
    """The last numbers, and where the model is."""
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1:]
    for entry in last:
        looked = f", {entry['selected']:.1%} of regions selected" if "selected" in entry else ""
        say(f"step {entry['step']}: loss {entry['loss']:.4f}{looked}")
    if found:
        looked = f", {found['eval_selected']:.1%} of regions selected" if "eval_selected" in found else ""
        right = f"{found['eval_answers']:.1%} of answers and {found['eval_tokens']:.1%} of their tokens right"
        say(f"evaluation: loss {found['eval_loss']:.4f}, {right}{looked}")
    if train.lost:
        say(f"{train.lost:,} examples turned out to be unusable while training, and others took their place")
    say(f"model {path}")


if __name__ == "__main__":
    sys.exit(main())
