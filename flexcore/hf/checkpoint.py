"""Save and load the new weights only: safetensors beside a JSON that says which model they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .._version import __version__
from ..config import FlexConfig
from ..errors import WeightsMismatchError, WrapStateError

CONFIG_NAME = "flex_config.json"
WEIGHTS_NAME = "flex_weights.safetensors"
FORMAT = 1


def architecture(model: nn.Module) -> dict[str, Any]:
    """What a model must share with another for the fine weights to fit."""
    text = model.config.get_text_config()  # type: ignore[union-attr,operator]
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(text, name, None) for name in names}


def _binding(model: nn.Module) -> Any:
    binding = getattr(model, "_flex_binding", None)
    if binding is None:
        raise WrapStateError("the model isn't wrapped; call flexcore.wrap(model, config) first")
    return binding


def save_adapter_weights(model: nn.Module, directory: str | Path) -> None:
    """Write the fine weights and the config of a wrapped model into a folder.

    Args:
        model: A wrapped model.
        directory: Made if it doesn't exist; `flex_config.json` and `flex_weights.safetensors` are written to it.

    Raises:
        WrapStateError: The model isn't wrapped.
    """
    binding = _binding(model)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in binding.fine.state_dict().items()}
    meta = {
        "format": FORMAT,
        "flexcore_version": __version__,
        "architecture": architecture(model),
        "config": binding.config.to_dict(),
    }
    # the weights first: a folder with a config is then a complete one
    _replace(folder / WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG_NAME, lambda path: Path(path).write_text(json.dumps(meta, indent=2) + "\n"))


def _replace(target: Path, write: Any) -> None:
    """Write beside the target and rename, so that a kill leaves the old file whole."""
    part = target.with_name(target.name + ".part")
    write(str(part))
    part.replace(target)


def read_adapter_config(directory: str | Path) -> tuple[FlexConfig, dict[str, Any]]:
    """Config and metadata of a folder that `save_adapter_weights` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsMismatchError: It isn't one of ours, or of a format this version can't read.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        meta = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsMismatchError(f"{path} must be JSON written by save_adapter_weights: {error}") from error
    if not isinstance(meta, dict) or not {"format", "config", "architecture"} <= set(meta):
        raise WeightsMismatchError(f"{path} must be JSON written by save_adapter_weights; fields are missing")
    if meta["format"] != FORMAT:
        raise WeightsMismatchError(
            f"{path}: format must be {FORMAT}, got {meta['format']!r}; update flexcore"
        )
    return FlexConfig.from_dict(meta["config"]), meta


def load_adapter_weights(model: nn.Module, directory: str | Path) -> None:
    """Load fine weights into a wrapped model; all of them or, on an error, none.

    Args:
        model: A wrapped model of the same architecture, with the same reading layers.
        directory: A folder that `save_adapter_weights` wrote.

    Raises:
        WrapStateError: The model isn't wrapped, or a request is running.
        WeightsMismatchError: The weights belong to another architecture; the message names what differs.
        FileNotFoundError: The folder lacks a file.
    """
    binding = _binding(model)
    binding.check_idle("load_adapter_weights")
    saved_config, meta = read_adapter_config(directory)
    here, there = architecture(model), meta["architecture"]
    wrong = [f"{k} {there.get(k)!r} (saved) and {v!r} (model)" for k, v in here.items() if there.get(k) != v]
    if wrong:
        raise WeightsMismatchError(f"{directory}: saved for another architecture: " + ", ".join(wrong))
    if saved_config.layers != binding.config.layers:
        raise WeightsMismatchError(
            f"{directory}: layers must match: saved for {list(saved_config.layers or ())}, "
            f"this model reads in {list(binding.config.layers)}"
        )
    state = binding.fine.state_dict()
    path = Path(directory) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise WeightsMismatchError(f"{path} must be a safetensors file: {error}") from error
    missing, extra = sorted(set(state) - set(tensors)), sorted(set(tensors) - set(state))
    if missing or extra:
        raise WeightsMismatchError(f"{path}: missing {missing[:3]}, unexpected {extra[:3]}")
    shapes = [
        f"{name} {list(tensors[name].shape)} (saved) and {list(state[name].shape)} (model)"
        for name in state
        if tensors[name].shape != state[name].shape
    ]
    if shapes:
        raise WeightsMismatchError(f"{path}: shapes differ: " + ", ".join(shapes[:3]))
    with torch.no_grad():
        for name, parameter in state.items():
            parameter.copy_(tensors[name])
