"""The recordings' frozen encoder: windows of sound in, one feature per 0.8 seconds out, or per eight of them.

The coarse view is to the fine one what a thumbnail is to a photo: the same spectrogram with ten columns averaged into
one, through the same weights, as in the audio adapter's own `SpectrogramEncoder`. The tower learned to read digits at
full rate only; of the averaged spectrogram it is taught which bell rang.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from flexcore_adapters.audio_checks import need
from flexcore_adapters.audio_encoders import WindowEncoder
from flexcore_adapters.audio_windows import Layout

from .loop import generator, train
from .sounds import NAMES, RATE, SAMPLES, WINDOW, Room, Window, window

WIDTH, MELS, HOP = 128, 40, 160
FRAMES, POOL = 20, 10  # fine frames in a window, and in a coarse cell
LAYOUT = Layout(RATE, SAMPLES, FRAMES, POOL)
FRAME_SECONDS = WINDOW / FRAMES
_COLUMNS = SAMPLES // HOP
_PER_FRAME = _COLUMNS // FRAMES  # spectrogram columns
_KNOWN = 0.4  # share of a digit from where on a frame has to know about it


class SoundTowerConfig(PreTrainedConfig):
    """Sizes of a SoundTower.

    Args:
        hidden_size: Width of its features.
        mels: Bands of the spectrogram.
    """

    model_type = "magnifier_sound_tower"

    def __init__(self, hidden_size: int = WIDTH, mels: int = MELS, **kwargs: Any):
        self.hidden_size = hidden_size
        self.mels = mels
        super().__init__(**kwargs)


class _Block(nn.Sequential):
    def __init__(self, inside: int, outside: int):
        super().__init__(
            nn.Conv2d(inside, outside, 3, 2, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()
        )


class SoundTower(PreTrainedModel):
    """Convolutions over a spectrogram, then over time, then one feature for every 40 of its columns."""

    config: SoundTowerConfig
    config_class = SoundTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SoundTowerConfig):
        super().__init__(config)
        width = config.hidden_size
        self.stem = nn.Sequential(_Block(1, 16), _Block(16, 32), _Block(32, 48))
        self.inside = nn.Conv1d(48 * config.mels // 8, width, 1)
        self.context = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation),
            )
            for dilation in (1, 2, 4)
        )
        self.out = nn.Linear(width * _PER_FRAME // 8, width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own initialisation suits convolutions with batch norms."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Features `[B, columns / 40, C]` of `[B, mels, columns]` levels, as last and only hidden state."""
        x = pixel_values - pixel_values.mean(dim=2, keepdim=True)  # a room's own spectrum says nothing
        x = self.inside(self.stem(x[:, None]).flatten(1, 2))
        for block in self.context:
            x = x + block(x)
        x = x.unflatten(2, (-1, _PER_FRAME // 8)).permute(0, 2, 1, 3).flatten(2)
        hidden = self.out(F.relu(x))
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,))


AutoConfig.register(SoundTowerConfig.model_type, SoundTowerConfig, exist_ok=True)
AutoModel.register(SoundTowerConfig, SoundTower, exist_ok=True)


class Levels(nn.Module):
    """Windows of samples to log-mel levels, at full rate and averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.mel = need("torchaudio").transforms.MelSpectrogram(RATE, n_fft=400, hop_length=HOP, n_mels=MELS)

    def forward(self, samples: Tensor, pool: int = 1) -> Tensor:
        """`[k, mels, 800 / pool]` levels of `[k, window]` samples."""
        power = self.mel(samples)[..., :_COLUMNS]
        # averaged as power and not as logarithm: what is loud for a moment stays audible in a long cell
        power = power if pool == 1 else F.avg_pool1d(power, pool)
        return (power.clamp(min=1e-10).log10() + 4) / 4


class TowerWindows(nn.Module, WindowEncoder):
    """What the audio adapter takes: a LLaVA's sound tower and projector as an encoder of windows.

    Args:
        llava: The model.
    """

    def __init__(self, llava: Any):
        super().__init__()
        self.layout = LAYOUT
        self.width = llava.config.get_text_config().hidden_size
        self.levels = Levels()
        # they are the model's and stay its own
        self.parts = (llava.model.vision_tower, llava.model.multi_modal_projector)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the features."""
        return next(self.parts[0].parameters()).dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Of the features."""
        return next(self.parts[0].parameters()).device

    def fine(self, samples: Tensor, lengths: Tensor) -> Tensor:
        return self._features(self.levels(samples))

    def coarse(self, samples: Tensor, lengths: Tensor) -> Tensor:
        return self._features(self.levels(samples, POOL))

    def _features(self, levels: Tensor) -> Tensor:
        tower, projector = self.parts
        out: Tensor = projector(tower(levels.to(self.device, self.dtype)).last_hidden_state)
        return out


class SoundReader(nn.Module):
    """The encoder with linear heads on each of its features: digit, is there one, which bells ring."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = Levels()
        self.tower = SoundTower(SoundTowerConfig())
        self.heads = nn.Linear(WIDTH, 10 + 1 + len(NAMES))

    def forward(self, levels: Tensor) -> tuple[Tensor, ...]:
        """Logits `[B, frames, n]` of each head for `[B, mels, columns]` levels."""
        hidden = self.tower(levels).last_hidden_state
        return self.heads(hidden).split((10, 1, len(NAMES)), dim=-1)


def labels(shown: Window, seconds: float, cells: int, digits: bool) -> tuple[np.ndarray, np.ndarray]:
    """Per frame or cell: the digit, -1 for none and -2 for one that can't be read, and the bells that ring.

    Args:
        shown: The window.
        seconds: Length of a frame.
        cells: Frames in the window.
        digits: Whether digits can be read at this rate.
    """
    start = np.arange(cells) * seconds

    def share(begin: float, end: float) -> np.ndarray:
        return (np.minimum(end, start + seconds) - np.maximum(begin, start)).clip(0)

    digit, bells = np.full(cells, -1), np.zeros((cells, len(NAMES)), np.float32)
    for value, begin, end in shown.digits:
        part = share(begin, end) / (end - begin)
        digit[part > 0] = -2
        if digits:
            digit[part >= _KNOWN] = value
    for (name, at), (_, _, end) in zip(shown.bells, shown.digits, strict=False):
        # a bell is heard from its stroke to the digit that follows, so that whoever finds the one finds the other
        part = share(at, end)
        bells[part >= min(0.2, part.max()), name] = 1
    return digit, bells


def batch_of(rng: np.random.Generator, levels: Levels, fine: int, coarse: int) -> list[tuple[Tensor, ...]]:
    """Windows with labels at both rates: `(levels, digits [B, cells], bells [B, cells, 6])` each."""
    out = []
    for n, pool in ((fine, 1), (coarse, POOL)):
        windows = []
        for _ in range(n):
            bells = rng.permutation(len(NAMES))[: 2 if pool == 1 else rng.integers(0, 3)]
            strokes = [(int(b), int(rng.integers(10))) for b in bells]
            windows.append(window(rng, Room(rng), strokes, others=int(rng.integers(1, 3))))
        samples = torch.from_numpy(np.stack([w.samples for w in windows]))
        marks = [labels(w, FRAME_SECONDS * pool, FRAMES // pool, pool == 1) for w in windows]
        digit, ringing = (torch.from_numpy(np.stack(part)) for part in zip(*marks, strict=True))
        with torch.no_grad():
            out.append((levels(samples, pool), digit, ringing))
    return out


def loss_of(model: SoundReader, batch: list[tuple[Tensor, ...]]) -> tuple[Tensor, dict[str, float]]:
    """The sum of the heads' losses, and how many digits were read right."""
    (fine, digit, bells), (coarse, _, coarse_bells) = batch
    found, there, ringing = model(fine)
    known, sure = digit >= 0, digit > -2
    read = F.cross_entropy(found[known], digit[known], label_smoothing=0.05)
    presence = F.binary_cross_entropy_with_logits(there[..., 0][sure], known[sure].float())
    ring = F.binary_cross_entropy_with_logits(ringing, bells)
    ring_coarse = F.binary_cross_entropy_with_logits(model(coarse)[2], coarse_bells)
    right = (found[known].argmax(-1) == digit[known]).float().mean()
    numbers = {"read": right, "there": presence, "ring": ring, "ring_coarse": ring_coarse}
    total = read + presence + 3 * ring + 3 * ring_coarse
    return total, {name: float(number.detach()) for name, number in numbers.items()}


def train_sound_encoder(folder: Path, steps: int, seed: int = 0) -> SoundReader:
    """Train the encoder, or load it if it is done."""
    torch.manual_seed(seed)
    model = SoundReader()
    held = batch_of(generator(seed, 31), model.levels, 60, 60)

    def validate() -> dict[str, float]:
        value, numbers = loss_of(model, held)
        return {"val": float(value), **{f"val_{k}": v for k, v in numbers.items()}}

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        return loss_of(model, batch_of(generator(seed, 32, step), model.levels, 6, 10))

    train(folder, model, loss, steps=steps, learning_rate=2e-3, report=validate, report_every=100)
    return model
