"""Plain Whisper out of its converted file hears what was said."""

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
