"""What looking at a very large picture takes: peak memory, spool and seconds, for a tiled TIFF and for a JPEG.

    python -m benchmarks.big_image                      # 20,000 x 20,000 pixels; needs about 2.5 GB of disk
    python -m benchmarks.big_image --side 6000 --json   # quick; the last line is JSON
    python -m benchmarks.big_image --zoom 40 --folder /scratch

Both files are made from a photograph that scikit-image carries, enlarged and repeated, and written piece by piece.
Each is asked about in a process of its own by a LLaVA with random weights and LLaVA-1.5's geometry of 24x24 coarse
tokens; the baseline is such a process with the photograph itself, at zoom 3.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tqdm import tqdm

PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"
ENLARGED = 4  # so that the picture isn't all edges
MIB = 1 << 20
ROOT = Path(__file__).parents[1]


def make(folder: Path, side: int) -> dict[str, Path]:
    """The photograph, a tiled TIFF of `side * side` pixels, and a JPEG of that."""
    import pyvips

    photo = Path(str(resources.files("skimage") / "data" / "astronaut.png"))
    files = {"photo": photo, "TIFF": folder / "big.tif", "JPEG": folder / "big.jpg"}
    once = pyvips.Image.new_from_file(str(photo)).resize(ENLARGED).cast("uchar")
    times = -(-side // once.width)
    whole = once.replicate(times, times).crop(0, 0, side, side)
    options = {"tile": True, "tile_width": 256, "tile_height": 256, "bigtiff": True}
    whole.tiffsave(str(files["TIFF"]), compression="deflate", level=1, predictor="horizontal", **options)
    pyvips.Image.new_from_file(str(files["TIFF"])).jpegsave(str(files["JPEG"]), Q=90)
    return files


def peak() -> int:
    """The most memory this process has held so far, in bytes."""
    try:
        # the kernel's own count of this program; getrusage starts with what the parent held when it forked
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) << 10
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10


def measure(path: Path, side: int, zoom: int, spool_dir: Path) -> dict[str, Any]:
    """Ask about one file in this process, and draw what was looked at."""
    import torch

    import flexcore
    from flexcore.hf.tiny import tiny_llava

    torch.manual_seed(0)
    model, processor = tiny_llava(layers=4, image_size=336, patch_size=14)
    flexcore.wrap(model, flexcore.FlexConfig(first_layer=1, selector="top_k", top_k=4))
    options = {"zoom": zoom, "max_pixels": side * side, "spool_dir": spool_dir, "progress": False}
    adapter = flexcore.load_adapter("image", model, processor, **options)
    loaded, started = peak(), time.perf_counter()
    inputs = adapter(text=PROMPT, images=path)
    opened = time.perf_counter()
    with flexcore.trace(model) as trace:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answered, held = time.perf_counter(), peak()
    picture = trace.overlay(path)
    source = inputs["flex_streams"].samples[0][0].source
    windows = getattr(source, "windows", None)
    return {
        "model loaded, bytes": loaded,
        "peak bytes": held,
        "peak bytes with overlay": peak(),
        "spool bytes": windows.spool_bytes if windows else 0,
        "largest window, bytes": windows.peak_bytes if windows else 0,
        "seconds to open": opened - started,
        "seconds to answer": answered - opened,
        "seconds to draw": time.perf_counter() - answered,
        "tiles encoded": source.stats.units,
        "tiles": source.n_tiles,
        "overlay": picture.size,
    }


def compare(folder: Path, side: int, zoom: int) -> dict[str, Any]:
    """Make the files and ask about each in a process of its own."""
    results: dict[str, Any] = {}
    with tqdm(total=4, desc="making the files", unit="step", disable=None) as bar:
        files = make(folder, side)
        bar.update()
        for kind, path in files.items():
            bar.set_description(f"asking about the {kind}")
            here = [sys.executable, "-m", "benchmarks.big_image", "--measure", str(path)]
            # the photograph's fine view is made whole: a small one, so that the baseline is the model's own memory
            own = zoom if kind != "photo" else min(zoom, 3)
            command = [*here, "--side", str(side), "--zoom", str(own), "--folder", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            results[kind] = json.loads(done.stdout.splitlines()[-1])
            results[kind]["file bytes"] = path.stat().st_size
            bar.update()
    return results


def report(results: dict[str, Any], side: int) -> None:
    """Print a table; memory is what was held beyond the baseline's peak."""
    print(f"\n{side} x {side} pixels, {3 * side * side / MIB:,.0f} MiB decoded; MiB, and seconds\n")
    line = "{:<7}{:>9}{:>9}{:>15}{:>9}{:>9}{:>9}{:>9}{:>9}{:>12}"
    columns = ("file", "peak", "over baseline", "overlay", "spool", "opening", "answer", "drawing", "tiles")
    print(line.format("", *columns))
    base = results["photo"]
    for kind, one in results.items():
        over = [(one[k] - base[k]) / MIB for k in ("peak bytes", "peak bytes with overlay")]
        sizes = [one["file bytes"] / MIB, one["peak bytes"] / MIB, *over, one["spool bytes"] / MIB]
        seconds = [one[f"seconds to {what}"] for what in ("open", "answer", "draw")]
        tiles = f"{one['tiles encoded']} of {one['tiles']}"
        print(line.format(kind, *(f"{n:,.0f}" for n in sizes), *(f"{s:,.1f}" for s in seconds), tiles))


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--side", type=int, default=20_000, help="pixels on a side")
    add("--zoom", type=int, default=20, help="tiles on a side of the fine view")
    add(
        "--folder", type=Path, help="where the files and the spool go; default: the system's temporary folder"
    )
    add("--json", action="store_true", help="end with one line of JSON")
    add("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.measure, args.side, args.zoom, args.folder)))
        return 0
    from flexcore_adapters.image_files import WINDOW_PIXELS

    if args.side**2 <= WINDOW_PIXELS or args.side > 65_535:
        least = int(WINDOW_PIXELS**0.5) + 1
        parser.error(
            f"--side must lie in {least}..65535: from there on pictures are read by window, up to there a JPEG goes"
        )
    if args.folder is not None and not args.folder.is_dir():
        parser.error(f"--folder: there is no folder {args.folder}")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="big-image-") as folder:
        results = compare(Path(folder), args.side, args.zoom)
    import pyvips

    from .environment import environment

    about = environment("benchmarks.big_image")
    about["versions"] |= {
        "pyvips": pyvips.__version__,
        "libvips": ".".join(str(pyvips.version(i)) for i in range(3)),
    }
    report(results, args.side)
    print(f"\n{about['command']}")
    for name in ("versions", "machine"):
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in about[name].items()))
    if args.json:
        print(json.dumps({**about, "side": args.side, "zoom": args.zoom, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
