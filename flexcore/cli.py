"""The `flexcore` command. Each subcommand imports what it needs when it runs, so that `--version` stays instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit status: 0, or 1 if `doctor` finds something that doesn't work.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.run is None:
        parser.print_help()
        return 0
    return int(arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexcore", description="Coarse tokens in the sequence, fine tokens on demand."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    adapters = commands.add_parser("adapters", help="list the installed adapters and what is wrong with any")
    adapters.add_argument(
        "--json", action="store_true", help="print a JSON list of name, distribution and error"
    )
    adapters.set_defaults(run=_adapters)

    families = commands.add_parser(
        "families", help="measure which model families work on the installed transformers"
    )
    families.add_argument("names", nargs="*", help="families to try; default: all that are known")
    form = families.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print a JSON list of name, kind, supported and reason"
    )
    form.add_argument(
        "--readme", action="store_true", help="write the table into a README between its markers"
    )
    families.set_defaults(run=_families)

    _add_cost(commands)

    doctor = commands.add_parser("doctor", help="check this environment and say what to do")
    doctor.add_argument(
        "--json",
        action="store_true",
        help="print a JSON list of name, status (ok, warn, fail), found and advice",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _add_cost(commands: Any) -> None:
    cost = commands.add_parser(
        "cost", help="count FLOPs, bytes, K/V memory and roofline time of a model from its config alone"
    )
    cost.add_argument(
        "target", nargs="?", help="llava-1.5-7b, a checkpoint folder, or a config.json; no weights are read"
    )
    cost.add_argument("--family", help="the tiny model of a family instead, see `flexcore families`")
    cost.add_argument("--zoom", type=int, default=3, help="fine tokens per coarse token and axis (3)")
    cost.add_argument("--fraction", type=float, default=0.1, help="part of the fine tokens read (0.1)")
    cost.add_argument("--text", type=int, default=64, help="text tokens (64)")
    cost.add_argument("--batch", type=int, default=1, help="samples, a picture each (1)")
    cost.add_argument("--tiles", type=int, help="fine tiles that Flex encodes; default: all zoom * zoom")
    cost.add_argument(
        "--side", type=int, help="side of the coarse picture in pixels; default: the tower's own, or 336"
    )
    cost.add_argument("--coarse", type=int, help="coarse tokens; leaves out what makes features")
    cost.add_argument("--first-layer", type=int, help="first layer that selects; default: as in `wrap`")
    cost.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 (default) or float16")
    cost.add_argument(
        "--machine", default="a100", help="v100, a100 (default), h100, or FLOPS:BYTES_PER_SECOND"
    )
    form = cost.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print JSON: FLOPs, bytes and seconds of every part"
    )
    form.add_argument("--markdown", action="store_true", help="print Markdown tables")
    form.add_argument("--readme", action="store_true", help="write them into a README between its markers")
    cost.set_defaults(run=_cost)


def _adapters(arguments: argparse.Namespace) -> int:
    rows = adapter_rows()
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print("no adapters are installed")
    width = max((len(row["name"] or "") for row in rows), default=0)
    for row in rows:
        print(f"{row['name'] or '':<{width}}  {row['distribution']}")
        if row["error"]:
            print(f"{'':<{width}}  FAILED: {row['error']}")
    return 0


def _families(arguments: argparse.Namespace) -> int:
    from .hf import support

    try:
        rows = support.measure(arguments.names or None)
        if arguments.readme:
            support.write_readme(Path("README.md"), rows)
        else:
            print(json.dumps(rows, indent=2) if arguments.json else support.table(rows))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _cost(arguments: argparse.Namespace) -> int:
    from . import roofline
    from .errors import UnsupportedModelError
    from .hf import cost, cost_claims, cost_report, readme

    try:
        if (arguments.target is None) == (arguments.family is None):
            raise ValueError("target: name a model, or a family with --family, and not both")
        names = ("text", "zoom", "fraction", "batch", "dtype", "tiles", "coarse")
        setting = cost_report.Setting(
            **{name: getattr(arguments, name) for name in names}, machine=roofline.machine(arguments.machine)
        )

        def config() -> Any:
            if arguments.family:
                return cost.family_config(arguments.family)
            return cost.load_config(arguments.target)

        first, encoder = arguments.first_layer, arguments.coarse is None
        measured = cost.measure(config(), first_layer=first, side=arguments.side, encoder=encoder)
        made = cost_report.report(measured, setting)
        claims = []
        # the paper's claim is about this model
        if arguments.target == "llava-1.5-7b" and encoder:
            dense = cost.measure(config(), first_layer=first, side=448)
            claims = cost_claims.claims(measured, dense, setting)
        if arguments.readme:
            section = cost_claims.readme_section(made, claims, _as_typed(arguments))
            readme.write_section(Path("README.md"), cost_claims.MARKERS, section)
        elif arguments.json:
            out = {**made.as_dict(), "claims": [asdict(c) for c in (cost_claims.CLAIMED, *claims) if claims]}
            print(json.dumps(out, indent=2))
        elif arguments.markdown:
            print(
                "\n\n".join(
                    [cost_report.markdown(made), *([cost_claims.claims_markdown(claims)] if claims else [])]
                )
            )
        else:
            print(
                "\n\n".join(
                    [cost_report.text_report(made), *([cost_claims.claims_text(claims)] if claims else [])]
                )
            )
    except (ValueError, OSError, UnsupportedModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _as_typed(arguments: argparse.Namespace) -> str:
    """The command whose output a README shows, less the options that have their defaults."""
    parts = ["flexcore cost", *([arguments.target] if arguments.target else [])]
    defaults = vars(_parser().parse_args(["cost", "x"]))
    for name, value in vars(arguments).items():
        if name not in ("target", "run", "json", "markdown", "readme") and value != defaults[name]:
            parts.append(f"--{name.replace('_', '-')} {value}")
    return " ".join(parts)


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor

    checks = doctor.diagnose()
    print(json.dumps(checks, indent=2) if arguments.json else doctor.render(checks))
    return int(doctor.failed(checks))


def adapter_rows() -> list[dict[str, str | None]]:
    """One row per adapter, by name: `name`, `distribution`, and `error`, which is None for a usable one.

    A plug-in that failed before it could register anything has a row under its own name.
    """
    from . import plugins

    usable = plugins.adapters()
    rows: list[dict[str, str | None]] = []
    for plugin in plugins.report():
        # a healthy plug-in without adapters brings selectors: nothing to list here
        for name in plugin["adapters"] or ([plugin["name"]] if plugin["error"] else []):
            # one adapter's quarrel with another plug-in leaves its siblings usable
            error = None if name in usable and plugin["adapters"] else plugin["error"]
            rows.append({"name": name, "distribution": plugin["distribution"], "error": error})
    return sorted(rows, key=lambda row: (row["name"] or "", row["distribution"] or ""))


if __name__ == "__main__":
    sys.exit(main())
