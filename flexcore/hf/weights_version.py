"""WeightsVersion: notices changed weights without walking the modules that hold them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def walked_version(parameters: Iterable[Tensor]) -> tuple[int, ...]:
    """The readable twin of `WeightsVersion.of`: where each parameter lies, and how often it was written in place."""
    return tuple(v for p in parameters for v in (_address(p), 0 if p.is_inference() else p._version))


class WeightsVersion:
    """Equal to `walked_version` of the modules' parameters, from a list that is made anew when their tree changes.

    Walking the modules of a few layers costs a decode step more than all it does for the media of one layer. The tree
    is the same as long as every module and parameter is still found under its name, and none was added.
    """

    def __init__(self) -> None:
        # what was walked; (dictionary, name, what was there); (dictionary, its size); the parameters
        self._seen: tuple[list[Any], list[tuple[Any, str, Any]], list[tuple[Any, int]], list[Tensor]]
        self._seen = [], [], [], []

    def of(self, modules: list[nn.Module]) -> tuple[int, ...]:
        """Changes whenever a parameter of the modules was replaced or written in place."""
        seen = self._seen
        if not _same(seen, modules):
            seen = self._seen = _tree(modules)
        return walked_version(seen[3])


def _same(seen: tuple[Any, ...], modules: list[nn.Module]) -> bool:
    roots, links, sizes, _ = seen
    if len(roots) != len(modules):
        return False
    for a, b in zip(roots, modules, strict=True):
        if a is not b:
            return False
    for dictionary, size in sizes:
        if len(dictionary) != size:
            return False
    return all(dictionary.get(name) is found for dictionary, name, found in links)


def _tree(modules: list[nn.Module]) -> tuple[Any, ...]:
    links, sizes = [], []
    for root in modules:
        for module in root.modules():
            for dictionary in (module._modules, module._parameters):
                links += [(dictionary, name, found) for name, found in dictionary.items()]
                sizes.append((dictionary, len(dictionary)))
    return modules, links, sizes, [p for module in modules for p in module.parameters()]


def _address(parameter: Tensor) -> int:
    try:
        return parameter.data_ptr()
    except RuntimeError:  # a tensor subclass (a quantised weight) without storage of its own
        return id(parameter)
