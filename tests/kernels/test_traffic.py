"""The counted bytes are those that the kernels ask for: the interpreter is made to count its loads and stores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flexcore.kernels.dispatch import Shape
from flexcore.kernels.launch import noting
from flexcore.kernels.traffic import Traffic, traffic
from tests.kernels.helpers import INTERPRETED

pytest.importorskip("triton")
cases = pytest.importorskip("benchmarks.kernel_cases", exc_type=ImportError)
pytestmark = [] if INTERPRETED else [pytest.mark.skip(reason="only the interpreter counts"), pytest.mark.gpu]

SHAPES = {
    "decode": Shape("readout", "float32", 24, 1, 2, 1, 65),
    "grouped": Shape("readout", "bfloat16", 32, 3, 2, 5, 300),
    "one-row": Shape("region_attention", "bfloat16", 32, 2, 2, 1, 200),
    "one-part": Shape("region_attention", "float32", 16, 1, 2, 3, 64),
    "backward": Shape("region_attention", "bfloat16", 16, 2, 2, 19, 128, True),
    "projection": Shape("gather_project_rotate", "float32", 24, 1, 2, 40, 70),
}


class Counter:
    """Counts what the interpreter loads and stores, masked-off lanes aside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from triton.runtime import interpreter

        self.read = self.written = 0
        inner = interpreter._interpreter

        class Counting:
            @staticmethod
            def load(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
                self.read += int(np.sum(mask)) * np.dtype(dtype).itemsize
                return inner.load(pointers, mask, other, dtype)

            @staticmethod
            def store(pointers: Any, value: Any, mask: Any) -> Any:
                self.written += int(np.sum(np.broadcast_to(mask, value.shape))) * value.dtype.itemsize
                return inner.store(pointers, value, mask)

        monkeypatch.setattr(interpreter, "_interpreter", Counting)


@pytest.mark.parametrize("name", SHAPES)
def test_counted_bytes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = cases.Case(SHAPES[name])
    given = case.inputs(torch.device("cpu"))
    counter = Counter(monkeypatch)
    with noting(run=True) as launches:
        case.run(given, kernel=True)
    total = sum((traffic(launch) for launch in launches), Traffic())
    assert (counter.read, counter.written) == (total.read, total.written)
    assert total.read > case.floor().read * 0.9 and total.flops >= case.floor().flops
