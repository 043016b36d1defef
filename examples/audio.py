"""Ask a question about a recording, and see which seconds the model listened to closely to answer it.

    python examples/audio.py                                        # a tiny random model: shows the mechanism only
    python examples/audio.py --model PATH --audio FILE --question "What is announced?"

Without `--audio` it listens to 44 seconds of A Tale of Two Cities, read aloud, which the package moonshine-voice
carries (a dependency of `flexcore[audio]` that is never imported). Prints what was selected in each layer and what it
cost, and writes a spectrogram with the regions that were read.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from asking import Answer, ask

import flexcore
from flexcore_adapters.audio_io import Recording, clock
from flexcore_adapters.audio_picture import save_picture
from flexcore_adapters.extras import carried

FRAMES_PER_SECOND = 50  # of towers like Whisper's


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 2 if what was asked for can't be done."""
    return common.main(run, lambda: arguments(argv))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--audio", type=Path, help="default: a reading that moonshine-voice carries")
    add("--start", type=float, default=0.0, help="where to begin, in seconds")
    add("--stop", type=float, help="where to end, in seconds")
    add(
        "--model", help="an Audio Flamingo 3 or Qwen2-Audio checkpoint; default: a tiny random Audio Flamingo"
    )
    add("--pool", type=int, help="20 ms frames per coarse token; default: the model's own 2")
    add("--region-seconds", type=float, default=0.5, help="length of what is chosen and read at once")
    question = "What kind of times were these?"
    common.add_options(
        parser, question=question, selector="top_k", threshold=48, output="looked_at_audio.png"
    )
    args = parser.parse_args(argv)
    args.audio = args.audio or default_recording()
    args.recording = Recording(args.audio, start=args.start, stop=args.stop)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the picture needs matplotlib: pip install 'flexcore[audio]'")
    return common.check_options(args)


def default_recording() -> Path:
    """A recording among moonshine-voice's own files."""
    return carried("moonshine-voice", "two_cities.wav", "audio")


def run(args: argparse.Namespace) -> None:
    """Load, wrap, listen, answer, report."""
    model, processor, note = model_of(args)
    common.wrap(model, args)
    side = max(1, round(args.region_seconds * FRAMES_PER_SECOND))
    started, recording = time.perf_counter(), args.recording
    adapter = flexcore.load_adapter("audio", model, processor, pool=args.pool, region_size=side)
    text = common.prompt(adapter, args.question, {"type": "audio", "path": ""})
    inputs = adapter(text, audio=recording).to(args.device)
    seconds = time.perf_counter() - started
    print(f"listening to {recording.seconds:.1f} s of {args.audio.name}; coarse view made in {seconds:.1f} s")

    answer = ask(model, inputs, args, lambda: adapter.sources(adapter.views([recording]))[0], "window")
    grid, weights = answer.stream.grid, answer.trace.looked_at()
    common.report_selection(
        model, answer, "seconds", lambda r: f"{listened(adapter, grid, r):.1f}", most_read(answer, adapter)
    )
    common.report_cost(model, answer, "window")
    each = [listened(adapter, grid, r.regions) for r in answer.trace if r.read_in is not None]
    title = f"{args.audio.name}: a row reads {sum(each) / len(each):.1f} of {recording.seconds:.1f} s in each layer"
    title += " (a tiny model with random weights)" if note else ""
    save_picture(args.output, recording, grid, weights, adapter.encoder.layout.frame_seconds, title)
    common.report_answer(processor, answer, args.question, note, args.output)


def model_of(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """The model, its processor, and what to say about its answer."""
    if args.model:
        return (*common.load(args, audio_class), "")
    from flexcore.hf.tiny_audio import tiny_audio_flamingo

    print("no --model: a tiny Audio Flamingo with random weights; where it listens and what it says is noise")
    # in a model of no size, handing work to a second thread takes longer than doing it
    torch.set_num_threads(1)
    # Audio Flamingo's own windows of 30 s, 25 coarse tokens a second, in front of a decoder of no size
    model, processor = tiny_audio_flamingo(layers=8, seconds=30)
    return common.place(model, args), processor, common.NOISE


def audio_class(path: str) -> Any:
    """A checkpoint's own class: no single auto class takes all audio models."""
    import transformers

    return getattr(transformers, transformers.AutoConfig.from_pretrained(path).architectures[0])


def listened(adapter: Any, grid: flexcore.Grid, regions: torch.Tensor) -> float:
    """Seconds that some regions cover together; bands of the same moment count once."""
    spans = {adapter.seconds(grid, int(r)) for r in regions.nonzero()[:, 0]}
    return sum(stop - start for start, stop in spans)


def most_read(answer: Answer, adapter: Any, most: int = 5) -> list[str]:
    """The moments that were read most: how often, and when."""
    weights = answer.trace.looked_at()
    order = [int(r) for r in weights.argsort(descending=True, stable=True) if weights[r] > 0][:most]
    lines = ["share of all reads, moment"]
    for region in order:
        start, stop = map(clock, adapter.seconds(answer.stream.grid, region))
        lines.append(f"{float(weights[region]):>4.0%}  {start} to {stop}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
