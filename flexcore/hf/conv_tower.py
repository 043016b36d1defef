"""ConvTower: a small convolutional vision tower for LLaVA-architecture models that are trained from nothing.

A vision transformer that cuts a picture into patches needs long training before it reads across their borders. This
one is for models small enough to train on a processor and to ship: a few convolutions, one feature for each patch, and
an input channel of local contrast beside the colours, so that faint and strong strokes look alike. Importing this
module makes it known to transformers' Auto classes.
"""

from __future__ import annotations

from itertools import pairwise
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
        widths: Channels at full resolution, then after each halving of it.
        contrast_window: Side in pixels of the neighbourhood that local contrast is taken from.
    """

    model_type = "flexcore_conv_tower"

    def __init__(
        self,
        image_size: int = 64,
        widths: tuple[int, ...] = (24, 48, 96, 128),
        contrast_window: int = 9,
        **kwargs: Any,
    ):
        self.image_size = image_size
        self.widths = list(widths)
        self.contrast_window = contrast_window
        self.patch_size = 2 ** (len(self.widths) - 1)
        self.hidden_size = self.widths[-1]
        super().__init__(**kwargs)


class _Block(nn.Sequential):
    def __init__(self, inside: int, outside: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()
        )


class ConvTower(PreTrainedModel):
    """Convolutions that halve a picture until one feature is left for each patch, and a position for each of those."""

    config: ConvTowerConfig
    config_class = ConvTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ConvTowerConfig):
        super().__init__(config)
        widths, side = config.widths, config.image_size // config.patch_size
        self.stem = _Block(4, widths[0])
        self.stages = nn.ModuleList(nn.Sequential(_Block(a, b, 2), _Block(b, b)) for a, b in pairwise(widths))
        self.position = nn.Parameter(torch.zeros(1, widths[-1], side, side))
        self.last = _Block(widths[-1], widths[-1])
        self.out = nn.Linear(widths[-1], widths[-1])
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
        x = self.stem(torch.cat([pixel_values, self.contrast(pixel_values)], dim=1))
        for stage in self.stages:
            x = stage(x)
        x = x + self.last(x + self.position)
        hidden = self.out(x.flatten(2).transpose(1, 2))
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,))


AutoConfig.register(ConvTowerConfig.model_type, ConvTowerConfig, exist_ok=True)
AutoModel.register(ConvTowerConfig, ConvTower, exist_ok=True)
