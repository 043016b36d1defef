"""One measurement of `benchmarks.scale`, in a process of its own: a medium, a tiny model and one question.

    python -m benchmarks.scale_probe video CLIP
    python -m benchmarks.scale_probe audio RECORDING
    python -m benchmarks.scale_probe image PHOTO --zoom 9

The last line is JSON: seconds to open and to answer, the most memory held beyond that of the model, and what was
encoded. A process of its own, because what one question held at its peak can't be told from the next one's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import flexcore
from flexcore.hf.tiny import tiny_llama, tiny_llava
from flexcore.hf.tiny_audio import tiny_audio_tokenizer

NEW_TOKENS = 16
OPENINGS = 3
REGIONS = 3  # per layer and row, whatever the medium's length
CELL_SECONDS = 30  # of sound in a coarse token: ten hours are 1,200 of them
WIDTH = 64  # of the tiny models


def video(model_options: dict[str, Any], zoom: int | None) -> tuple[Any, Callable[[str], Any]]:
    """A video adapter with its default numbers of frames."""
    from flexcore_adapters.video_io import open_video

    model, processor = tiny_llava(**model_options)
    flexcore.wrap(model, _config(region_size=3))
    adapter = flexcore.load_adapter("video", model, processor, progress=False)
    return adapter, lambda path: open_video(path, decoder=adapter.decoder)


def audio(model_options: dict[str, Any], zoom: int | None) -> tuple[Any, Callable[[str], Any]]:
    """A spectrogram encoder in front of a text model."""
    from flexcore_adapters.audio_encoders import SpectrogramEncoder
    from flexcore_adapters.audio_io import Recording

    tokenizer = tiny_audio_tokenizer()
    model = tiny_llama(vocab=len(tokenizer), max_position_embeddings=1 << 17, **model_options)
    flexcore.wrap(model, _config(region_size=50))
    encoder = SpectrogramEncoder(
        WIDTH, rate=16000, mels=32, hop=800, seconds=CELL_SECONDS, pool=CELL_SECONDS * 10
    )
    adapter = flexcore.load_adapter("audio", model, tokenizer, encoder=encoder, progress=False)
    return adapter, Recording


def image(model_options: dict[str, Any], zoom: int | None) -> tuple[Any, Callable[[str], Any]]:
    """An image adapter whose fine view has `zoom * zoom` tiles."""
    from flexcore_adapters.image_io import load_image

    model, processor = tiny_llava(**model_options)
    flexcore.wrap(model, _config(region_size=3))
    adapter = flexcore.load_adapter("image", model, processor, zoom=zoom or 3, progress=False)
    return adapter, load_image


MEDIA = {"video": video, "audio": audio, "image": image}


def measure(
    medium: str, path: str, zoom: int | None = None, repeats: int = 1, size: int = 48
) -> dict[str, Any]:
    """Build the model, note what memory it takes, then ask.

    Args:
        medium: `video`, `audio` or `image`.
        path: Of the file.
        zoom: Of an image adapter.
        repeats: Questions, each with the file opened anew; the first pays for set-up.
        size: Side of the vision tower's view in pixels.

    Returns:
        Seconds of every opening and every question, by the clock and of this process's work; peak memory in MiB, of
        this process and of the decoder's; and counts.
    """
    torch.set_num_threads(1)
    vision = {} if medium == "audio" else {"image_size": size}
    adapter, open_medium = MEDIA[medium](vision, zoom)
    prompt = f"USER: {adapter.placeholder} What happens? ASSISTANT:"
    reset_peak()
    before = memory("VmRSS")
    opening, answering, working = [], [], []
    for _ in range(repeats):
        started, worked = time.perf_counter(), time.process_time()
        opened = open_medium(path)
        opening.append(time.perf_counter() - started)
        inputs = adapter(prompt, **{adapter.keyword: [opened]})
        settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        adapter.model.generate(**inputs, **settings)
        answering.append(time.perf_counter() - started)
        working.append(time.process_time() - worked)
    for _ in range(OPENINGS - repeats):  # other programs may have been in the way
        started = time.perf_counter()
        open_medium(path)
        opening.append(time.perf_counter() - started)
    stream = inputs["flex_streams"].samples[0][0]
    stats = stream.source.stats
    return {
        "open seconds": opening,
        "seconds": answering,
        "CPU seconds": working,
        "peak MiB": memory("VmHWM"),
        "over the model MiB": memory("VmHWM") - before,
        "decoder MiB": sum(memory("VmHWM", child) for child in children()),
        "coarse tokens": stream.grid.n_coarse,
        "fine tokens": stream.grid.n_fine,
        "regions": stream.grid.n_regions,
        "units": stream.source.n_tiles,
        "encoded": stats.units,
    }


# ---------------------------------------------------------------------- memory


def reset_peak() -> None:
    """Forget the peak of importing and building, where the kernel lets a process do so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def memory(field: str, pid: int | str = "self") -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of a process in MiB.

    `getrusage` won't do: Linux hands a process's peak on to the programs it starts, so a child of a large process
    seems large whatever it does.

    Raises:
        RuntimeError: The system doesn't say.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024
    except (OSError, StopIteration):
        raise RuntimeError(f"peak memory is read from /proc/{pid}/status, which only Linux has") from None


def children() -> list[int]:
    """Processes that this one started and that still run; the video decoder is one."""
    return [
        int(pid)
        for thread in Path("/proc/self/task").glob("*/children")
        for pid in thread.read_text().split()
    ]


def _config(region_size: int) -> flexcore.FlexConfig:
    return flexcore.FlexConfig(first_layer=1, selector="top_k", top_k=REGIONS, region_size=region_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure once and print it; 2 if it can't be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("medium", choices=list(MEDIA))
    parser.add_argument("path")
    parser.add_argument("--zoom", type=int)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--size", type=int, default=48, help="side of the vision tower's view in pixels")
    args = parser.parse_args(argv)
    try:
        found = measure(args.medium, args.path, args.zoom, args.repeats, args.size)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
