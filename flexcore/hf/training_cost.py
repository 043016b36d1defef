"""What a training step costs: FLOPs, the least time they take, and the memory that they need, from the config alone.

    python -m flexcore.hf.training_cost llava-1.5-7b --trains all-but-tower --answer 90 --text 250 --devices 8

A pass costs what `flexcore.cost` says. Backward, a product costs as much again for the gradient of its inputs, where
something below it trains, and as much again for that of its weights, where they train; attention's two products cost
twice as much again. So what trains whole costs three times its forward pass, and once more under gradient
checkpointing. Tiles are encoded without gradients. The selection loss, LoRA's own products and what processes send
each other are not counted.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..cost import MULTIPLY_ADD, flex_prefill
from ..roofline import MACHINES, Work, decoder_parts, machine
from .cost import Measured, _build, load_config, measure
from .cost_report import ITEMSIZE, Setting, encoding, quantity, seconds
from .encoder_cost import sized

TRAINS = ("fine", "fine-and-projector", "lora", "all-but-tower", "all")
# AdamW's two moments, and what a step reads and writes of weights, gradients and moments, in float32
_MOMENTS, _STEP_BYTES = 8, 28


@dataclass(frozen=True)
class TrainingSetting:
    """How a model is trained.

    Args:
        seen: What a sample holds (`text` with its answers), on each device `batch` of them at once; `dtype` is what
            it computes in. `fraction` is what one row reads.
        answer: Labelled tokens of a sample: its readout rows.
        accumulate: Batches per step.
        devices: That train together.
        trains: `fine`, `fine-and-projector`, `lora`, `all-but-tower` or `all`, as in `flexcore.hf.training_groups`.
        rank: Of LoRA.
        weights: Dtype that the weights are held in; beside 16 bits the optimizer keeps a copy in 32.
        checkpointing: Gradient checkpointing.
        sharded: Weights, gradients and optimizer are spread over the devices (ZeRO-3, FSDP).

    Raises:
        ValueError: A field is out of range.
    """

    seen: Setting = field(default_factory=Setting)
    answer: int = 16
    accumulate: int = 1
    devices: int = 1
    trains: str = "fine"
    rank: int = 16
    weights: str = "float32"
    checkpointing: bool = False
    sharded: bool = False

    def __post_init__(self) -> None:
        for name in ("answer", "accumulate", "devices", "rank"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if self.trains not in TRAINS:
            raise ValueError(f"trains must be one of {', '.join(TRAINS)}, got {self.trains!r}")
        if self.weights not in ITEMSIZE:
            raise ValueError(f"weights must be one of {', '.join(ITEMSIZE)}, got {self.weights!r}")
        if self.answer > self.seen.text:
            raise ValueError(
                f"answer must be at most text={self.seen.text}, of which it is a part, got {self.answer}"
            )


@dataclass(frozen=True)
class Parameters:
    """Parameters by what they belong to.

    Args:
        text: Decoder, embeddings and head.
        tower: The vision tower.
        projector: What brings its features to the decoder's width.
        fine: The fine projections.
    """

    text: int
    tower: int
    projector: int
    fine: int

    @classmethod
    def of(cls, config: Any, measured: Measured, side: int | None = None) -> Parameters:
        """A config's, counted on the meta device; `side` as it was measured with."""
        with torch.device("meta"):
            total = sum(p.numel() for p in _build(sized(copy.deepcopy(config), side)).parameters())
        encoder, shape = measured.encoder, measured.shape
        tower, projector = (encoder.tower_params, encoder.projector_params) if encoder is not None else (0, 0)
        fine = len(shape.reading) * shape.fine_params_per_layer
        return cls(total - tower - projector, tower, projector, fine)

    @property
    def total(self) -> int:
        """All of them."""
        return self.text + self.tower + self.projector + self.fine

    def trained(self, setting: TrainingSetting, measured: Measured) -> int:
        """Those that train."""
        shape = measured.shape
        if setting.trains in ("fine", "fine-and-projector"):
            return self.fine + (self.projector if setting.trains != "fine" else 0)
        if setting.trains == "lora":
            # four projections of attention and those of the MLP, two thin matrices each
            ins = 2 * shape.hidden + shape.heads * shape.head_dim + shape.intermediate + 2 * shape.hidden
            outs = (shape.heads + shape.kv_heads) * shape.head_dim + shape.kv_heads * shape.value_dim
            outs += 2 * shape.hidden + 2 * shape.intermediate + shape.hidden
            return self.fine + setting.rank * shape.layers * (ins + outs)
        return self.total - (self.tower if setting.trains == "all-but-tower" else 0)


@dataclass(frozen=True)
class TrainingCost:
    """A training step on one device.

    Args:
        setting: What it was worked out for.
        name: The model's class.
        parts: Work of one batch, forward and backward, by part.
        optimizer: Work of the step itself.
        memory: Bytes, by what they hold.
        trained: Parameters that train.
        coarse: Coarse tokens of a sample.
        fine: Its fine tokens.
        projected: Fine tokens projected per sample and layer.
    """

    setting: TrainingSetting
    name: str
    parts: dict[str, Work]
    optimizer: Work
    memory: dict[str, int]
    trained: int
    coarse: int
    fine: int
    projected: int

    @property
    def flops(self) -> int:
        """FLOPs of a step, all devices together."""
        batches = self.setting.accumulate * self.setting.devices
        return batches * sum(work.flops for work in self.parts.values())

    @property
    def seconds(self) -> float:
        """The least time of a step."""
        on = self.setting.seen.machine
        return self.setting.accumulate * seconds(self.parts, on) + self.optimizer.seconds(on)

    @property
    def bytes(self) -> int:
        """Memory on each device."""
        return sum(self.memory.values())

    def text(self, steps: int | None = None) -> str:
        """For a terminal: what a step takes, and what all of them do."""
        s, seen = self.setting, self.setting.seen
        shares = ", ".join(f"{name} {quantity(value, 'B')}" for name, value in self.memory.items() if value)
        seen_by = (
            f"{self.coarse:,} coarse and {self.fine:,} fine, of which a layer projects {self.projected:,}"
        )
        lines = [
            f"cost model ({seen.machine.name}, a lower bound): {self.name}, {quantity(self.trained, '')} parameters "
            f"train ({s.trains}); per sample {seen.text} text tokens, {s.answer} of them answers, {seen_by}; "
            f"batch {seen.batch} x {s.accumulate} x {s.devices} device(s), {seen.dtype}",
            f"  a step: {quantity(self.flops, 'FLOP')}, at least {quantity(self.seconds, 's')}",
            f"  memory on each device: at least {quantity(self.bytes, 'B')} ({shares})",
        ]
        if steps is not None:
            hours = steps * self.seconds / 3600
            lines.append(f"  {steps:,} steps: at least {hours:,.2f} h, {hours * s.devices:,.2f} device hours")
        return "\n".join(lines)


def training_cost(measured: Measured, parameters: Parameters, setting: TrainingSetting) -> TrainingCost:
    """Work out a step.

    Args:
        measured: The model, see `flexcore.hf.cost.measure`.
        parameters: Its parameters.
        setting: How it is trained.

    Raises:
        ValueError: It isn't known how many coarse tokens a picture has.
    """
    shape, encoder, seen = measured.shape, measured.encoder, setting.seen
    coarse = seen.coarse or (encoder.tokens if encoder is not None else 0)
    if not coarse:
        raise ValueError(
            f"coarse: {measured.name} has no encoder that was measured; give the number of coarse tokens"
        )
    n, fine = seen.text + coarse, coarse * seen.zoom**2
    # a layer projects what any row reads, and every row is multiplied with all of it; here no two rows choose alike
    projected = min(fine, setting.answer * round(seen.fraction * fine))
    itemsize = ITEMSIZE[seen.dtype]
    cost = flex_prefill(shape, seen.text, coarse, projected, setting.answer * projected, setting.answer)
    sizes = {"tokens": n, "context": n, "projected": projected, "read": projected}
    forward = decoder_parts(shape, measured.weights, cost, batch=seen.batch, itemsize=itemsize, **sizes)

    whole, again = setting.trains.startswith("all"), int(setting.checkpointing)
    # a gradient goes down to the lowest layer that trains anything
    first = shape.reading[0] if setting.trains == "fine" and shape.reading else 0
    share = (shape.layers - first) / shape.layers
    linear = cost.linear * (1 + share * (1 + whole + again))
    attention = cost.attention * (1 + share * (2 + again))
    head = MULTIPLY_ADD * shape.hidden * shape.vocab * n * (3 if whole else 2)
    moved = round(forward["decoder"].bytes * (1 + share * (1 + whole + again)))
    parts = {
        **_encoding(measured, setting, itemsize),
        "decoder": Work(round(seen.batch * (linear + attention + head)), moved),
        # the features get no gradient
        "fine projection": _times(forward["fine projection"], 2 + again),
        "fine attention": _times(forward["fine attention"], 3 + again),
    }
    trained = parameters.trained(setting, measured)
    shards = setting.devices if setting.sharded else 1
    optimizer = Work(0, trained * _STEP_BYTES // shards)
    memory = _memory(measured, setting, n, fine, projected, share)
    held = ITEMSIZE[setting.weights]
    spread = {
        "weights": parameters.total * held,
        "gradients": trained * held,
        "optimizer": trained * (_MOMENTS + (4 if held == 2 else 0)),
    }
    memory = {**{name: size // shards for name, size in spread.items()}, **memory}
    return TrainingCost(setting, measured.name, parts, optimizer, memory, trained, coarse, fine, projected)


def _encoding(measured: Measured, setting: TrainingSetting, itemsize: int) -> dict[str, Work]:
    """Tower and projector: the coarse view with what gradients it gets, the tiles without."""
    seen, hidden = setting.seen, measured.shape.hidden
    tiles = seen.zoom**2 if seen.tiles is None else seen.tiles
    view = encoding(measured.encoder, seen.batch, hidden, itemsize)
    rest = encoding(measured.encoder, seen.batch * tiles, hidden, itemsize)
    again = int(setting.checkpointing and setting.trains == "all")
    tower, projector = {"fine": (1, 1), "lora": (1, 1), "all": (3 + again, 3)}.get(setting.trains, (1, 2))
    return {
        "tower": _times(view["tower"], tower) + rest["tower"],
        "projector": _times(view["projector"], projector) + rest["projector"],
    }


def _memory(
    measured: Measured, setting: TrainingSetting, n: int, fine: int, projected: int, share: float
) -> dict[str, int]:
    """Bytes of what a batch leaves for the backward pass."""
    shape, seen = measured.shape, setting.seen
    itemsize = ITEMSIZE[seen.dtype]
    # what norms and products keep of their inputs: residuals, normed ones, q, k, v, the attention's output, the MLP's
    layer = 4 * shape.hidden + 2 * shape.heads * shape.head_dim + shape.kv_width + 4 * shape.intermediate
    layers = round(share * shape.layers)
    own = projected * (shape.hidden + shape.kv_width)
    if setting.checkpointing:
        kept = n * (layers * shape.hidden + layer) + own
    else:
        kept = n * layers * layer + own * len(shape.reading)
    return {
        "activations": seen.batch * kept * itemsize,
        # as the model makes them, in float32 for the loss, and their gradient
        "logits": seen.batch * n * shape.vocab * (itemsize + 8),
        "fine features": seen.batch * fine * shape.hidden * itemsize,
    }


def _times(work: Work, factor: int) -> Work:
    return Work(work.flops * factor, work.bytes * factor)


def main(argv: Sequence[str] | None = None) -> None:
    """Print what a training step of a preset's or a checkpoint's model costs."""
    args = arguments(argv)
    print(asked(args).text(args.steps))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flexcore.hf.training_cost", description="Cost of a training step."
    )
    add = parser.add_argument
    add("model", help="llava-1.5-7b, a checkpoint's folder or its config.json")
    add("--trains", choices=TRAINS, default="fine")
    add("--text", type=int, default=64, help="text tokens of a sample, answers included")
    add("--answer", type=int, default=16, help="of which so many are answers")
    add("--zoom", type=int, default=3)
    add("--fraction", type=float, default=0.1, help="of the fine tokens, read by one row")
    add("--first-layer", type=int)
    add("--batch", type=int, default=1, help="samples on each device")
    add("--accumulate", type=int, default=1)
    add("--devices", type=int, default=1)
    add("--dtype", choices=ITEMSIZE, default="bfloat16")
    add("--weights", choices=ITEMSIZE, default="float32")
    add("--rank", type=int, default=16, help="of LoRA")
    add("--checkpointing", action="store_true")
    add("--sharded", action="store_true", help="ZeRO-3 or FSDP")
    add("--machine", default="a100", help=f"{', '.join(MACHINES)}, or FLOPS:BYTES_PER_SECOND")
    add("--steps", type=int)
    return parser.parse_args(argv)


def asked(args: argparse.Namespace) -> TrainingCost:
    """The cost that a command line asks for; `--steps` is left to `TrainingCost.text`."""
    config = load_config(args.model)
    seen = Setting(args.text, args.zoom, args.fraction, args.batch, args.dtype, machine(args.machine))
    same = {
        name: getattr(args, name) for name in ("answer", "accumulate", "devices", "trains", "rank", "weights")
    }
    setting = TrainingSetting(seen, checkpointing=args.checkpointing, sharded=args.sharded, **same)
    measured = measure(config, first_layer=args.first_layer)
    return training_cost(measured, Parameters.of(config, measured), setting)


if __name__ == "__main__":
    main()
