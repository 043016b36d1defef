"""Tables and plots of what `benchmarks.speed_suite` measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20


def bars(found: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """What was aimed at: in words, measured, bound, and `<=` or `>=`."""
    out: list[tuple[str, float, float, str]] = []

    def ratio(group: str, case: str, name: str) -> float | None:
        return found.get(group, {}).get(case, {}).get("ratios", {}).get(name)

    def add(text: str, value: float | None, bound: float, sign: str = "<=") -> None:
        if value is not None:
            out.append((text, value, bound, sign))

    for case, prefill, decode in (("20 %", 1.12, 1.20), ("10 %", 1.06, 1.12)):
        for part, bound in (("prefill", prefill), ("decode", decode)):
            name = f"{part}_flex_over_coarse"
            # the case with more pairs, where it was measured
            value = ratio("overhead", case, name) or ratio("default", case, name)
            add(f"{part}, Flex over coarse, {case}", value, bound)
    faster = ratio("default", "20 %", "decode_official_over_flex")
    official = ratio("default", "20 %", "decode_official_over_coarse")
    if faster is not None and official is not None:
        add(
            "decode, official scheme over Flex (at least 0.8 x official over coarse)",
            faster,
            0.8 * official,
            ">=",
        )
    add("prefill, dense over Flex", ratio("default", "20 %", "prefill_dense_over_flex"), 10, ">=")
    add("training step, Flex over coarse", ratio("default", "20 %", "training_flex_over_coarse"), 1.3)
    for case, one in found.get("memory", {}).items():
        add(
            f"prefill memory beyond coarse-only, MiB, {case} (at most the fine K/V and a tenth of coarse-only's)",
            one["flex_beyond_coarse"] / MIB,
            one["bound"] / MIB,
            "<=",
        )
    zooms = found.get("zoom", {})
    if {"3", "27"} <= set(zooms):
        for part in ("prefill", "decode"):
            near, far = (zooms[z]["milliseconds"][f"{part} flex"] for z in ("3", "27"))
            floor = (
                zooms["27"]["milliseconds"][f"{part} coarse"] / zooms["3"]["milliseconds"][f"{part} coarse"]
            )
            # the two zooms weren't run side by side, their coarse-only models were the same
            add(f"{part}, zoom 27 over zoom 3, as many tokens chosen", far / near / floor, 1.15)
    static = found.get("static", {}).get("20 %")
    if static:
        add("static mode, prefill over coarse", static["ratios"]["prefill_static_over_coarse"], 1.4)
        add("compiled decode, static over lazy", static["ratios"]["decode_static_over_lazy"], 1.0)
    media = found.get("no media", {}).get("20 %")
    if media:
        add("no media: microseconds of Python a layer", media["microseconds_per_layer"], 20)
        add("no media: extra tensor operations", media["extra_operations"], 0)
    return out


def section(found: dict[str, Any]) -> str:
    """The section's text."""
    lines = [
        "## Speed",
        "",
        "What looking closer costs. `python -m benchmarks.speed_suite`; every ratio is the median",
    ]
    lines[-1] += (
        " of ratios taken pair by pair within a round, in which the arms take turns. Selection is forced to a share "
        "of the 81 regions (zoom 3) and held after four choices, unless it says drifting."
    )
    some = next((one for group in found.values() for one in group.values() if "versions" in one), None)
    if some:
        machine = {k: v for k, v in some["machine"].items() if k != "load"}
        for about in (some["versions"], machine):
            lines += ["", ", ".join(f"{k} {v}" for k, v in about.items()) + "."]
    lines += ["", "| aim | bound | measured | reached |", "|---|---|---|---|"]
    for text, value, bound, sign in bars(found):
        reached = value <= bound if sign == "<=" else value >= bound
        lines.append(f"| {text} | {sign} {bound:.4g} | {value:.4g} | {'yes' if reached else 'no'} |")
    lines += ["", "All ratios, with the 95 % interval of the median and the number of pairs:", ""]
    lines += ["| case | ratio | median | interval | pairs | command |", "|---|---|---|---|---|---|"]
    for group, cases in found.items():
        for case, one in cases.items():
            for name, r in one.get("spread", {}).items():
                part, _, rest = name.partition("_")
                what = f"{part}, {rest.replace('_over_', ' / ')}"
                interval = f"{r['low']:.3f} to {r['high']:.3f}"
                label = case if group == "default" else f"{group} {case}"
                command = one["command"].removeprefix("python -m ").removesuffix(" --json")
                lines.append(
                    f"| {label} | {what} | {r['median']:.3f} | {interval} | {r['pairs']} | `{command}` |"
                )
    lines += milliseconds(found) + memory(found)
    for name, text in (
        ("fraction", "Overhead over the share of regions read"),
        ("zoom", "Overhead over zoom"),
    ):
        lines += ["", f"![{text}](results/speed_{name}.png)"]
    return "\n".join(lines)


def milliseconds(found: dict[str, Any]) -> list[str]:
    """Medians of the default case."""
    one = found.get("default", {}).get("20 %")
    if one is None:
        return []
    lines = ["", "Milliseconds at 20 %, medians:", "", "| | ms |", "|---|---|"]
    lines += [
        f"| {name.replace('/', ', beside ')} | {value:.1f} |" for name, value in one["milliseconds"].items()
    ]
    union = one.get("union of the answer rows' regions", {})
    if union:
        shares = ", ".join(f"{100 * share:.0f} % in layer {layer}" for layer, share in union.items())
        lines += ["", f"In the training step 32 rows read 20 % of the regions each; between them, {shares}."]
    return lines


def memory(found: dict[str, Any]) -> list[str]:
    """Peaks of a prefill by arm."""
    cases = found.get("memory", {})
    if not cases:
        return []
    lines = ["", "Most bytes that a prefill's tensors took at once, MiB (`benchmarks.speed_memory`):", ""]
    lines += [
        "| case | coarse | flex | official scheme | dense | fine K/V held |",
        "|---|---|---|---|---|---|",
    ]
    for case, one in cases.items():
        peaks = [one["peak_bytes"].get(arm) for arm in ("coarse", "flex", "official", "dense")]
        cells = ["" if p is None else f"{p / MIB:.1f}" for p in (*peaks, one["fine_kv_bytes"])]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def plot(found: dict[str, Any], folder: Path) -> None:
    """Overhead over coarse-only, over the share of regions read and over zoom."""
    from matplotlib.figure import Figure

    shares = {**found.get("fraction", {}), **found.get("default", {}), **found.get("overhead", {})}
    by_share = {float(case.split()[0]): one for case, one in shares.items() if "drifting" not in case}
    by_zoom = {float(zoom): one for zoom, one in found.get("zoom", {}).items()}
    for name, label, points in (
        ("fraction", "regions read, %", by_share),
        ("zoom", "zoom (fine tokens per coarse token and axis), 16 regions read", by_zoom),
    ):
        figure = Figure(figsize=(6, 3.6), dpi=130, layout="constrained")
        axes = figure.subplots()
        for part, colour in (("prefill", "#d2531a"), ("decode", "#1a6ad2")):
            key = f"{part}_flex_over_coarse"
            draw(
                axes,
                {x: one["spread"][key] for x, one in sorted(points.items()) if key in one.get("spread", {})},
                part,
                colour,
            )
        axes.axhline(1, color="grey", linewidth=1, linestyle=":")
        axes.set(xlabel=label, ylabel="Flex over coarse-only")
        axes.legend(frameon=False)
        figure.savefig(folder / f"speed_{name}.png")


def draw(axes: Any, points: dict[float, dict[str, float]], label: str, colour: str) -> None:
    """A line of medians with their intervals."""
    if not points:
        return
    x: Sequence[float] = list(points)
    middle = [r["median"] for r in points.values()]
    errors = [
        [r["median"] - r["low"] for r in points.values()],
        [r["high"] - r["median"] for r in points.values()],
    ]
    axes.errorbar(x, middle, yerr=errors, marker="o", markersize=4, capsize=3, color=colour, label=label)
