"""Where kernels run in a test: in Triton's interpreter if TRITON_INTERPRET is set, else on a CUDA device.

Triton reads the variable at import, and a process in which it is set compiles nothing. So the tests of what kernels
compute are of the `gpu` kind in an ordinary run; `test_interpreter.py` runs the same tests in processes of their own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import helpers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
RUNS_KERNELS: list[Any] = []
if not INTERPRETED:
    RUNS_KERNELS = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    ]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT32 = 5e-6


def rounding(dtype: torch.dtype) -> float:
    """What may be lost where a result is rounded to `dtype` once; the interpreter truncates to bfloat16."""
    return FLOAT32 if dtype == torch.float32 else torch.finfo(dtype).eps


def gap(found: Tensor, expected: Tensor) -> float:
    """`tests.helpers.gap`, wherever the tensors are."""
    return helpers.gap(found.cpu(), expected.cpu())


def strided(tensor: Tensor) -> Tensor:
    """The same values as a view of a buffer of NaN: room around every axis, every other place of the last one."""
    *lead, last = tensor.shape
    room = torch.empty([*(n + 3 for n in lead), 2 * last + 3], dtype=tensor.dtype, device=tensor.device)
    room.fill_(torch.nan if tensor.is_floating_point() else 1)
    view = room[(*(slice(1, 1 + n) for n in lead), slice(1, 1 + 2 * last, 2))]
    return view.copy_(tensor.detach())
