"""FlexInputs: what an adapter returns, a `BatchFeature` whose streams move with it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BatchFeature
from transformers.utils import ModelOutput

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
        self.data = {k: _moved(v, device, dtype) for k, v in self.data.items()}
        return self


def _moved(value: Any, device: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, StreamBatch):
        return value.to(device, dtype)
    if isinstance(value, ModelOutput):  # an encoder's output, as Whisper's adapter makes it
        states = {k: v for k, v in value.items() if isinstance(v, torch.Tensor)}
        return type(value)(
            **{k: v.to(device, dtype if v.is_floating_point() else None) for k, v in states.items()}
        )
    return value
