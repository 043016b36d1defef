"""The weights that ship: the Flex model with the package, the other arms and the ceilings here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .arms import ARMS, Arm, build
from .base import assembled
from .ceiling import CropReader
from .image_task import IMAGE
from .model import processor
from .task import Task

HERE = Path(__file__).parent / "weights"
CEILINGS = {"ceiling": True, "ceiling_coarse": False}


def shared(source: Any, task: Task = IMAGE) -> Callable[[], Any]:
    """A maker of LLaVAs whose encoder and projector are those of another; for arms, which differ in the rest."""
    state = {k: v.detach().float() for k, v in source.state_dict().items() if not k.startswith("flex_fine")}

    def load() -> Any:
        model = assembled(task)
        model.load_state_dict(state)
        return model

    return load


def arm_model(arm: Arm, load: Callable[[], Any], trained: dict[str, Tensor]) -> Any:
    """An arm's model in eval mode.

    Args:
        arm: The arm.
        load: Makes the LLaVA it is built on.
        trained: What the arm trained, by name; in any dtype.

    Raises:
        ValueError: The weights are another arm's.
    """
    model = build(arm, load)
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in trained.items()}, strict=False)
    lacking = sorted({n for n, p in model.named_parameters() if p.requires_grad} & set(missing))
    if lacking or unexpected:
        raise ValueError(
            f"the weights must be this arm's, missing {lacking[:3]}, unexpected {unexpected[:3]}"
        )
    return model.eval()


def ceiling_model(path: Path) -> CropReader:
    """A reader of true crops."""
    model = CropReader()
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    model.load_state_dict(state)
    return model.eval()


def trained_state(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """What an arm trains, in another dtype."""
    return {
        n: p.detach().to(dtype).contiguous().clone() for n, p in model.named_parameters() if p.requires_grad
    }


def ship(outputs: Path, package: Path, base: Any, seed: int = 0) -> None:
    """Write the files that ship from what training left in `outputs`.

    Args:
        outputs: Where training wrote.
        package: Folder of the Flex model.
        base: The trained base.
        seed: Whose arms.
    """
    load = shared(base)
    HERE.mkdir(parents=True, exist_ok=True)
    for name, arm in ARMS.items():
        folder = outputs / "arms" / f"{name}-{seed}"
        if not (folder / "done").exists():
            continue
        model = arm_model(arm, load, load_file(folder / "model.safetensors"))
        if name != "flex":
            save_file(trained_state(model, torch.bfloat16), HERE / f"{name}.safetensors")
            continue
        model.half().save_pretrained(package)
        # half precision is for the file; a processor computes in single
        config = json.loads((package / "config.json").read_text())
        for part in (config, config["text_config"], config["vision_config"]):
            part["dtype"] = "float32"
        (package / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        processor().save_pretrained(package)
    for name, fine in CEILINGS.items():
        folder = outputs / f"ceiling-{'fine' if fine else 'coarse'}"
        if (folder / "done").exists():
            state = load_file(folder / "model.safetensors")
            half = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in state.items()}
            save_file(half, HERE / f"{name}.safetensors")
