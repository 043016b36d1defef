"""The hooks a plug-in may implement; mark an implementation with `flexcore.hookimpl`."""

from collections.abc import Callable

import pluggy

hookspec = pluggy.HookspecMarker("flexcore")
hookimpl = pluggy.HookimplMarker("flexcore")

Register = Callable[[str, type], None]


@hookspec
def flexcore_register_adapters(register: Register) -> None:
    """Register adapter classes, each with `register(name, cls)`; keep heavy imports inside the class."""


@hookspec
def flexcore_register_selectors(register: Register) -> None:
    """Register selector classes (scores to regions), each with `register(name, cls)`."""
