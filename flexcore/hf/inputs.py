"""FlexInputs: what an adapter returns, a `BatchFeature` whose streams move with it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BatchFeature

from flexcore.streams import StreamBatch


class FlexInputs(BatchFeature):
    """Model inputs with the batch's media under `flex_streams`; unpack it as `model.generate(**inputs)`.

    It is reusable: the `StreamBatch` in it is immutable, and moving the inputs puts a moved one in its place.
    """

    def to(self, *args: Any, **kwargs: Any) -> FlexInputs:
        """Move to a device and cast floating-point tensors, streams included.

        Args:
            *args: A device, a dtype or both, as `torch.Tensor.to` takes them.
            **kwargs: `device`, `dtype` and `non_blocking`.

        Returns:
            The same object, changed in place, as `BatchFeature.to` does.
        """
        super().to(*args, **kwargs)
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                device = value
        # An index alone means a device of the accelerator at hand; streams take names and devices.
        device = torch.device(device) if isinstance(device, int) else device
        # `BatchFeature.to` moves tensors only and passes over any other object without a word.
        self.data = {
            k: v.to(device, dtype) if isinstance(v, StreamBatch) else v for k, v in self.data.items()
        }
        return self
