"""Wrapped models with `FLEXCORE_KERNELS=on`: the same numbers as with `off`, through all three kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flexcore.kernels.dispatch import VARIABLE
from flexcore.kernels.launch import noting
from tests.hf.helpers import Sample, batch, generate, wrapped
from tests.kernels.helpers import DEVICE, RUNS_KERNELS, gap

pytest.importorskip("triton")
pytestmark = RUNS_KERNELS

READOUT = {"row_log_sum_exp", "coarse_scores"}
REGIONS = {"region_rows"}
PROJECTION = {"project_pages"}


def compared(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> tuple[Any, Any, set[str]]:
    """What a run gives with the kernels off and on, and which kernels were launched."""
    monkeypatch.setenv(VARIABLE, "off")
    with noting(run=True) as launches:
        off = run()
    assert not launches
    monkeypatch.setenv(VARIABLE, "on")
    with noting(run=True) as launches:
        on = run()
    names = Counter(launch.kernel.__name__ for launch in launches)
    return off, on, set(names) - {"join_parts"}


def inputs(model: Any, *samples: Sample) -> dict[str, Any]:
    made = batch("llama", list(samples), model=model)
    return {name: value.to(DEVICE) for name, value in made.items()}


def test_prefill_and_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama", layers=4).to(DEVICE)
    given = inputs(model, Sample(seed=1), Sample(before=7, seed=2))

    def run() -> Any:
        with torch.no_grad():
            return model(**given).logits, generate(model, given, 3)

    (logits, tokens), (with_kernels, same), names = compared(monkeypatch, run)
    assert names == READOUT | REGIONS | PROJECTION
    assert gap(with_kernels, logits) < 2e-5 and torch.equal(tokens, same)


def test_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama", layers=4).to(DEVICE).train()
    given = inputs(model, Sample(after=9, seed=1))
    labels = given["input_ids"].clone()
    labels[:, :-6] = -100

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        model(**given, labels=labels, alpha=0.4).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    off, on, names = compared(monkeypatch, run)
    assert names == READOUT | REGIONS | {"query_gradient", "page_gradients"}
    assert len(off) == len(on) > 40
    assert all(gap(a, b) < 2e-4 for a, b in zip(on, off, strict=True))


def test_static_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """All fine tokens beside each other, and a selection that says which are read."""
    model = wrapped("llama", layers=4, static=True).to(DEVICE)
    given = inputs(model, Sample(seed=3))
    off, on, names = compared(monkeypatch, lambda: generate(model, given, 3))
    assert torch.equal(off, on) and names == READOUT | REGIONS | PROJECTION


def test_auto_launches_nothing_where_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama", layers=4).to(DEVICE)
    given = inputs(model, Sample(seed=1))
    monkeypatch.setenv(VARIABLE, "auto")
    with noting(run=True) as launches, torch.no_grad():
        model(**given)
    assert not launches
