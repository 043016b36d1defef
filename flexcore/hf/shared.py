"""SharedProjection: fine tokens through the layer's own K/V projections, without new weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .site import AttentionSite


class SharedProjection:
    """What `share_kv_projections` puts in the place of a layer's `FineProjection`.

    Args:
        site: The layer.
        names: Its submodules that shape key or value.
    """

    def __init__(self, site: AttentionSite, names: tuple[str, ...]):
        self.site = site
        self.names = names

    def parameters(self) -> Iterator[nn.Parameter]:
        """The layer's own K/V parameters, looked up at call time so that later LoRA layers count."""
        for module in self.modules():
            yield from module.parameters()

    def modules(self) -> Iterator[nn.Module]:
        """Those that hold them."""
        for name in self.names:
            yield self.site.attention.get_submodule(name)

    def modules_by_name(self) -> dict[str, nn.Module]:
        """Nothing to replace: the shadow runs the layer's own modules."""
        return {}
