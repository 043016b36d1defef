"""One plug-in on probation: all it registers, or nothing and the reason."""

from collections.abc import Callable
from typing import Any

import pytest

from flexcore import hookimpl
from flexcore.plugin_loading import Plugin, describe, examine
from tests.fake_plugins import Image, Video, marked, module, registering, unmarked


def look(plugin: object) -> Plugin:
    return examine("mine", "my-dist", lambda: plugin)


def refused(plugin: object, *fragments: str) -> None:
    seen = look(plugin)
    assert seen.registrations == ()
    assert seen.error is not None
    for fragment in fragments:
        assert fragment in describe(seen.error)


def test_all_it_registers() -> None:
    plugin = registering(("image", Image), ("image", Image), ("clip", Video))
    plugin.flexcore_register_selectors = hookimpl(lambda register: register("image", int))  # type: ignore[attr-defined]
    seen = look(plugin)
    assert seen.error is None
    assert [(r.kind, r.name, r.cls) for r in seen.registrations] == [
        ("adapter", "image", Image),
        ("adapter", "clip", Video),
        ("selector", "image", int),
    ]
    assert {(r.plugin, r.distribution) for r in seen.registrations} == {("mine", "my-dist")}


@pytest.mark.parametrize(
    ("name", "cls", "shown"),
    [
        ("video", Image("model", "processor"), "<"),
        ("video", "flexcore_video:Video", "'flexcore_video:Video'"),
        ("video", None, "None"),
        ("", Video, "''"),
        ("Video", Video, "'Video'"),
        ("my-video", Video, "'my-video'"),
        ("2d", Video, "'2d'"),
        ("vidéo", Video, "'vidéo'"),
        ("video\n", Video, r"'video\n'"),
        (None, Video, "None"),
    ],
    ids=[
        "instance",
        "path",
        "no-class",
        "empty",
        "upper-case",
        "dash",
        "digit-first",
        "accent",
        "newline",
        "no-name",
    ],
)
def test_bad_registration(name: Any, cls: Any, shown: str) -> None:
    rule = "must be registered as a class" if name == "video" else "must be lower-case letters"
    refused(registering(("first", Video), (name, cls)), "PluginError: adapter", rule, f"got {shown}")


def test_one_name_for_two_classes() -> None:
    refused(registering(("video", Video), ("video", Image)), "adapter 'video' is registered twice")


def test_half_way_failure_registers_nothing() -> None:
    """Neither what came before the failure, nor what the plug-in's other hook registered."""
    refused(registering(("video", Video), then=RuntimeError("half-way")), "RuntimeError: half-way")
    plugin = registering(("video", Video))
    plugin.flexcore_register_selectors = hookimpl(lambda register: 1 / 0)  # type: ignore[attr-defined]
    refused(plugin, "ZeroDivisionError")


@pytest.mark.parametrize(
    ("plugin", "fragments"),
    [
        (module(flexcore_register_adaptors=marked), ["_register_adaptors", "_register_adapters"]),
        (module(flexcore_register_adaptors=unmarked), ["_register_adaptors", "_register_adapters"]),
        (module(register_adapters=marked), ["'register_adapters'", "flexcore_register_adapters"]),
        (module(flexcore_register_adapters=unmarked), ["not marked with @flexcore.hookimpl"]),
        (module(), ["implements no hook", "flexcore_register_adapters"]),
        (Video, ["Video", "implements no hook"]),
        (None, ["implements no hook"]),
        (module(flexcore_register_adapters=hookimpl(lambda: None)), ["must take the argument 'register'"]),
        (module(flexcore_register_adapters=hookimpl(lambda register=print: None)), ["'register'"]),
        (module(flexcore_register_adapters=hookimpl(lambda register, model: None)), ["Validation", "model"]),
    ],
    ids=[
        "misspelt",
        "misspelt-unmarked",
        "no-prefix",
        "unmarked",
        "empty-module",
        "adapter-itself",
        "none",
        "no-argument",
        "default-argument",
        "wrong-signature",
    ],
)
def test_hook_that_fits_no_spec(plugin: object, fragments: list[str]) -> None:
    refused(plugin, *fragments)


def test_misspelt_hook_beside_a_good_one_is_an_error() -> None:
    plugin = registering(("video", Video))
    plugin.flexcore_register_selector = unmarked  # type: ignore[attr-defined]
    refused(plugin, "flexcore_register_selector is not a hook")


def test_what_is_nobodys_mistake() -> None:
    """An optional hook of a later version; a sub-module, a class and a constant that bear our prefix."""
    plugin = registering(("image", Image))
    vars(plugin).update(
        flexcore_register_samplers=hookimpl(optionalhook=True)(lambda register: None),
        flexcore_adapters=module(),
        flexcore_class=Video,
        flexcore_version="0.1",
    )
    seen = look(plugin)
    assert (seen.error, [r.name for r in seen.registrations]) == (None, ["image"])


def test_lazy_attributes_are_left_alone() -> None:
    class Lazy:
        touched = False

        @property
        def flexcore_heavy(self) -> object:
            Lazy.touched = True
            raise ImportError("heavy")

        @hookimpl
        def flexcore_register_adapters(self, register: Callable[[str, type], None]) -> None:
            register("image", Image)

    assert look(Lazy()).error is None
    assert not Lazy.touched
