"""ConvTower: a small convolutional vision tower for LLaVA-architecture models that are trained from nothing.

A vision transformer that cuts a picture into patches needs long training before it reads across their borders. So do
convolutions that halve a picture until one feature is left for each patch: they have to learn a sign anew for each of
the 64 places that it can have in a patch of eight pixels. This tower reads at half the resolution, where a sign looks
nearly the same wherever it is, and only then keeps, for each patch, the strongest of what was read in it. Beside the
colours it sees local contrast, so that faint and strong strokes look alike. It is for models small enough to train on
a processor and to ship. Importing this module makes it known to transformers' Auto classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class ConvTowerConfig(PreTrainedConfig):
    """Sizes of a ConvTower.

    Args:
        image_size: Side of a picture in pixels.
        widths: Channels at full resolution, at half of it, and of a patch's feature.
        depth: Residual blocks at half resolution; each sees two pixels further.
        patch_size: Side in pixels of what one feature stands for; even.
        contrast_window: Side in pixels of the neighbourhood that local contrast is taken from.
    """

    model_type = "flexcore_conv_tower"

    def __init__(
        self,
        image_size: int = 64,
        widths: tuple[int, int, int] = (24, 64, 128),
        depth: int = 3,
        patch_size: int = 8,
        contrast_window: int = 9,
        **kwargs: Any,
    ):
        self.image_size = image_size
        self.widths = list(widths)
        self.depth = depth
        self.patch_size = patch_size
        self.contrast_window = contrast_window
        self.hidden_size = self.widths[-1]
        super().__init__(**kwargs)


class _Block(nn.Sequential):
    def __init__(self, inside: int, outside: int, side: int = 3, stride: int = 1):
        super().__init__(
            nn.Conv2d(inside, outside, side, stride, padding=side // 2, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
        )


class _Residual(_Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ConvTower(PreTrainedModel):
    """Convolutions at half resolution, the strongest of each patch, and convolutions over placed patches."""

    config: ConvTowerConfig
    config_class = ConvTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ConvTowerConfig):
        super().__init__(config)
        full, half, width = config.widths
        side = config.image_size // config.patch_size
        self.stem = nn.Sequential(_Block(4, full), _Block(full, half, stride=2))
        self.read = nn.Sequential(
            *(_Residual(half, half) for _ in range(config.depth)), _Block(half, width, side=1)
        )
        self.position = nn.Parameter(torch.zeros(1, width, side, side))
        self.patches = nn.Sequential(_Residual(width, width), _Residual(width, width))
        self.out = nn.Linear(width, width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # torch's own initialisation suits convolutions with batch norms; transformers' default would shrink them
        if isinstance(module, ConvTower):
            nn.init.normal_(module.position, std=0.1)

    def contrast(self, pixels: Tensor) -> Tensor:
        """`[B, 1, H, W]` brightness, less its mean and over its spread in a window around each pixel."""
        window = self.config.contrast_window
        grey = pixels.mean(1, keepdim=True)
        mean = F.avg_pool2d(grey, window, 1, window // 2, count_include_pad=False)
        square = F.avg_pool2d((grey - mean).square(), window, 1, window // 2, count_include_pad=False)
        return (grey - mean) / (square + 1e-2).sqrt()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Features `[B, patches, hidden]` of `[B, 3, H, W]` pixels, in raster order, as last and only hidden state."""
        seen = torch.cat([pixel_values, self.contrast(pixel_values)], dim=1)
        # a processor's convolutions are a third faster over channels that lie together
        x = self.read(self.stem(seen.contiguous(memory_format=torch.channels_last)))
        # windows reach a pixel over a patch's border on each side: what lies on it is part of both
        half = self.config.patch_size // 2
        x = F.max_pool2d(x, half + 2, stride=half, padding=1)
        x = self.patches(x + self.position)
        hidden = self.out(x.flatten(2).transpose(1, 2))
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,))


AutoConfig.register(ConvTowerConfig.model_type, ConvTowerConfig, exist_ok=True)
AutoModel.register(ConvTowerConfig, ConvTower, exist_ok=True)
