"""The section of `RESULTS.md`, and what the README says of it."""

from __future__ import annotations

from typing import Any

from .signs import LARGE, SMALL, ZOOM
from .stages import TOP_K


def section(found: dict[str, Any]) -> str:
    """The section's text.

    Args:
        found: What `__main__.measure` found, with `environment`.
    """
    steps, sizes, arms, machine = found["steps"], found["sizes"], found["arms"], found["machine"]
    flex, large = arms["flex"], found["base"]["large signs"]
    lines = [
        "## Small text",
        "",
        "DINOv2-small (its first six layers) and SmolLM2-135M as a LLaVA: does a real language model read a small "
        f"word in a large photograph? Pictures of 448x448 with a sign in a font of {SMALL[0]} to {SMALL[1]} pixels; "
        f"the coarse view of 112x112, 64 tokens, shows it {ZOOM} times smaller, and 1,024 fine tokens wait outside. "
        f"One of {found['words']} words, in six fonts: these are the same in training and test; photographs, places "
        "and colours aren't.",
        "",
        f"`{found['command']}`; {machine['cpu']}; cores {machine['cores']}, memory GiB {machine['memory GiB']}; "
        + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        + ".",
        "",
        f"The projector was aligned with the words' embeddings ({steps['align']:,} steps of 32 of "
        f"{sizes['large train']:,} views with signs of {LARGE[0]} to {LARGE[1]} pixels; it reads "
        f"{100 * found['base']['aligned']:.1f} % of {sizes['large val']} held-out ones). Then the language model "
        f"learned to say what it sees there ({steps['base']} steps of {found['batch']}), and from these weights each "
        f"arm met small signs ({steps['arms']} steps of {found['batch']} of {sizes['small train']:,} pictures), "
        "fine projections starting from least squares (`fine_init.py`). One seed. An answer counts if "
        "what `generate` says is the word and nothing else.",
        "",
        "| | right answers, % | sign chosen in any layer, % | regions read, % | GFLOP |",
        "|---|---|---|---|---|",
        f"| *the base, asked about large signs* | {100 * large['accuracy']:.1f} |  |  | {large['gflops']:.2f} |",
    ]
    for name, label in (
        ("coarse", "coarse only"),
        ("coarse, longer", f"coarse only, {found['longer']} times the steps"),
        ("flex, withheld", "the Flex model, fine tokens withheld"),
        ("flex, random", f"the Flex model, {TOP_K} random regions"),
        ("flex", f"Flex, top {TOP_K} of 64 regions"),
        ("flex, all", "the Flex model, every region"),
    ):
        arm = arms[name]
        more = ("hit_any", "regions")
        cells = " | ".join(f"{100 * arm[key]:.1f}" if key in arm else "" for key in more)
        lines.append(f"| {label} | {100 * arm['accuracy']:.1f} | {cells} | {arm['gflops']:.2f} |")
    lines += [
        "",
        f"{flex['questions']} test pictures, a chance of {100 / found['words']:.1f} %. GFLOP: the language model's "
        f"prefill, causal attention halved, output head left out; with all fine tokens in the sequence it would be "
        f"{flex['gflops, dense']:.1f}. The base sees signs of {LARGE[0]} to {LARGE[1]} pixels in the same test "
        "photographs with nothing shrunk: what the encoder can read there, more or less. "
        "Random regions differ from layer to layer and not from picture to picture.",
        "",
        "| layer that reads | " + " | ".join(flex["hits"]) + " |",
        "|---" * (len(flex["hits"]) + 1) + "|",
        "| sign chosen, % | " + " | ".join(f"{100 * share:.0f}" for share in flex["hits"].values()) + " |",
    ]
    return "\n".join(lines)


def summary(found: dict[str, Any]) -> str:
    """What the README says.

    Args:
        found: What `__main__.measure` found.
    """
    arms, large = found["arms"], found["base"]["large signs"]
    share = {name: f"{100 * arm['accuracy']:.1f} %" for name, arm in arms.items()}
    flops = {name: f"{arm['gflops']:.1f}" for name, arm in arms.items()}
    return (
        "The same with a language model that others trained, SmolLM2-135M, which "
        "[`benchmarks/small_text`](benchmarks/small_text/README.md) makes a LLaVA with DINOv2-small: of "
        f"{arms['flex']['questions']} small words in large photographs, {found['words']} different ones, it reads "
        f"{share['coarse']} from 64 coarse tokens (chance is {100 / found['words']:.1f} %), "
        f"**{share['flex']} with Flex, top {TOP_K} of 64 regions**, and {share['flex, all']} if every region is "
        f"visible. Large words in the same photographs: {100 * large['accuracy']:.1f} %. The language model's prefill "
        f"is {flops['coarse']}, {flops['flex']} and {flops['flex, all']} GFLOP, and would be "
        f"{arms['flex']['gflops, dense']:.1f} with all fine tokens in the sequence. One seed."
    )
