"""Running a model on the meta device: shapes without weights, and FLOPs without time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode


class ShapesOnly(TorchDispatchMode):
    """Lets tensors with values take part where they are known, and shapes where they are not.

    Modeling code asks values of small tensors (picture sizes) and looks at masks to see whether they can be left out.
    Values that are there are used; a question about a tensor on the meta device is answered with 1, which is what a
    mask without padding answers.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.device.type == "meta" for t in found):
            if func is torch.ops.aten._local_scalar_dense.default:
                return True if found[0].dtype is torch.bool else 1
            # indexing, arithmetic and all else refuse two devices
            args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count the FLOPs of what runs in the block, on the meta device or with it."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, ShapesOnly():
        yield counter
