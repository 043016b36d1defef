"""Naive twins of the core, written for reading: loops, exact fractions and one concatenated float64 softmax."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexcore.grid import Grid

# ---------------------------------------------------------------------- lattices


def raster(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """All cells of a lattice, last axis fastest."""
    return list(itertools.product(*(range(n) for n in sizes)))


def flat_index(cell: Sequence[int], sizes: Sequence[int]) -> int:
    index = 0
    for at, size in zip(cell, sizes, strict=True):
        index = index * size + at
    return index


def block_edges(size: int, side: int, tile: int | None = None) -> tuple[int, ...]:
    """Region edges of one axis, one token at a time: a new block at every tile start and after `side` tokens."""
    tile = size if tile is None else tile
    edges, start = [0], 0
    for at in range(1, size):
        if at % tile == 0 or at - start == side:
            edges.append(at)
            start = at
    return tuple(edges + [size])


def region_cells(grid: Grid) -> list[list[tuple[int, ...]]]:
    """The fine tokens of every region, by asking of every token which interval it lies in."""

    def owner(at: int, edges: Sequence[int]) -> int:
        return next(p for p in range(len(edges) - 1) if edges[p] <= at < edges[p + 1])

    shape = [len(e) - 1 for e in grid.edges]
    out: list[list[tuple[int, ...]]] = [[] for _ in range(math.prod(shape))]
    for token in raster(grid.fine):
        region = [owner(at, edges) for at, edges in zip(token, grid.edges, strict=True)]
        out[flat_index(region, shape)].append(token)
    return out


def touches(grid: Grid) -> Tensor:
    """`[n_regions, n_coarse]` bool: whose extents overlap with positive measure on every axis."""
    axes = []
    for edges, cells, size in zip(grid.edges, grid.coarse, grid.fine, strict=True):
        axes.append(
            [
                [
                    min(Fraction(b, size), Fraction(u + 1, cells))
                    > max(Fraction(a, size), Fraction(u, cells))
                    for u in range(cells)
                ]
                for a, b in itertools.pairwise(edges)
            ]
        )
    regions = raster([len(a) for a in axes])
    return torch.tensor(
        [[all(axes[i][p[i]][u[i]] for i in range(len(axes))) for u in raster(grid.coarse)] for p in regions]
    )


# ---------------------------------------------------------------------- attention


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    see: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp (sinks not counted) and probabilities (sinks counted), head by head in float64.

    Args:
        query: `[B, Hq, R, D]`.
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, Dv]`.
        see: Bool or additive float, broadcastable to `[B, Hq, R, N]`; every row must see something.
        scaling: Factor on the logits.
        softcap: `cap * tanh(logits / cap)`.
        sinks: `[Hq]`, counted in the output's softmax as well.
    """
    batch, heads, rows, _ = query.shape
    see = see.expand(batch, heads, rows, key.shape[2])
    out, lse, prob = [], [], []
    for b, h in itertools.product(range(batch), range(heads)):
        kv = h // (heads // key.shape[1])
        s = torch.einsum("rd,nd->rn", query[b, h].double(), key[b, kv].double()) * scaling
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        s = s.masked_fill(~see[b, h], -math.inf) if see.dtype == torch.bool else s + see[b, h].double()
        lse.append(s.exp().sum(dim=-1).log())
        if sinks is not None:
            s = torch.cat([s, sinks[h].double().expand(rows, 1)], dim=-1)
        p = (s.exp() / s.exp().sum(dim=-1, keepdim=True))[:, : key.shape[2]]
        prob.append(p)
        out.append(torch.einsum("rn,nd->rd", p, value[b, kv].double()))
    return tuple(torch.stack(t).unflatten(0, (batch, heads)) for t in (out, lse, prob))  # type: ignore[return-value]


def dense_joint(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fine_key: Tensor,
    fine_value: Tensor,
    *,
    see: Tensor,
    fine_see: Tensor,
    alpha: float | Tensor = 1.0,
    **kwargs: Any,
) -> Tensor:
    """Both parts in one softmax, blended with the plain output: float64 `[B, R, Hq, Dv]`."""
    shape = (*query.shape[:3], -1)
    plain, _, _ = dense_attention(query, key, value, see, **kwargs)
    both = torch.cat([see.expand(*shape[:3], key.shape[2]), fine_see[:, None].expand(shape)], dim=-1)
    joint, _, _ = dense_attention(
        query, torch.cat([key, fine_key], 2), torch.cat([value, fine_value], 2), both, **kwargs
    )
    return ((1 - alpha) * plain + alpha * joint).transpose(1, 2)


def gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the expected tensor's largest magnitude; NaN and inf count as infinite."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    exact = expected.detach().double()
    difference = (found.detach().double() - exact).abs().amax()
    if not bool(difference.isfinite()):
        return math.inf
    return float(difference / exact.abs().amax().clamp(min=1e-30))


# ---------------------------------------------------------------------- memory


class Watch(TorchDispatchMode):
    """Notes the shape and size of every tensor that an operation makes; views of what was there don't count."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given:
                self.shapes.add(tuple(t.shape))
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote holds NaN: what `torch.empty` hands out, in operators as well."""
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert bool(torch.empty(3).isnan().all())
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
