"""Ask a question about a photo, and see where the model looked to answer it.

    python examples/image.py                                        # a tiny random model: shows the mechanism only
    python examples/image.py --model PATH --image PHOTO --question "What does the sign say?"

Prints what was selected in each layer and what it cost, and writes the photo with the regions that were read.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.generation.streamers import BaseStreamer

import flexcore
from flexcore.cost import DecoderShape, coarse_prefill, decode, dense_prefill, flex_prefill
from flexcore.hf.checkpoint import read_adapter_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 2 if what was asked for can't be done."""
    try:
        run(arguments(argv))
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what can be checked before a model loads is checked here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--image", type=Path, help="default: a photograph that scikit-image carries")
    add("--model", help="a LLaVA checkpoint; default: a tiny random one, whose answer is noise")
    add(
        "--fine-weights",
        type=Path,
        help="a folder of trained fine weights; default: copies of the layer's own K/V",
    )
    add("--question", default="What is standing in the garage?")
    add("--zoom", type=int, default=3, help="fine tokens per coarse token and axis")
    add("--selector", default="threshold", help="threshold, top_k, top_p, random, all, or a plug-in's")
    add("--threshold", type=int, default=48, help="for threshold, in 1/255ths")
    add("--top-k", type=int, help="for top_k and random: regions per layer")
    add("--first-layer", type=int, help="first layer that selects; default: a quarter of the depth")
    add("--max-new-tokens", type=int, default=20)
    add("--output", type=Path, default=Path("looked_at.png"), help="where the picture goes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])
    args = parser.parse_args(argv)
    args.image = args.image or default_photo()
    if not args.image.is_file():
        raise FileNotFoundError(f"--image: there is no file {args.image}")
    if not args.output.parent.is_dir():
        raise FileNotFoundError(f"--output: there is no folder {args.output.parent}")
    if Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--output must end like a picture, as in looked_at.png, got {args.output}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    return args


def run(args: argparse.Namespace) -> None:
    """Load, wrap, look, answer, report."""
    model, processor = load(args)
    if args.fine_weights:  # trained weights come with the settings they were trained for
        flexcore.wrap(model, read_adapter_config(args.fine_weights)[0])
        flexcore.load_adapter_weights(model, args.fine_weights)
    else:
        chosen = {"selector": args.selector, "threshold": args.threshold, "top_k": args.top_k}
        flexcore.wrap(model, flexcore.FlexConfig(first_layer=args.first_layer, **chosen))

    started = time.perf_counter()
    adapter = flexcore.load_adapter("image", model, processor, zoom=args.zoom)
    inputs = adapter(text=[prompt(processor, args.question)], images=[args.image]).to(args.device)
    encoded = time.perf_counter()
    bar = tqdm(total=args.max_new_tokens, desc="answering", unit="token", leave=False, disable=None)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "streamer": Counter(bar)}
    with flexcore.trace(model) as trace, bar:
        out = model.generate(**inputs, **options)
    answered = time.perf_counter()

    length, stream = inputs["input_ids"].shape[1], inputs["flex_streams"].samples[0][0]
    report_selection(model, trace, stream)
    report_cost(model, trace, stream, length)
    answer = processor.decode(out[0, length:], skip_special_tokens=True).strip()
    noise = "" if args.model else " (noise: this model's weights are random)"
    print(f"\nquestion  {args.question}\nanswer    {answer!r}{noise}")
    print(f"seconds   {encoded - started:.1f} to encode, {answered - encoded:.1f} to answer")
    trace.overlay(args.image).save(args.output)
    print(f"picture   {args.output}")


def default_photo() -> Path:
    """A photograph from scikit-image's own files; nothing is downloaded."""
    try:
        return Path(str(files("skimage") / "data" / "motorcycle_left.png"))
    except ModuleNotFoundError:
        raise ValueError("without --image scikit-image is needed: pip install 'flexcore[image]'") from None


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its processor."""
    if args.model:
        print(f"loading {args.model}")
        try:
            processor = AutoProcessor.from_pretrained(args.model)
            model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=args.dtype).eval()
        except (ValueError, OSError) as error:
            raise ValueError(f"--model {args.model} can't be loaded: {error}") from error
    else:
        from flexcore.hf.tiny import tiny_llava

        print("no --model: a tiny LLaVA with random weights; where it looks and what it says is noise")
        # LLaVA-1.5's view of a picture, 24x24 coarse tokens, in front of a decoder of no size
        model, processor = tiny_llava(layers=8, image_size=336, patch_size=14)
        model = model if args.dtype == "auto" else model.to(getattr(torch, args.dtype))
    return model.to(args.device), processor


def prompt(processor: Any, question: str) -> str:
    """The question in the model's own chat format, or in LLaVA-1.5's."""
    if getattr(processor, "chat_template", None):
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        return processor.apply_chat_template([message], add_generation_prompt=True)
    return f"USER: <image>\n{question} ASSISTANT:"


class Counter(BaseStreamer):
    """Moves a bar on by every token of the answer."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def put(self, value: torch.Tensor) -> None:
        self.bar.update(len(value) if value.ndim == 1 else 0)  # the prompt comes first, as a batch

    def end(self) -> None:
        self.bar.close()


def report_selection(model: Any, trace: flexcore.Trace, stream: flexcore.FineStream) -> None:
    """Per reading layer: the regions chosen for it, at the prompt's last row and over the whole answer."""
    grid = stream.grid
    tokens = stream.region_valid.sum(dim=1)  # fine tokens of each region that are not margin
    print(f"\n{grid.n_coarse} coarse tokens {grid.coarse}, {grid.n_fine} fine tokens {grid.fine}, ", end="")
    print(f"{grid.n_regions} regions {grid.region_shape}; chosen for each layer that reads:\n")
    line = "{:>5}   {:>24} {:>6} {:>12}   {:>24} {:>6} {:>12}"
    more = ("share", "fine tokens")
    print(line.format("layer", "regions, prompt's row", *more, "regions, whole answer", *more))
    for layer in model.flex_config.layers:
        records = trace.where(read_in=layer)
        cells = [str(layer)]
        for some in ([min(records, key=lambda r: r.position)], records):
            regions = torch.stack([r.regions for r in some]).any(dim=0)
            count, read = int(regions.sum()), int(tokens[regions].sum())
            cells += [f"{count} of {grid.n_regions}", f"{count / grid.n_regions:.0%}", f"{read:,}"]
        print(line.format(*cells))


def report_cost(model: Any, trace: flexcore.Trace, stream: flexcore.FineStream, length: int) -> None:
    """Tokens and FLOPs of the language model, as selected, beside coarse-only and dense high resolution."""
    layers = model.flex_config.layers
    shape = DecoderShape.from_config(model.config, reading=layers)
    coarse, fine, text = stream.grid.n_coarse, stream.grid.n_fine, length - stream.grid.n_coarse
    tokens = stream.region_valid.sum(dim=1)
    plain, flex, dense, reads = [], [], [], []
    seen = dict.fromkeys(layers, torch.zeros(stream.grid.n_regions, dtype=torch.bool))
    for position in sorted({r.position for r in trace}):
        chosen = {r.read_in: r.regions for r in trace.where(position=position)}
        read = [int(tokens[chosen[layer]].sum()) for layer in layers]
        # a region is projected the first time a layer reads it, then it is cached
        new = [int(tokens[chosen[layer] & ~seen[layer]].sum()) for layer in layers]
        seen = {layer: seen[layer] | chosen[layer] for layer in layers}
        reads.append(sum(read) / len(read))
        if len(reads) == 1:
            plain.append(coarse_prefill(shape, text, coarse))
            flex.append(flex_prefill(shape, text, coarse, fine_projected=new, fine_read=read))
            dense.append(dense_prefill(shape, text, coarse, fine))
        else:
            plain.append(decode(shape, position + 1))
            flex.append(decode(shape, position + 1, fine_read=read, fine_projected=new))
            dense.append(decode(shape, position + 1 + fine))
    line = "{:<24}{:>19}{:>21}{:>15}{:>15}"
    print("\n" + line.format("", "tokens in sequence", "fine tokens read", "prefill GFLOP", "answer GFLOP"))
    for name, sequence, fine_read, costs in (
        ("coarse only", length, "-", plain),
        ("flex", length, f"{reads[0]:,.0f} per layer", flex),
        ("dense high resolution", length + fine, "in the sequence", dense),
    ):
        gflop = [cost.total / 1e9 for cost in costs]
        print(line.format(name, f"{sequence:,}", fine_read, f"{gflop[0]:,.3f}", f"{sum(gflop[1:]):,.3f}"))


if __name__ == "__main__":
    sys.exit(main())
