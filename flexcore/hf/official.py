"""The released FlexAttention checkpoint's layout, read into a stock LLaVA and fine projections.

The official code kept the names of the original LLaVA-1.5: the decoder under `model.`, the projector under
`model.mm_projector.`, the vision tower by name in `config.json`, and `k_proj_hd` / `v_proj_hd` in every decoder layer,
of which those from layer 9 on are used.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from ..config import FlexConfig
from ..errors import WeightsMismatchError
from .checkpoint import fill
from .model_card import ranges
from .official_files import OfficialFiles
from .wrapping import wrap

logger = logging.getLogger(__name__)

PAD_TO = 64  # rows of the embedding, as in transformers' conversion of LLaVA-1.5
FINE = re.compile(r"model\.layers\.(\d+)\.self_attn\.([kv]_proj)_hd\.(weight|bias)")
TOWER = "model.vision_tower.vision_tower."
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.position_ids$")
_LLAMA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
)


def import_official_checkpoint(
    directory: str | Path,
    *,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> Any:
    """Read a checkpoint of the official code's layout into a wrapped `LlavaForConditionalGeneration`.

    The original vocabulary has no image token (the official code writes -200 in its place), so two are added behind
    it, as transformers' own conversion does: `<image>` at index `vocab_size` and `<pad>` after it, and the embedding
    is padded to a multiple of 64 rows. The new rows are the mean of the old ones, in the output layer too, so that
    greedy decoding never picks them. Give the tokenizer the same tokens, in this order:
    `tokenizer.add_tokens(["<image>"], special_tokens=True); tokenizer.add_special_tokens({"pad_token": "<pad>"})`.

    Weights are read one at a time from memory-mapped files (safetensors, or `.bin` with `weights_only=True`), so that
    the model is held in memory once. Only a `.bin` in PyTorch's format from before 1.6 is read whole, shard by shard.

    Args:
        directory: Holds `config.json` and the weights, sharded or not.
        vision_tower: Folder or hub name of the CLIP model to use instead of the one that `mm_vision_tower` names.
        dtype: Of the model. Default: what `config.json` says, else float32.
        **overrides: Fields of `FlexConfig.reference` to change.

    Returns:
        The wrapped model, in eval mode.

    Raises:
        FileNotFoundError: A file is missing.
        WeightsMismatchError: Tensors are missing, unexpected or of another shape; the message names them.
        ValueError: A field of `config.json` asks for what LLaVA in transformers doesn't have, or an override is wrong.
    """
    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} is missing")
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    flex = _flex_config(about, overrides)
    files = OfficialFiles(folder)
    tower_name = _tower_name(folder, about, vision_tower)
    tower_config = _tower_config(tower_name)
    config = _llava_config(about, tower_config)
    text: Any = config.text_config
    depth, vocabulary = text.num_hidden_layers, config.image_token_id
    assert flex.first_layer is not None
    if flex.first_layer + 1 >= depth:
        raise ValueError(
            f"first_layer must leave a later layer to read: this checkpoint has {depth} layers, got {flex.first_layer}"
        )
    layers = flex.layers or tuple(range(flex.first_layer + 1, depth))
    expected = _expected(about, text, () if flex.share_kv_projections else layers)
    own_tower = {n for n in files.names if n.startswith(TOWER)}
    _check_names(files, expected, own_tower)

    dtype = dtype or _dtype(about)
    shapes = _shapes(LlavaForConditionalGeneration, config)
    weights: dict[str, Tensor] = {}
    for name, tensor in files.read([n for n in expected if not FINE.fullmatch(n)]):
        stock = _stock_name(name)
        weights[stock] = _fitted(name, tensor, shapes[stock], vocabulary).to(dtype)
    weights.update(_tower_weights(tower_name, tower_config, files, own_tower, dtype))
    # nothing else refers to the weights, so the model takes them over without a second copy
    model = LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype
    )
    del weights
    wrap(model, flex)
    fine = {_fine_name(n): t for n, t in files.read([n for n in expected if FINE.fullmatch(n)])}
    fill(model, fine, str(folder))
    unused = sorted({int(m[1]) for n in files.names if (m := FINE.fullmatch(n)) and n not in expected})
    if unused:
        logger.info(
            "%s: dropped k_proj_hd and v_proj_hd of layers %s, which don't read fine tokens with these settings",
            folder,
            ranges(unused),
        )
    return model


def _flex_config(about: dict[str, Any], overrides: dict[str, Any]) -> FlexConfig:
    """The reference settings, with what the checkpoint says of itself and then the caller's changes."""
    zoom, low, high = (about.get(name) or 0 for name in ("zoom_ratio", "lowres_size", "highres_size"))
    if zoom and low and high and zoom * low != high:
        raise ValueError(
            f"highres_size must be zoom_ratio * lowres_size = {zoom * low} in config.json, got {high!r}"
        )
    said = {
        ours: about[theirs]
        for theirs, ours in (("threshold", "threshold"), ("warmup", "alpha_warmup"))
        if about.get(theirs) is not None
    }
    return FlexConfig.reference(**{**said, **overrides})


def _need(about: dict[str, Any], name: str, wanted: tuple[Any, ...], default: Any) -> Any:
    value = about.get(name, default)
    if value not in wanted:
        raise ValueError(f"{name} must be {' or '.join(map(repr, wanted))} in config.json, got {value!r}")
    return value


def _llava_config(about: dict[str, Any], tower: Any) -> Any:
    _need(about, "mm_projector_type", ("mlp2x_gelu",), "linear")
    for flag in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        _need(about, flag, (False, None), False)
    select = _need(about, "mm_vision_select_feature", ("patch", "cls_patch"), "patch")
    width = about.get("mm_hidden_size", tower.hidden_size)
    if width != tower.hidden_size:
        raise ValueError(
            f"mm_hidden_size must be the vision tower's {tower.hidden_size} in config.json, got {width!r}; pass "
            "vision_tower=... for another tower"
        )
    lacking = [n for n in _LLAMA[:5] if n not in about and n != "vocab_size"]
    if lacking:
        raise ValueError(f"config.json must say {', '.join(lacking)}")
    fields = {name: about[name] for name in _LLAMA if about.get(name) is not None}
    vocabulary = fields.setdefault("vocab_size", 32000)
    fields["vocab_size"] = -(-(vocabulary + 2) // PAD_TO) * PAD_TO
    fields["pad_token_id"] = vocabulary + 1
    rope: dict[str, Any] = dict(about.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("rope_type", rope.pop("type", "default"))
    rope["rope_theta"] = about.get("rope_theta", 10000.0)
    text = LlamaConfig(**fields, rope_parameters=rope)
    side = tower.image_size // tower.patch_size
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=vocabulary,
        image_seq_length=side**2 + (select == "cls_patch"),
        projector_hidden_act="gelu",
        vision_feature_layer=about.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default" if select == "patch" else "full",
        tie_word_embeddings=bool(about.get("tie_word_embeddings", False)),
    )


def _dtype(about: dict[str, Any]) -> torch.dtype:
    said = about.get("torch_dtype", about.get("dtype")) or "float32"
    found = getattr(torch, str(said), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch_dtype must be a torch dtype's name in config.json, got {said!r}")
    return found


# ---------------------------------------------------------------------- names


def _expected(about: dict[str, Any], text: LlamaConfig, layers: tuple[int, ...]) -> list[str]:
    """Names of every tensor that the model can't do without."""
    bias = ("weight", "bias") if text.attention_bias else ("weight",)
    names = ["model.embed_tokens.weight"]
    for layer in range(text.num_hidden_layers):
        start = f"model.layers.{layer}."
        names += [f"{start}self_attn.{p}_proj.{k}" for p in "qkvo" for k in bias]
        names += [f"{start}mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
        names += [f"{start}{p}_layernorm.weight" for p in ("input", "post_attention")]
        if layer in layers:
            names += [f"{start}self_attn.{p}_proj_hd.{k}" for p in "kv" for k in bias]
    names += ["model.norm.weight"]
    names += [f"model.mm_projector.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")]
    if not about.get("tie_word_embeddings"):
        names.append("lm_head.weight")
    return names


def _check_names(files: OfficialFiles, expected: list[str], tower: set[str]) -> None:
    missing = [n for n in expected if n not in files.names]
    known = {*expected, *tower, *_EMBEDDINGS}
    unexpected = sorted(
        n for n in files.names if n not in known and not BUFFERS.search(n) and not FINE.fullmatch(n)
    )
    if missing or unexpected:
        raise WeightsMismatchError(
            f"{files.folder}: must hold the official checkpoint's tensors; missing {_some(missing)}, unexpected "
            f"{_some(unexpected)}"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{names[:6]}{more}"


def _stock_name(name: str) -> str:
    """Name of an official tensor in transformers' LLaVA."""
    if name.startswith("lm_head."):
        return name
    rest = name.removeprefix("model.")
    for index, linear in ((0, "linear_1"), (2, "linear_2")):
        if rest.startswith(f"mm_projector.{index}."):
            return f"model.multi_modal_projector.{linear}.{rest.rpartition('.')[2]}"
    return f"model.language_model.{rest}"


def _fine_name(name: str) -> str:
    found = FINE.fullmatch(name)
    assert found is not None
    return ".".join(found.groups())


# ---------------------------------------------------------------------- weights


def _shapes(model_class: Any, config: Any) -> dict[str, torch.Size]:
    """Shape of every parameter that a model has."""
    with torch.device("meta"):
        return {name: p.shape for name, p in model_class(config).named_parameters()}


def _fitted(name: str, tensor: Tensor, shape: torch.Size, vocabulary: int) -> Tensor:
    """A tensor of the wanted shape; embeddings get rows for the added tokens, the mean of the others."""
    grows = name in _EMBEDDINGS
    wanted = [vocabulary, *shape[1:]] if grows else list(shape)
    if list(tensor.shape) != wanted:
        raise WeightsMismatchError(f"{name}: shape must be {wanted}, got {list(tensor.shape)}")
    if not grows:
        return tensor
    mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(shape[0] - vocabulary, -1)])


# ---------------------------------------------------------------------- the vision tower


def _tower_name(folder: Path, about: dict[str, Any], given: str | Path | None) -> str:
    name = given or about.get("mm_vision_tower") or about.get("vision_tower")
    if not name:
        raise ValueError("mm_vision_tower must name a CLIP model in config.json; pass vision_tower=...")
    inside = folder / str(name)
    return str(inside) if given is None and inside.is_dir() else str(name)


def _tower_config(name: str) -> Any:
    try:
        config: Any = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(
            f"the vision tower {name!r} (mm_vision_tower in config.json) can't be found; pass vision_tower=..., a "
            "folder or hub name"
        ) from error
    config = getattr(config, "vision_config", config)
    if not isinstance(config, CLIPVisionConfig):
        raise ValueError(f"mm_vision_tower must be a CLIP model, {name!r} is {config.model_type!r}")
    return config


def _tower_weights(
    name: str, config: Any, files: OfficialFiles, own: set[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tower's weights: those in the checkpoint (it may have been trained too), the others from its own."""
    shapes = _shapes(CLIPVisionModel, config)
    places: dict[str, str] = {}
    for official in own:
        tail = official.removeprefix(TOWER)
        found = next((t for t in (tail, tail.removeprefix("vision_model.")) if t in shapes), None)
        if found is None and not BUFFERS.search(official):
            raise WeightsMismatchError(
                f"{files.folder}: unexpected {official!r} for the vision tower {name!r}"
            )
        if found is not None:
            places[official] = found
    out: dict[str, Tensor] = {}
    if set(places.values()) != set(shapes):
        tower: Any = CLIPVisionModel.from_pretrained(name, dtype=dtype)
        out = {n: p.data for n, p in tower.named_parameters()}
    for official, tensor in files.read(list(places)):
        if tensor.shape != shapes[places[official]]:
            raise WeightsMismatchError(
                f"{official}: shape must be {list(shapes[places[official]])}, got {list(tensor.shape)}"
            )
        out[places[official]] = tensor.to(dtype)
    return {f"model.vision_tower.{n}": t for n, t in out.items()}
