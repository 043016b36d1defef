"""Ask a text-only model about a recording, and see which seconds of it were looked at.

    python demo.py

The model and the encoder are random, so where it looks and what it says is noise: this shows the mechanism.
"""

import math

import torch

import flexcore
from flexcore.hf.tiny import tiny_llama, tiny_tokenizer

RATE = 100  # samples per second


def recording(seconds: int = 60) -> torch.Tensor:
    """A slow oscillation on two sensors, `[T, 2]`, with a burst at 41 to 43 s on the second."""
    t = torch.arange(seconds * RATE) / RATE
    signal = torch.stack([torch.sin(t), torch.cos(t)], dim=1)
    burst = (t >= 41) & (t < 43)
    signal[burst, 1] += 4 * torch.sin(2 * math.pi * 12 * t[burst])
    return signal


def main() -> None:
    """Wrap, look, answer, report."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(layers=8, vocab=len(tokenizer))
    flexcore.wrap(model, flexcore.FlexConfig(selector="top_k", top_k=2))
    adapter = flexcore.load_adapter("timeseries", model, tokenizer, channels=2)

    signal = recording()
    inputs = adapter(text=["<series> What happened? "], series=[signal])
    with flexcore.trace(model) as trace:
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)

    stream = inputs["flex_streams"].samples[0][0]
    length = adapter.patch * adapter.window / RATE
    end = len(signal) / RATE
    print(f"{end:.0f} s, {len(signal)} samples: {stream.grid.n_coarse} coarse tokens of {length:.2f} s each")
    question = min(record.position for record in trace)
    for layer in model.flex_config.layers:
        (record,) = trace.where(read_in=layer, position=question)
        spans = [
            f"{r * length:.1f}-{min((r + 1) * length, end):.1f} s"
            for r in record.regions.nonzero()[:, 0].tolist()
        ]
        print(f"layer {layer} looked at {', '.join(spans)} to begin its answer")
    print(f"{stream.source.stats.units} of {stream.source.n_tiles} windows were encoded at the full rate")
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    print(f"answer {answer!r} (noise: the weights are random)")


if __name__ == "__main__":
    main()
