"""What the examples have in common: options, loading and wrapping, and the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from asking import COARSE, DENSE, FLEX, Answer

import flexcore
from flexcore.cost import DecoderShape, coarse_prefill, decode, dense_prefill, flex_prefill
from flexcore.errors import SourceError
from flexcore.hf.checkpoint import read_adapter_config

PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".webp")
NOISE = " (noise: this model's weights are random)"


# ---------------------------------------------------------------------- the command line


def main(run: Callable[[argparse.Namespace], None], read: Callable[[], argparse.Namespace]) -> int:
    """Run an example; 2, and one line that says why, if what was asked for can't be done."""
    try:
        run(read())
        return 0
    except (ValueError, OSError, ImportError, SourceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def add_options(
    parser: argparse.ArgumentParser, *, question: str, selector: str, threshold: int, output: str
) -> None:
    """The options that all examples have."""
    add = parser.add_argument
    add(
        "--fine-weights",
        type=Path,
        help="a folder of trained fine weights; default: copies of the layer's K/V",
    )
    add("--question", default=question)
    add("--selector", default=selector, help="threshold, top_k, top_p, random, all, or a plug-in's")
    add("--threshold", type=int, default=threshold, help="for threshold, in 1/255ths")
    add("--top-k", type=int, help="for top_k and random: regions per layer and row; default: a tenth of them")
    add("--first-layer", type=int, help="first layer that selects; default: a quarter of the depth")
    add("--max-new-tokens", type=int, default=20)
    add("--dense-limit", type=int, default=20_000, help="tokens beyond which dense high resolution isn't run")
    add("--output", type=Path, default=Path(output), help="where the picture goes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])


def check_options(args: argparse.Namespace) -> argparse.Namespace:
    """Find out before a model loads what would go wrong after it has answered."""
    if not args.output.parent.is_dir():
        raise FileNotFoundError(f"--output: there is no folder {args.output.parent}")
    if args.output.suffix.lower() not in PICTURES:
        raise ValueError(f"--output must end like a picture ({', '.join(PICTURES)}), got {args.output}")
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {args.max_new_tokens}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    return args


# ---------------------------------------------------------------------- the model


def load(args: argparse.Namespace, find_class: Callable[[str], Any] | None = None) -> tuple[Any, Any]:
    """A checkpoint and its processor; `find_class` names the model class where it isn't one that sees."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    print(f"loading {args.model}")
    try:
        processor = AutoProcessor.from_pretrained(args.model)
        cls = AutoModelForImageTextToText if find_class is None else find_class(args.model)
        model = cls.from_pretrained(args.model, dtype=args.dtype).eval()
    except (ValueError, OSError, AttributeError, TypeError) as error:
        raise ValueError(f"--model {args.model} can't be loaded: {error}") from error
    return model.to(args.device), processor


def place(model: Any, args: argparse.Namespace) -> Any:
    """A model made on the spot, where and in the dtype that was asked for."""
    return (
        model.to(args.device) if args.dtype == "auto" else model.to(args.device, getattr(torch, args.dtype))
    )


def wrap(model: Any, args: argparse.Namespace, **config: Any) -> Any:
    """Wrap with the options' settings, or with those that trained weights were trained for."""
    if args.fine_weights:
        flexcore.wrap(model, read_adapter_config(args.fine_weights)[0])
        flexcore.load_adapter_weights(model, args.fine_weights)
        return model
    chosen = {name: getattr(args, name) for name in ("selector", "threshold", "top_k", "first_layer")}
    return flexcore.wrap(model, flexcore.FlexConfig(**chosen, **config))


def prompt(adapter: Any, question: str, part: dict[str, Any] | None = None) -> str:
    """The question in the model's own chat format, or in LLaVA-1.5's.

    Args:
        adapter: What knows both.
        question: Behind the medium.
        part: The medium as the chat format takes it; None writes its placeholder.
    """
    text = question if part else f"{adapter.placeholder}\n{question}"
    content = [*([part] if part else []), {"type": "text", "text": text}]
    if getattr(adapter, "chat_template", None):
        message = {"role": "user", "content": content}
        return adapter.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    return f"USER: {adapter.placeholder}\n{question} ASSISTANT:"


# ---------------------------------------------------------------------- the report


def report_selection(
    model: Any, answer: Answer, what: str, amount: Callable[[torch.Tensor], str], most: Sequence[str]
) -> None:
    """Per reading layer: the regions chosen for it, at the prompt's last row and over the whole answer.

    Args:
        model: The wrapped model.
        answer: What was asked.
        what: Name of `amount`.
        amount: What some regions (`[n_regions]` bool) are together, in the medium's own terms.
        most: What was read most, a line each.
    """
    grid = answer.stream.grid
    print(
        f"\n{grid.n_coarse:,} coarse tokens {grid.coarse}, {grid.n_fine:,} fine tokens {grid.fine}, ", end=""
    )
    print(f"{grid.n_regions:,} regions {grid.region_shape}; chosen for each layer that reads:\n")
    line = "{:>5}   {:>24} {:>6} {:>12}   {:>24} {:>6} {:>12}"
    print(
        line.format("layer", "regions, prompt's row", "share", what, "regions, whole answer", "share", what)
    )
    for layer in model.flex_config.layers:
        records = answer.trace.where(read_in=layer, level=1)
        cells = [str(layer)]
        for some in ([min(records, key=lambda r: r.position)], records):
            regions = torch.stack([r.regions for r in some]).any(dim=0)
            count = int(regions.sum())
            cells += [f"{count} of {grid.n_regions}", f"{count / grid.n_regions:.0%}", amount(regions)]
        print(line.format(*cells))
    print("\nread most, over all layers and tokens:\n")
    for text in most:
        print(f"  {text}")


def report_cost(model: Any, answer: Answer, unit: str) -> None:
    """Tokens, FLOPs of the language model as selected and seconds, beside coarse-only and dense high resolution."""
    sequence, stats = answer.length, answer.stream.source.stats
    fine = int(answer.stream.region_valid.sum())
    flops, read = gflop(model, answer)
    line = "{:<23}{:>19}{:>18}{:>15}{:>14}{:>18}"
    names = ("tokens in sequence", "fine tokens read", "prefill GFLOP", "answer GFLOP", "s to first token")
    print("\n" + line.format("", *names))
    rows = (
        (COARSE, sequence, "-"),
        (FLEX, sequence, f"{read:,.0f} per layer"),
        (DENSE, sequence + fine, "all"),
    )
    for name, tokens, what in rows:
        spent = f"{answer.seconds[name]:.3f}" if name in answer.seconds else "not run"
        print(line.format(name, f"{tokens:,}", what, *flops[name], spent))
    print(
        "GFLOP are the language model's; seconds begin with the coarse view made, and fine tokens yet to encode"
    )
    total = answer.stream.source.n_tiles
    print(f"encoded on demand: {stats.units} of {total} {unit}s, {stats.seconds:.1f} s")


def gflop(model: Any, answer: Answer) -> tuple[dict[str, tuple[str, str]], float]:
    """GFLOP of prefill and of the rest of the answer by way, and fine tokens read per layer at the prompt."""
    layers, grid = model.flex_config.layers, answer.stream.grid
    coarse, text = grid.n_coarse, answer.length - grid.n_coarse
    tokens = answer.stream.region_valid.sum(dim=1)
    fine, seen = int(tokens.sum()), dict.fromkeys(layers, torch.zeros(grid.n_regions, dtype=torch.bool))
    reads, steps = [], []
    for position in sorted({r.position for r in answer.trace}):
        chosen = {r.read_in: r.regions for r in answer.trace.where(position=position, level=1)}
        reads.append([int(tokens[chosen[layer]].sum()) for layer in layers])
        # a region is projected the first time a layer reads it, then it is cached
        new = [int(tokens[chosen[layer] & ~seen[layer]].sum()) for layer in layers]
        seen = {layer: seen[layer] | chosen[layer] for layer in layers}
        steps.append((position + 1, reads[-1], new))
    mean = sum(reads[0]) / len(layers)
    try:
        shape = DecoderShape.from_config(model.config, reading=layers)
    except ValueError:  # a mixture of experts, whose work no config tells
        return dict.fromkeys((COARSE, FLEX, DENSE), ("-", "-")), mean
    (_, read, new), rest = steps[0], steps[1:]
    costs = {
        COARSE: [coarse_prefill(shape, text, coarse), *(decode(shape, n) for n, _, _ in rest)],
        FLEX: [flex_prefill(shape, text, coarse, new, read), *(decode(shape, n, r, p) for n, r, p in rest)],
        DENSE: [dense_prefill(shape, text, coarse, fine), *(decode(shape, n + fine) for n, _, _ in rest)],
    }
    totals = {name: [cost.total / 1e9 for cost in own] for name, own in costs.items()}
    return {name: (f"{own[0]:,.3f}", f"{sum(own[1:]):,.3f}") for name, own in totals.items()}, mean


def report_answer(processor: Any, answer: Answer, question: str, note: str, output: Path) -> None:
    """Question, answer, and where the picture is."""
    said = processor.decode(answer.tokens, skip_special_tokens=True).strip()
    print(f"\nquestion  {question}\nanswer    {said!r}{note}\npicture   {output}")
