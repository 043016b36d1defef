"""Bytes that a launch asks for and FLOPs that it issues, by the kernels' own loops and tiles.

Asked for is more than what comes from memory: what several programs read again may still be in a cache. Masks are
taken for open: every row sees every key. A float32 product counts as often as tensor cores have to run for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .launch import Launch


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written by a launch, and FLOPs issued, padding of tiles included."""

    read: int = 0
    written: int = 0
    flops: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written, self.flops + other.flops)

    @property
    def bytes(self) -> int:
        """Read and written together."""
        return self.read + self.written


def traffic(launch: Launch) -> Traffic:
    """What one launch of one of our kernels moves and computes."""
    return _KERNELS[launch.kernel.__name__](launch.grid, launch.arguments)


def _item(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.element_size()


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _product(m: int, n: int, k: int, item: int, split: bool = False) -> int:
    """FLOPs of a tile's product; split operands take two runs, float32 ones three."""
    return 2 * m * n * k * (3 if item == 4 else 2 if split else 1)


def _row_log_sum_exp(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    tiles, lanes, parts = grid
    rows = a["q"].numel() // a["WIDTH"]
    keys = lanes * a["n_keys"] * a["WIDTH"] * _item(a["k"])
    where = _item(a["last"]) + _item(a["rows"])
    mask = rows * a["n_keys"] * _item(a["mask"])
    blocks = sum(
        math.ceil(max(0, min(a["part"], a["n_keys"] - i * a["part"])) / a["BLOCK_N"]) for i in range(parts)
    )
    product = _product(a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_D"], _item(a["q"]))
    return Traffic(
        parts * _size(a["q"]) + tiles * keys + parts * rows * where + mask,
        _size(a["lse"]),
        tiles * lanes * blocks * product,
    )


def _coarse_scores(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    cell_blocks, row_blocks, batch = grid
    rows = a["q"].numel() // a["WIDTH"]
    kv_heads = a["n_heads"] // a["GROUPS"]
    keys = batch * kv_heads * a["n_cells"] * a["WIDTH"] * _item(a["k"])
    where = batch * a["n_rows"] * a["GROUPS"] * (_item(a["last"]) + _item(a["rows"]))
    beside = rows * (a["PARTS"] * _item(a["parts"]) + _item(a["sinks"]))
    product = _product(a["BLOCK_R"] * a["GROUPS_PADDED"], a["BLOCK_C"], a["BLOCK_D"], _item(a["q"]))
    return Traffic(
        cell_blocks * (_size(a["q"]) + where + beside)
        + row_blocks * (keys + _size(a["cells"]))
        + rows * a["n_cells"] * _item(a["mask"]),
        _size(a["scores"]) + (_size(a["lse"]) if a["PARTS"] > 1 else 0),
        math.prod(grid) * kv_heads * product,
    )


def _tokens(lanes: int, a: dict[str, Any]) -> tuple[int, int]:
    """Bytes of all keys and values, and of the block table and mask beside them, once for each kv head."""
    tokens = lanes * a["n_regions"] * a["page"]
    pages = tokens * (a["WIDTH"] * _item(a["k"]) + a["VALUE"] * _item(a["v"]))
    return pages, tokens * (_item(a["valid"]) + _item(a["table"]))


def _region_rows(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    tiles, lanes, parts = grid
    rows, tokens = a["q"].numel() // a["WIDTH"], a["n_regions"] * a["page"]
    pages, beside = _tokens(lanes, a)
    own = rows * (a["VALUE"] * _item(a["plain"]) + _item(a["plain_lse"])) if a["PARTS"] == 1 else 0
    blocks = sum(
        math.ceil(max(0, min(a["part"], tokens - i * a["part"])) / a["BLOCK_N"]) for i in range(parts)
    )
    m, n, item = a["BLOCK_M"], a["BLOCK_N"], _item(a["q"])
    product = _product(m, n, a["BLOCK_D"], item) + _product(m, n, a["BLOCK_V"], item, split=True)
    return Traffic(
        parts * _size(a["q"]) + tiles * (pages + beside) + rows * tokens * _item(a["selected"]) + own,
        _size(a["out"]) + _size(a["lse"]),
        tiles * lanes * blocks * product,
    )


def _join_parts(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    rows = a["n_batch"] * a["n_rows"] * a["n_heads"]
    own = rows * (a["VALUE"] * _item(a["plain"]) + _item(a["plain_lse"]))
    return Traffic(_size(a["parts"]) + 2 * _size(a["parts_lse"]) + own, _size(a["out"]) + _size(a["lse"]))


def _query_gradient(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    tiles, lanes = grid
    tokens = a["n_regions"] * a["page"]
    rows = a["q"].numel() // a["WIDTH"]
    pages, beside = _tokens(lanes, a)
    once = sum(_size(a[name]) for name in ("q", "g", "lse", "delta"))
    return Traffic(
        once + tiles * (pages + beside) + rows * tokens * _item(a["selected"]),
        _size(a["dq"]),
        tiles * lanes * math.ceil(tokens / a["BLOCK_N"]) * _gradient_products(a),
    )


def _page_gradients(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    tiles, lanes = grid
    tokens = a["n_regions"] * a["page"]
    rows = a["q"].numel() // a["WIDTH"]
    pages, beside = _tokens(lanes, a)
    again = sum(_size(a[name]) for name in ("q", "g", "lse", "delta"))
    blocks = math.ceil(a["n_rows"] * a["GROUPS"] / a["BLOCK_M"])
    # values' gradients: both factors are split
    outer = (4 if _item(a["q"]) == 2 else 3) * _product(a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_V"], 2)
    return Traffic(
        tiles * again + pages + beside + rows * tokens * _item(a["selected"]),
        _size(a["dk"]) + _size(a["dv"]),
        tiles * lanes * blocks * (_gradient_products(a) + outer),
    )


def _gradient_products(a: dict[str, Any]) -> int:
    """Logits, their gradients from the values, and one product of those with keys or queries."""
    m, n, item = a["BLOCK_M"], a["BLOCK_N"], _item(a["q"])
    split = _product(m, n, a["BLOCK_V"], item, split=True) + _product(m, n, a["BLOCK_D"], item, split=True)
    return _product(m, n, a["BLOCK_D"], item) + split


def _project_pages(grid: tuple[int, ...], a: dict[str, Any]) -> Traffic:
    tiles, heads = grid
    item = _item(a["features"])
    tables = a["n_tokens"] * 2 * a["key_half"] * (_item(a["cos"]) + _item(a["sin"]))
    weights = (
        _size(a["key_weight"]) + _size(a["value_weight"]) + _size(a["key_bias"]) + _size(a["value_bias"])
    )
    blocks = math.ceil(a["width"] / a["BLOCK_C"])
    return Traffic(
        heads * a["n_tokens"] * (a["width"] * item + _item(a["tokens"]))
        + tiles * weights
        + a["heads"] * tables,
        _size(a["key"]) + _size(a["value"]),
        tiles * heads * blocks * 2 * _product(a["BLOCK_M"], a["BLOCK_H"], a["BLOCK_C"], item),
    )


_KERNELS = {
    "row_log_sum_exp": _row_log_sum_exp,
    "coarse_scores": _coarse_scores,
    "region_rows": _region_rows,
    "join_parts": _join_parts,
    "query_gradient": _query_gradient,
    "page_gradients": _page_gradients,
    "project_pages": _project_pages,
}
