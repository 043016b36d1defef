"""Which of a training's checkpoints is whole: a run that was killed goes on from the last one that is.

Trainer writes into `checkpoint-N` itself: first the weights, then optimizer, schedule and random numbers, last
`trainer_state.json`. A kill leaves the files before it whole and one, or with several processes a few, cut off or
missing. So a checkpoint counts as whole if every file that must be there is, and every file that is there ends where
it says that it ends. A kill of the machine itself may lose what was written last without a trace; nothing here syncs.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
_ZIPS = ("*.pt", "*.pth", "*.bin")


def last_checkpoint(folder: str | Path, processes: int = 1) -> Path | None:
    """The newest whole checkpoint of a training, or None if there is none.

    Args:
        folder: Trainer's `output_dir`.
        processes: That train; each writes its own random numbers.
    """
    return next((path for path in _newest_first(Path(folder)) if not fault(path, processes)), None)


def drop_unfinished(folder: str | Path, processes: int = 1) -> list[Path]:
    """Delete checkpoints newer than the last whole one, so that their files never mix with those of a second try.

    Call it in one process, before any trains.

    Args:
        folder: Trainer's `output_dir`.
        processes: As for `last_checkpoint`.

    Returns:
        What was deleted.
    """
    gone = []
    for path in _newest_first(Path(folder)):
        if not fault(path, processes):
            break
        # without its state it can't pass for whole while the rest goes
        (path / _STATE).unlink(missing_ok=True)
        shutil.rmtree(path)
        gone.append(path)
    return gone


def fault(checkpoint: str | Path, processes: int = 1) -> str:
    """Why a checkpoint isn't whole; nothing if it is.

    Args:
        checkpoint: A folder `checkpoint-N`.
        processes: As for `last_checkpoint`.
    """
    path = Path(checkpoint)
    named = _NAME.fullmatch(path.name)
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        step = state["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_STATE} is missing or cut off"
    if named is None or step != int(named[1]):
        return f"{_STATE} is of step {step}"
    return _missing(path, processes) or _cut_off(path)


def _missing(path: Path, processes: int) -> str:
    shards = sorted(path.glob("pytorch_model_fsdp*"))
    if not shards and not any((path / name).is_file() for name in _WEIGHTS):
        return "there are no weights"
    for index in path.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return f"{index.name} is cut off"
        lacking = sorted(name for name in names if not (path / name).is_file())
        if lacking:
            return f"{lacking[0]} is missing"
    steps = [p for p in path.glob("global_step*") if p.is_dir()]  # DeepSpeed's, with the schedule in it
    if steps:
        if not (path / "latest").is_file():
            return "DeepSpeed's latest is missing"
        if len(list(steps[0].glob("*optim_states.pt"))) < processes:
            return "a process' optimizer is missing"
    else:
        if not any(path.glob("optimizer*")):
            return "the optimizer is missing"
        if not (path / "scheduler.pt").is_file():
            return "scheduler.pt is missing"
    wanted = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    lacking = [name for name in wanted if not (path / name).is_file()]
    return f"{lacking[0]} is missing" if lacking else ""


def _cut_off(path: Path) -> str:
    for file in sorted(path.rglob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt"):
                pass  # it checks that the file is as long as its header says
        except (SafetensorError, OSError):
            return f"{file.name} is cut off"
    for pattern in _ZIPS:
        for file in sorted(path.rglob(pattern)):
            # torch writes zip archives, whose directory comes last
            if not zipfile.is_zipfile(file):
                return f"{file.name} is cut off"
    return ""


def _newest_first(folder: Path) -> list[Path]:
    found = [
        (int(m[1]), p) for p in folder.glob("checkpoint-*") if p.is_dir() and (m := _NAME.fullmatch(p.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]
