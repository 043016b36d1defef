"""save_pretrained of wrapped models: the fine weights travel in the main checkpoint.

A wrapped model's `save_pretrained` writes what the plain model's does, with the fine weights among the others under
`flex_fine.`, and `flex_config.json` beside it. The model's own class loads such a folder and ignores the fine weights
with a warning; `flexcore.from_pretrained` wraps again.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..config import FlexConfig
from ..errors import WeightsMismatchError
from .checkpoint import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    fine_state,
    read_adapter_config,
    read_tensors,
    write_config,
    write_weights,
)

logger = logging.getLogger(__name__)

PREFIX = "flex_fine."
# what transformers' own from_pretrained passes on to whatever finds a file
_HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "subfolder", "local_files_only")


class Checkpoint:
    """The files of a checkpoint in a folder or on the hub that have to do with fine weights."""

    def __init__(self, name: str | Path, kwargs: dict[str, Any]):
        self.name = name
        self.hub = {key: kwargs[key] for key in _HUB if key in kwargs}
        self.variant = kwargs.get("variant")
        self._names: dict[str, tuple[Path, str]] | None = None

    def find(self, filename: str) -> Path | None:
        """Where a file of the checkpoint is on this machine, or None if there is no such file."""
        found = cached_file(
            str(self.name),
            filename,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **self.hub,
        )
        return None if found is None else Path(found)

    def config(self) -> tuple[FlexConfig, dict[str, Any]] | None:
        """The saved config and metadata, if a wrapped model was saved here."""
        path = self.find(CONFIG_NAME)
        return None if path is None else read_adapter_config(path)

    def fine_names(self) -> dict[str, tuple[Path, str]]:
        """Fine weights by name, with the file and the name in it under which each is found."""
        if self._names is None:
            self._names = self._find_names()
        return self._names

    def _find_names(self) -> dict[str, tuple[Path, str]]:
        # a file of their own is kept in step by save_pretrained, so it is never older than the main checkpoint
        own = self.find(WEIGHTS_NAME)
        if own is not None:
            return {name: (own, name) for name in _keys(own)}
        index = self.find(_variant(SAFE_WEIGHTS_INDEX_NAME, self.variant))
        if index is not None:
            shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            whole = self.find(_variant(SAFE_WEIGHTS_NAME, self.variant))
            shards = {} if whole is None else dict.fromkeys(_keys(whole), whole.name)
        out = {}
        for name, shard in shards.items():
            if name.startswith(PREFIX):
                path = self.find(shard)
                if path is None:
                    raise WeightsMismatchError(f"{self.name}: the shard {shard} is missing")
                out[name.removeprefix(PREFIX)] = (path, name)
        return out

    def tensors(self) -> dict[str, Any]:
        """All fine weights, read from the files that hold them and nothing else."""
        by_file: dict[Path, dict[str, str]] = {}
        for new, (path, name) in self.fine_names().items():
            by_file.setdefault(path, {})[name] = new
        out: dict[str, Any] = {}
        for path, names in by_file.items():
            out.update(read_tensors(path, names))
        return out


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise WeightsMismatchError(f"{path} must be a safetensors file: {error}") from error


def _variant(name: str, variant: str | None) -> str:
    """`model.fp16.safetensors` for variant `fp16`, as transformers names it."""
    if variant is None:
        return name
    parts = name.split(".")
    return ".".join([*parts[:-1], variant, parts[-1]])


def saving_methods(base: Any) -> dict[str, Any]:
    """`save_pretrained` and `from_pretrained` for the wrapped class of a model class."""

    @functools.wraps(base.save_pretrained)
    def save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        base.save_pretrained(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process and Path(save_directory).is_dir() and not kwargs.get("distributed_checkpoint"):
            write_beside(self, save_directory, kwargs.get("variant"))

    def _upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        write_beside(self, working_dir)  # `save_pretrained(push_to_hub=True)` uploads before it returns
        return base._upload_modified_files(self, working_dir, *args, **kwargs)

    def load(
        cls: Any, name_or_path: Any, model_class: Any = base, config: FlexConfig | None = None, **kwargs: Any
    ) -> Any:
        from .pretrained import from_pretrained

        return from_pretrained(name_or_path, model_class, config, **kwargs)

    load.__name__ = "from_pretrained"
    load.__doc__ = "See `flexcore.from_pretrained`."
    return {
        "save_pretrained": save_pretrained,
        "_upload_modified_files": _upload_modified_files,
        "from_pretrained": classmethod(load),
    }


def write_beside(model: Any, directory: str | Path, variant: str | None = None) -> None:
    """Complete a folder that the plain class's `save_pretrained` wrote.

    Where the checkpoint doesn't hold the fine weights (peft saved an adapter in its place, or it was handed a
    `state_dict` without them), they are written as a file of their own.
    """
    folder = Path(directory)
    # one from an earlier save would be older than the checkpoint
    (folder / WEIGHTS_NAME).unlink(missing_ok=True)
    fine = model.flex_fine.live()
    own = {f"{layer}.{name}": t for layer in fine for name, t in fine.at(int(layer)).state_dict().items()}
    if not set(own) <= set(Checkpoint(folder, {"variant": variant}).fine_names()):
        if any(isinstance(t, DTensor) for t in own.values()):
            # gathering needs every process, and only this one is here
            logger.warning(
                "%s holds no fine weights; call save_adapter_weights on every process to save them", folder
            )
            return
        write_weights(folder, fine_state(model))
    write_config(folder, model)
