"""Whether a kernel takes a call: by what was asked for, by what the kernel can do, and by what was measured."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..row_attention import RowMask

VARIABLE = "FLEXCORE_KERNELS"
TABLE = Path(__file__).with_name("measured.json")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Ampere: before it there are neither bfloat16 nor tf32 tensor cores
CAPABILITY = (8, 0)
# a kernel that is as fast as torch within the noise isn't chosen
MARGIN = 0.95


def mode() -> str:
    """`off`, `on` or `auto`, as `FLEXCORE_KERNELS` says.

    Raises:
        ValueError: It says something else.
    """
    found = os.environ.get(VARIABLE, "auto")
    if found not in ("off", "on", "auto"):
        raise ValueError(f"{VARIABLE} must be 'off', 'on' or 'auto', got {found!r}")
    return found


# Looking into the environment takes longer than the rest of the decision. Calls on the CPU, where there is nothing to
# decide, don't; so that a misspelt value is heard of there too, it is looked at once, here.
mode()
# Triton's own switch for running kernels in its interpreter, where they take tensors on the CPU
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@dataclass(frozen=True)
class Shape:
    """What the speed of a call depends on, and `auto` decides by.

    Args:
        kernel: `readout`, `region_attention` or `gather_project_rotate`.
        dtype: Of the inputs, `bfloat16` for instance.
        width: D of a head.
        groups: Query heads per kv head.
        lanes: Samples times kv heads.
        rows: Rows; in a projection, the width of the features.
        keys: Keys; in a projection, tokens.
        grad: Whether there will be a backward pass.
    """

    kernel: str
    dtype: str
    width: int
    groups: int
    lanes: int
    rows: int
    keys: int
    grad: bool = False

    def bucket(self) -> Shape:
        """Lanes, rows and keys rounded up to powers of two; the widths of heads and features stay what they are."""
        return replace(self, **{name: 1 << (getattr(self, name) - 1).bit_length() for name in self._rounded})

    def least(self) -> Shape:
        """The smallest shape of this one's bucket: measured there and at the largest, a kernel stands for all."""
        return replace(self.bucket(), **{n: getattr(self.bucket(), n) // 2 + 1 for n in self._rounded})

    @property
    def _rounded(self) -> tuple[str, ...]:
        return ("lanes", "keys") if self.kernel == "gather_project_rotate" else ("lanes", "rows", "keys")


def wins(shape: Shape, device: str, table: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether a table of measurements says that the kernel is faster than torch on a device at such a shape.

    Args:
        shape: Of the call.
        device: Name of the GPU.
        table: By device, entries with the fields of a bucket's `Shape` and `ratio`, the kernel's time over torch's at
            the worse end of the bucket.
    """
    wanted = asdict(shape.bucket())
    ratios = [
        e["ratio"] for e in table.get(device, ()) if {n: v for n, v in e.items() if n != "ratio"} == wanted
    ]
    return bool(ratios) and max(ratios) <= MARGIN


@cache
def _measured(shape: Shape, device: str) -> bool:
    return wins(shape, device, json.loads(TABLE.read_text())["devices"])


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def _able(*tensors: Tensor) -> bool:
    """Whether kernels can be handed these tensors at all: plain ones of one dtype that they know, on one GPU."""
    first = tensors[0]
    if torch.compiler.is_compiling() or not _has_triton():
        return False
    if not (_capable(first.device) if first.is_cuda else INTERPRETED and first.device.type == "cpu"):
        return False
    return first.dtype in DTYPES and all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.dtype == first.dtype
        and t.device == first.device
        and t.numel()
        for t in tensors
    )


def _widest(dtype: torch.dtype, grad: bool = False) -> int:
    """Widest head whose kernels compile without spilled registers: float32 operands take several times the room."""
    if dtype == torch.float32:
        return 64 if grad else 128
    return 256


def _chosen(wanted: str, shape: Shape, device: torch.device) -> bool:
    if wanted == "on":
        return True
    return device.type == "cuda" and _measured(shape.bucket(), torch.cuda.get_device_name(device))


def reads_out(query: Tensor, key: Tensor, mask: RowMask | None) -> bool:
    """Whether the readout kernel takes a call of `row_attention` without a value; arguments as there."""
    from ..row_attention import CausalRows, GatheredRows, SharedMask

    wanted = mode()
    if wanted == "off" or not _able(query, key) or query.shape[3] > _widest(query.dtype):
        return False
    if type(mask) is CausalRows:
        beside = mask.last
    elif type(mask) in (GatheredRows, SharedMask):
        beside = mask.mask  # type: ignore[union-attr]
        if beside.dtype not in (torch.bool, *DTYPES):
            return False
    elif mask is None:
        beside = query
    else:
        return False
    batch, heads, rows, width = query.shape
    kv = key.shape[1]
    shape = Shape(
        "readout", str(query.dtype)[6:], width, heads // kv, batch * kv, rows, key.shape[2], grad=False
    )
    return beside.device == query.device and _chosen(wanted, shape, query.device)


def reads_regions(query: Tensor, key: Tensor, value: Tensor, mask: RowMask | None) -> bool:
    """Whether the region kernel takes a call of `hierarchical_attention`; arguments as there, `mask` the fine one."""
    from ..row_attention import RegionRows

    wanted = mode()
    if wanted == "off" or not _able(query, key, value) or (mask is not None and type(mask) is not RegionRows):
        return False
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if max(key.shape[3], value.shape[3]) > _widest(query.dtype, grad):
        return False
    if mask is not None and any(t.device != query.device for t in (mask.selected, mask.valid)):  # type: ignore
        return False
    batch, heads, rows, width = query.shape
    kv = key.shape[1]
    shape = Shape(
        "region_attention",
        str(query.dtype)[6:],
        width,
        heads // kv,
        batch * kv,
        rows,
        key.shape[2],
        grad,
    )
    return _chosen(wanted, shape, query.device)


def projects(
    features: Tensor, key: torch.nn.Linear, value: torch.nn.Linear, cos: Tensor, sin: Tensor
) -> bool:
    """Whether the projection kernel takes these features, linear layers and rotary tables `[1, N, D]`."""
    wanted = mode()
    biases = [m.bias for m in (key, value) if m.bias is not None]
    leaves = (features, key.weight, value.weight, *biases)
    if wanted == "off" or len(biases) == 1 or not _able(*leaves, cos, sin):
        return False
    if torch.is_autocast_enabled(features.device.type) or (
        torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    ):
        return False
    width = cos.shape[-1]
    heads = key.weight.shape[0] // width
    if width % 2 or width > 256 or key.weight.shape[0] % width or value.weight.shape[0] % heads:
        return False
    if (value.weight.shape[0] // heads) % 2 or value.weight.shape[0] // heads > 256:
        return False
    tokens, wide = features.shape[-2:]
    shape = Shape("gather_project_rotate", str(features.dtype)[6:], width, 1, heads, wide, tokens)
    return _chosen(wanted, shape, features.device)
