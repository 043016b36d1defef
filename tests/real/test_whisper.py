"""Whisper out of its converted file hears what was said; wrapped, it reads full-rate states over pooled ones."""

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

import flexcore

pytestmark = pytest.mark.slow


def samples(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getsampwidth(), file.getnchannels()) == (16000, 2, 1)
        return np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768


def words(text: str) -> list[str]:
    text = text.lower().replace("mr.", "mister").replace("-", " ")
    return "".join(c for c in text if c.isalpha() or c == " ").split()


def errors(said: list[str], heard: list[str]) -> int:
    """Words to insert, delete or replace (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said):
        diagonal, row[0] = row[0], i + 1
        for j, other in enumerate(heard):
            diagonal, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, diagonal + (word != other))
    return row[-1]


def test_plain_whisper_transcribes(whisper: tuple[Any, Any], utterances: list[tuple[Path, str]]) -> None:
    model, processor = whisper
    audio = [samples(path) for path, _ in utterances]
    inputs = processor(audio, sampling_rate=16000, return_tensors="pt")
    heard = processor.batch_decode(model.generate(**inputs, do_sample=False), skip_special_tokens=True)
    wrong = sum(errors(words(said), words(h)) for (_, said), h in zip(utterances, heard, strict=True))
    total = sum(len(words(said)) for _, said in utterances)
    assert total > 50
    assert wrong / total < 0.15, heard


def pooled(model: Any, features: Any, width: int = 10) -> tuple[Any, Any]:
    """The encoder's states, and their means over `width` neighbours."""
    with torch.no_grad():
        states = model.get_encoder()(features).last_hidden_state
    return states, states.unflatten(1, (-1, width)).mean(2)


def test_wrapped_whisper_reads_full_rate_states(
    whisper: tuple[Any, Any], utterances: list[tuple[Path, str]]
) -> None:
    model, processor = whisper
    inputs = processor([samples(utterances[0][0])], sampling_rate=16000, return_tensors="pt")
    states, coarse = pooled(model, inputs["input_features"])
    grid = flexcore.Grid.blocks((coarse.shape[1],), (states.shape[1],), region=50)
    streams = flexcore.StreamBatch.from_features([states[0]], grid, [torch.arange(coarse.shape[1])])

    def answer(streams: Any = None) -> torch.Tensor:
        media = {} if streams is None else {"flex_streams": streams}
        out = BaseModelOutput(coarse.clone())
        return model.generate(encoder_outputs=out, do_sample=False, max_new_tokens=20, **media)

    plain = answer()
    with flexcore.attached(model, flexcore.FlexConfig(first_layer=0, selector="top_k", fraction=0.0)):
        assert torch.equal(answer(), plain) and torch.equal(answer(streams), plain)
    with flexcore.attached(model, flexcore.FlexConfig(first_layer=0, selector="top_k", fraction=0.2)):
        assert model.flex_config.layers == (1, 2, 3)
        with flexcore.trace(model) as trace:
            read = answer(streams)
        assert not torch.equal(read, plain)
        assert all(int(r.regions.sum()) == 6 for r in trace)
