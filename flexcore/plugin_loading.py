"""One plug-in on probation: load it, check its hooks, collect what it registers or why it failed."""

import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pluggy

from flexcore import hookspecs
from flexcore.errors import FlexcoreError
from flexcore.hookspecs import Register

logger = logging.getLogger(__name__)

Kind = Literal["adapter", "selector"]

HOOKS: dict[str, Kind] = {
    "flexcore_register_adapters": "adapter",
    "flexcore_register_selectors": "selector",
}
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class PluginError(FlexcoreError, ValueError):
    """A plug-in broke a rule, or a name that was asked for can't be served."""


@dataclass(frozen=True)
class Registration:
    """A registered class, the name it goes by, and the plug-in and distribution it came from."""

    name: str
    cls: type[Any]
    kind: Kind
    plugin: str
    distribution: str


@dataclass(frozen=True)
class Plugin:
    """What came of one plug-in: its registrations, or the error that left it without any."""

    name: str
    distribution: str
    registrations: tuple[Registration, ...] = ()
    error: Exception | None = None


def examine(name: str, distribution: str, load: Callable[[], object]) -> Plugin:
    """Load one plug-in and collect what it registers; whatever fails becomes its `error`.

    Args:
        name: The plug-in's own name, for messages.
        distribution: The distribution it belongs to, for messages.
        load: Imports the plug-in and returns it.
    """
    registrations: dict[tuple[Kind, str], Registration] = {}

    def registrar(kind: Kind) -> Register:
        def register(entry: str, cls: type) -> None:
            check_registration(kind, entry, cls)
            new = Registration(entry, cls, kind, name, distribution)
            if registrations.setdefault((kind, entry), new).cls is not cls:
                raise PluginError(f"{kind} {entry!r} is registered twice by one plug-in")

        return register

    try:
        plugin = load()
        # A manager of its own for every plug-in: what one of them breaks can't reach the next.
        manager = pluggy.PluginManager("flexcore")
        manager.add_hookspecs(hookspecs)
        manager.register(plugin, name=name)
        _check_hooks(manager, plugin)
        for hook, kind in HOOKS.items():
            getattr(manager.hook, hook)(register=registrar(kind))
    except (Exception, SystemExit) as error:
        logger.warning("plug-in %r of distribution %r is left out: %s", name, distribution, describe(error))
        # An `exit()` at import is the plug-in's failure; re-raised as a cause it must not end the process.
        return Plugin(
            name, distribution, error=error if isinstance(error, Exception) else PluginError(describe(error))
        )
    return Plugin(name, distribution, tuple(registrations.values()))


def check_registration(kind: Kind, name: object, cls: object) -> None:
    """Check what somebody wants to register.

    Args:
        kind: What it is to be registered as.
        name: Lower-case letters, digits and underscores, starting with a letter.
        cls: A class.

    Raises:
        PluginError: The name is malformed, or `cls` is not a class.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PluginError(
            f"{kind} name must be lower-case letters, digits and underscores, starting with a letter "
            f"(such as 'image'), got {name!r}"
        )
    if not isinstance(cls, type):
        raise PluginError(f"{kind} {name!r} must be registered as a class, got {cls!r}")


def describe(error: BaseException) -> str:
    """Return an exception's type and message in one line's worth of text."""
    return f"{type(error).__name__}: {error}"


def _check_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    """Refuse what pluggy would pass over in silence: a hook misspelt, unmarked or unable to register."""
    known = f"the hooks are {', '.join(HOOKS)}"
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{error}; {known}") from None
    for attribute in dir(plugin):
        if (
            not attribute.startswith("flexcore_")
            or manager.parse_hookimpl_opts(plugin, attribute) is not None
        ):
            continue
        # Looked up statically: a property or a lazy module attribute must not run for its name's sake.
        if inspect.isroutine(inspect.getattr_static(plugin, attribute, None)):
            if attribute in HOOKS:
                raise PluginError(f"{attribute} is not marked with @flexcore.hookimpl")
            raise PluginError(f"{attribute} is not a hook; {known}")
    callers = manager.get_hookcallers(plugin)
    if not callers:
        raise PluginError(f"{plugin!r} implements no hook; {known}")
    for caller in callers:
        for implementation in caller.get_hookimpls():
            # pluggy lets an implementation take fewer arguments; without this one it can't do its work.
            if caller.has_spec() and "register" not in implementation.argnames:
                raise PluginError(
                    f"{caller.name} must take the argument 'register', got {implementation.argnames!r}"
                )
