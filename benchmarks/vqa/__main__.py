"""One of the paper's benchmarks, from a local folder, for any wrapped or plain model: coarse-only, Flex and dense.

    python -m benchmarks.vqa vstar --data vstar_bench --model llava-1.5-7b-hf --fine-weights trained --batch-size 8
    torchrun --nproc-per-node 8 -m benchmarks.vqa textvqa --data textvqa --model llava-1.5-7b-hf --fine-weights trained

Answers are written to --output as they come; the same command goes on after a run that was stopped or killed. In the
end all arms stand side by side, scored on the same samples. Layouts of the folders: see the module of each benchmark.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import flexcore
from flexcore_adapters.extras import need

from ..environment import environment
from . import magnifier_bench, rsvqa, textvqa, vstar
from .answers import settle
from .arms import ARMS, DENSE, FLEX
from .asking import Asker
from .base import Judge, Problem
from .conversation import KINDS, resolve
from .loading import fingerprint, load
from .runner import Run
from .table import table

BENCHMARKS = {m.BENCHMARK.name: m.BENCHMARK for m in (vstar, textvqa, magnifier_bench, rsvqa)}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vqa", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("name", choices=BENCHMARKS)
    add("--data", type=Path, required=True, help="the benchmark's folder")
    add("--model", required=True, help="a checkpoint, plain or saved from a wrapped model")
    add("--fine-weights", type=Path, help="a folder that save_adapter_weights wrote")
    add("--arms", default=",".join(ARMS), help="some of %(default)s")
    add("--batch-size", type=int, default=8, help="questions per forward pass; with options, options")
    add("--limit", type=int, help="the first so many questions only")
    add("--output", type=Path, help="folder of answers and results; default: outputs/vqa/NAME")
    add("--json", action="store_true", help="end with one line of JSON")
    add("--zoom", type=int, default=3, help="fine tokens per coarse token and axis")
    add("--dense-zoom", type=int, help="the same for dense; default: --zoom")
    add(
        "--dense-limit",
        type=int,
        help="tokens of a dense sequence; default: what the model has positions for",
    )
    add(
        "--conversation",
        choices=KINDS,
        default="auto",
        help="auto: v1, unless a chat template speaks otherwise",
    )
    add("--max-new-tokens", type=int, help="of an answer; default: the benchmark's")
    add(
        "--judge",
        metavar="MODULE:FUNCTION",
        help="decides from question, answer and response (MagnifierBench)",
    )
    add("--device", help="default: the process's GPU, or the CPU")
    add("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])
    args = parser.parse_args(argv)
    for name in ("batch_size", "limit", "zoom", "dense_zoom", "dense_limit", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    args.arms = list(dict.fromkeys(args.arms.split(",")))
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        parser.error(f"--arms must be some of {','.join(ARMS)}, got {','.join(unknown)}")
    args.output = args.output or Path("outputs") / "vqa" / args.name
    args.dense_zoom = args.dense_zoom or args.zoom
    args.max_new_tokens = args.max_new_tokens or BENCHMARKS[args.name].new_tokens
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark; 1 if nothing could be asked, 2 if what was asked for can't be done, 130 if it was stopped."""
    args = arguments(argv)
    try:
        return run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"stopped; the answers so far are in {args.output}, and the same command goes on", file=sys.stderr
        )
        return 130


def run(args: argparse.Namespace) -> int:
    """Read, ask, merge, report."""
    judge = find_judge(args.judge)
    # Processes finish their shares at different times, and wait for each other only then.
    state = need("accelerate", "train").PartialState(
        cpu=args.device == "cpu" or None, timeout=timedelta(weeks=1)
    )
    device = torch.device(args.device) if args.device and state.num_processes == 1 else state.device
    benchmark = BENCHMARKS[args.name]
    problems: list[str] = []

    def report(problem: Problem) -> None:
        problems.append(str(problem))
        if state.is_main_process:
            print(f"left out: {problem}", file=sys.stderr)

    samples = benchmark.read(args.data, report)[: args.limit]
    if state.is_main_process:
        settle(args.output, settings(args), write=True)
    state.wait_for_everyone()
    settle(args.output, settings(args), write=False)
    job = Run(
        benchmark,
        samples,
        args.arms,
        args.output,
        state.process_index,
        state.num_processes,
        state.wait_for_everyone,
        problems,
    )
    job.execute(lambda: make_asker(args, device), args.batch_size)
    if not state.is_main_process:
        return 0
    found = {**job.merge(judge), **environment("benchmarks.vqa")}
    print(f"\n{table(benchmark.title, found, args.arms)}")
    times = ", ".join(f"{arm} {seconds:,.1f} s" for arm, seconds in found["seconds"].items())
    print(f"time spent asking, all processes together: {times or 'none'}")
    if args.json:
        print(json.dumps(found))
    return 0 if found["rows"] else 1


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What an answer depends on; more samples, other arms or batches may join the answers that are there."""
    names = ("name", "data", "model", "fine_weights", "zoom", "dense_zoom", "dense_limit", "conversation")
    chosen = {name: getattr(args, name) for name in (*names, "max_new_tokens", "dtype")}
    chosen = {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()}
    return {**chosen, "weights": fingerprint(args.model), "fine weights": fingerprint(args.fine_weights)}


def make_asker(args: argparse.Namespace, device: torch.device) -> tuple[Asker, str]:
    """Load the model and its adapters."""
    wrap = FLEX in args.arms or args.fine_weights is not None
    model, processor, note = load(args.model, args.fine_weights, device, args.dtype, wrap)
    options: dict[str, Any] = {"progress": False}
    adapter = flexcore.load_adapter("image", model, processor, zoom=args.zoom, **options)
    dense = adapter
    if DENSE in args.arms and args.dense_zoom != args.zoom:
        dense = flexcore.load_adapter("image", model, processor, zoom=args.dense_zoom, **options)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", 0)
    asker = Asker(
        model,
        adapter,
        dense,
        conversation=resolve(adapter, args.conversation),
        new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        dense_limit=args.dense_limit or positions,
    )
    return asker, note


def find_judge(name: str | None) -> Judge | None:
    """The callable that `--judge` names."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function, None) if function else None
    if not callable(found):
        raise ValueError(f"--judge must be MODULE:FUNCTION that can be called, got {name!r}")
    return found


if __name__ == "__main__":
    sys.exit(main())
