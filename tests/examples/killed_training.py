"""`examples/train.py` in a process of its own that dies by SIGKILL: `killed_training.py WHERE STEP OPTIONS...`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerState

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cut(path: Path) -> None:
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def arm(where: str, step: int) -> None:
    """Patch the Trainer so that it dies at a step: before it, while it accumulates, or writing its checkpoint."""

    def after(cls: Any, name: str, then: Any) -> None:
        original = getattr(cls, name)

        def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = original(self, *args, **kwargs)
            state = self if isinstance(self, TrainerState) else self.state
            if state.global_step == step:
                then(*args)
            return out

        setattr(cls, name, patched)

    def half(name: str, *gone: str) -> Any:
        def then(folder: str, *rest: Any) -> None:
            cut(Path(folder) / name)
            for other in gone:
                (Path(folder) / other).unlink()
            die()

        return then

    def half_state(path: str) -> None:
        cut(Path(path))
        die()

    def half_rotated(*args: Any, output_dir: str, **kwargs: Any) -> None:
        oldest = min(Path(output_dir).glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
        if int(oldest.name.rpartition("-")[2]) < step and (Path(output_dir) / f"checkpoint-{step}").exists():
            (oldest / "model.safetensors").unlink()
            die()

    places = {
        "training": lambda: after(Trainer, "training_step", lambda *args: die()),
        "weights": lambda: after(Trainer, "_save", half("model.safetensors")),
        "optimizer": lambda: after(
            Trainer, "_save_optimizer_and_scheduler", half("optimizer.pt", "scheduler.pt")
        ),
        "random numbers": lambda: after(Trainer, "_save_rng_state", half("rng_state.pth")),
        "state": lambda: after(TrainerState, "save_to_json", half_state),
        "rotation": lambda: setattr(transformers.trainer, "rotate_checkpoints", half_rotated),
        "model": lambda: after(
            Trainer, "save_model", lambda folder, **k: die() if "part" in folder else None
        ),
    }
    places[where]()


if __name__ == "__main__":
    torch.set_num_threads(1)
    arm(sys.argv[1], int(sys.argv[2]))
    sys.path.insert(0, str(EXAMPLES))
    import train

    sys.exit(train.main(sys.argv[3:]))
