"""Six small digits in coloured frames on a photograph: who can say what is in the red one, and for how much?

    python -m benchmarks.magnifier                    # all arms' shipped weights, 4,200 questions of the first kind
    python -m benchmarks.magnifier --quick            # fewer pictures, under a minute on two cores
    python -m benchmarks.magnifier --seed 7 --images 50 --question left --json

Pictures are drawn anew from the seed, of digits and photographs that no training has seen. All arms answer the same
questions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file

from flexcore.hf.magnifier import load_magnifier

from .arms import ARMS
from .evaluate import accuracies, ceiling, evaluate
from .pictures import make
from .questions import KINDS
from .weights import CEILINGS, HERE, arm_model, ceiling_model, shared, trained_state

QUICK, FULL = 100, 700


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--seed", type=int, default=0, help="which test pictures are drawn")
    add("--images", type=int, help=f"how many; default {FULL}, or {QUICK} with --quick")
    add("--question", choices=(*KINDS, "both"), help="default: both, or frame with --quick")
    add("--quick", action="store_true")
    add("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args(argv)
    if args.images is None:
        args.images = QUICK if args.quick else FULL
    if args.images < 1 or args.seed < 0:
        parser.error(f"--images must be at least 1 and --seed at least 0, got {args.images} and {args.seed}")
    args.question = args.question or ("frame" if args.quick else "both")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the shipped weights."""
    flex, processor = load_magnifier()
    load = shared(flex)
    kinds = KINDS if args.question == "both" else (args.question,)
    pictures = make(flex, processor, "test", args.images, 1000 + args.seed)
    results: dict[str, Any] = {}
    for name, arm in ARMS.items():
        path = HERE / f"{name}.safetensors"
        if name != "flex" and not path.exists():
            print(f"{name}: no weights in {path}, left out", file=sys.stderr)
            continue
        trained = load_file(path) if name != "flex" else trained_state(flex, torch.float32)
        model = arm_model(arm, load, trained)
        results[name] = {kind: evaluate(name, model, arm, pictures, kind) for kind in kinds}
    found = {name: accuracies(results, name) for name in kinds}
    for name, fine in CEILINGS.items() if "frame" in kinds else ():
        path = HERE / f"{name}.safetensors"
        if path.exists():
            found["frame"][name] = ceiling(ceiling_model(path), fine, "test", args.images, 1000 + args.seed)
    return {
        "accuracy": found[kinds[0]],
        "question": kinds[0],
        **({"accuracy_left": found["left"]} if "left" in kinds else {}),
        "arms": {name: {k: r.summary() for k, r in kinds.items()} for name, kinds in results.items()},
        "images": args.images,
        "seed": args.seed,
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    result = run(args)
    print(f"\n{args.images} test pictures, seed {args.seed}\n")
    line = "{:<16}{:>10}{:>10}{:>12}{:>14}{:>14}"
    print(line.format("", *KINDS, "GFLOP", "hit, any", "hit, least"))
    for name in dict.fromkeys([*result["arms"], *result["accuracy"]]):
        by_kind = result["arms"].get(name, {})
        one = next(iter(by_kind.values()), {})
        shares = [by_kind.get(kind, {}).get("accuracy") for kind in KINDS]
        if name in CEILINGS:
            shares = [result["accuracy"][name], None]
        hits = [one.get("hit_any"), min(one["hits"].values()) if one.get("hits") else None]
        cells = [f"{100 * s:.1f} %" if s is not None else "-" for s in (*shares, *hits)]
        flops = f"{one['gflops']:.3f}" if one else "-"
        print(line.format(name, *cells[:2], flops, *cells[2:]))
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
