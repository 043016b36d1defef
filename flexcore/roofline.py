"""Roofline: the least time that FLOPs and bytes take on a machine, and how many bytes a decoder's passes must move.

A lower bound: every part runs at the machine's peak or at its memory's bandwidth, whichever is slower, and moves
weights, K/V and fine features once. What passes between two operations is taken to stay on the chip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .cost import Cost, DecoderShape, kv_bytes


@dataclass(frozen=True)
class Machine:
    """One accelerator.

    Args:
        name: What to call it.
        flops: Peak FLOPs a second of dense 16-bit matrix products.
        bytes_per_second: Bandwidth of its memory.
        source: Where the two numbers are from.

    Raises:
        ValueError: A rate isn't a positive number.
    """

    name: str
    flops: float
    bytes_per_second: float
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("flops", "bytes_per_second"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number > 0, got {value!r}")
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a number > 0, got {value!r}")


# tensor-core peaks without sparsity
MACHINES = {
    "v100": Machine("V100 SXM2", 125e12, 900e9, "NVIDIA V100 datasheet: 125 TFLOPS, 900 GB/s"),
    "a100": Machine("A100 SXM 80GB", 312e12, 2039e9, "NVIDIA A100 datasheet: 312 TFLOPS, 2,039 GB/s"),
    "h100": Machine(
        "H100 SXM",
        989.5e12,
        3.35e12,
        "NVIDIA H100 datasheet: 1,979 TFLOPS with sparsity (half without), 3.35 TB/s",
    ),
}


def machine(name: str) -> Machine:
    """A machine by its name in `MACHINES`, or by its rates: `"312e12:2.0e12"`, FLOPs and bytes a second.

    Raises:
        ValueError: It is neither.
    """
    if name in MACHINES:
        return MACHINES[name]
    try:
        flops, bandwidth = (float(part) for part in name.split(":"))
    except ValueError:
        known = ", ".join(MACHINES)
        raise ValueError(f"machine must be one of {known} or FLOPS:BYTES_PER_SECOND, got {name!r}") from None
    return Machine(name, flops, bandwidth, "as given")


@dataclass(frozen=True)
class Work:
    """What one part of a pass does.

    Args:
        flops: Its FLOPs.
        bytes: Bytes that it must move from or to memory.
    """

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, on: Machine) -> float:
        """The least time that it takes."""
        return max(self.flops / on.flops, self.bytes / on.bytes_per_second)


@dataclass(frozen=True)
class Weights:
    """Weights of a decoder's layers and head.

    Args:
        layers: Weights that every token passes through, in all layers.
        experts: Weights of all routed experts, in all layers.
        head: Weights of the output head.
        routed: The part of the experts that one token goes to.
    """

    layers: int
    experts: int = 0
    head: int = 0
    routed: float = 0.0

    def touched(self, tokens: int) -> int:
        """Weights that a pass over `tokens` must read, if its tokens choose experts evenly and independently."""
        return self.layers + round(self.experts * (1 - (1 - self.routed) ** tokens)) + self.head


def decoder_parts(
    shape: DecoderShape,
    weights: Weights,
    cost: Cost,
    *,
    tokens: int,
    context: int,
    projected: int = 0,
    read: int = 0,
    batch: int = 1,
    itemsize: int = 2,
) -> dict[str, Work]:
    """A decoder's parts in one pass: `decoder`, `fine projection` and `fine attention`.

    Args:
        shape: The decoder, with its reading layers.
        weights: Its weights.
        cost: FLOPs of the pass for one sample.
        tokens: Tokens that pass through the layers, per sample: those of the prompt, or 1.
        context: Tokens whose ordinary K/V is read or written.
        projected: Fine tokens projected in each reading layer.
        read: Fine tokens read in each reading layer.
        batch: Samples; their weights are read once.
        itemsize: Bytes of one number.
    """
    reading = len(shape.reading)
    # a pass over a prompt writes K/V, a step reads it: every layer's as far back as it sees
    sequence = shape.seen(context) * (shape.cache_width or shape.kv_width)
    decoder = weights.touched(tokens * batch) + batch * sequence
    projection = 0
    if projected:
        own = shape.fine_params_per_layer + batch * projected * shape.hidden
        projection = reading * own + batch * kv_bytes(shape, projected, reading, 1)
    again = shape.readout_layers * context * shape.kv_heads * shape.head_dim if cost.readout_logits else 0
    attention = batch * (again + kv_bytes(shape, read, reading, 1))
    return {
        "decoder": Work(batch * (cost.linear + cost.attention + cost.lm_head), itemsize * decoder),
        "fine projection": Work(batch * cost.fine_projection, itemsize * projection),
        "fine attention": Work(batch * (cost.readout_logits + cost.fine_attention), itemsize * attention),
    }
