"""The runner: deals samples out to processes, asks them batch by batch, writes answers as they come, and merges."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flexcore.errors import SourceError

from .answers import ANSWER, PROBLEM, SKIPPED, AnswerFile, read
from .arms import TooLongError, cannot
from .asking import Asker
from .base import Benchmark, Judge, Sample
from .table import results

_ABOUT = "about.json"
_QUIET = 30.0  # seconds between two states of the bar in a log, which keeps them all
RESULTS = "results.json"


@dataclass(frozen=True)
class Run:
    """One run over one benchmark, as each of its processes sees it.

    Args:
        benchmark: The benchmark.
        samples: All of them, in the same order in every process.
        arms: Which to ask.
        folder: Where answers go.
        rank: This process.
        world: How many there are.
        wait: Returns when all processes have called it.
        problems: What was wrong with the samples that aren't among `samples`.
    """

    benchmark: Benchmark
    samples: Sequence[Sample]
    arms: Sequence[str]
    folder: Path
    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None
    problems: list[str] = field(default_factory=list)

    def execute(self, make: Callable[[], tuple[Asker, str]], batch_size: int) -> None:
        """Ask all arms about what has no answer yet.

        Args:
            make: Loads the model; called if anything is left to ask. Its note says what to know about the model.
            batch_size: Questions at a time.
        """
        done = {arm: read(self.folder, arm) for arm in self.arms}
        self.wait()  # nobody writes before all have read, so that all agree on what is left
        left = {
            arm: [s for s in self.samples if PROBLEM in own.get(s.key, {PROBLEM: ""})]
            for arm, own in done.items()
        }
        if any(left.values()):
            asker, note = make()
            reasons = {arm: reason for arm in self.arms if (reason := cannot(arm, asker.model))}
            if note and "flex" in reasons:
                reasons["flex"], note = note, ""
            if self.rank == 0:
                about = {"not run": reasons, "notes": {"flex": note} if note and "flex" in self.arms else {}}
                (self.folder / _ABOUT).write_text(json.dumps(about, indent=1) + "\n")
            own = {sample.key for sample in self.samples[self.rank :: self.world]}
            for arm in self.arms:
                if arm not in reasons:
                    self._ask(asker, arm, [s for s in left[arm] if s.key in own], batch_size)
        self.wait()

    def _ask(self, asker: Asker, arm: str, samples: Sequence[Sample], batch_size: int) -> None:
        shard = len(self.samples[self.rank :: self.world])
        bar = tqdm(
            total=shard,
            initial=shard - len(samples),
            desc=arm,
            unit="question",
            disable=self.rank != 0,
            mininterval=0.1 if sys.stderr.isatty() else _QUIET,
        )
        with AnswerFile(self.folder, arm, self.rank) as file, bar:
            for i in range(0, len(samples), batch_size):
                some = samples[i : i + batch_size]
                started = time.perf_counter()
                records = list(records_of(asker, arm, some))
                seconds = (time.perf_counter() - started) / len(some)
                file.write({**record, "seconds": round(seconds, 4)} for record in records)
                for record in records:
                    if PROBLEM in record:
                        tqdm.write(f"left out: {record[PROBLEM]}")
                bar.update(len(some))

    def merge(self, judge: Judge | None = None) -> dict[str, Any]:
        """The results of all processes, which are written to the folder too."""
        records = {arm: read(self.folder, arm) for arm in self.arms}
        about = self.folder / _ABOUT
        known = json.loads(about.read_text()) if about.exists() else {"not run": {}, "notes": {}}
        reasons = {arm: reason for arm, reason in known["not run"].items() if arm in self.arms}
        keys = [sample.key for sample in self.samples]
        wrong = [r[key][PROBLEM] for r in records.values() for key in keys if PROBLEM in r.get(key, ())]
        found = {
            "benchmark": self.benchmark.name,
            **results(self.benchmark, self.samples, records, reasons, judge),
            "notes": {arm: note for arm, note in known["notes"].items() if arm in self.arms},
            "problems": [*self.problems, *dict.fromkeys(wrong)],
            "seconds": {arm: _seconds(own, keys) for arm, own in records.items() if arm not in reasons},
        }
        (self.folder / RESULTS).write_text(json.dumps(found, indent=1) + "\n")
        return found


def _seconds(records: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> float:
    return round(sum(records[key]["seconds"] for key in keys if key in records), 1)


def records_of(asker: Asker, arm: str, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """What to record about each sample of a batch: its answer, or why there is none."""
    try:
        answers = asker.ask(arm, samples)
    except (ValueError, OSError, SourceError) as error:
        if len(samples) > 1:
            # One of them is to blame; the others must not suffer for it.
            for sample in samples:
                yield from records_of(asker, arm, [sample])
            return
        (sample,) = samples
        if isinstance(error, TooLongError):
            yield {"key": sample.key, SKIPPED: str(error)}
        else:
            yield {"key": sample.key, PROBLEM: f"{sample.where}: {error}"}
        return
    for sample, answer in zip(samples, answers, strict=True):
        yield {"key": sample.key, ANSWER: answer}
