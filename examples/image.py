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
from pathlib import Path
from typing import Any

import common
from asking import Answer, ask

import flexcore
from flexcore.viz import region_boxes
from flexcore_adapters.extras import carried
from flexcore_adapters.image_io import image_size, open_header, orientation


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 2 if what was asked for can't be done."""
    return common.main(run, lambda: arguments(argv))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--image", type=Path, help="default: a photograph that scikit-image carries")
    add("--model", help="a checkpoint like LLaVA's, LLaVA-NeXT's or Qwen2-VL's; default: a tiny random LLaVA")
    add("--zoom", type=int, help="fine tokens per coarse token and axis; default: the adapter's, 3 for LLaVA")
    add("--max-pixels", type=int, help="the largest picture accepted; default: Pillow's limit")
    question = "What is standing in the garage?"
    common.add_options(parser, question=question, selector="threshold", threshold=48, output="looked_at.png")
    args = parser.parse_args(argv)
    args.image = args.image or default_photo()
    if not args.image.is_file():
        raise FileNotFoundError(f"--image: there is no file {args.image}")
    return common.check_options(args)


def default_photo() -> Path:
    """A photograph from scikit-image's own files."""
    return carried("scikit-image", "motorcycle_left.png", "image")


def run(args: argparse.Namespace) -> None:
    """Load, wrap, look, answer, report."""
    size = photo_size(args.image)
    model, processor, note = model_of(args)
    if not flexcore.is_wrapped(model):
        common.wrap(model, args)
    given = {"zoom": args.zoom, "max_pixels": args.max_pixels}
    options = {name: value for name, value in given.items() if value is not None}
    started = time.perf_counter()
    adapter = flexcore.load_adapter("image", model, processor, **options)
    text = common.prompt(adapter, args.question, {"type": "image"})
    inputs = adapter(text=[text], images=[args.image]).to(args.device)
    seconds = time.perf_counter() - started
    print(f"looking at {args.image.name}, {size[0]}x{size[1]}; coarse view made in {seconds:.1f} s")

    answer = ask(model, inputs, args, lambda: adapter.sources(adapter.views([args.image]))[0], "tile")
    tokens = answer.stream.region_valid.sum(dim=1)  # fine tokens of each region that are not margin
    common.report_selection(
        model, answer, "fine tokens", lambda r: f"{int(tokens[r].sum()):,}", most_read(answer, size)
    )
    common.report_cost(model, answer, "tile")
    report_windows(answer)
    answer.trace.overlay(args.image).save(args.output)
    common.report_answer(processor, answer, args.question, note, args.output)


def photo_size(path: Path) -> tuple[int, int]:
    """Width and height of the upright photo, from its header alone."""
    width, height = image_size(path)
    with open_header(path) as header:
        turned = orientation(header) > 4
    return (height, width) if turned else (width, height)


def model_of(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """The model, its processor, and what to say about its answer."""
    if args.model:
        return (*common.load(args), "")
    from flexcore.hf.tiny import tiny_llava

    print("no --model: a tiny LLaVA with random weights; where it looks and what it says is noise")
    # LLaVA-1.5's view of a picture, 24x24 coarse tokens, in front of a decoder of no size
    model, processor = tiny_llava(layers=8, image_size=336, patch_size=14)
    return common.place(model, args), processor, common.NOISE


def report_windows(answer: Answer) -> None:
    """What reading a large picture by window took."""
    windows = getattr(answer.stream.source, "windows", None)
    if windows is None or not windows.windows:
        return
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        memory = f"; peak memory {peak / 2**20:,.0f} MiB"
    except ImportError:  # not a Unix
        memory = ""
    print(
        f"read by window: {windows.windows} windows of {windows.peak_bytes / 2**20:.1f} MiB at most, spooled "
        f"{windows.spool_bytes / 2**20:,.0f} MiB, {windows.seconds:.1f} s{memory}"
    )


def most_read(answer: Answer, size: tuple[int, int], most: int = 5) -> list[str]:
    """The boxes of the photo that were read most: how often, and where."""
    weights = answer.trace.looked_at()
    places = region_boxes(answer.stream.grid, size)
    order = [int(r) for r in weights.argsort(descending=True, stable=True) if weights[r] > 0]
    lines = [f"{float(weights[r]):>4.0%}  {places[r]}" for r in order if r in places][:most]
    return ["share of all reads, box as (left, top, right, bottom) in pixels", *lines]


if __name__ == "__main__":
    sys.exit(main())
