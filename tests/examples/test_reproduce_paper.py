"""examples/reproduce_paper.md: its commands are understood by the programs they call, and ask for the recipe."""

import argparse
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.vqa import __main__ as vqa
from flexcore.hf import training_cost
from flexcore.hf.cost import llava_7b

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "examples" / "reproduce_paper.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture
def train(load_example, monkeypatch) -> Callable[[list[str]], argparse.Namespace]:
    monkeypatch.chdir(ROOT)
    return load_example("train").arguments


def parsed(command: list[str], train: Callable) -> tuple[str, argparse.Namespace | None]:
    """What a command's own program makes of it."""
    program, *rest = command
    if program == "torchrun":
        assert rest[:2] == ["--nproc-per-node", "8"]
        rest = rest[2:]
    elif program == "pip":
        (asked,) = [word for word in rest if word.startswith("flexcore")]
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\w+", asked)[1:]) <= set(known)
        return "pip", None
    if rest[0] == "examples/train.py":
        return "train", train(rest[1:])
    if rest[:2] == ["-m", "benchmarks.vqa"]:
        return "vqa", vqa.arguments(rest[2:])
    assert rest[:2] == ["-m", "flexcore.hf.training_cost"], command
    return "cost", training_cost.arguments(rest[2:])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c[:6]))
def test_a_command_is_understood(command, train):
    parsed(command, train)


def test_the_commands_are_the_recipe(train):
    found = [parsed(command, train) for command in COMMANDS]
    (made,) = [args for kind, args in found if kind == "train"]
    wanted = {
        **{
            "learning_rate": 2e-5,
            "schedule": "cosine",
            "warmup_ratio": 0.03,
            "weight_decay": 0.0,
            "epochs": 1.0,
        },
        **{"seed": 3407, "zoom": 3, "max_length": 2048, "fp16": True, "gradient_checkpointing": True},
        **{"trains": "all-but-tower", "max_steps": None, "lora": None, "reference": True},
    }
    assert {name: getattr(made, name) for name in wanted} == wanted
    assert made.batch * made.accumulate * 8 == 128
    config = train_config(made)
    assert (config.threshold, config.alpha_warmup, config.first_layer) == (48, 10, 8)
    assert (config.regions, config.positions, config.init) == ("official", "official", "random")
    # all four benchmarks, of the model that was trained
    asked = [args for kind, args in found if kind == "vqa"]
    assert {args.name for args in asked} == set(vqa.BENCHMARKS)
    assert {(args.model, args.zoom) for args in asked} == {(f"{made.output}/model", 3)}


def train_config(args: argparse.Namespace):
    from flexcore import FlexConfig

    return FlexConfig.reference(
        first_layer=args.first_layer,
        selector=args.selector,
        threshold=args.threshold,
        alpha_warmup=args.alpha_warmup,
    )


def test_the_cost_is_what_the_command_prints(capsys):
    (command,) = [c for c in COMMANDS if "flexcore.hf.training_cost" in c]
    training_cost.main(command[3:])
    (shown,) = re.findall(r"<!-- cost.*?```text\n(.*?)```", TEXT, re.DOTALL)
    assert capsys.readouterr().out == shown


def test_zero3_keeps_whole_what_processes_use_differently():
    """Everything that media pass through, and the fine projections; but not most of the decoder."""
    from transformers import LlavaForConditionalGeneration

    zero = json.loads((ROOT / "examples" / "zero3.json").read_text())["zero_optimization"]
    limit = zero["stage3_param_persistence_threshold"]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_7b())
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    text = {name for name in sizes if "language_model" in name or name == "lm_head.weight"}
    fine = model.get_decoder().layers[9].self_attn.k_proj.weight.numel()
    assert max([fine, *(size for name, size in sizes.items() if name not in text)]) <= limit
    assert sum(sizes[name] for name in text if sizes[name] > limit) > 0.6 * sum(sizes.values())
    assert zero["stage"] == 3 and zero["stage3_prefetch_bucket_size"] == 0
