"""One call of each Triton kernel at sizes of a real model, its torch twin, and what either moves and computes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from flexcore.hierarchical_attention import hierarchical_attention
from flexcore.kernels.artefacts import TARGETS, Artefact, compiled, missing_tools
from flexcore.kernels.dispatch import Shape
from flexcore.kernels.gather_project_rotate import gather_project_rotate, gather_project_rotate_reference
from flexcore.kernels.launch import Launch, noting
from flexcore.kernels.readout import readout
from flexcore.kernels.region_attention import read_regions
from flexcore.kernels.traffic import Traffic, traffic
from flexcore.row_attention import CausalRows, RegionRows, row_attention

# data sheets: bytes and dense bfloat16 FLOPs per second
CARDS = {"A100": (2.04e12, 312e12), "H100": (3.35e12, 989e12), "B200": (8.0e12, 2250e12)}
CELLS, TEXT, PAGE = 576, 64, 64


@dataclass(frozen=True)
class Case:
    """One call of one kernel, and of the torch path in its place.

    Args:
        shape: Sizes, as the choice of `auto` sees them.
        name: Of the sizes.
    """

    shape: Shape
    name: str = ""

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Random inputs; masks are open, so that every row reads everything."""
        s = self.shape
        dtype = getattr(torch, s.dtype)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, dtype=dtype, device=device)

        if s.kernel == "gather_project_rotate":
            tables = {name: random(s.keys, s.width) for name in ("cos", "sin")}
            weights = {name: random(s.lanes * s.width, s.rows) for name in ("key_weight", "value_weight")}
            order = torch.randperm(s.keys, device=device)
            return {"features": random(s.keys, s.rows), "tokens": order, **weights, **tables}
        kv, heads = s.lanes, s.lanes * s.groups
        regions = math.ceil(s.keys / PAGE)
        keys = s.keys if s.kernel == "readout" else regions * PAGE
        out = {"query": random(1, heads, s.rows, s.width), "key": random(1, kv, keys, s.width)}
        if s.kernel == "readout":
            last = torch.arange(s.keys - s.rows, s.keys, device=device)[None]
            return out | {"last": last, "cells": torch.arange(min(CELLS, s.keys), device=device)[None]}
        out |= {"value": random(1, kv, keys, s.width), "plain": random(1, s.rows, heads, s.width)}
        seen = {"selected": (1, s.rows, regions), "valid": (1, regions, PAGE)}
        out |= {name: torch.ones(size, dtype=torch.bool, device=device) for name, size in seen.items()}
        out["lse"] = torch.randn(1, heads, s.rows, device=device)
        if s.grad:
            out = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in out.items()}
        return out

    def run(self, given: dict[str, Tensor], kernel: bool) -> list[Tensor]:
        """The call's outputs, and its gradients where there are any."""
        s, scaling = self.shape, self.shape.width**-0.5
        if s.kernel == "gather_project_rotate":
            project = gather_project_rotate if kernel else gather_project_rotate_reference
            return list(project(**given, heads=s.lanes))
        if s.kernel == "readout":
            query, key, cells = given["query"], given["key"], given["cells"]
            mask = CausalRows(given["last"], s.keys) if s.rows > 1 else None
            if kernel:
                return [t for t in readout(query, key, mask, cells, scaling=scaling) if t is not None]
            found = row_attention(query, key, None, mask, scaling=scaling, cells=cells)
            return [t for t in found if t is not None]
        query, key, value, plain, lse = (given[n] for n in ("query", "key", "value", "plain", "lse"))
        mask_ = RegionRows(given["selected"], given["valid"])
        if kernel:
            out = read_regions(query, key, value, mask_, plain, lse, scaling=scaling, softcap=None, alpha=1.0)
        else:
            out = hierarchical_attention(
                query, None, None, key, value, fine_mask=mask_, scaling=scaling, plain=plain, lse=lse
            )
        if not s.grad:
            return [out]
        leaves = [t for t in given.values() if t.requires_grad]
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    def launches(self) -> list[Launch]:
        """How the kernel would be launched, without launching it."""
        with noting() as launches:
            self.run(self.inputs(torch.device("cpu")), kernel=True)
        return launches

    def floor(self) -> Traffic:
        """Inputs and outputs once, and the products that the mathematics needs."""
        given = self.inputs(torch.device("cpu"))
        s = self.shape
        outputs = {
            "readout": lambda: [
                given["query"][..., 0].float(),
                torch.empty(1, s.rows, len(given["cells"][0])),
            ],
            "region_attention": lambda: [given["plain"]],
            "gather_project_rotate": lambda: [
                torch.empty(2, s.keys, s.lanes, s.width, dtype=getattr(torch, s.dtype))
            ],
        }[s.kernel]()
        if s.grad:
            outputs += [t for t in given.values() if t.requires_grad]
        rows = s.lanes * s.groups * s.rows
        if s.kernel == "gather_project_rotate":
            flops = 2 * 2 * s.keys * s.rows * s.lanes * s.width
        elif s.kernel == "readout":
            flops = 2 * rows * s.keys * s.width
        else:  # backward: logits again, and four products for the gradients
            flops = 2 * rows * s.keys * s.width * (2 + 5 * s.grad)
        return Traffic(sum(t.nbytes for t in given.values()), sum(t.nbytes for t in outputs), flops)


def cases(dtype: str = "bfloat16") -> list[Case]:
    """What the tables show: one layer, a batch of one, 20 % of 81 regions chosen, their features new."""
    keys, fine = CELLS + TEXT, 16 * PAGE
    out = []
    for name, lanes, groups in (("32 heads", 32, 1), ("32 heads, 8 kv heads", 8, 4)):
        for rows, what in ((1, "decode"), (32, "training, 32 rows")):
            label = f"{what}, {name}"
            out.append(Case(Shape("readout", dtype, 128, groups, lanes, rows, keys), label))
            grad = rows > 1
            out.append(Case(Shape("region_attention", dtype, 128, groups, lanes, rows, fine, grad), label))
        label = f"{fine} tokens, {name}"
        out.append(Case(Shape("gather_project_rotate", dtype, 128, 1, lanes, 4096, fine), label))
    return out


# ---------------------------------------------------------------------- counting


class _Moved(TorchDispatchMode):
    """Counts the bytes that operators are given and give back; views cost nothing."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        if any(t.untyped_storage()._cdata not in known for t in made) or func._schema.is_mutable:
            self.bytes += sum(t.numel() * t.element_size() for t in {id(t): t for t in given + made}.values())
        return out


def counted(case: Case) -> dict[str, Any]:
    """Bytes and FLOPs of a case: floor, kernel and torch path."""
    given = case.inputs(torch.device("cpu"))
    with _Moved() as moved, FlopCounterMode(display=False) as flops:
        case.run(given, kernel=False)
    total = sum((traffic(launch) for launch in case.launches()), Traffic())
    floor = case.floor()
    return {
        "case": asdict(case),
        "floor": {"bytes": floor.bytes, "flops": floor.flops},
        "kernel": {"bytes": total.bytes, "flops": total.flops, "launches": len(case.launches())},
        "torch": {"bytes": moved.bytes, "flops": flops.get_total_flops()},
        "floor_us": {
            card: 1e6 * max(floor.bytes / rate, floor.flops / flop_rate)
            for card, (rate, flop_rate) in CARDS.items()
        },
    }


def compile_cases() -> Iterator[Case]:
    """What `statistics` compiles: the cases of the tables, and other dtypes and head widths."""
    yield from cases()
    for dtype, width in (("bfloat16", 64), ("bfloat16", 256), ("float16", 128), ("float32", 64)):
        yield Case(Shape("readout", dtype, width, 1, 8, 32, 640))
        yield Case(Shape("region_attention", dtype, width, 1, 8, 32, 1024, True))
        yield Case(Shape("gather_project_rotate", dtype, width, 1, 8, 1024, 1024))


def statistics(targets: Sequence[int] = TARGETS) -> tuple[list[tuple[Case, Artefact]], list[str]]:
    """Registers, spills and shared memory of every launch, and why there are none for some targets."""
    found, reasons = [], []
    for target in targets:
        if reason := missing_tools(target):
            reasons.append(f"sm_{target}: {reason}")
            continue
        for case in tqdm(list(compile_cases()), desc=f"compiling for sm_{target}"):
            found += [(case, artefact) for artefact in compiled(case.launches(), target)]
    return found, reasons
