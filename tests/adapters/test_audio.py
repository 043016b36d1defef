"""The audio adapter on a tiny Audio Flamingo, Qwen2-Audio and a text model with a spectrogram encoder."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip(
    "soundfile", reason="soundfile reads the files (pip install 'flexcore[audio]')"
)
pytest.importorskip("torchaudio", reason="torchaudio makes the spectrograms (pip install 'flexcore[audio]')")

import flexcore  # noqa: E402
from flexcore.errors import SourceError, StreamError, UnsupportedModelError  # noqa: E402
from flexcore.hf.processing import collate  # noqa: E402
from flexcore.hf.tiny import tiny_llama, tiny_llava, tiny_tokenizer  # noqa: E402
from flexcore.hf.tiny_audio import tiny_audio_flamingo, tiny_audio_tokenizer, tiny_whisper  # noqa: E402
from flexcore.sources import FineSource  # noqa: E402
from flexcore_adapters.audio import AudioAdapter  # noqa: E402
from flexcore_adapters.audio_encoders import SpectrogramEncoder  # noqa: E402
from flexcore_adapters.audio_io import Recording  # noqa: E402
from flexcore_adapters.audio_windows import Layout  # noqa: E402

RATE = 16000
PROMPT = "USER: <sound> What is said? ASSISTANT:"
TOP_2 = flexcore.FlexConfig(first_layer=1, selector="top_k", top_k=2)
KINDS = ["flamingo", "qwen2_audio", "pooled", "time", "bands"]


def sound(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    at = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(at))
    return (0.3 * np.sin(2 * np.pi * 150 * (1 + at) * at) + 0.05 * noise).astype(np.float32)


def encoder(bands: int = 1, pool: int = 10, seconds: float = 2.0) -> SpectrogramEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return SpectrogramEncoder(64, mels=16, bands=bands, pool=pool, seconds=seconds)


def qwen2_audio() -> tuple[Any, Any]:
    """A tiny Qwen2-Audio; its tower and projector are named as Audio Flamingo's, its masks are not."""
    from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioForConditionalGeneration

    flamingo, processor = tiny_audio_flamingo()
    tower = flamingo.config.audio_config
    fields = ("num_mel_bins", "max_source_positions")
    audio = Qwen2AudioEncoderConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        **{f: getattr(tower, f) for f in fields},
    )
    config = Qwen2AudioConfig(
        audio_config=audio,
        text_config=flamingo.config.text_config,
        audio_token_index=flamingo.config.audio_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2AudioForConditionalGeneration(config).eval(), processor


def make(kind: str, config: flexcore.FlexConfig | None = TOP_2, **options: Any) -> tuple[Any, AudioAdapter]:
    """A wrapped model, its fine weights disturbed, and its adapter."""
    if kind in ("flamingo", "pooled"):
        model, processor = tiny_audio_flamingo()
        options = {"pool": 20, **options} if kind == "pooled" else options
    elif kind == "qwen2_audio":
        model, processor = qwen2_audio()
    else:
        model, processor = tiny_llama(vocab=300), tiny_audio_tokenizer()
        options = {"encoder": encoder(bands=4 if kind == "bands" else 1), **options}
    if config is not None:
        flexcore.wrap(model, config)
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in model.flex_fine.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, flexcore.load_adapter("audio", model, processor, **options)


def logits(model: Any, inputs: Any, **kwargs: Any) -> list[torch.Tensor]:
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, **kwargs}
    return list(model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True).logits)


def features_of(source: FineSource) -> torch.Tensor:
    """All of a source's features in raster order, asked for region by region in any order."""
    grid = source.grid
    tokens = grid.tokens(torch.arange(grid.n_regions))
    out = torch.full((grid.n_fine, source.width), float("nan"))
    for region in torch.randperm(grid.n_regions).split(3):
        out[tokens[region][tokens[region] >= 0]] = source.features(region)[tokens[region] >= 0]
    return out


# ---------------------------------------------------------------------- what the model gets


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.5, 1.999, 2.0, 2.005, 5.3])
def test_the_coarse_view_is_the_processors_own(seconds: float) -> None:
    model, adapter = make("flamingo")
    samples = sound(seconds)
    inputs = adapter(PROMPT, audio=(samples, RATE))
    ((stream,),) = inputs["flex_streams"].samples
    assert stream.grid.fine == (2 * stream.grid.n_coarse,)
    if seconds < 0.05 or seconds == 2.005:  # the processor would make no token at all of so short a window
        model(**inputs)
        return
    plain = adapter.processor(text=[PROMPT], audio=[samples], sampling_rate=RATE)
    for name in ("input_ids", "attention_mask", "input_features", "input_features_mask"):
        assert torch.equal(inputs[name], plain[name]), name


def test_fine_frames_are_the_towers_before_it_averages() -> None:
    model, adapter = make("flamingo", None)
    inputs = adapter(PROMPT, audio=(sound(3.1), RATE))
    ((stream,),) = inputs["flex_streams"].samples
    seen = []
    hook = model.model.audio_tower.avg_pooler.register_forward_hook(lambda m, a, o: seen.append(a[0]))
    with torch.no_grad():
        own = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).pooler_output
        hook.remove()
        frames = seen[0].permute(0, 2, 1).flatten(0, 1)[: stream.grid.n_fine]
        expected = model.model.multi_modal_projector(model.model.audio_tower.layer_norm(frames))
    assert own.shape[0] == stream.grid.n_coarse == 77
    assert torch.allclose(features_of(stream.source), expected, atol=1e-5)
    assert model.model.audio_tower.avg_pooler.kernel_size in (2, (2,))


def test_pooled_cells_are_averages_of_frames() -> None:
    _, adapter = make("pooled")
    (view,) = adapter.views([(sound(5.3), RATE)])
    (source,) = adapter.sources([view])
    frames = features_of(source)
    held = 265  # of 5.3 s at 50 frames a second
    assert view.grid.coarse == (14,) and view.grid.fine == (280,)
    assert int(view.grid.fine_valid.sum()) == held
    for cell in range(14):
        expected = frames[cell * 20 : min(cell * 20 + 20, held)].mean(dim=0)
        assert torch.allclose(view.coarse[cell], expected, atol=1e-5)


@pytest.mark.parametrize("bands", [1, 4])
def test_spectrogram_encoder_is_its_own_formula(bands: int) -> None:
    module = encoder(bands)
    model = tiny_llama(vocab=300)
    adapter = AudioAdapter(model, tiny_audio_tokenizer(), encoder=module)
    samples = sound(3.0)
    (view,) = adapter.views([(samples, RATE)])
    assert view.grid.fine == ((150,) if bands == 1 else (150, 4))
    found = features_of(adapter.sources([view])[0])
    second = torch.zeros(2 * RATE)
    second[:RATE] = torch.from_numpy(samples[2 * RATE :])
    with torch.no_grad():
        power = module.mel(second)[:, :200]
        levels = (power.clamp(min=1e-10).log10() + 4) / 4
        weight = module.patch.weight[:, 0]
        rows = 16 // bands
        for frame, band in ((0, 0), (7, bands - 1), (49, 0)):
            patch = levels[band * rows : (band + 1) * rows, 2 * frame : 2 * frame + 2]
            value = module.project((weight * patch).sum(dim=(1, 2)) + module.patch.bias)
            assert torch.allclose(found[(100 + frame) * bands + band], value, atol=1e-5)
        # the coarse view: the same spectrogram with 10 columns averaged into one
        thin = power[:, 40:60].unflatten(1, (2, 10)).mean(dim=2)
        patch = ((thin.clamp(min=1e-10).log10() + 4) / 4)[:rows]
        value = module.project((weight * patch).sum(dim=(1, 2)) + module.patch.bias)
        assert torch.allclose(view.coarse[(10 + 2) * bands], value, atol=1e-5)


def embedded(model: Any, inputs: Any) -> dict[str, Any]:
    """The same inputs for the plain model: coarse cells in the embeddings, no streams."""
    out = {k: v for k, v in inputs.items() if k != "flex_streams"}
    if "input_features" not in out:
        embeds = model.get_input_embeddings()(out.pop("input_ids")).detach().clone()
        for row, sample in zip(embeds, inputs["flex_streams"].samples, strict=True):
            for stream in sample:
                row[stream.coarse_positions] = stream.coarse_embeds
        out["inputs_embeds"] = embeds
    return out


def test_any_tokenizer_gets_a_placeholder() -> None:
    model, own = tiny_llama(vocab=260), tiny_tokenizer()
    adapter = AudioAdapter(model, own, encoder=encoder())
    inputs = adapter(["USER: <audio> What?", "hello"], audio=[[(sound(3.0), RATE)], []])
    assert getattr(own, "audio_token", None) is None and int(inputs["input_ids"].max()) < 260
    ((stream,), none) = inputs["flex_streams"].samples
    (view,) = adapter.views([(sound(3.0), RATE)])
    assert none == () and torch.equal(stream.coarse_embeds, view.coarse)
    ids = own(["USER: ", " What?"])["input_ids"]
    found = inputs["input_ids"][0][inputs["attention_mask"][0] == 1].tolist()
    assert found == ids[0] + [own.pad_token_id] * view.grid.n_coarse + ids[1][1:]


# ---------------------------------------------------------------------- invariants


@pytest.mark.parametrize("kind", KINDS)
def test_on_demand_equals_up_front(kind: str) -> None:
    model, lazy = make(kind)
    options = (
        {"pool": 20} if kind == "pooled" else {"encoder": lazy.encoder} if kind in ("time", "bands") else {}
    )
    eager = AudioAdapter(model, lazy.processor, lazy=False, **options)
    media = [(sound(5.3), RATE), (sound(1.1, 22050, 1), 22050)]
    for a, b in zip(lazy.streams(media), eager.streams(media), strict=True):
        expected = features_of(b.source)
        assert torch.allclose(features_of(a.source), expected, rtol=1e-5, atol=1e-5)
        assert float((expected[1:] - expected[:-1]).abs().max()) > 1e-3
    texts = [PROMPT, PROMPT]
    one, two = (logits(model, adapter(texts, audio=media)) for adapter in (lazy, eager))
    for a, b in zip(one, two, strict=True):
        assert float((a - b).abs().max()) < 5e-5
    plain = logits(model, embedded(model, lazy(texts, audio=media)))
    assert float((plain[0] - one[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_equals_its_samples_alone(kind: str) -> None:
    """Two recordings, a text-only sample and one with two recordings, padded on the left."""
    model, adapter = make(kind)
    texts = [PROMPT, "USER: Hello there, who is it? ASSISTANT:", "USER: <sound><sound> Same? ASSISTANT:"]
    one, two = (sound(2.7, seed=3), RATE), (sound(0.9, 8000, seed=4), 8000)
    media = [[one], [], [two, one]]
    together = adapter(texts, audio=media)
    assert not together["attention_mask"][:, 0].all() and together["flex_streams"].n_media == 3
    found = logits(model, together)
    for row, (text, own) in enumerate(zip(texts, media, strict=True)):
        for a, b in zip(found, logits(model, adapter([text], audio=[own])), strict=True):
            assert float((a[row] - b[0]).abs().max()) < 5e-5


@pytest.mark.parametrize("kind", KINDS)
def test_only_chosen_windows_are_encoded(kind: str) -> None:
    model, adapter = make(kind, flexcore.FlexConfig(first_layer=3, selector="top_k", top_k=1))
    inputs = adapter(PROMPT, audio=(sound(30.0), RATE))
    ((stream,),) = inputs["flex_streams"].samples
    stats = stream.source.stats
    assert stats.units == 0 and stream.source.n_tiles == 15
    with flexcore.trace(model) as trace:
        logits(model, inputs, max_new_tokens=1, min_new_tokens=1)
    chosen = torch.stack([r.regions for r in trace if r.read_in is not None]).any(dim=0)
    windows = {int(adapter.seconds(stream.grid, int(r))[0] // 2) for r in chosen.nonzero()[:, 0]}
    # one region a layer, two layers that read, each region within one window
    assert 0 < stats.units == len(windows) <= len(model.flex_config.layers) == 2
    assert stats.bytes == stats.units * stream.source.encoder.stats.tokens // stats.units * 64 * 4
    # read again: nothing is encoded again
    logits(model, inputs, max_new_tokens=1, min_new_tokens=1)
    assert stats.units == len(windows) and stats.hits > 0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_selected_is_the_plain_model(kind: str) -> None:
    plain, _ = make(kind, None)
    model, adapter = make(kind, flexcore.FlexConfig(selector="threshold", threshold=255))
    inputs = adapter(PROMPT, audio=(sound(3.0), RATE))
    for a, b in zip(logits(model, inputs), logits(plain, embedded(plain, inputs)), strict=True):
        assert torch.equal(a, b)


def test_beams_and_cached_steps_agree() -> None:
    model, adapter = make("flamingo")
    inputs = adapter([PROMPT, "Well?"], audio=[[(sound(3.0), RATE)], []])
    cached = model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
    again = model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)


@pytest.mark.parametrize("kind", KINDS)
def test_collated_samples_are_a_batch_and_can_be_trained_on(kind: str) -> None:
    model, adapter = make(kind)
    texts, media = (
        [PROMPT + " a longer one", "Hello?", PROMPT],
        [[(sound(2.7), RATE)], [], [(sound(0.9), RATE)]],
    )
    alone = [adapter([text], audio=[own]) for text, own in zip(texts, media, strict=True)]
    joined = collate(alone, tokenizer=adapter, padding_side="left")
    together = adapter(texts, audio=media)
    for name in together:
        if name != "flex_streams":
            assert torch.equal(joined[name], together[name]), name
    for a, b in zip(logits(model, joined), logits(model, together), strict=True):
        assert torch.equal(a, b)
    labels = joined["input_ids"].masked_fill(joined["attention_mask"] == 0, -100)
    labels[:, :-6] = -100
    model(**joined, labels=labels).loss.backward()
    gradients = [p.grad for p in model.flex_fine.parameters() if p.grad is not None]
    assert gradients and all(float(g.abs().max()) > 0 for g in gradients)


# ---------------------------------------------------------------------- recordings of any kind


def test_files_arrays_and_parts_are_one(tmp_path: Path) -> None:
    _, adapter = make("flamingo")
    samples = sound(2.5)
    soundfile.write(tmp_path / "a.wav", np.stack([samples, samples], axis=1), RATE, subtype="FLOAT")
    media = [
        tmp_path / "a.wav",
        str(tmp_path / "a.wav"),
        (samples, RATE),
        torch.from_numpy(samples),
        {"array": samples, "sampling_rate": RATE},
        Recording(tmp_path / "a.wav"),
        Recording((np.concatenate([sound(1.0, seed=9), samples]), RATE), start=1.0),
    ]
    adapter.sampling_rate = RATE
    expected = adapter(PROMPT, audio=media[0])["input_features"]
    for medium in media[1:]:
        assert torch.equal(adapter(PROMPT, audio=medium)["input_features"], expected)


def test_silence_is_sound() -> None:
    model, adapter = make("time")
    inputs = adapter(PROMPT, audio=(np.zeros(3 * RATE, np.int16), RATE))
    assert all(bool(step.isfinite().all()) for step in logits(model, inputs))


def test_seconds_of_a_region() -> None:
    _, adapter = make("time")
    (view,) = adapter.views([(sound(3.15), RATE)])
    # 158 frames of 20 ms in 16 cells of 10: the last two frames of the grid are padding
    assert view.grid.fine == (160,) and adapter.seconds(view.grid, 0) == pytest.approx((0.0, 0.16))
    start, stop = adapter.seconds(view.grid, view.grid.n_regions - 1)
    assert (round(start, 6), round(stop, 6)) == (3.12, 3.15)
    assert view.describe(1) == "0:02.0 to 0:03.1"


# ---------------------------------------------------------------------- what goes wrong


def test_bad_recordings_show_before_any_work(tmp_path: Path) -> None:
    _, adapter = make("time")
    with pytest.raises(ValueError, match="recording 1 must hold finite samples"):
        adapter([PROMPT, PROMPT], audio=[(sound(1.0), RATE), (np.full(9, np.nan), RATE)])
    with pytest.raises(FileNotFoundError, match=r"absent.wav"):
        adapter(PROMPT, audio=tmp_path / "absent.wav")
    with pytest.raises(ValueError, match="recording 0 is an array and doesn't say its sampling rate"):
        adapter(PROMPT, audio=sound(1.0))
    with pytest.raises(StreamError, match=r"1 <sound> placeholder\(s\)"):
        adapter(PROMPT, audio=[(sound(1.0), RATE)] * 2)
    with pytest.raises(StreamError, match="audio tokens"):
        adapter(PROMPT, audio=(sound(9.0), RATE), truncation=True, max_length=12)


def test_a_window_that_cannot_be_read(tmp_path: Path) -> None:
    model, adapter = make("flamingo", window_cache_bytes=0)
    path = tmp_path / "a.wav"
    soundfile.write(path, sound(3.0), RATE)
    inputs = adapter(PROMPT, audio=path)
    path.unlink()
    with pytest.raises(SourceError, match=r"a.wav', tile \d of 2, 0:0\d.0 to 0:0\d.0 can't be read"):
        logits(model, inputs)
    soundfile.write(path, sound(3.0), RATE)
    skipping = flexcore.load_adapter("audio", model, adapter.processor, on_error="skip")
    inputs = skipping(PROMPT, audio=path)
    path.unlink()
    with pytest.warns(UserWarning, match="it is left out"):
        assert all(bool(step.isfinite().all()) for step in logits(model, inputs))
    source = inputs["flex_streams"].samples[0][0].source
    assert not bool(source.readable(torch.arange(source.grid.n_regions)).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": 3}, "pool must be even"),
        ({"pool": 7 * 2}, r"pool must divide the 100 fine frames of a window \(one of"),
        ({"pool": 0}, "pool must be an integer >= 1, got 0"),
        ({"region_size": 0}, "region_size must be an integer >= 1, got 0"),
        ({"micro_batch": None}, "micro_batch must be an integer >= 1, got None"),
        ({"lazy": 1}, "lazy must be a bool, got 1"),
        ({"encoder": object()}, "encoder must be a WindowEncoder, got object"),
        ({"on_error": "ignore"}, "on_error must be one of raise, skip"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model, processor = tiny_audio_flamingo(layers=2)
    with pytest.raises(ValueError, match=message):
        AudioAdapter(model, processor, **options)(PROMPT, audio=(sound(1.0), RATE))


def test_models_that_do_not_fit() -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlavaForConditionalGeneration has none. Give encoder="):
        AudioAdapter(*tiny_llava())
    with pytest.raises(UnsupportedModelError, match=r'load_adapter."whisper"'):
        AudioAdapter(*tiny_whisper())
    model, processor = tiny_audio_flamingo(layers=2)
    _, longer = tiny_audio_flamingo(layers=2, seconds=3)
    with pytest.raises(ValueError, match="windows of 200 columns; got 300"):
        AudioAdapter(model, longer)
    with pytest.raises(ValueError, match="as wide as the model's embeddings, 64, got 32"):
        AudioAdapter(model, processor, encoder=SpectrogramEncoder(32))
    with pytest.raises(ValueError, match="pool must be given to the encoder"):
        AudioAdapter(tiny_llama(vocab=300), tiny_audio_tokenizer(), encoder=encoder(), pool=2)
    with pytest.raises(ValueError, match="bands must divide mels=64, got 5"):
        SpectrogramEncoder(64, bands=5)
    with pytest.raises(ValueError, match="seconds must make a window of whole frames"):
        SpectrogramEncoder(64, seconds=0.03)
    with pytest.raises(ValueError, match="pool must divide"):
        Layout(RATE, 32000, 100, 7)
    with pytest.raises(TypeError, match="AudioAdapter has no option 'zoom'; its options are encoder, pool"):
        AudioAdapter(model, processor, zoom=3)


# ---------------------------------------------------------------------- travelling


def test_streams_can_be_pickled_and_adapters_copied() -> None:
    model, adapter = make("time")
    (stream,) = adapter.streams((sound(3.0), RATE))
    twin = pickle.loads(pickle.dumps(stream))
    assert torch.allclose(features_of(twin.source), features_of(stream.source))
    assert copy.deepcopy(adapter).model is model


def test_nothing_heavy_is_imported_to_register() -> None:
    code = (
        "import sys, flexcore_adapters.audio\n"
        "print([m for m in ('torchaudio', 'soundfile', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
