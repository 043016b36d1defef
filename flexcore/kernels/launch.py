"""Launching kernels, or only noting down how they would be launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# what a GPU of unknown size is taken for where launches are only noted down: the H100's
PROCESSORS = 132
MOST_SPLITS = 16


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its grid and its arguments by name, `num_warps` and `num_stages` among them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


_noting: ContextVar[tuple[list[Launch], bool] | None] = ContextVar("flexcore_kernel_launches", default=None)


@contextmanager
def noting(run: bool = False) -> Iterator[list[Launch]]:
    """Collect the launches of a block.

    Args:
        run: Launch the kernels as well. If not, what they would write stays unwritten, and no GPU is needed.
    """
    launches: list[Launch] = []
    token = _noting.set((launches, run))
    try:
        yield launches
    finally:
        _noting.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a kernel on the current stream of its tensors' device."""
    noted = _noting.get()
    if noted is not None:
        noted[0].append(Launch(kernel, grid, arguments))
        if not noted[1]:
            return
    first = next(a for a in arguments.values() if isinstance(a, torch.Tensor))
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](**arguments)
    else:
        kernel[grid](**arguments)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else PROCESSORS
    )


def splits(programs: int, blocks: int, device: torch.device) -> int:
    """Into how many parts to split a loop of `blocks` so that a launch of `programs` fills the GPU.

    A power of two, for every number is a kernel of its own to compile; a part keeps two blocks at least.
    """
    want = min(2 * processors(device) // max(programs, 1), blocks // 2, MOST_SPLITS)
    return 1 << (want.bit_length() - 1) if want > 1 else 1
