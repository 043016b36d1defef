"""The least time that the speed benchmark's passes can take on a GPU, from their FLOPs and bytes."""

from __future__ import annotations

from typing import Any

import torch

from flexcore.cost import DecoderShape, coarse_prefill, decode, dense_prefill, flex_prefill
from flexcore.roofline import MACHINES, Machine, Weights, decoder_parts, machine

from .speed_arms import COARSE, TEXT, Bench


def floors(bench: Bench, measured: dict[str, float]) -> dict[str, Any]:
    """`floor_milliseconds` for what was measured; empty where the machine's rates aren't known.

    Args:
        bench: What was run.
        measured: Milliseconds by group and arm.

    The official scheme has no floor of its own: it does Flex's work and more.
    """
    on = machine_of(bench)
    if on is None:
        return {}
    model, args = bench.model, bench.args
    shape = DecoderShape.from_config(model.config, reading=model.flex_config.layers)
    head = model.lm_head.weight.numel()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    weights = Weights(layers, head=head)
    text, coarse, fine = TEXT, COARSE**2, bench.grid.n_fine
    chosen = bench.k * bench.grid.region_tokens
    context = text + coarse
    passes = {
        "prefill coarse": (coarse_prefill(shape, text, coarse), context, context, {}),
        "prefill flex": (
            flex_prefill(shape, text, coarse, chosen),
            context,
            context,
            {"projected": chosen, "read": chosen},
        ),
        "prefill dense": (dense_prefill(shape, text, 0, fine), text + fine, text + fine, {}),
        "decode coarse": (decode(shape, context), 1, context, {}),
        "decode flex": (decode(shape, context, chosen), 1, context, {"read": chosen}),
        "decode dense": (decode(shape, text + fine), 1, text + fine, {}),
    }
    itemsize = model.dtype.itemsize
    out = {}
    for name in measured:
        group, _, arm = name.partition(" ")
        if (known := passes.get(f"{group.partition('/')[0]} {arm}")) is None:
            continue
        cost, tokens, seen, reading = known
        parts = decoder_parts(
            shape,
            weights,
            cost,
            tokens=tokens,
            context=seen,
            batch=args.batch,
            itemsize=itemsize,
            **reading,
        )
        out[name] = 1e3 * sum(work.seconds(on) for work in parts.values())
    return {"floor_milliseconds": out, "floor_machine": {"name": on.name, "source": on.source}}


def machine_of(bench: Bench) -> Machine | None:
    """The machine whose peak rates count: the one that was named, or the GPU if `flexcore.roofline` has it."""
    if bench.args.machine:
        return machine(bench.args.machine)
    if bench.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(bench.device).lower()
    return next((found for key, found in MACHINES.items() if key in name), None)
