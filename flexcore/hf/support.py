"""The support table, measured: every known family is built, wrapped and put through a short check."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import FlexConfig
from ..errors import UnsupportedModelError
from .families import Family, Sample, families
from .readme import write_section
from .wrapping import attached

CHANGED, UNCHANGED = 1e-3, 1e-5
MARKERS = "<!-- families: measured -->", "<!-- families: end -->"


def measure(names: Collection[str] | None = None, progress: bool = True) -> list[dict[str, Any]]:
    """Try every family that the installed transformers has.

    Args:
        names: Families to try; None tries all.
        progress: Print a line per family to stderr.

    Returns:
        One `{"name", "kind", "supported", "reason"}` per family; the reason is empty where it is supported.

    Raises:
        ValueError: A name isn't a family's.
    """
    known = list(families())
    unknown = sorted(set(names or ()) - {f.name for f in known})
    if unknown:
        raise ValueError(f"names must be among {[f.name for f in known]}, got {unknown}")
    rows = []
    for family in known:
        if (names is not None and family.name not in names) or not family.installed():
            continue
        reason = check(family)
        rows.append({"name": family.name, "kind": family.kind, "supported": not reason, "reason": reason})
        if progress:
            print(f"{family.kind:10s} {family.name:24s} {reason or 'supported'}", file=sys.stderr, flush=True)
    return rows


def check(family: Family) -> str:
    """Why a family isn't supported, or "" if it is.

    A tiny random model of it must be refused, or be bit-identical to itself without media and with nothing selected,
    and change its readout rows, and only those, with everything selected.
    """
    try:
        model = family.build()
        inputs = family.example(model, [Sample(before=3, after=4, seed=1), Sample(before=5, after=3, seed=2)])
        plain = {name: value for name, value in inputs.items() if name != "flex_streams"}
        before = _logits(model, plain)
    except Exception as error:  # a config that this version of transformers understands differently
        return f"not measured: {_line(error)}"
    try:
        with attached(model, FlexConfig(selector="top_k", fraction=0.0)):
            if not torch.equal(_logits(model, plain), before):
                return "differs from the unwrapped model without media"
            if not torch.equal(_logits(model, inputs), before):
                return "differs from the unwrapped model when nothing is selected"
        with attached(model, FlexConfig(selector="all")):
            _perturb(model)
            change = (_logits(model, inputs) - before).abs().amax(dim=-1)
            if not float(change[:, -1].min()) > CHANGED:
                return "reads nothing when everything is selected"
            padding = inputs["attention_mask"][:, :-1] == 0
            if not float(change[:, :-1].masked_fill(padding, 0.0).max()) <= UNCHANGED:
                return "rows that don't read change"
    except UnsupportedModelError as error:
        return _line(error)
    except Exception as error:  # the table reports what goes wrong
        return f"{type(error).__name__}: {_line(error)}"
    return ""


def table(rows: list[dict[str, Any]]) -> str:
    """The support table in Markdown."""
    lines = ["| family | kind | works | why not |", "|---|---|---|---|"]
    for row in rows:
        reason = str(row["reason"]).replace("|", "\\|")
        lines.append(f"| {row['name']} | {row['kind']} | {'yes' if row['supported'] else 'no'} | {reason} |")
    for kind in sorted({row["kind"] for row in rows}, reverse=True):
        own = [row for row in rows if row["kind"] == kind]
        lines.append("")
        lines.append(f"{sum(row['supported'] for row in own)} of {len(own)} {kind} families work.")
    return "\n".join(lines)


def readme_section(rows: list[dict[str, Any]]) -> str:
    """What a README says of the support table: how many, which, and why not the others."""
    from transformers import __version__ as version

    lines = [f"Measured on transformers {version} with `flexcore families`:", ""]
    for kind in ("text", "multimodal"):
        own = [row for row in rows if row["kind"] == kind]
        names = ", ".join(row["name"] for row in own if row["supported"])
        lines.append(
            f"**{sum(row['supported'] for row in own)} of {len(own)} {kind} families work**: {names}."
        )
        lines.append("")
    refused = [row for row in rows if not row["supported"]]
    lines += [
        "<details><summary>Refused by <code>wrap</code>, and why</summary>",
        "",
        "| family | why not |",
        "|---|---|",
    ]
    lines += [f"| {row['name']} | {str(row['reason']).replace('|', chr(92) + '|')} |" for row in refused]
    return "\n".join([*lines, "", "</details>"])


def write_readme(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace what stands between a README's markers.

    Raises:
        ValueError: The file has no markers.
    """
    write_section(path, MARKERS, readme_section(rows))


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def _perturb(model: Any) -> None:
    """Move the fine weights away from the copies that they start as: some errors can't be seen with copies."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.flex_fine.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
