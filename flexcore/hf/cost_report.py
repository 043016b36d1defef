"""The cost of coarse, Flex and dense side by side, by part, prefill and decode: what `flexcore cost` prints."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..cost import Cost, coarse_prefill, decode, dense_prefill, flex_prefill, kv_bytes
from ..roofline import MACHINES, Machine, Work, decoder_parts
from .cost import Encoder, Measured

PARTS = ("tower", "projector", "decoder", "fine projection", "fine attention")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
COARSE, FLEX, CROSS, OFFICIAL, DENSE = "coarse", "Flex", "cross-attention to all", "official scheme", "dense"


@dataclass(frozen=True)
class Setting:
    """What is asked and how.

    Args:
        text: Text tokens.
        zoom: Fine tokens per coarse token and axis; a tile of the fine view is as large as the coarse view.
        fraction: Part of the fine tokens that is read in each reading layer.
        batch: Samples, one picture each.
        dtype: Of weights, features and K/V.
        machine: For the roofline.
        tiles: Fine tiles that Flex encodes; None: all `zoom * zoom`. A source that encodes on demand needs only those
            that hold a chosen region.
        coarse: Coarse tokens of a picture; None takes them from the encoder.

    Raises:
        ValueError: A field is out of range.
    """

    text: int = 64
    zoom: int = 3
    fraction: float = 0.1
    batch: int = 1
    dtype: str = "bfloat16"
    machine: Machine = field(default_factory=lambda: MACHINES["a100"])
    tiles: int | None = None
    coarse: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("text", 0), ("zoom", 1), ("batch", 1), ("tiles", 0), ("coarse", 1)):
            value = getattr(self, name)
            if value is None and name in ("tiles", "coarse"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if not 0.0 <= self.fraction <= 1.0:
            raise ValueError(f"fraction must lie in [0, 1], got {self.fraction!r}")
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"dtype must be one of {', '.join(ITEMSIZE)}, got {self.dtype!r}")
        if self.tiles is not None and self.tiles > self.zoom**2:
            raise ValueError(f"tiles must be at most zoom * zoom = {self.zoom**2}, got {self.tiles}")


@dataclass(frozen=True)
class Row:
    """One way of seeing a picture.

    Args:
        name: Which.
        prefill: Work of the prompt's pass, by part.
        step: Work of one generated token, by part.
        kv_bytes: K/V of the sequence after the prompt.
        fine_kv_bytes: Fine K/V held beside it.
    """

    name: str
    prefill: dict[str, Work]
    step: dict[str, Work]
    kv_bytes: int
    fine_kv_bytes: int = 0


@dataclass(frozen=True)
class Report:
    """The rows, and what they were worked out for."""

    name: str
    setting: Setting
    coarse: int
    fine: int
    read: int
    reading: tuple[int, ...]
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts in FLOPs and bytes, times in seconds."""
        machine = self.setting.machine

        def passes(parts: dict[str, Work]) -> dict[str, Any]:
            out = {n: {**asdict(work), "seconds": work.seconds(machine)} for n, work in parts.items()}
            whole = total(parts)
            out["total"] = {**asdict(whole), "seconds": seconds(parts, machine)}
            return out

        return {
            "model": self.name,
            "setting": asdict(self.setting),
            "tokens": {
                "text": self.setting.text,
                "coarse": self.coarse,
                "fine": self.fine,
                "read": self.read,
            },
            "reading_layers": list(self.reading),
            "rows": [
                {
                    "name": row.name,
                    "prefill": passes(row.prefill),
                    "decode": passes(row.step),
                    "kv_bytes": row.kv_bytes,
                    "fine_kv_bytes": row.fine_kv_bytes,
                }
                for row in self.rows
            ],
        }


def total(parts: dict[str, Work]) -> Work:
    """The sum of the parts."""
    return sum(parts.values(), Work())


def seconds(parts: dict[str, Work], machine: Machine) -> float:
    """The least time of the parts one after the other."""
    return sum(work.seconds(machine) for work in parts.values())


def report(measured: Measured, setting: Setting) -> Report:
    """Work out every row.

    Raises:
        ValueError: It isn't known how many coarse tokens a picture has.
    """
    encoder, shape = measured.encoder, measured.shape
    coarse = setting.coarse or (encoder.tokens if encoder is not None else 0)
    if not coarse:
        raise ValueError(
            f"coarse: {measured.name} has no encoder that was measured; give the number of coarse tokens"
        )
    fine = coarse * setting.zoom**2
    read = round(setting.fraction * fine)
    every, some = setting.zoom**2, setting.zoom**2 if setting.tiles is None else setting.tiles
    itemsize, batch, text = ITEMSIZE[setting.dtype], setting.batch, setting.text
    reading = len(shape.reading)

    def row(
        name: str,
        prompt: Cost,
        step: Cost,
        n: int,
        tiles: int,
        own: int = 0,
        again: int = 0,
        step_read: int = 0,
    ) -> Row:
        sizes = {"batch": batch, "itemsize": itemsize}
        at_prompt = decoder_parts(
            shape, measured.weights, prompt, tokens=n, context=n, projected=own, read=own, **sizes
        )
        at_step = decoder_parts(
            shape, measured.weights, step, tokens=1, context=n + 1, projected=again, read=step_read, **sizes
        )
        return Row(
            name,
            {**encoding(encoder, batch * tiles, shape.hidden, itemsize), **at_prompt},
            at_step,
            batch * kv_bytes(shape, n, itemsize=itemsize),
            batch * kv_bytes(shape, 0 if again else own, reading, itemsize),
        )

    n = text + coarse
    flex = flex_prefill(shape, text, coarse, read)
    rows = (
        row(COARSE, coarse_prefill(shape, text, coarse), decode(shape, n + 1), n, 1),
        row(FLEX, flex, decode(shape, n + 1, read), n, 1 + some, read, 0, read),
        row(OFFICIAL, flex, decode(shape, n + 1, read, read), n, 1 + every, read, read, read),
        row(
            CROSS,
            flex_prefill(shape, text, coarse, fine),
            decode(shape, n + 1, fine),
            n,
            1 + every,
            fine,
            0,
            fine,
        ),
        row(
            DENSE,
            dense_prefill(shape, text, coarse, fine),
            decode(shape, n + fine + 1),
            n + fine,
            1 + every,
        ),
    )
    return Report(measured.name, setting, coarse, fine, read, shape.reading, rows)


def encoding(encoder: Encoder | None, tiles: int, width: int, itemsize: int) -> dict[str, Work]:
    """What encoding that many tiles takes, weights read once."""
    if encoder is None or not tiles:
        return {"tower": Work(), "projector": Work()}
    made = tiles * encoder.tokens * width
    return {
        "tower": Work(tiles * encoder.tower_flops, itemsize * encoder.tower_params),
        "projector": Work(tiles * encoder.projector_flops, itemsize * (encoder.projector_params + made)),
    }


def text_report(made: Report) -> str:
    """The report for a terminal."""
    machine = made.setting.machine
    lines = [heading(made), ""]
    for title, attribute in (("prefill", "prefill"), ("decode, per token", "step")):
        lines.append(
            f"{title:<24}{''.join(f'{p:>17}' for p in PARTS)}{'total':>12}{'bytes':>12}{'roofline':>12}"
        )
        for row in made.rows:
            parts: dict[str, Work] = getattr(row, attribute)
            whole = total(parts)
            cells = "".join(f"{quantity(parts[p].flops, 'F') if p in parts else '':>17}" for p in PARTS)
            lines.append(
                f"  {row.name:<22}{cells}{quantity(whole.flops, 'F'):>12}{quantity(whole.bytes, 'B'):>12}"
                f"{quantity(seconds(parts, machine), 's'):>12}"
            )
        lines.append("")
    lines.append(f"{'memory':<24}{'K/V':>17}{'fine K/V':>17}")
    for row in made.rows:
        lines.append(
            f"  {row.name:<22}{quantity(row.kv_bytes, 'B'):>17}{quantity(row.fine_kv_bytes, 'B'):>17}"
        )
    return "\n".join([*lines, "", FOOTNOTE])


def markdown(made: Report) -> str:
    """The report as Markdown tables."""
    machine = made.setting.machine
    lines = [heading(made), ""]
    for title, attribute in (("prefill, FLOPs", "prefill"), ("decode per token, FLOPs", "step")):
        shown = PARTS if attribute == "prefill" else PARTS[2:]
        lines.append(f"| {title} | {' | '.join(shown)} | total | bytes moved | at roofline |")
        lines.append("|---" * (len(shown) + 4) + "|")
        for row in made.rows:
            parts: dict[str, Work] = getattr(row, attribute)
            whole = total(parts)
            cells = [quantity(parts[p].flops, "") if parts[p].flops else "" for p in shown]
            cells += [
                quantity(whole.flops, ""),
                quantity(whole.bytes, "B"),
                quantity(seconds(parts, machine), "s"),
            ]
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| memory after the prompt | K/V | fine K/V |", "|---|---|---|"]
    for row in made.rows:
        fine = quantity(row.fine_kv_bytes, "B") if row.fine_kv_bytes else ""
        lines.append(f"| {row.name} | {quantity(row.kv_bytes, 'B')} | {fine} |")
    return "\n".join([*lines, "", FOOTNOTE])


def heading(made: Report) -> str:
    """What was counted, in a sentence."""
    s, first, last = made.setting, made.reading[0], made.reading[-1]
    layers = f"layers {first}-{last}"
    if len(made.reading) != last - first + 1:
        layers = f"{len(made.reading)} of {layers}"
    tiles = "" if s.tiles is None else f"; {s.tiles} of {s.zoom**2} fine tiles encoded"
    return (
        f"{made.name}: {s.text} text, {made.coarse} coarse, {made.fine} fine tokens (zoom {s.zoom}), of which each of "
        f"{layers} reads {made.read}{tiles}; batch {s.batch}, {s.dtype}; roofline of {s.machine.name} "
        f"({s.machine.source})."
    )


FOOTNOTE = (
    "Counted from the config, not timed. A multiply-add is 2 FLOPs; matrix products only. Bytes: weights, K/V and "
    "features, moved once. Roofline: a lower bound, each part at the machine's 16-bit peak or its bandwidth. The "
    "official scheme's prefill is taken to be Flex's, which is less than it does."
)


def quantity(value: float, unit: str) -> str:
    """Three digits and a prefix."""
    if not value:
        return f"0 {unit}".rstrip()
    prefixes = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P"}
    scale = max(-9, min(15, 3 * math.floor(math.log10(abs(value)) / 3)))
    shown = value / 10.0**scale
    digits = max(0, 2 - math.floor(math.log10(abs(shown))))
    return f"{shown:.{digits}f} {prefixes[scale]}{unit}".rstrip()
