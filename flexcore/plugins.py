"""Discovery of adapters and selectors: built-ins, installed plug-ins and classes registered in this process.

Everything enters through the hooks of `hookspecs.py`. Nothing is imported before the first question is asked,
and a plug-in that fails takes nothing down but itself: `report()` says what went wrong with it.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypedDict

from flexcore.plugin_loading import (
    HOOKS,
    Kind,
    Plugin,
    PluginError,
    Registration,
    check_registration,
    describe,
    examine,
)

__all__ = [
    "PluginError",
    "PluginReport",
    "Registration",
    "adapters",
    "load_adapter",
    "load_adapter_class",
    "load_selector_class",
    "register_adapter",
    "register_selector",
    "reload",
    "report",
    "selectors",
]

_GROUP = "flexcore"
# Parts of flexcore that register something; they pass the same checks as an installed plug-in.
_BUILTIN = ("flexcore.selection",)


class PluginReport(TypedDict):
    """One plug-in as `report()` shows it; `error` is None for a healthy one."""

    name: str
    distribution: str
    error: str | None
    adapters: list[str]
    selectors: list[str]


# What the caller registers by hand counts as one more plug-in.
_HERE = Plugin("in-process", "this process")


class _Registry:
    """The plug-ins of this process: scanned on the first question, by one thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._scanning = False
        # Both are replaced as a whole, never edited, so that readers need no lock.
        self._installed: tuple[Plugin, ...] | None = None
        self._local: dict[tuple[Kind, str], Registration] = {}

    def plugins(self) -> tuple[Plugin, ...]:
        installed = self._installed
        if installed is None:
            with self._lock:
                if self._scanning:
                    raise PluginError("flexcore's plug-ins were asked for while they are being loaded")
                if self._installed is None:
                    self._scanning = True
                    try:
                        self._installed = tuple(examine(*candidate) for candidate in _candidates())
                    finally:
                        self._scanning = False
                installed = self._installed
        if not self._local:
            return installed
        return (*installed, replace(_HERE, registrations=tuple(self._local.values())))

    def register(self, kind: Kind, name: str, cls: type) -> None:
        check_registration(kind, name, cls)
        with self._lock:
            for rival in _claims(self.plugins(), kind).get(name, []):
                if rival.distribution != _HERE.distribution and rival.cls is not cls:
                    raise PluginError(
                        f"{kind} {name!r} belongs to the plug-in {rival.plugin!r} of distribution "
                        f"{rival.distribution!r}; register {cls.__name__} under another name"
                    )
            # A name registered by hand before is replaced: notebooks run their cells again.
            entry = Registration(name, cls, kind, _HERE.name, _HERE.distribution)
            self._local = {**self._local, (kind, name): entry}

    def reload(self) -> None:
        with self._lock:
            importlib.invalidate_caches()
            self._installed = None


_registry = _Registry()


def adapters() -> Mapping[str, Registration]:
    """Return the usable adapters by name; a name that two plug-ins claim is left out (see `report`)."""
    return _usable("adapter")


def selectors() -> Mapping[str, Registration]:
    """Return the usable selectors by name; a name that two plug-ins claim is left out (see `report`)."""
    return _usable("selector")


def load_adapter_class(name: str) -> type[Any]:
    """Return the adapter class registered under `name`.

    Args:
        name: What a plug-in registered the class as, such as `"image"`.

    Raises:
        PluginError: Nobody registered the name, its plug-in failed, or two plug-ins claim it.
    """
    return _find("adapter", name)


def load_selector_class(name: str) -> type[Any]:
    """Return the selector class registered under `name`.

    Args:
        name: What a plug-in registered the class as.

    Raises:
        PluginError: Nobody registered the name, its plug-in failed, or two plug-ins claim it.
    """
    return _find("selector", name)


def load_adapter(name: str, model: Any, processor: Any, **options: Any) -> Any:
    """Build the adapter registered under `name` for one model.

    Args:
        name: What a plug-in registered the class as, such as `"image"`.
        model: The model that the adapter prepares inputs for.
        processor: The model's own transformers processor.
        **options: Passed to the adapter's class as they are.

    Raises:
        PluginError: Nobody registered the name, its plug-in failed, or two plug-ins claim it.
    """
    return load_adapter_class(name)(model, processor, **options)


def register_adapter(name: str, cls: type) -> None:
    """Register an adapter class for this process only, without a plug-in; a second call replaces the first.

    Args:
        name: Lower-case letters, digits and underscores, starting with a letter.
        cls: The class, as `load_adapter` will call it: `cls(model, processor, **options)`.

    Raises:
        PluginError: The name is malformed or an installed plug-in's, or `cls` is not a class.
    """
    _registry.register("adapter", name, cls)


def register_selector(name: str, cls: type) -> None:
    """Register a selector class for this process only, without a plug-in; a second call replaces the first.

    Args:
        name: Lower-case letters, digits and underscores, starting with a letter.
        cls: The class.

    Raises:
        PluginError: The name is malformed or an installed plug-in's, or `cls` is not a class.
    """
    _registry.register("selector", name, cls)


def report() -> list[PluginReport]:
    """Return one row per plug-in: what it registered, and what is wrong with it if anything is."""
    plugins = _registry.plugins()
    claims = {kind: _claims(plugins, kind) for kind in HOOKS.values()}
    rows: list[PluginReport] = []
    for plugin in plugins:
        errors = [describe(plugin.error)] if plugin.error else []
        names: dict[Kind, list[str]] = {"adapter": [], "selector": []}
        for registration in plugin.registrations:
            names[registration.kind].append(registration.name)
            rivals = claims[registration.kind][registration.name]
            if len(rivals) > 1:
                errors.append(_conflict(rivals))
        rows.append(
            PluginReport(
                name=plugin.name,
                distribution=plugin.distribution,
                error="; ".join(errors) or None,
                adapters=sorted(names["adapter"]),
                selectors=sorted(names["selector"]),
            )
        )
    return rows


def reload() -> None:
    """Forget what the last scan found; the next question scans again, and in-process registrations stay."""
    _registry.reload()


def _usable(kind: Kind) -> Mapping[str, Registration]:
    claims = _claims(_registry.plugins(), kind)
    return MappingProxyType({name: rivals[0] for name, rivals in claims.items() if len(rivals) == 1})


def _find(kind: Kind, name: str) -> type[Any]:
    plugins = _registry.plugins()
    claims = _claims(plugins, kind)
    rivals = claims.get(name, [])
    if len(rivals) > 1:
        raise PluginError(_conflict(rivals))
    if rivals:
        return rivals[0].cls
    message = f"unknown {kind} {name!r}; known {kind}s: {', '.join(claims) or 'none'}"
    cause: Exception | None = None
    for plugin in plugins:
        # What a plug-in registers need not bear its own name, so any failed one may be the reason.
        if plugin.error:
            message += f"; the plug-in {plugin.name!r} of distribution {plugin.distribution!r} failed with "
            message += describe(plugin.error)
            cause = plugin.error if plugin.name == name else cause
    raise PluginError(message) from cause


def _claims(plugins: Sequence[Plugin], kind: Kind) -> dict[str, list[Registration]]:
    """Who claims which name; a class that arrives by two ways claims it once."""
    claims: dict[str, list[Registration]] = {}
    for plugin in plugins:
        for registration in plugin.registrations:
            if registration.kind == kind:
                rivals = claims.setdefault(registration.name, [])
                if all(rival.cls is not registration.cls for rival in rivals):
                    rivals.append(registration)
    return dict(sorted(claims.items()))


def _conflict(rivals: Sequence[Registration]) -> str:
    claimants = " and ".join(f"{r.plugin!r} of distribution {r.distribution!r}" for r in rivals)
    return (
        f"{rivals[0].kind} {rivals[0].name!r} is claimed by the plug-ins {claimants}; uninstall all but one"
    )


def _candidates() -> Iterator[tuple[str, str, Callable[[], object]]]:
    for module in _BUILTIN:
        if importlib.util.find_spec(module) is not None:
            yield module, "flexcore", functools.partial(importlib.import_module, module)
    for entry_point in importlib.metadata.entry_points(group=_GROUP):
        distribution = getattr(entry_point.dist, "name", None) or "unknown"
        yield entry_point.name, distribution, entry_point.load
