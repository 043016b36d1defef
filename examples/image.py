"""Ask a question about a photo, and see where the model looked to answer it.

    python examples/image.py                    # the small trained model that ships, on a canvas and on a photo
    python examples/image.py --image PHOTO      # the same, with its digits placed in a photo of yours
    python examples/image.py --model PATH --image PHOTO --question "What does the sign say?"

Prints what was selected in each layer and what it cost, and writes the picture with the regions that were read. The
model that ships knows "What is in the green frame?", with red, blue, yellow, pink and cyan frames, and no more. It
misreads about one digit of six; a table of all six frames shows which.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import magnified
from asking import Answer, ask

import flexcore
from flexcore.viz import region_boxes
from flexcore_adapters.extras import carried
from flexcore_adapters.image_io import image_size, load_image, open_header, orientation

ASKED = "green"  # read right on both pictures; the table of all six frames shows what isn't


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 2 if what was asked for can't be done."""
    return common.main(run, lambda: arguments(argv))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--image",
        type=Path,
        help="default: a photograph that scikit-image carries; without --model digits go in",
    )
    add("--model", help="a checkpoint like LLaVA's, LLaVA-NeXT's or Qwen2-VL's; default: the one that ships")
    add("--zoom", type=int, help="fine tokens per coarse token and axis; default: the adapter's, 3 for LLaVA")
    add("--max-pixels", type=int, help="the largest picture accepted; default: Pillow's limit")
    common.add_options(parser, question="", selector="threshold", threshold=48, output="looked_at.png")
    parser.set_defaults(max_new_tokens=None)
    args = parser.parse_args(argv)
    if args.max_new_tokens is None:
        args.max_new_tokens = 20 if args.model else 1  # a digit is one token
    args.canvas = not args.model and not args.image
    args.image = args.image or default_photo()
    args.question = args.question or (
        "What is standing in the garage?" if args.model else magnified.QUESTION.format(ASKED)
    )
    if not args.image.is_file():
        raise FileNotFoundError(f"--image: there is no file {args.image}")
    if not args.model:
        for name in ("selector", "threshold", "top_k", "first_layer", "fine_weights", "zoom"):
            if getattr(args, name) != parser.get_default(name):
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} needs --model: the model that ships reads as it was trained to")
    return common.check_options(args)


def default_photo() -> Path:
    """A photograph from scikit-image's own files."""
    return carried("scikit-image", "motorcycle_left.png", "image")


def run(args: argparse.Namespace) -> None:
    """Load, wrap, look, answer, report."""
    given = {"zoom": args.zoom, "max_pixels": args.max_pixels}
    options = {name: value for name, value in given.items() if value is not None}
    if args.model:
        size = photo_size(args.image)
        model, processor = common.load(args)
        common.wrap(model, args)
        adapter = flexcore.load_adapter("image", model, processor, **options)
        look(model, processor, adapter, args.image, (args.image.name, size), args.output, args)
        return
    from flexcore.hf.magnifier import load_magnifier

    print(
        "no --model: the small model that ships, which reads digits in coloured frames (benchmarks/magnifier)"
    )
    model, processor = load_magnifier()
    adapter = flexcore.load_adapter("image", common.place(model, args), processor, **options)
    shown = [("canvas", *magnified.canvas())] if args.canvas else []
    photo = load_image(args.image, args.max_pixels)
    shown.append((args.image.name, *magnified.placed(photo)))
    for i, (name, picture, frames) in enumerate(shown):
        output = args.output if i == 0 else args.output.with_stem(f"{args.output.stem}_photo")
        print(f"\n---- {name}")
        look(model, processor, adapter, picture, (name, picture.size), output, args)
        for frame in frames:
            if args.question == magnified.QUESTION.format(frame.colour):
                print(f"truth     {str(frame.digit)!r}")
        magnified.report_all(model, processor, adapter, picture, frames)


def look(
    model: Any,
    processor: Any,
    adapter: Any,
    image: Any,
    called: tuple[str, tuple[int, int]],
    output: Path,
    args: argparse.Namespace,
) -> None:
    """Ask about one picture, and report.

    Args:
        model: A wrapped model.
        processor: Its processor.
        adapter: Its image adapter.
        image: The picture, or its path.
        called: Its name, and its width and height.
        output: Where the picture with what was looked at goes.
        args: The options.
    """
    name, size = called
    started = time.perf_counter()
    text = common.prompt(adapter, args.question, {"type": "image"})
    inputs = adapter(text=[text], images=[image]).to(args.device)
    seconds = time.perf_counter() - started
    print(f"looking at {name}, {size[0]}x{size[1]}; coarse view made in {seconds:.1f} s")

    answer = ask(model, inputs, args, lambda: adapter.sources(adapter.views([image]))[0], "tile")
    tokens = answer.stream.region_valid.sum(dim=1)  # fine tokens of each region that are not margin
    common.report_selection(
        model, answer, "fine tokens", lambda r: f"{int(tokens[r].sum()):,}", most_read(answer, size)
    )
    common.report_cost(model, answer, "tile")
    report_windows(answer)
    answer.trace.overlay(image).save(output)
    common.report_answer(processor, answer, args.question, "", output)


def photo_size(path: Path) -> tuple[int, int]:
    """Width and height of the upright photo, from its header alone."""
    width, height = image_size(path)
    with open_header(path) as header:
        turned = orientation(header) > 4
    return (height, width) if turned else (width, height)


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
