"""The model that is asked: plain, or wrapped with the fine weights that it brings or is given."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

import flexcore
from flexcore.errors import UnsupportedModelError

logger = logging.getLogger(__name__)
UNTRAINED = "its fine projections are untrained, copies of the layers' own"


def load(
    path: str, fine_weights: Path | None, device: torch.device, dtype: str, wrap: bool
) -> tuple[Any, Any, str]:
    """A model in eval mode with its processor, and what there is to say about its fine weights.

    Args:
        path: A checkpoint, plain or saved from a wrapped model.
        fine_weights: A folder that `save_adapter_weights` wrote.
        device: Where it goes.
        dtype: Of the weights, as transformers takes it.
        wrap: Whether anything asks it to look closer.

    Raises:
        ValueError: It can't be loaded.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from flexcore.hf.checkpoint import load_adapter_weights, read_adapter_config
    from flexcore.hf.pretrained import from_pretrained
    from flexcore.hf.saving import Checkpoint

    note = ""
    try:
        processor = AutoProcessor.from_pretrained(path)
        if wrap:
            saved = Checkpoint(path, {}).config()
            config = read_adapter_config(fine_weights)[0] if fine_weights else saved[0] if saved else None
            try:
                model = from_pretrained(path, config=config or flexcore.FlexConfig(), dtype=dtype)
                note = "" if config else UNTRAINED
                if fine_weights:
                    load_adapter_weights(model, fine_weights)
            except UnsupportedModelError as error:
                wrap, note = False, str(error)
        if not wrap:
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    except (OSError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"--model {path} can't be loaded: {error}") from error
    # Answers are padded on the left.
    processor.tokenizer.padding_side = "left"
    return model.to(device).eval(), processor, note


def fingerprint(folder: str | Path | None) -> list[list[Any]]:
    """Name, size and time of a folder's weights: whether they are still those that gave earlier answers."""
    if folder is None or not Path(folder).is_dir():
        return []
    files = sorted(Path(folder).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
