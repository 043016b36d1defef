"""Sensor time series for a text-only language model, as a plug-in of flexcore.

A recording `[T, channels]` is cut into windows. The sequence holds one token per window, made from the window
averaged down to one patch; its patches at the full rate are the fine tokens, encoded when their window is chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import flexcore
from flexcore.hf import EmbeddingAdapter, View
from flexcore.tiled_source import TiledSource, UnitEncoder


@flexcore.hookimpl
def flexcore_register_adapters(register: Callable[[str, type], None]) -> None:
    """Register the time series adapter."""
    register("timeseries", TimeSeriesAdapter)


@dataclass(frozen=True, eq=False)
class Recording(View):
    """A recording made ready: its windows `[n, samples, channels]`, beside its lattice and its coarse tokens."""

    windows: Tensor


class TimeSeriesAdapter(EmbeddingAdapter):
    """Recordings `[T]` or `[T, channels]` (numpy or torch), where a prompt says `<series>`.

    The encoder starts at random, the same every time: train or load `adapter.encoder` for answers that mean something.

    Args:
        model: The language model, wrapped or plain.
        tokenizer: Its tokenizer.
        channels: Sensors per recording.
        patch: Samples per fine token.
        window: Fine tokens per window: a window is one coarse token, and one region to be chosen.

    Raises:
        ValueError: An option is out of range, or a recording is unusable.
    """

    medium = keyword = "series"

    def __init__(self, model: Any, tokenizer: Any, *, channels: int = 1, patch: int = 8, window: int = 16):
        super().__init__(model, tokenizer)
        if min(channels, patch, window) < 1:
            raise ValueError(f"channels, patch and window must be >= 1, got {channels}, {patch} and {window}")
        self.channels, self.patch, self.window = channels, patch, window
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = nn.Linear(patch * channels, self.width).to(model.device, model.dtype)

    def views(self, media: Sequence[Any]) -> list[Recording]:
        """Cut recordings into windows and make their coarse tokens."""
        return [self.view(f"series {i}", medium) for i, medium in enumerate(media)]

    def view(self, name: str, medium: Any) -> Recording:
        """One recording: what the lattice is, and how the coarse view is made."""
        signal = torch.as_tensor(medium, dtype=torch.float32)
        signal = signal[:, None] if signal.ndim == 1 else signal
        if signal.ndim != 2 or signal.shape[1] != self.channels or not len(signal):
            raise ValueError(f"{name} must be [T, {self.channels}] with T >= 1, got {list(signal.shape)}")
        if not signal.isfinite().all():
            raise ValueError(f"{name} must hold finite numbers, got NaN or infinity")
        # Sensors come in any unit: a recording is read in its own standard deviations.
        signal = (signal - signal.mean(0)) / signal.std(0, correction=0).clamp(min=1e-6)
        samples = self.patch * self.window
        missing = -len(signal) % samples
        windows = nn.functional.pad(signal, (0, 0, 0, missing)).unflatten(0, (-1, samples))
        n = len(windows)
        padding = [(0.0, missing / (n * samples))]
        grid = flexcore.Grid.blocks((n,), (n * self.window,), region=self.window, padding=padding)
        pooled = windows.unflatten(1, (self.patch, self.window)).mean(2)
        return Recording(grid, self.encode(pooled.flatten(1)), windows)

    def sources(self, views: Sequence[Recording]) -> list[flexcore.FineSource]:
        """How the features of given regions are made: a window's patches, when it is first chosen."""

        def encode(units: Sequence[tuple[int, int]]) -> Tensor:
            windows = torch.stack([views[recording].windows[window] for recording, window in units])
            return self.encode(windows.unflatten(1, (self.window, self.patch)).flatten(2))

        weight = self.encoder.weight
        encoder = UnitEncoder(encode, self.width, weight.dtype, weight.device)
        return [TiledSource(v.grid, (self.window,), encoder, i, f"series {i}") for i, v in enumerate(views)]

    def encode(self, patches: Tensor) -> Tensor:
        """`[..., width]` features of patches `[..., patch * channels]`."""
        return self.encoder(patches.to(self.encoder.weight))
