"""The Whisper adapter: its decoder attends to pooled encoder states, and reads the full-rate ones of a few regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from flexcore.errors import StreamError, UnsupportedModelError
from flexcore.grid import Grid
from flexcore.hf.processing import Adapter
from flexcore.sources import FineSource, TensorSource
from flexcore.streams import FineStream, StreamBatch

from .audio_checks import is_recording
from .audio_io import Recording, clock
from .audio_windows import AudioView, Layout, read_window, region_seconds

if TYPE_CHECKING:
    from flexcore.hf.inputs import FlexInputs

_REGION_SIZE = 10


class StatePooling(nn.Module):
    """Every `pool` encoder states become one: their average, weighted per channel, plus a linear map of all of them.

    Args:
        width: Of a state.
        pool: States per pooled one.

    Freshly made it is the plain average; train it with the decoder's loss.
    """

    def __init__(self, width: int, pool: int):
        super().__init__()
        self.pool = pool
        self.weight = nn.Parameter(torch.full((pool, width), 1.0 / pool))
        self.mix = nn.Linear(pool * width, width)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, states: Tensor) -> Tensor:
        """`[..., n, C]` states to `[..., n / pool, C]`."""
        groups = states.unflatten(-2, (-1, self.pool))
        return (groups * self.weight).sum(dim=-2) + self.mix(groups.flatten(-2))


class WhisperAdapter(Adapter):
    """Recordings of at most one window for Whisper: a pooled encoder output, and its full-rate states by region.

    The encoder runs once in the call; what is saved is what the decoder's cross-attention reads at every step: 150
    pooled states and a few regions instead of 1500. States of the silence after a recording's end are never read.

    Args:
        model: A `WhisperForConditionalGeneration`, wrapped or plain.
        processor: Its processor, or any object with its `feature_extractor` and `tokenizer`.
        pool: Encoder states per pooled one; divides the encoder's 1500.
        pooling: A module from `[B, n, C]` to `[B, n / pool, C]`, such as a trained `StatePooling`; None averages.
        region_size: Encoder states per region; None takes the wrapped model's, or 10.
        sampling_rate: Of arrays that don't say theirs.

    Raises:
        ValueError: An option is out of range.
        UnsupportedModelError: The model isn't an encoder-decoder with an encoder like Whisper's.
    """

    medium: ClassVar[str] = "audio"
    keyword: ClassVar[str] = "audio"

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        pool: int = 10,
        pooling: nn.Module | None = None,
        region_size: int | None = None,
        sampling_rate: int | None = None,
        **unknown: Any,
    ):
        super().__init__(model, processor, **unknown)
        positions = getattr(model.config, "max_source_positions", None)
        if not getattr(model.config, "is_encoder_decoder", False) or positions is None:
            raise UnsupportedModelError(
                f"WhisperAdapter needs an encoder-decoder like Whisper; {type(model).__name__} isn't one"
            )
        extractor = getattr(processor, "feature_extractor", None)
        if extractor is None or extractor.nb_max_frames != 2 * positions:
            raise ValueError(
                f"processor must be {type(model).__name__}'s own, whose feature_extractor makes windows of "
                f"{2 * positions} columns; got {getattr(extractor, 'nb_max_frames', None)} from "
                f"{type(processor).__name__}"
            )
        if region_size is not None and (
            isinstance(region_size, bool) or not isinstance(region_size, int) or region_size < 1
        ):
            raise ValueError(f"region_size must be an integer >= 1, got {region_size!r}")
        self.extractor = extractor
        self.layout = Layout(extractor.sampling_rate, extractor.n_samples, positions, pool)
        self.pooling = pooling
        self.region_size = region_size
        self.sampling_rate = sampling_rate

    def __call__(
        self, text: str | Sequence[str] | None = None, audio: Any = None, **kwargs: Any
    ) -> FlexInputs:
        """Make model inputs.

        Args:
            text: Transcripts to train on, one per recording; they become `labels`. None to transcribe.
            audio: One recording or a list of them, each at most a window (30 s) long; a longer one is cut up first,
                as in `Recording(path, start=30, stop=60)`.
            **kwargs: None are taken.

        Returns:
            `encoder_outputs` with the pooled states, `flex_streams`, and `labels` if there is text.

        Raises:
            StreamError: Text and recordings differ in number, or there is no recording.
            ValueError: A recording is unusable or too long.
        """
        from flexcore.hf.inputs import FlexInputs

        if kwargs:
            raise TypeError(f"WhisperAdapter takes text and audio, got {', '.join(sorted(kwargs))}")
        media = [] if audio is None else [audio] if self.is_medium(audio) else list(audio)
        texts = None if text is None else [text] if isinstance(text, str) else list(text)
        if not media or (texts is not None and len(texts) != len(media)):
            given = "" if texts is None else f" for {len(texts)} texts"
            raise StreamError(f"audio must hold one recording per sample, got {len(media)}{given}")
        views = self.views(media)
        states = self.encode(views)
        coarse = self.pool(states)
        cells = torch.arange(self.layout.cells)
        streams = tuple(
            (FineStream(view.grid, cells, None, TensorSource(features, view.grid)),)
            for view, features in zip(views, states, strict=True)
        )
        out = {"encoder_outputs": _outputs(coarse), "flex_streams": StreamBatch(streams)}
        return FlexInputs(out if texts is None else {**out, "labels": self._labels(texts)})

    def is_medium(self, value: Any) -> bool:
        return is_recording(value)

    def views(self, media: Sequence[Any]) -> list[AudioView]:
        """Open recordings; one that doesn't fit the encoder's window is refused."""
        layout, config = self.layout, self.flex_config
        side = self.region_size or (config.region_size if config is not None else _REGION_SIZE)
        limit = layout.window / layout.rate
        views = []
        for i, medium in enumerate(media):
            recording = Recording(medium, self.sampling_rate, name=f"recording {i}")
            samples = recording.length(layout.rate)
            if samples > layout.window:
                raise ValueError(
                    f"{recording.name} must be at most {limit:g} s long, the encoder's window, it is "
                    f"{clock(recording.seconds)}; cut it up, as in Recording(source, start=0, stop={limit:g})"
                )
            content = max(1.0, samples * layout.frames / layout.window)
            views.append(AudioView(layout.grid(layout.cells, content, (side,)), None, recording, layout))
        return views

    def sources(self, views: Sequence[AudioView]) -> list[FineSource]:
        """The encoder's states of each recording."""
        states = self.encode(views)
        return [TensorSource(features, view.grid) for features, view in zip(states, views, strict=True)]

    @torch.no_grad()
    def encode(self, views: Sequence[AudioView]) -> Tensor:
        """`[B, frames, C]` full-rate encoder states."""
        encoder = self.model.get_encoder()
        samples = [read_window(view.recording, view.layout, 0)[0].numpy() for view in views]
        made = self.extractor(
            samples, sampling_rate=self.layout.rate, padding="max_length", return_tensors="pt"
        )
        weight = encoder.conv1.weight
        device = torch.device("cpu") if weight.device.type == "meta" else weight.device
        return encoder(made["input_features"].to(device, weight.dtype)).last_hidden_state

    @torch.no_grad()
    def pool(self, states: Tensor) -> Tensor:
        """`[B, cells, C]` pooled states of `[B, frames, C]`."""
        if self.pooling is not None:
            out: Tensor = self.pooling(states)
            if out.shape[1] != self.layout.cells:
                raise ValueError(
                    f"pooling must make {self.layout.cells} states of {self.layout.frames}, got {out.shape[1]}"
                )
            return out
        return states.unflatten(1, (self.layout.cells, self.layout.pool)).mean(dim=2)

    def seconds(self, grid: Grid, region: int) -> tuple[float, float]:
        """Where a region begins and ends in its recording, in seconds."""
        return region_seconds(grid, region, self.layout)

    def _labels(self, texts: list[str]) -> Tensor:
        made = self.processor.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
        # the model puts its start token in front of the labels itself
        start = getattr(self.model.config, "decoder_start_token_id", None)
        return labels[:, 1:] if bool((labels[:, 0] == start).all()) else labels


def _outputs(states: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)
