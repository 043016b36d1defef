"""The `flexcore` command. Each subcommand imports what it needs when it runs, so that `--version` stays instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

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

    doctor = commands.add_parser("doctor", help="check this environment and say what to do")
    doctor.add_argument(
        "--json",
        action="store_true",
        help="print a JSON list of name, status (ok, warn, fail), found and advice",
    )
    doctor.set_defaults(run=_doctor)
    return parser


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
