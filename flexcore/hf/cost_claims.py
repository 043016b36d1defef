"""The paper's claim of what it saves, beside what the cost model gives under several ways of counting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..cost import coarse_prefill
from .cost import Measured
from .cost_report import CROSS, FLEX, PARTS, Report, Setting, encoding, markdown, report, total

MARKERS = "<!-- cost: measured -->", "<!-- cost: end -->"
NEAR = 0.02  # the claims are whole percents, and the paper doesn't give every size that they follow from


@dataclass(frozen=True)
class Claim:
    """The paper's two savings under one way of counting.

    Args:
        counting: Which.
        over_cross: Part saved against cross-attention over all fine tokens.
        over_dense: Part saved against a dense model of 448 pixels.
    """

    counting: str
    over_cross: float
    over_dense: float


CLAIMED = Claim("the paper", 0.37, 0.31)


def claims(measured: Measured, dense: Measured, setting: Setting) -> list[Claim]:
    """The paper's comparison under several ways of counting FLOPs, as it doesn't say which is its own.

    Args:
        measured: The model.
        dense: The same one with its tower at 448 pixels, whose tokens all stand in the sequence.
        setting: As for `report`.
    """
    assert measured.encoder is not None and dense.encoder is not None
    made = report(measured, setting)
    larger = coarse_prefill(dense.shape, setting.text, dense.encoder.tokens).total * setting.batch
    towers = [
        total(encoding(e, setting.batch, dense.shape.hidden, 2)).flops
        for e in (measured.encoder, dense.encoder)
    ]

    def decoder(name: str) -> int:
        return sum(made.row(name).prefill[p].flops for p in PARTS[2:])

    every = 1 + setting.zoom**2
    least = 1 + math.ceil(setting.fraction * setting.zoom**2)
    ways = [
        ("decoder alone", decoder(FLEX), decoder(CROSS), larger),
        (
            f"with tower and projector, all {every} tiles",
            decoder(FLEX) + every * towers[0],
            decoder(CROSS) + every * towers[0],
            larger + towers[1],
        ),
        (
            f"the same, Flex encoding on demand the fewest that can hold what it reads, {least} tiles",
            decoder(FLEX) + least * towers[0],
            decoder(CROSS) + every * towers[0],
            larger + towers[1],
        ),
    ]
    return [Claim(name, 1 - own / cross, 1 - own / other) for name, own, cross, other in ways]


def claims_markdown(found: Sequence[Claim]) -> str:
    """The paper's claim beside what the model gives, and how far they agree."""
    lines = [
        "| FLOPs that Flex saves in prefill | over cross-attention to all fine tokens | over dense, 448 pixels |",
        "|---|---|---|",
    ]
    for claim in (CLAIMED, *found):
        lines.append(f"| {claim.counting} | {claim.over_cross:.0%} | {claim.over_dense:.0%} |")
    return "\n".join([*lines, "", verdict(found)])


def claims_text(found: Sequence[Claim]) -> str:
    """The same for a terminal."""
    lines = [
        "FLOPs that Flex saves in prefill against (a) cross-attention over all fine tokens, (b) dense, 448 pixels:"
    ]
    for claim in (CLAIMED, *found):
        lines.append(f"  (a) {claim.over_cross:>4.0%}  (b) {claim.over_dense:>4.0%}  {claim.counting}")
    return "\n".join([*lines, verdict(found)])


def verdict(found: Sequence[Claim]) -> str:
    """For each ratio, under which counting it is near the paper's; and whether one counting gives both."""
    said = []
    for what, attribute in (("cross-attention", "over_cross"), ("448-pixel", "over_dense")):
        gaps = {c.counting: getattr(c, attribute) - getattr(CLAIMED, attribute) for c in found}
        agree = [name for name, gap in gaps.items() if abs(gap) <= NEAR]
        name, gap = min(gaps.items(), key=lambda item: abs(item[1]))
        if agree:
            said.append(
                f"The {what} ratio agrees within {100 * NEAR:.0f} points when counted as: {'; '.join(agree)}."
            )
        else:
            said.append(
                f"The {what} ratio agrees within {100 * NEAR:.0f} points under none of these; nearest: {name}, "
                f"{100 * gap:+.1f} points."
            )
    both = any(
        max(abs(c.over_cross - CLAIMED.over_cross), abs(c.over_dense - CLAIMED.over_dense)) <= NEAR
        for c in found
    )
    said.append("One way of counting gives both." if both else "No way of counting here gives both.")
    return " ".join(said)


def readme_section(made: Report, found: Sequence[Claim], command: str) -> str:
    """What a README says of the cost: the command, the tables, the paper's claim."""
    import torch
    import transformers

    versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    parts = [f"`{command}` ({versions}):", markdown(made)]
    if found:
        parts.append(claims_markdown(found))
    return "\n\n".join(parts)
