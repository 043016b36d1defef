"""Tiny random models that hear, made on the spot: for tests, and for examples without a checkpoint."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .tiny import _random, _special, _text, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import (
        AudioFlamingo3ForConditionalGeneration,
        AudioFlamingo3Processor,
        PreTrainedTokenizerFast,
        WhisperForConditionalGeneration,
    )

_SOUND = "<sound>"
_RATE, _HOP = 16000, 160


def tiny_audio_tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer of `tiny_llava` with `<sound>` as its audio token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [_SOUND]}, replace_extra_special_tokens=False)
    tokenizer.audio_token = _SOUND
    return tokenizer


def tiny_audio_flamingo(
    seed: int = 0,
    layers: int = 6,
    *,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    seconds: int = 2,
    mels: int = 16,
    audio_hidden: int = 32,
    audio_layers: int = 2,
    **text_config: Any,
) -> tuple[AudioFlamingo3ForConditionalGeneration, AudioFlamingo3Processor]:
    """A random Audio Flamingo 3 with its processor, in eval mode; a window is `seconds` long, 25 tokens a second.

    Args:
        seed: Of the weights; the same seed gives the same model, and the global generator is left alone.
        layers: Decoder layers.
        hidden: Hidden size of the decoder.
        heads: Query heads.
        kv_heads: Key and value heads.
        seconds: Length of the audio tower's window; a released checkpoint's is 30.
        mels: Mel bands of the tower's input.
        audio_hidden: Hidden size of the tower.
        audio_layers: Layers of the tower.
        **text_config: Further fields of the decoder's `Qwen2Config`.
    """
    from transformers import (
        AudioFlamingo3Config,
        AudioFlamingo3EncoderConfig,
        AudioFlamingo3ForConditionalGeneration,
        AudioFlamingo3Processor,
        Qwen2Config,
    )

    tokenizer = tiny_audio_tokenizer()
    text = _text(layers, hidden, heads, kv_heads, len(tokenizer), {**_special(tokenizer), **text_config})
    text.pop("head_dim")  # Qwen2 works it out
    tower = AudioFlamingo3EncoderConfig(
        num_mel_bins=mels,
        num_hidden_layers=audio_layers,
        num_attention_heads=4,
        intermediate_size=2 * audio_hidden,
        hidden_size=audio_hidden,
        max_source_positions=seconds * _RATE // _HOP // 2,
    )
    token: Any = tokenizer.convert_tokens_to_ids(_SOUND)
    config = AudioFlamingo3Config(audio_config=tower, text_config=Qwen2Config(**text), audio_token_id=token)
    processor = AudioFlamingo3Processor(_extractor(seconds, mels), tokenizer, audio_token=_SOUND)
    return _random(AudioFlamingo3ForConditionalGeneration, config, seed), processor


def tiny_whisper(
    seed: int = 0, layers: int = 4, *, hidden: int = 64, heads: int = 4, seconds: int = 2, mels: int = 16
) -> tuple[WhisperForConditionalGeneration, Any]:
    """A random Whisper in eval mode, and what stands in for its processor: a `feature_extractor` and a `tokenizer`.

    Args:
        seed: Of the weights; the same seed gives the same model, and the global generator is left alone.
        layers: Decoder layers.
        hidden: Hidden size.
        heads: Heads.
        seconds: Length of a window; a released checkpoint's is 30.
        mels: Mel bands.
    """
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    tokenizer = tiny_audio_tokenizer()
    fields: dict[str, Any] = _special(tokenizer)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=mels,
        d_model=hidden,
        encoder_layers=2,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=2 * hidden,
        decoder_ffn_dim=2 * hidden,
        max_source_positions=seconds * _RATE // _HOP // 2,
        max_target_positions=128,
        decoder_start_token_id=tokenizer.bos_token_id,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **fields,
    )
    processor = SimpleNamespace(feature_extractor=_extractor(seconds, mels), tokenizer=tokenizer)
    return _random(WhisperForConditionalGeneration, config, seed), processor


def _extractor(seconds: int, mels: int) -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(
        feature_size=mels, sampling_rate=_RATE, hop_length=_HOP, chunk_length=seconds
    )
