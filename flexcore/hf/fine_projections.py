"""FineProjections: the fine projections of all reading layers, as one module of the model."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

import torch
from torch import Tensor, nn


class FineProjections(nn.Module):
    """Fine projections by layer index, as `flex_fine.<layer>.k_proj` and so on; read like a dictionary of strings.

    Not an `nn.ModuleDict`: peft refuses those in `modules_to_save`. When peft has put a wrapper in this module's
    place (or in a layer's), `live()` called on the wrapper answers for whichever copy is active.
    """

    def live(self) -> FineProjections:
        """Itself; through a wrapper that passes attributes on, the copy that is in use."""
        return self

    def at(self, layer: int) -> Any:
        """A layer's projection, the active copy if peft keeps several."""
        module = self._modules[str(layer)]
        assert module is not None
        return module.live()  # type: ignore[operator]

    def zero(self, layer: int) -> Tensor | None:
        """A zero that depends on every trainable parameter of a layer, or None if it has none."""
        parts = [p.sum() * 0.0 for p in self.at(layer).parameters() if p.requires_grad]
        return torch.stack(parts).sum() if parts else None

    def __getitem__(self, layer: str) -> nn.Module:
        module = self._modules[layer]
        assert module is not None
        return module

    def __setitem__(self, layer: str, module: nn.Module) -> None:
        self.add_module(layer, module)

    def __contains__(self, layer: object) -> bool:
        return layer in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def keys(self) -> KeysView[str]:
        """Layer indices, as strings."""
        return self._modules.keys()

    def values(self) -> ValuesView[nn.Module | None]:
        """Projections in the order of layers."""
        return self._modules.values()

    def items(self) -> ItemsView[str, nn.Module | None]:
        """Pairs of layer index and projection."""
        return self._modules.items()
