"""Small text in large photographs, read by a real language model with Flex and not from its coarse tokens.

    python -m benchmarks.small_text                 # all of it; the same command goes on where it was stopped
    python -m benchmarks.small_text --until flex    # one arm, beside another process that trains the other

DINOv2-small (its first six layers, which tell letters apart; later ones forget them) and SmolLM2-135M become a LLaVA:
its projector is aligned, the model learns to read large signs from coarse tokens, and then small ones with fine tokens
or without. Test pictures go through the image adapter and `generate`, as a user's do. Writes a section of `RESULTS.md`
and of the README, and `results/small_text.json`. For the weights see `packaged_weights.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import flexcore

from .. import packaged_weights as weights
from ..assembled import assemble
from ..environment import environment
from ..sections import write_json, write_section
from .evaluate import evaluate, test_signs
from .fine_init import fit_fine
from .projector import align, word_ids
from .report import section, summary
from .signs import LARGE, REGION, SMALL, WORDS, ZOOM, Large, Small, kept, large, small
from .stages import BATCH, Talk, flex_config, train_arm, train_base

HERE = Path(__file__).parent.parent
SIDE, TOWER_LAYERS = 112, 6
# where the base looks at the sign when it answers
FIRST_LAYER, READING = 15, tuple(range(16, 26))
FITTED = 480  # views that the fine projections' start is fitted on
STEPS = {"align": 1500, "base": 200, "arms": 200}
SIZES = {"large train": 6000, "large val": 400, "small train": 4000, "small val": 200, "test": 300}
GROUNDS = {"small train": 200, "small val": 40}
# How each arm looks closer, and how many times the steps it has: is it only slower to learn without?
LONGER = 3
ARMS: dict[str, tuple[dict[str, Any] | None, int]] = {
    "coarse": (None, 1),
    "flex": ({}, 1),
    "coarse, longer": (None, LONGER),
}
# Who is asked about test pictures: an arm's weights, how its choosing is changed for that, and whether fine tokens are
# given. Nothing is trained again for a change: it shows what choosing by attention is worth, and what it costs.
ASKED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "coarse": ("coarse", {}, False),
    "flex, withheld": ("flex", {}, False),
    "flex, random": ("flex", {"selector": "random"}, True),
    "flex": ("flex", {}, True),
    "flex, all": ("flex", {"selector": "all", "top_k": None}, True),
    "coarse, longer": ("coarse, longer", {}, False),
}


def assembled() -> tuple[Any, Any]:
    """The LLaVA with an untrained projector, and its processor."""
    llava, processor = assemble(weights.dinov2(layers=TOWER_LAYERS), *weights.smollm2(), side=SIDE)
    llava.config.vision_feature_layer = -1
    return llava, processor


class Run:
    """All stages in a folder; each is made when it is asked for and kept.

    Args:
        folder: Where everything goes.
        make: A new LLaVA with its processor.
        steps: Of the stages, see `STEPS`.
        sizes: How many pictures, see `SIZES`.
    """

    def __init__(
        self,
        folder: Path,
        make: Callable[[], tuple[Any, Any]],
        steps: dict[str, int],
        sizes: dict[str, int],
    ):
        self.folder, self.make, self.steps, self.sizes = folder, make, steps, sizes

    def data(self, name: str, llava: Any, processor: Any) -> Any:
        """`large train` and its like: encoded pictures."""
        adapter = self.adapter(llava, processor)
        size, split = name.split()
        path = self.folder / f"{size}-{split}.safetensors"
        if size == "large":
            return kept(path, Large, lambda: large(llava, adapter, split, self.sizes[name]))
        number = min(GROUNDS[name], self.sizes[name])
        return kept(path, Small, lambda: small(llava, adapter, split, self.sizes[name], number))

    def adapter(self, llava: Any, processor: Any) -> Any:
        """The image adapter for a model."""
        return flexcore.load_adapter("image", llava, processor, zoom=ZOOM, region_size=REGION, progress=False)

    def base(self) -> tuple[Any, Any, dict[str, Any]]:
        """The base, its processor, and how well its projector reads."""
        llava, processor = self.make()
        words = word_ids(processor.tokenizer)
        data, held = (self.data(f"large {split}", llava, processor) for split in ("train", "val"))
        side = self.adapter(llava, processor).side
        read = align(self.folder / "align", llava, words, data, held, side, self.steps["align"])
        train_base(self.folder / "base", Talk(llava, processor, words), data, held, self.steps["base"])
        return llava, processor, {"aligned": read}

    def fitted(self, talk: Talk, data: Large) -> dict[int, tuple[Tensor, Tensor]]:
        """Fine projections to start with."""
        llava = talk.llava.eval()

        def inputs(which: Tensor) -> tuple[Tensor, dict[str, Any]]:
            seen = llava.model.multi_modal_projector(data.features[which].float())
            made = talk(seen, data.words[which])
            made.pop("labels")
            return seen, made

        begin, cells = len(talk.before), data.features.shape[1]
        return fit_fine(llava, READING, min(FITTED, len(data.words)), inputs, slice(begin, begin + cells))

    def arm(self, name: str, **changes: Any) -> tuple[Any, Any]:
        """A trained arm of `ARMS` and its processor.

        Args:
            name: Which one.
            **changes: What its `FlexConfig` has differently from what it was trained with.
        """
        llava, processor, _ = self.base()
        words = word_ids(processor.tokenizer)
        data, held = (self.data(f"small {split}", llava, processor) for split in ("train", "val"))
        talk = Talk(llava, processor, words)
        config = start = None
        trained = (self.folder / name / "done").exists()
        assert trained or not changes, f"{name} isn't trained yet"
        flex, times = ARMS[name]
        if flex is not None:
            config = flex_config(FIRST_LAYER, READING, **{**flex, **changes})
            if not trained:
                start = self.fitted(talk, self.data("large train", llava, processor))
        train_arm(self.folder / name, talk, config, data, held, times * self.steps["arms"], start)
        return llava.eval(), processor


def measure(run: Run) -> dict[str, Any]:
    """Train what isn't trained yet, and ask all of `ASKED` about the same test pictures."""
    path = run.folder / "found.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"arms": {}}
    if "base" not in found:
        llava, processor, found["base"] = run.base()
        adapter = run.adapter(llava.eval(), processor)
        signs = test_signs(run.sizes["test"], adapter.side, LARGE)
        found["base"]["large signs"] = evaluate(llava, processor, adapter, signs, "base, large signs", False)
        found |= {
            "steps": run.steps,
            "longer": LONGER,
            "sizes": run.sizes,
            "batch": BATCH,
            "words": len(WORDS),
        }
        write_json(path, found)
    for name, (arm, changes, look) in ASKED.items():
        if name in found["arms"]:
            continue
        llava, processor = run.arm(arm, **changes)
        adapter = run.adapter(llava, processor)
        signs = test_signs(run.sizes["test"], adapter.side * ZOOM, SMALL)
        found["arms"][name] = evaluate(llava, processor, adapter, signs, name, look)
        write_json(path, found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 2 if the weights aren't there, 130 if it was stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, default=Path("outputs/small-text"), help="data and weights; again: goes on")
    add("--results", type=Path, default=HERE, help="where RESULTS.md is, below the README")
    add("--until", choices=("base", *ARMS), help="train so far and write nothing")
    args = parser.parse_args(argv)
    run = Run(args.folder, assembled, STEPS, SIZES)
    try:
        if args.until is not None:
            run.base() if args.until == "base" else run.arm(args.until)
            return 0
        found = measure(run)
    except weights.MissingWeights as missing:
        print(f"error: {missing}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    found |= environment("benchmarks.small_text")
    write_json(args.results / "results" / "small_text.json", found)
    write_section("small-text", section(found), args.results / "RESULTS.md")
    write_section("small-text", summary(found), args.results.parent / "README.md")
    print(section(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
