"""Save and load the new weights only: safetensors beside a JSON that says which model they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .._version import __version__
from ..config import FlexConfig
from ..errors import WeightsMismatchError, WrapStateError
from .model_card import model_card
from .offload import plain_copy, without_peft

CONFIG_NAME = "flex_config.json"
WEIGHTS_NAME = "flex_weights.safetensors"
CARD_NAME = "README.md"
FORMAT = 1


def architecture(model: nn.Module) -> dict[str, Any]:
    """What a model must share with another for the fine weights to fit."""
    text = model.config.get_text_config()  # type: ignore[union-attr,operator]
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(text, name, None) for name in names}


def _binding(model: Any) -> Any:
    model = without_peft(model)
    binding = getattr(model, "_flex_binding", None)
    if binding is None:
        raise WrapStateError("the model isn't wrapped; call flexcore.wrap(model, config) first")
    return binding.follow(model)


def fine_state(model: nn.Module) -> dict[str, Tensor]:
    """The fine weights of a wrapped model by name, as a freshly wrapped one calls them.

    Weights that accelerate offloaded are brought in, shards are gathered (so every process has to call this), and
    adapters that peft put on the projections are merged.

    Raises:
        WrapStateError: The model isn't wrapped.
    """
    fine = _binding(model).fine
    out: dict[str, Tensor] = {}
    for layer in fine:
        projection = fine.at(int(layer))
        own = projection.state_dict()
        if any(t.device.type == "meta" for t in own.values()) or _has_adapters(projection):
            own = plain_copy(projection).state_dict()
        for name, tensor in own.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            out[f"{layer}.{name}"] = whole.detach().cpu().contiguous()
    return out


def _has_adapters(module: nn.Module) -> bool:
    return any(hasattr(part, "get_base_layer") for part in module.modules())


def save_adapter_weights(model: nn.Module, directory: str | Path, is_main_process: bool = True) -> None:
    """Write the fine weights, the config and a model card of a wrapped model into a folder.

    Args:
        model: A wrapped model.
        directory: Made if it doesn't exist; `flex_config.json` and `flex_weights.safetensors` are written to it, and
            a `README.md` if there is none. With `share_kv_projections` the weights file is there and empty.
        is_main_process: Whether this process writes; under FSDP every process must call, and one should write.

    Raises:
        WrapStateError: The model isn't wrapped.
    """
    binding = _binding(model)
    tensors = fine_state(model)
    if not is_main_process:
        return
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # the config last: a folder with a config is then a complete one
    write_weights(folder, tensors)
    card = folder / CARD_NAME
    if not card.exists():
        parameters = sum(t.numel() for t in tensors.values())
        text = model_card(without_peft(model), binding.config, architecture(model), parameters, __version__)
        _replace(card, lambda path: Path(path).write_text(text, encoding="utf-8"))
    write_config(folder, model)


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write fine weights as a file of their own."""
    _replace(folder / WEIGHTS_NAME, lambda path: save_file(dict(tensors), path, metadata={"format": "pt"}))


def write_config(folder: Path, model: nn.Module) -> None:
    """Write the JSON that says how a model is wrapped and what it takes to fit its fine weights."""
    meta = {
        "format": FORMAT,
        "flexcore_version": __version__,
        "architecture": architecture(model),
        "config": _binding(model).config.to_dict(),
    }
    text = json.dumps(meta, indent=2) + "\n"
    _replace(folder / CONFIG_NAME, lambda path: Path(path).write_text(text, encoding="utf-8"))


def _replace(target: Path, write: Callable[[str], Any]) -> None:
    """Write beside the target and rename, so that a kill leaves the old file whole."""
    part = target.with_name(target.name + ".part")
    write(str(part))
    part.replace(target)


def read_adapter_config(directory: str | Path) -> tuple[FlexConfig, dict[str, Any]]:
    """Config and metadata of a folder that a wrapped model was saved to.

    Args:
        directory: A folder that `save_adapter_weights` or a wrapped model's `save_pretrained` wrote, or the
            `flex_config.json` in it.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsMismatchError: It isn't one of ours, or of a format this version can't read.
    """
    path = Path(directory)
    path = path if path.is_file() else path / CONFIG_NAME
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
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
        WrapStateError: The model isn't wrapped, a request is running, or its fine weights are offloaded.
        WeightsMismatchError: The weights belong to another architecture; the message names what differs.
        FileNotFoundError: The folder lacks a file.
    """
    _binding(model).check_idle("load_adapter_weights")
    saved_config, meta = read_adapter_config(directory)
    check_fit(model, saved_config, meta, str(directory))
    path = Path(directory) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    fill(model, read_tensors(path), str(path))


def check_fit(model: nn.Module, saved: FlexConfig, meta: dict[str, Any], where: str) -> None:
    """Raise WeightsMismatchError if weights saved with this config and metadata can't belong in a wrapped model."""
    config = _binding(model).config
    here, there = architecture(model), meta["architecture"]
    wrong = [f"{k} {there.get(k)!r} (saved) and {v!r} (model)" for k, v in here.items() if there.get(k) != v]
    if wrong:
        raise WeightsMismatchError(f"{where}: saved for another architecture: " + ", ".join(wrong))
    if saved.share_kv_projections != config.share_kv_projections:
        raise WeightsMismatchError(
            f"{where}: share_kv_projections must match: {saved.share_kv_projections} (saved) and "
            f"{config.share_kv_projections} (model)"
        )
    if saved.layers != config.layers:
        raise WeightsMismatchError(
            f"{where}: layers must match: saved for {list(saved.layers or ())}, "
            f"this model reads in {list(config.layers)}"
        )


def read_tensors(path: Path, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Args:
        path: The file.
        names: Which ones, and what to call them; None takes all under their own names.

    Raises:
        WeightsMismatchError: It isn't a safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            if names is None:
                names = {name: name for name in file.keys()}  # noqa: SIM118 - no mapping
            return {new: file.get_tensor(name) for name, new in names.items()}
    except SafetensorError as error:
        raise WeightsMismatchError(f"{path} must be a safetensors file: {error}") from error


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor], where: str, keep_saved_dtype: bool = False) -> None:
    """Copy fine weights into a wrapped model, once all of them are known to fit.

    Args:
        model: A wrapped model.
        tensors: By name, as `fine_state` has them.
        where: What to call their origin in messages.
        keep_saved_dtype: Give the parameters the dtype that they were saved in.

    Raises:
        WeightsMismatchError: Names or shapes differ.
        WrapStateError: The model's fine weights are offloaded.
    """
    fine = _binding(model).fine
    state: dict[str, Tensor] = {
        f"{layer}.{name}": tensor
        for layer in fine
        for name, tensor in fine.at(int(layer)).state_dict(keep_vars=True).items()
    }
    missing, extra = sorted(set(state) - set(tensors)), sorted(set(tensors) - set(state))
    if missing or extra:
        raise WeightsMismatchError(f"{where}: missing {missing[:3]}, unexpected {extra[:3]}")
    shapes = [
        f"{name} {list(tensors[name].shape)} (saved) and {list(state[name].shape)} (model)"
        for name in state
        if tensors[name].shape != state[name].shape
    ]
    if shapes:
        raise WeightsMismatchError(f"{where}: shapes differ: " + ", ".join(shapes[:3]))
    if any(t.device.type == "meta" for t in state.values()):
        raise WrapStateError("the fine weights are offloaded; load them before dispatching the model")
    for name, parameter in state.items():
        if keep_saved_dtype and parameter.dtype != tensors[name].dtype:
            parameter.data = parameter.data.to(tensors[name].dtype)
        value = tensors[name]
        if isinstance(parameter, DTensor):
            value = distribute_tensor(
                value.to(parameter.device), parameter.device_mesh, list(parameter.placements)
            )
        parameter.copy_(value)
