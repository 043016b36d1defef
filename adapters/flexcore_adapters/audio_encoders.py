"""What turns windows of sound into features: an audio model's own tower and projector, or a small encoder to train."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from flexcore.errors import StreamError, UnsupportedModelError

from .audio_checks import need
from .audio_windows import Layout

_FLOOR = 1e-10  # of a mel band's power, as Whisper's features have it
_STRIDE = 2  # spectrogram columns per fine frame


class WindowEncoder(ABC):
    """Features of windows, each encoded on its own; subclass it to bring another encoder.

    Subclasses set `layout`, `width` (C), `dtype` and `device`.
    """

    layout: Layout
    width: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def fine(self, samples: Tensor, lengths: Tensor) -> Tensor:
        """Full-rate features.

        Args:
            samples: `[k, window]` float32, silence after the end of a recording.
            lengths: `[k]` samples of each that are the recording's.

        Returns:
            `[k, frames * bands, C]`, time first.
        """

    @abstractmethod
    def coarse(self, samples: Tensor, lengths: Tensor) -> Tensor:
        """Features pooled over `layout.pool` frames, `[k, cells * bands, C]`; arguments as for `fine`."""

    def sizes(self, samples: int) -> tuple[int, float]:
        """Coarse cells along time of a whole recording, and the fine frames that hold sound."""
        frames = max(1.0, samples * self.layout.frames / self.layout.window)
        return math.ceil(math.ceil(frames) / self.layout.pool), frames


class SpectrogramEncoder(nn.Module, WindowEncoder):
    """Log-mel spectrogram, patches and a projector: the small encoder that puts sound in front of a text model.

    The coarse view is to the fine one what a thumbnail is to a photo: the same spectrogram with `pool` frames averaged
    into one, through the same weights. It costs a share `1 / pool` of the encoder, so a day of sound can be skimmed.

    Args:
        hidden: The language model's hidden size.
        rate: Samples per second.
        mels: Mel bands.
        bands: Patches per frame, which gives a `(T, F)` lattice; 1 gives `(T,)`. Divides `mels`.
        seconds: Length of a window.
        pool: Fine frames per coarse cell.
        hop: Samples per spectrogram column; a fine frame is two of them.

    Raises:
        ValueError: The numbers don't fit.
        ImportError: torchaudio is missing.
    """

    def __init__(
        self,
        hidden: int,
        *,
        rate: int = 16000,
        mels: int = 64,
        bands: int = 1,
        seconds: float = 10.0,
        pool: int = 25,
        hop: int = 160,
    ):
        super().__init__()
        if mels % bands:
            raise ValueError(f"bands must divide mels={mels}, got {bands}")
        window = round(seconds * rate)
        if window < 1 or window % (_STRIDE * hop):
            raise ValueError(
                f"seconds must make a window of whole frames ({_STRIDE * hop} samples each), got {seconds:g} s = "
                f"{window} samples"
            )
        self.layout = Layout(rate, window, window // (_STRIDE * hop), pool, bands)
        self.mel = need("torchaudio").transforms.MelSpectrogram(
            rate, n_fft=max(400, 2 * hop), hop_length=hop, n_mels=mels
        )
        self.patch = nn.Conv2d(1, hidden, (mels // bands, _STRIDE), stride=(mels // bands, _STRIDE))
        self.project = nn.Sequential(nn.GELU(), nn.Linear(hidden, hidden))
        self.width = hidden

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the features."""
        return self.patch.weight.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Of the features."""
        return self.patch.weight.device

    def fine(self, samples: Tensor, lengths: Tensor) -> Tensor:
        return self.encode(self.spectrogram(samples))

    def coarse(self, samples: Tensor, lengths: Tensor) -> Tensor:
        # pooled as power and not as logarithm: what is loud for a moment stays audible in a long cell
        return self.encode(nn.functional.avg_pool1d(self.spectrogram(samples), self.layout.pool))

    def spectrogram(self, samples: Tensor) -> Tensor:
        """`[k, mels, columns]` power of `[k, window]` samples."""
        mel = self.mel.float()(samples.to(self.device, torch.float32))
        return mel[..., : self.layout.frames * _STRIDE]

    def encode(self, power: Tensor) -> Tensor:
        """`[k, columns / 2 * bands, C]` features of `[k, mels, columns]` power."""
        levels = (power.clamp(min=_FLOOR).log10() + 4) / 4
        patches = self.patch(levels.to(self.dtype)[:, None])
        return self.project(patches.permute(0, 3, 2, 1).flatten(1, 2))


class TowerEncoder(WindowEncoder):
    """An audio model's own tower and projector, built like Whisper's but averaging frames in pairs.

    The tower averages after its last layer, and its projector takes one frame at a time, so the frames before the
    averaging fit the projector too: they are the fine features. With `pool=2` the coarse cells are the model's own
    audio tokens; a larger one averages the frames' features further, for recordings too long for the sequence.

    Args:
        model: An audio model such as `AudioFlamingo3ForConditionalGeneration` or `Qwen2AudioForConditionalGeneration`.
        processor: Its processor, with a `feature_extractor` like Whisper's.
        pool: Frames per coarse cell.

    Raises:
        UnsupportedModelError: The model isn't built like that.
    """

    def __init__(self, model: Any, processor: Any, pool: int = 2):
        name = type(model).__name__
        inner = getattr(model, "model", model)
        self.tower: Any = getattr(inner, "audio_tower", None)
        self.projector: Any = getattr(inner, "multi_modal_projector", None)
        extractor = getattr(processor, "feature_extractor", None)
        kernel = getattr(getattr(self.tower, "avg_pooler", None), "kernel_size", None)
        if self.tower is None or self.projector is None or kernel not in (2, (2,)):
            raise UnsupportedModelError(
                f"AudioAdapter needs a model with an audio_tower that averages pairs of frames (avg_pooler) and a "
                f"multi_modal_projector, as Audio Flamingo 3 and Qwen2-Audio have; {name} has none. Give "
                "encoder=SpectrogramEncoder(...), or a WindowEncoder of your own, to put sound in front of it"
            )
        positions, wide = self.tower.max_source_positions, self.tower.config.d_model
        takes = next((m.in_features for m in self.projector.modules() if isinstance(m, nn.Linear)), wide)
        if takes != wide:
            raise UnsupportedModelError(
                f"{name}'s projector takes {takes // wide} frames at a time, so finer frames don't fit it"
            )
        if extractor is None or extractor.nb_max_frames != 2 * positions:
            raise ValueError(
                f"processor must be {name}'s own, whose feature_extractor makes windows of {2 * positions} columns; "
                f"got {getattr(extractor, 'nb_max_frames', None)} from {type(processor).__name__}"
            )
        if pool % 2:
            raise ValueError(f"pool must be even: the model's own tokens are 2 frames each, got {pool}")
        self.extractor = extractor
        self.layout = Layout(extractor.sampling_rate, extractor.n_samples, positions, pool)
        self.width = model.config.get_text_config().hidden_size
        self.dtype = self.tower.dtype
        # offloaded weights sit on the meta device between calls; their hooks move the inputs
        self.device = torch.device("cpu") if self.tower.device.type == "meta" else self.tower.device
        self.masked = "input_features_mask" in inspect.signature(type(self.tower).forward).parameters

    @property
    def native(self) -> bool:
        """Whether the coarse cells are the tokens that the model makes itself."""
        return self.layout.pool == 2

    def sizes(self, samples: int) -> tuple[int, float]:
        full, rest = divmod(samples, self.layout.window)
        frames = full * self.layout.frames + (-(-self._columns(rest) // 2) if rest else 0)
        cells = frames // 2 if self.native else -(-frames // self.layout.pool)
        return cells, float(min(frames, cells * self.layout.pool))

    def mels(self, samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own input: `[k, mels, columns]` log-mel spectrogram and `[k, columns]` mask of its content."""
        extractor = self.extractor
        made = extractor(
            list(samples.numpy()),
            sampling_rate=extractor.sampling_rate,
            padding="max_length",
            return_tensors="pt",
        )
        columns = torch.tensor([self._columns(int(n)) for n in lengths])
        return made["input_features"], (torch.arange(extractor.nb_max_frames) < columns[:, None]).long()

    @torch.no_grad()
    def fine(self, samples: Tensor, lengths: Tensor) -> Tensor:
        features, mask = self.mels(samples, lengths)
        features, mask = features.to(self.device, self.dtype), mask.to(self.device)
        tower = copy.copy(self.tower)
        tower._modules = {**self.tower._modules, "avg_pooler": nn.Identity()}
        # the class's own forward: a hook that accelerate put on the instance would run the tower that averages
        forward = type(tower).forward
        if self.masked:
            states = forward(tower, features, input_features_mask=mask)
        else:
            states = forward(tower, features, attention_mask=self._attention_mask(mask))
        out = self.projector(states.last_hidden_state)
        if out.shape[1] != self.layout.frames:
            raise StreamError(
                f"{type(tower).__name__} makes {out.shape[1]} frames of a window without its averaging, "
                f"{self.layout.frames} were expected"
            )
        return out

    def coarse(self, samples: Tensor, lengths: Tensor) -> Tensor:
        frames = self.fine(samples, lengths).unflatten(1, (self.layout.cells, self.layout.pool))
        # frames past the end say nothing; the first one of each cell is kept, so that no cell is empty
        held = torch.tensor([-(-self._columns(int(n)) // 2) for n in lengths])
        inside = torch.arange(self.layout.frames) < held[:, None]
        inside = inside.unflatten(1, (self.layout.cells, self.layout.pool))
        inside[..., 0] = True
        weight = inside.to(frames)[..., None]
        return (frames * weight).sum(dim=2) / weight.sum(dim=2)

    def _columns(self, samples: int) -> int:
        """Spectrogram columns of so many samples; at least what one token takes."""
        return max(4, -(-samples // self.extractor.hop_length))

    def _attention_mask(self, mask: Tensor) -> Any:
        from transformers.masking_utils import create_bidirectional_mask

        held = (mask.sum(dim=1) - 1) // 2 + 1
        inside = torch.arange(self.layout.frames, device=mask.device) < held[:, None]
        like = torch.zeros(*inside.shape, 1, dtype=self.dtype, device=mask.device)
        return create_bidirectional_mask(
            config=self.tower.config, inputs_embeds=like, attention_mask=inside.long()
        )
