"""Training and one benchmark, end to end, with real weights: DINOv2-small and SmolLM2-135M as a LLaVA.

    python -m benchmarks.real_weights                          # half an hour of training; the same command goes on
    python -m benchmarks.real_weights --minutes 5 --threads 1

`examples/train.py` trains the model to read a word in a photograph, is killed on the way and goes on; then
`benchmarks.vqa` asks it and is killed once too. That the path holds is what is shown: the accuracy of so short a
training means nothing. Writes a section of `RESULTS.md` and `results/real_weights.json`. For the weights see
`packaged_weights.py`; `--model` takes any other LLaVA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from tqdm import tqdm

from flexcore.hf.checkpoints import last_checkpoint

from .environment import environment
from .real_weights_data import TEST, fabricate
from .real_weights_report import TRAINS, costs, section
from .sections import write_json, write_section
from .vqa.answers import settle
from .vqa.arms import ARMS

HERE = Path(__file__).parent
ROOT = HERE.parent
SAVE_EVERY, AFTER = 20, 3  # steps between checkpoints, and beyond the first one until the kill
_STEP = b"'loss'"  # what a step leaves in the log of train.py


def watch(
    command: Sequence[str], log: Path, label: str, count: Callable[[], int], kill_at: int | None, threads: int
) -> dict[str, Any]:
    """Run a command, show how far it is, and kill it on the way if asked to.

    Args:
        command: Its words behind `python`.
        log: Where what it prints is added.
        label: In front of the bar, and what is counted.
        count: How much is done, by all runs so far.
        kill_at: Kill it when so much is.
        threads: That it computes with.

    Returns:
        Whether it was killed, what it did, and the seconds that a unit took, by the clock and of the CPU (medians).

    Raises:
        RuntimeError: It failed.
    """
    import psutil

    environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    before, killed, marks = count(), False, []
    with log.open("ab") as out, tqdm(desc=label, initial=before, unit="") as bar:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environ, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            seen = psutil.Process(process.pid)
            while process.poll() is None:
                time.sleep(0.2)
                done = count()
                if done > bar.n:
                    # what a process has used is known while it lives
                    used = _used(seen)
                    marks.append((done, time.monotonic(), used))
                    bar.update(done - bar.n)
                if kill_at is not None and done >= kill_at:
                    process.kill()
                    killed = True
                    process.wait()
        finally:
            process.kill()
            process.wait()
    if process.returncode and not killed:
        raise RuntimeError(f"{label} failed, see {log}: {log.read_text(errors='replace').strip()[-800:]}")
    pairs = [(b, a) for a, b in pairwise(marks) if b[2] is not None and a[2] is not None]
    found = {"command": shlex.join(["python", *command]), "killed": killed, "from": before, "to": count()}
    for name, at in (("seconds", 1), ("CPU seconds", 2)):
        found[name] = round(median((b[at] - a[at]) / (b[0] - a[0]) for b, a in pairs), 3) if pairs else None
    return {**found, "spent": round(marks[-1][1] - marks[0][1], 1) if marks else 0.0}


def options(given: dict[str, Any]) -> list[str]:
    """Options as words of a command that runs in the repository's root; paths in there are relative."""
    words = []
    for name, value in given.items():
        inside = isinstance(value, Path) and value.is_relative_to(ROOT)
        words += [f"--{name}", str(value.relative_to(ROOT) if inside else value)]
    return words


def _used(process: Any) -> float | None:
    import psutil

    try:
        used = process.cpu_times()
    except psutil.NoSuchProcess:
        return None
    return float(used.user + used.system)


def assemble(args: argparse.Namespace) -> Path:
    """The folder of the model that is trained."""
    folder: Path = args.folder / "assembled"
    if args.model is not None:
        return args.model
    if not folder.is_dir():
        from . import packaged_weights as weights
        from .assembled import assemble as put_together

        try:
            model, processor = put_together(weights.dinov2(), *weights.smollm2(), side=args.side)
        except weights.MissingWeights as missing:
            raise ValueError(f"{missing}; or give --model") from None
        part = folder.with_name("assembled.part")
        model.save_pretrained(part)
        processor.save_pretrained(part)
        part.rename(folder)
    return folder


def train(args: argparse.Namespace, model: Path, stage: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """`examples/train.py`, killed a few steps behind its first checkpoint, and again until the time is over."""
    output, log, data = args.folder / "train", args.folder / "train.log", args.folder / "data"
    given = {"model": model, "data": data / "train.jsonl", "eval": data / "held.jsonl", "images": data}
    given |= {"output": output, "trains": TRAINS, "learning-rate": "3e-3", "batch": args.batch}
    given |= {"fine-learning-rate": "1e-3", "epochs": 20, "schedule": "constant", "alpha-warmup": 0}
    given |= {"zoom": args.zoom, "device": "cpu", "log-every": 1, "save-every": SAVE_EVERY}
    command = ["examples/train.py", *options(given)]

    def steps() -> int:
        return log.read_bytes().count(_STEP) if log.exists() else 0

    def run(kill_at: int | None, minutes: float) -> dict[str, Any]:
        return watch(
            [*command, "--max-minutes", f"{minutes:.2f}"], log, "steps", steps, kill_at, args.threads
        )

    first = stage("training, killed", lambda: run(SAVE_EVERY + AFTER, args.minutes))
    whole = last_checkpoint(output)
    left = max(0.01, args.minutes - first["spent"] / 60)
    at = {"resumed at": int(whole.name.rpartition("-")[2]) if whole else 0}
    second = stage("training, resumed", lambda: {**run(None, left), **at})
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    some = max(1, min(10, len(losses) // 4))
    said = log.read_text(errors="replace")
    told = re.findall(r"per sample ([\d,]+) text tokens, ([\d,]+) of them answers, ([\d,]+) coarse", said)
    text, answer, coarse = (int(n.replace(",", "")) for n in told[-1])
    return {
        "runs": [first, second],
        "steps": len(losses),
        "loss, first steps": mean(losses[:some]),
        "loss, last steps": mean(losses[-some:]),
        "steps averaged": some,
        "done twice": twice(re.findall(r"'loss': '([^']*)'", said), second["resumed at"], first["to"]),
        "selected": mean(entry["selected"] for entry in history if "selected" in entry),
        "evaluations": [
            {name: entry[name] for name in ("step", "eval_loss", "eval_tokens", "eval_answers")}
            for entry in history
            if "eval_loss" in entry
        ],
        "sample": {"text": text, "answer": answer, "coarse": coarse},
    }


def twice(losses: Sequence[str], resumed: int, killed: int) -> dict[str, Any]:
    """How many steps were done before the kill and again, and how many of them gave the same loss, as logged."""
    before, again = losses[resumed:killed], losses[killed : 2 * killed - resumed]
    return {"steps": len(again), "same loss": sum(a == b for a, b in zip(before, again, strict=False))}


def ask(args: argparse.Namespace, stage: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """`benchmarks.vqa`, killed after its first answers, and again."""
    output = args.folder / "textvqa"
    given = {"data": args.folder / "data" / "textvqa", "model": args.folder / "train" / "model"}
    given |= {"output": output, "zoom": args.zoom, "batch-size": args.batch, "limit": args.limit}
    given |= {"device": "cpu"}
    command = ["-m", "benchmarks.vqa", "textvqa", *options(given), "--arms", ",".join(ARMS)]

    def answers() -> int:
        return sum(path.read_bytes().count(b"\n") for path in output.glob("*.jsonl"))

    log, threads = args.folder / "textvqa.log", args.threads
    runs = [
        stage(f"asking {args.limit}, killed", lambda: watch(command, log, "answers", answers, 1, threads)),
        stage(
            f"asking {args.limit}, resumed", lambda: watch(command, log, "answers", answers, None, threads)
        ),
    ]
    return {"runs": runs, **json.loads((output / "results.json").read_text())}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that isn't there yet; what comes out is all there is to know."""
    names = ("minutes", "side", "zoom", "batch", "threads")
    settings = {name: getattr(args, name) for name in names} | {"model": args.model and args.model.name}
    settle(args.folder, settings, write=True)

    def stage(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = args.folder / f"{name.replace(', ', '-')}.json"
        if not path.exists():
            write_json(path, make())
        return dict(json.loads(path.read_text()))

    fabricate(args.folder / "data", args.side * args.zoom)
    model = assemble(args)
    here = environment("benchmarks.real_weights")
    here["machine"]["threads"] = args.threads
    # as it was when the measurements began
    about = {**stage("environment", lambda: here), "command": here["command"]}
    training = train(args, model, stage)
    asked = ask(args, stage)
    cost = costs(model, training, args.side, args.zoom, args.batch)
    return {**about, "settings": settings, "training": training, "asked": asked, "cost": cost}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=30.0, help="of training")
    add(
        "--folder",
        type=Path,
        default=Path("outputs/real-weights"),
        help="data, model and logs; again: goes on",
    )
    add("--model", type=Path, help="a LLaVA instead of the assembled one")
    add("--side", type=int, default=112, help="of the coarse view in pixels")
    add("--zoom", type=int, default=3)
    add("--batch", type=int, default=2)
    add("--limit", type=int, default=TEST, help="questions of the benchmark")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--results", type=Path, default=HERE, help="where RESULTS.md and results/ are")
    args = parser.parse_args(argv)
    for name in ("minutes", "side", "zoom", "batch", "limit", "threads"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be more than 0, got {getattr(args, name)}")
    args.folder = args.folder.resolve()
    args.model = args.model and args.model.resolve()
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 2 if what it needs isn't there, 130 if it was stopped."""
    args = arguments(argv)
    try:
        found = run(args)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    write_json(args.results / "results" / "real_weights.json", found)
    write_section("real-weights", section(found), args.results / "RESULTS.md")
    print(section(found))
    return 0


if __name__ == "__main__":
    # so that what it started ends with it
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
