"""The Whisper adapter: pooled states for the cross-attention, full-rate ones by region."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip(
    "soundfile", reason="soundfile reads the files (pip install 'flexcore[audio]')"
)
pytest.importorskip("torchaudio", reason="torchaudio resamples (pip install 'flexcore[audio]')")

import flexcore  # noqa: E402
from flexcore.errors import StreamError, UnsupportedModelError  # noqa: E402
from flexcore.hf.tiny import tiny_llama  # noqa: E402
from flexcore.hf.tiny_audio import tiny_audio_tokenizer, tiny_whisper  # noqa: E402
from flexcore_adapters.audio_io import Recording  # noqa: E402
from flexcore_adapters.audio_whisper import StatePooling, WhisperAdapter  # noqa: E402

RATE = 16000


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    at = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(seed).normal(size=len(at))
    return (0.3 * np.sin(2 * np.pi * 150 * (1 + at) * at) + 0.05 * noise).astype(np.float32)


def adapter(**options: Any) -> WhisperAdapter:
    return flexcore.load_adapter("whisper", *tiny_whisper(), **options)


def wrapped(config: flexcore.FlexConfig) -> tuple[Any, WhisperAdapter]:
    """A wrapped tiny Whisper, its fine weights disturbed."""
    model, processor = tiny_whisper()
    flexcore.wrap(model, config)
    ears = flexcore.load_adapter("whisper", model, processor)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.flex_fine.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, ears


def states(model: Any, processor: Any, samples: np.ndarray) -> torch.Tensor:
    made = processor.feature_extractor(samples, sampling_rate=RATE, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        return model.model.encoder(made["input_features"]).last_hidden_state[0]


# ---------------------------------------------------------------------- what the model gets


@pytest.mark.parametrize("pool", [1, 4, 10, 50])
def test_pooled_and_full_states(pool: int) -> None:
    model, processor = tiny_whisper()
    ears = WhisperAdapter(model, processor, pool=pool)
    inputs = ears(audio=[(sound(1.13), RATE), (sound(2.0, 1), RATE)])
    pooled = inputs["encoder_outputs"].last_hidden_state
    assert pooled.shape == (2, 100 // pool, 64)
    for row, samples in enumerate((sound(1.13), sound(2.0, 1))):
        full = states(model, processor, samples)
        ((stream,)) = inputs["flex_streams"].samples[row]
        assert torch.allclose(stream.source.tensor, full, atol=1e-5)
        for cell in range(100 // pool):
            assert torch.allclose(pooled[row, cell], full[cell * pool : (cell + 1) * pool].mean(0), atol=1e-5)
    short, long = (sample[0] for sample in inputs["flex_streams"].samples)
    # 1.13 s are 56.5 states: the silence after them is in the pooled view, and never read
    assert int(short.valid.sum()) == 57 and bool(long.valid.all())
    assert torch.equal(short.coarse_positions, torch.arange(100 // pool))


def test_a_trained_pooling_takes_the_averages_place() -> None:
    model, processor = tiny_whisper()
    pooling = StatePooling(64, 10)
    fresh = WhisperAdapter(model, processor, pooling=pooling)(audio=(sound(1.0), RATE))
    plain = WhisperAdapter(model, processor)(audio=(sound(1.0), RATE))
    a, b = (i["encoder_outputs"].last_hidden_state for i in (fresh, plain))
    assert torch.allclose(a, b, atol=1e-6)
    torch.nn.init.normal_(pooling.mix.weight, std=0.1)
    changed = WhisperAdapter(model, processor, pooling=pooling)(audio=(sound(1.0), RATE))
    assert float((changed["encoder_outputs"].last_hidden_state - b).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="pooling must make 10 states of 100, got 20"):
        WhisperAdapter(model, processor, pooling=StatePooling(64, 5))(audio=(sound(1.0), RATE))


def test_the_plain_model_takes_the_pooled_states() -> None:
    ears = adapter()
    inputs = ears(["hi", "a longer one"], audio=[(sound(1.0), RATE), (sound(0.5), RATE)])
    assert inputs["labels"].shape[0] == 2 and bool((inputs["labels"][0] == -100).any())
    inputs.pop("flex_streams")
    loss = ears.model(**inputs).loss
    assert bool(loss.isfinite())
    inputs.pop("labels")
    assert ears.model.generate(**inputs, max_new_tokens=4).shape[0] == 2


def test_moving_and_casting() -> None:
    inputs = adapter()(audio=(sound(1.0), RATE)).to(torch.bfloat16)
    assert inputs["encoder_outputs"].last_hidden_state.dtype == torch.bfloat16
    ((stream,),) = inputs["flex_streams"].samples
    assert stream.source.dtype == torch.bfloat16


def test_files_and_parts(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sound(5.0), RATE, subtype="FLOAT")
    ears = adapter()
    with pytest.raises(
        ValueError, match=r"a.wav' must be at most 2 s long, the encoder's window, it is 0:05.0"
    ):
        ears(audio=tmp_path / "a.wav")
    part = ears(audio=Recording(tmp_path / "a.wav", start=1.0, stop=2.5))
    own = ears(audio=(sound(5.0)[RATE : 5 * RATE // 2], RATE))
    a, b = (i["encoder_outputs"].last_hidden_state for i in (part, own))
    assert torch.equal(a, b)
    ((stream,),) = part["flex_streams"].samples
    assert ears.seconds(stream.grid, 7) == pytest.approx((1.4, 1.5))


def test_what_is_refused() -> None:
    ears = adapter()
    with pytest.raises(StreamError, match="one recording per sample, got 0"):
        ears()
    with pytest.raises(StreamError, match="got 1 for 2 texts"):
        ears(["a", "b"], audio=(sound(1.0), RATE))
    with pytest.raises(TypeError, match="takes text and audio, got padding"):
        ears(audio=(sound(1.0), RATE), padding=True)
    with pytest.raises(ValueError, match="pool must divide the 100 fine frames"):
        adapter(pool=7)
    with pytest.raises(ValueError, match="region_size must be an integer >= 1, got 0"):
        adapter(region_size=0)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM isn't one"):
        WhisperAdapter(tiny_llama(), tiny_audio_tokenizer())
    model, _ = tiny_whisper()
    with pytest.raises(ValueError, match="windows of 200 columns; got 300"):
        WhisperAdapter(model, tiny_whisper(seconds=3)[1])


# ---------------------------------------------------------------------- reading in the cross-attention


def test_a_batch_equals_its_samples_alone() -> None:
    model, ears = wrapped(flexcore.FlexConfig(first_layer=0, selector="top_k", top_k=2, region_size=5))
    media = [(sound(1.9, seed), RATE) for seed in range(3)]
    together = model.generate(**ears(audio=media), **_STEPS)
    for row, medium in enumerate(media):
        alone = model.generate(**ears(audio=medium), **_STEPS)
        for a, b in zip(together.logits, alone.logits, strict=True):
            assert float((a[row] - b[0]).abs().max()) < 5e-5


def test_reading_changes_the_answer_and_nothing_selected_does_not() -> None:
    plain, _ = tiny_whisper()
    for config, least, most in (
        (flexcore.FlexConfig(first_layer=0, selector="top_k", top_k=2), 1e-3, float("inf")),
        (flexcore.FlexConfig(first_layer=0, selector="threshold", threshold=255), 0.0, 0.0),
    ):
        model, ears = wrapped(config)
        inputs = ears(audio=(sound(1.7), RATE))
        found = model.generate(**inputs, **_STEPS)
        inputs.pop("flex_streams")
        expected = plain.generate(**inputs, **_STEPS)
        gap = float((found.logits[0] - expected.logits[0]).abs().max())
        assert least <= gap <= most


def test_teacher_forcing_equals_generation() -> None:
    model, ears = wrapped(flexcore.FlexConfig(first_layer=0, selector="top_k", top_k=2, region_size=5))
    inputs = ears(audio=(sound(1.7), RATE))
    out = model.generate(**inputs, **_STEPS)
    ids = out.sequences[:, -4:]
    labels = ids.clone()
    with torch.no_grad():
        forced = model(**inputs, labels=labels).logits
    for step, logits in enumerate(out.logits):
        assert float((forced[:, step] - logits).abs().max()) < 5e-5


_STEPS: dict[str, Any] = {
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
