"""A spectrogram of a recording with the regions that were read marked, and how often they were."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexcore.grid import Grid

from .audio_checks import need
from .audio_io import Recording, clock

_RATE, _HOP, _MELS = 16000, 160, 96
_COLUMNS = 1800  # of the picture; a longer recording's are averages
_BLOCK = 30  # seconds read at once
_RANGE = 70.0  # decibels shown
_PALE, _DEEP = 0.2, 0.55  # of the colour map: a region that was hardly read, and the one that was read most


def levels(recording: Recording, columns: int = _COLUMNS) -> tuple[Tensor, float]:
    """A recording's mel spectrogram in decibels, read block by block.

    Args:
        recording: What to look at.
        columns: The most columns wanted.

    Returns:
        `[mels, columns]` levels, 0 for the loudest, and the hertz of the highest band's upper edge.
    """
    top = min(_RATE, recording.rate) / 2
    mel = need("torchaudio").transforms.MelSpectrogram(
        _RATE, n_fft=1024, win_length=400, hop_length=_HOP, n_mels=_MELS, f_max=top
    )
    total = recording.length(_RATE)
    hops = -(-total // _HOP)
    columns = min(columns, hops)
    power, counts = torch.zeros(_MELS, columns), torch.zeros(columns)
    for start in range(0, total, _BLOCK * _RATE):
        # what lies just outside belongs in the first and last column's window
        samples = recording.read(start - _HOP * 4, min(start + _BLOCK * _RATE, total) + _HOP * 4, _RATE)
        found = mel(samples)[:, 4:-5]
        where = (torch.arange(found.shape[1]) + start // _HOP) * columns // hops
        keep = where < columns
        power.index_add_(1, where[keep], found[:, keep])
        counts.index_add_(0, where[keep], torch.ones(int(keep.sum())))
    decibels = 10 * (power / counts.clamp(min=1)).clamp(min=1e-12).log10()
    return (decibels - decibels.max()).clamp(min=-_RANGE), top


def save_picture(
    path: str | os.PathLike[str],
    recording: Recording,
    grid: Grid,
    weights: Tensor,
    frame_seconds: float,
    title: str = "",
) -> None:
    """Draw a spectrogram with the regions that were read as if gone over with a marker, over how often they were.

    Args:
        path: Where to; the ending decides the format.
        recording: The recording, or the part of it that was listened to.
        grid: Its lattice, `(T,)` or `(T, F)`.
        weights: `[n_regions]` in `[0, 1]`, how often each region was read (see `Trace.looked_at`).
        frame_seconds: Seconds per fine frame.
        title: Of the picture.

    Raises:
        ValueError: The grid isn't a recording's, or weights don't fit it.
        ImportError: matplotlib or torchaudio is missing.
    """
    if len(grid.fine) > 2 or weights.shape != (grid.n_regions,):
        raise ValueError(
            f"weights must hold one number for each of the {grid.n_regions} regions of a (T,) or (T, F) grid, got "
            f"{list(weights.shape)} for {grid.fine}"
        )
    need("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    spectrum, top = levels(recording)
    span = grid.fine[0] * frame_seconds
    read = _per_cell(grid, weights)  # [bands, frames]
    share = read / read.max().clamp(min=torch.finfo(torch.float32).tiny)
    rows = (torch.arange(spectrum.shape[0]) * share.shape[0]) // spectrum.shape[0]
    at = (torch.arange(spectrum.shape[1]) + 0.5) / spectrum.shape[1] * recording.seconds / span
    shown = share[rows][:, (at * share.shape[1]).long().clamp(max=share.shape[1] - 1)]

    figure = Figure(figsize=(13, 5.2), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    upper.imshow(
        _colours(spectrum.numpy(), shown.numpy()),
        origin="lower",
        aspect="auto",
        extent=(0, recording.seconds, 0, 1),
        interpolation="nearest",
    )
    ticks = [hz for hz in (250, 500, 1000, 2000, 4000, 8000) if hz <= top]
    upper.set_yticks([_mel(hz) / _mel(top) for hz in ticks], [f"{hz / 1000:g}" for hz in ticks])
    upper.set_ylabel("kHz")
    upper.set_title(title, loc="left", fontsize=11)
    upper.tick_params(axis="x", length=0, labelbottom=False)

    height = read.amax(dim=0)
    starts = torch.cat([torch.tensor([0]), 1 + (height[1:] != height[:-1]).nonzero()[:, 0]])
    widths = torch.diff(starts, append=torch.tensor([len(height)])) * frame_seconds
    heat = _marker(share.amax(dim=0)[starts].numpy())
    lower.bar(
        (starts * frame_seconds).numpy(), height[starts].numpy(), widths.numpy(), align="edge", color=heat
    )
    lower.set_xlim(0, recording.seconds)
    lower.set_ylim(0, max(1e-6, float(height.max())) * 1.08)
    lower.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    lower.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: clock(seconds).removesuffix(".0")))
    lower.set_ylabel("read by")
    lower.set_xlabel(
        "share of all (layer, row) pairs that read a region; the marker above has the same colours"
    )
    for side in ("top", "right"):
        lower.spines[side].set_visible(False)
    figure.savefig(path)


def _per_cell(grid: Grid, weights: Tensor) -> Tensor:
    """`[bands, frames]` weight of the region that each fine token lies in."""
    tokens = grid.tokens(torch.arange(grid.n_regions))
    inside = tokens >= 0
    out = torch.zeros(grid.n_fine)
    out[tokens[inside]] = weights.float().cpu()[:, None].expand_as(tokens)[inside]
    return out.view(grid.fine[0], -1).T


def _colours(spectrum: np.ndarray, share: np.ndarray) -> Any:
    """RGB: ink on white paper, loud is black; the marker's colour lies under the ink."""
    ink = 1 - np.clip(1 + spectrum / _RANGE, 0, 1) ** 1.5
    return ink[..., None] * _marker(share)


def _marker(share: np.ndarray) -> Any:
    """RGB of a region by how often it was read: from white where it wasn't to orange."""
    from matplotlib import colormaps

    colour = colormaps["YlOrRd"](_PALE + (_DEEP - _PALE) * share)[..., :3]
    return 1 - (1 - colour) * share[..., None] ** 0.7


def _mel(hertz: float) -> float:
    # the scale that torchaudio's bands are laid out on
    return 2595.0 * float(np.log10(1.0 + hertz / 700.0))
