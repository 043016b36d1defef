"""OfficialFiles: the tensors of a checkpoint folder, one at a time, from safetensors or `.bin`, sharded or not."""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import WeightsMismatchError

_WHOLE = ("model.safetensors", "pytorch_model.bin")


class OfficialFiles:
    """Where each tensor of a checkpoint is.

    Args:
        folder: The checkpoint.

    Raises:
        FileNotFoundError: It holds no weights, or lacks a shard.
        WeightsMismatchError: A file isn't what its name says.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shard_of = self._shards()

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self.shard_of.keys()

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name, shard by shard; each is the caller's own, and no other is kept in memory."""
        by_shard: dict[str, list[str]] = {}
        for name in names:
            by_shard.setdefault(self.shard_of[name], []).append(name)
        for shard, wanted in by_shard.items():
            path = self.folder / shard
            if shard.endswith(".safetensors"):
                with _safetensors(path) as file:
                    for name in wanted:
                        # a copy: what the file is mapped to changes with the file
                        yield name, file.get_tensor(name).clone()
            else:
                tensors = _load_bin(path)
                for name in wanted:
                    yield name, tensors[name].clone()
                del tensors

    def _shards(self) -> dict[str, str]:
        for whole in _WHOLE:
            index = self.folder / f"{whole}.index.json"
            if index.is_file():
                return self._indexed(index)
            path = self.folder / whole
            if path.is_file():
                return dict.fromkeys(_names(path), whole)
        raise FileNotFoundError(f"{self.folder} holds none of {', '.join(_WHOLE)} or their index files")

    def _indexed(self, index: Path) -> dict[str, str]:
        try:
            shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsMismatchError(f"{index} must be JSON with a weight_map: {error!r}") from error
        for shard in sorted(set(shards.values())):
            if Path(shard).name != shard or Path(shard).suffix not in (".safetensors", ".bin"):
                raise WeightsMismatchError(f"{index}: a shard must be a file beside it, got {shard!r}")
            path = self.folder / shard
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; {index.name} lists it")
            lost = sorted({name for name, at in shards.items() if at == shard} - set(_names(path)))
            if lost:
                raise WeightsMismatchError(f"{path}: missing {lost[:6]}, which {index.name} lists there")
        return shards


def _names(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(_load_bin(path))
    with _safetensors(path) as file:
        return list(file.keys())


def _safetensors(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise WeightsMismatchError(f"{path} must be a safetensors file: {error}") from error


def _load_bin(path: Path) -> dict[str, Tensor]:
    """A `.bin` shard, mapped to memory where its format allows; nothing in it but tensors is ever unpickled."""
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format from before PyTorch 1.6 can't be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsMismatchError(f"{path} must hold tensors and nothing else: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise WeightsMismatchError(f"{path} must hold a dictionary of tensors")
    return found
