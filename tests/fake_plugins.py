"""Plug-ins for tests: made in memory, healthy or broken as asked."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from flexcore import hookimpl


class Image:
    def __init__(self, model: object, processor: object, zoom: int = 3) -> None:
        self.model, self.processor, self.zoom = model, processor, zoom


class Video(Image):
    pass


def module(**attributes: Any) -> ModuleType:
    made = ModuleType("fake_plugin")
    vars(made).update(attributes)
    return made


def registering(*entries: tuple[Any, Any], then: Exception | None = None) -> ModuleType:
    """A plug-in that registers adapters and may fail afterwards."""

    @hookimpl
    def flexcore_register_adapters(register: Callable[[Any, Any], None]) -> None:
        for name, cls in entries:
            register(name, cls)
        if then is not None:
            raise then

    return module(flexcore_register_adapters=flexcore_register_adapters)


marked = hookimpl(lambda register: register("video", Video))


def unmarked(register: Callable[[str, type], None]) -> None:
    register("video", Video)
