"""Ten hours of sound in the memory of ten minutes, measured in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip(
    "soundfile", reason="soundfile writes the file (pip install 'flexcore[audio]')"
)
pytest.importorskip("torchaudio", reason="torchaudio makes the spectrograms (pip install 'flexcore[audio]')")

RATE = 8000

LISTEN = """
import json, resource, sys
import torch
import flexcore
from flexcore.hf.tiny import tiny_llama
from flexcore.hf.tiny_audio import tiny_audio_tokenizer
from flexcore_adapters.audio_encoders import SpectrogramEncoder

torch.set_num_threads(1)
torch.manual_seed(0)
model, tokenizer = tiny_llama(vocab=300, max_position_embeddings=1 << 16), tiny_audio_tokenizer()
flexcore.wrap(model, flexcore.FlexConfig(first_layer=3, selector="top_k", top_k=4, region_size=50))
encoder = SpectrogramEncoder(64, rate=8000, mels=32, hop=400, seconds=30, pool=300)
adapter = flexcore.load_adapter("audio", model, tokenizer, encoder=encoder, window_cache_bytes=1 << 20, progress=False)
inputs = adapter("USER: <sound> What is said? ASSISTANT:", audio=sys.argv[1])
out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
stream = inputs["flex_streams"].samples[0][0]
stats = stream.source.stats
print(json.dumps({
    "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "cells": stream.grid.n_coarse, "windows": stream.source.n_tiles, "encoded": stats.units, "new": out.shape[1],
}))
"""


def write(path: Path, seconds: int) -> None:
    """A recording of so many seconds, a minute at a time: a tone whose pitch tells the minute."""
    block = np.arange(60 * RATE) / RATE
    noise = (0.01 * np.random.default_rng(0).normal(size=len(block))).astype(np.float32)
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        for minute in range(seconds // 60):
            pitch = 200 + minute % 60 * 20
            file.write(0.2 * np.sin(2 * np.pi * pitch * block, dtype=np.float32) + noise)


@pytest.mark.slow
def test_ten_hours_in_the_memory_of_ten_minutes(tmp_path: Path) -> None:
    found = {}
    for name, seconds in {"ten minutes": 600, "ten hours": 36000}.items():
        path = tmp_path / f"{seconds}.flac"
        write(path, seconds)
        done = subprocess.run(
            [sys.executable, "-c", LISTEN, str(path)], capture_output=True, text=True, check=True
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
    print(found)
    short, long = found["ten minutes"], found["ten hours"]
    assert (short["windows"], long["windows"]) == (20, 1200) and long["cells"] == 60 * short["cells"] == 1200
    # what is encoded follows what is chosen: 4 regions in each of 2 layers, at each of 4 rows
    assert 0 < long["encoded"] <= 4 * 2 * 4
    assert long["megabytes"] < 1.2 * short["megabytes"]
