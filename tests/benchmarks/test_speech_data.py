"""What the word error rate counts, and the loader of the weights against a file written here."""

import struct

import numpy as np
import pytest
import torch

pytest.importorskip("soundfile", reason="soundfile reads the recordings (pip install 'flexcore[audio]')")

from benchmarks.ctranslate2_whisper import read_variables, state_dict
from benchmarks.speech_data import errors, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Press 4, or #!", "press four or pound"),
        ("the 21st of May, 2nd", "the twenty first of may second"),
        ("13 90 45 107", "thirteen ninety forty five one zero seven"),
        ("Mr. Dashwood\u2019s 'own'", "mister dashwood's own"),
        ("", ""),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert words(text) == expected.split()


@pytest.mark.parametrize(
    ("reference", "found", "wrong"),
    [
        ("a b c", "a b c", 0),
        ("a b c", "a x c", 1),
        ("a b c", "", 3),
        ("a b c", "b c", 1),
        ("a b", "a x y b", 2),
        ("", "a", 1),
    ],
)
def test_errors(reference: str, found: str, wrong: int) -> None:
    assert errors(reference, found) == (wrong, len(reference.split()))


def packed(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def test_variables_and_their_names() -> None:
    arrays = {
        "decoder/layer_0/attention/linear_1/weight": np.arange(24, dtype=np.float16).reshape(8, 3),
        "decoder/layer_0/ffn/linear_1/bias": np.arange(3, dtype=np.float32),
        "decoder/embeddings/weight": np.ones((2, 3), np.float32),
        "decoder/num_heads": np.array(4, np.int8),
    }
    kinds = {np.dtype(np.float32): 0, np.dtype(np.int8): 1, np.dtype(np.float16): 4}
    data = struct.pack("<I", 6) + packed("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for name, array in arrays.items():
        data += packed(name) + struct.pack(f"<B{array.ndim}IB", array.ndim, *array.shape, kinds[array.dtype])
        data += struct.pack("<I", array.nbytes) + array.tobytes()
    data += struct.pack("<I", 1) + packed("decoder/projection/weight") + packed("decoder/embeddings/weight")
    found = read_variables(data)
    assert found.keys() == {*arrays, "decoder/projection/weight"}
    del found["decoder/projection/weight"]
    state = state_dict(found)
    whole = torch.arange(24.0).view(8, 3)
    assert torch.equal(state["model.decoder.layers.0.encoder_attn.k_proj.weight"], whole[:4])
    assert torch.equal(state["model.decoder.layers.0.encoder_attn.v_proj.weight"], whole[4:])
    assert torch.equal(state["model.decoder.layers.0.fc2.bias"], torch.arange(3.0))
    assert torch.equal(state["proj_out.weight"], torch.ones(2, 3))
    with pytest.raises(ValueError, match="1 bytes too many"):
        read_variables(data + b"\0")
    with pytest.raises(ValueError, match="must be a Whisper, it is a Other"):
        read_variables(struct.pack("<I", 6) + packed("Other"))
