"""The audio adapter: pooled sound in the sequence, full-rate frames of a few regions on demand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from flexcore.errors import UnsupportedModelError
from flexcore.grid import Grid
from flexcore.hf.processing import Adapter
from flexcore.hookspecs import Register, hookimpl
from flexcore.sources import FineSource, TensorSource
from flexcore.streams import FineStream
from flexcore.tiled_source import TiledSource, UnitEncoder

from .audio_checks import is_recording
from .audio_encoders import TowerEncoder, WindowEncoder
from .audio_io import Recording
from .audio_whisper import WhisperAdapter
from .audio_windows import AudioView, region_seconds, windows

if TYPE_CHECKING:
    from transformers import BatchFeature

    from flexcore.hf.inputs import FlexInputs

_REGION_SIZE = 8
_PLACEHOLDER = "<audio>"
# from here on a wait is worth a progress bar
_MANY_WINDOWS = 16


@hookimpl
def flexcore_register_adapters(register: Register) -> None:
    """Register the adapters for audio language models and for Whisper."""
    register("audio", AudioAdapter)
    register("whisper", WhisperAdapter)


class AudioAdapter(Adapter):
    """Recordings for a language model: cells pooled over time in the sequence, finer frames fetched by region.

    With an audio model (Audio Flamingo 3, Qwen2-Audio) the coarse cells are its own audio tokens, and the fine ones
    the frames of its tower before they are averaged. With `encoder` any text model gets ears: the encoder's pooled
    features travel in `flex_streams`, and the wrapped model puts them where the placeholders were. So they do when
    `pool` asks for longer cells than an audio model's own.

    Files are read and encoded window by window, and the windows of a recording are encoded again when one of their
    regions is first chosen: memory doesn't grow with the recording's length, but for the coarse cells.

    Args:
        model: The model, wrapped or plain; a wrapped one's config lays out the regions.
        processor: The model's own processor; with `encoder` its tokenizer, of which the adapter takes a copy that
            knows `<audio>`, unless it has an `audio_token` of its own.
        encoder: What makes features of windows, such as a `SpectrogramEncoder`; None takes the model's own tower.
        pool: Fine frames per coarse cell; None is the encoder's own, for an audio model 2. Not with `encoder`.
        region_size: Side of a region in fine tokens; None takes the wrapped model's, or 8.
        sampling_rate: Of arrays that don't say theirs.
        micro_batch: Windows per call of the encoder.
        lazy: Encode a window's frames when one of its regions is first chosen; False encodes all in the call.
        window_cache_bytes: Budget of the encoded windows that a call's recordings keep; None is unlimited.
        on_error: `raise` fails a request that reads what can't be decoded; `skip` warns and leaves it out.
        progress: Show a bar while the coarse cells are made; None shows one on a terminal when there are many windows.

    Raises:
        ValueError: An option is out of range.
        UnsupportedModelError: There's no `encoder`, and the model has no tower that fits.
    """

    medium: ClassVar[str] = "audio"
    keyword: ClassVar[str] = "audio"

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        encoder: WindowEncoder | None = None,
        pool: int | None = None,
        region_size: int | None = None,
        sampling_rate: int | None = None,
        micro_batch: int = 4,
        lazy: bool = True,
        window_cache_bytes: int | None = 256 << 20,
        on_error: str = "raise",
        progress: bool | None = None,
        **unknown: Any,
    ):
        if encoder is not None and getattr(processor, "audio_token", None) is None:
            processor = copy.deepcopy(processor)
            processor.add_tokens([_PLACEHOLDER], special_tokens=True)
            processor.audio_token = _PLACEHOLDER
        super().__init__(model, processor, **unknown)
        for name, value in {"region_size": region_size, "micro_batch": micro_batch}.items():
            least = value is None and name == "region_size"
            if not least and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        for name, flag in {"lazy": lazy, "progress": progress}.items():
            if not isinstance(flag, bool) and not (flag is None and name == "progress"):
                raise ValueError(f"{name} must be a bool, got {flag!r}")
        if encoder is not None and not isinstance(encoder, WindowEncoder):
            raise ValueError(f"encoder must be a WindowEncoder, got {type(encoder).__name__}")
        if encoder is not None and pool is not None:
            raise ValueError(
                f"pool must be given to the encoder, whose layout it belongs to, got {pool!r} here"
            )
        if (
            encoder is None
            and hasattr(model, "get_encoder")
            and getattr(model.config, "is_encoder_decoder", False)
        ):
            raise UnsupportedModelError(
                f"{type(model).__name__} reads sound in its cross-attention: use "
                'flexcore.load_adapter("whisper", ...)'
            )
        self.encoder = (
            TowerEncoder(model, processor, 2 if pool is None else pool) if encoder is None else encoder
        )
        width = model.config.get_text_config().hidden_size
        if self.encoder.width != width:
            raise ValueError(
                f"encoder must make features as wide as the model's embeddings, {width}, got {self.encoder.width}"
            )
        self.region_size = region_size
        self.sampling_rate = sampling_rate
        self.micro_batch = micro_batch
        self.lazy = lazy
        self.window_cache_bytes = window_cache_bytes
        self.on_error = on_error
        self.progress = progress

    # Spelt out for its signature; the work is the base's.
    def __call__(self, text: str | Sequence[str], audio: Any = None, **kwargs: Any) -> FlexInputs:
        """Make model inputs.

        Args:
            text: One prompt or a list of them, with the processor's audio token where a recording goes.
            audio: None, one recording, a flat list that the placeholders take in order, or a list per sample. A
                recording is whatever `Recording` takes: a path, an `(array, sampling_rate)` pair, ...
            **kwargs: For the tokenizer; `padding=True` unless given.

        Returns:
            `input_ids`, `attention_mask`, `flex_streams`, and the model's own audio inputs where it makes the coarse
            cells itself.

        Raises:
            StreamError: Recordings and placeholders differ in number.
            ValueError: A recording is unusable; the message says which and why.
        """
        out = super().__call__(text, **{self.keyword: audio}, **kwargs)
        if not self._native():
            # the placeholder may lie beyond the model's vocabulary
            tokenizer, ids = self._tokenizer(), out["input_ids"]
            stand_in = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
            out["input_ids"] = ids.masked_fill(ids == self._token_id(), stand_in)
        return out

    def is_medium(self, value: Any) -> bool:
        return is_recording(value)

    def views(self, media: Sequence[Any]) -> list[AudioView]:
        """Open all recordings, then make the coarse cells of each."""
        recordings = [
            Recording(medium, self.sampling_rate, name=f"recording {i}") for i, medium in enumerate(media)
        ]
        layout, config = self.encoder.layout, self.flex_config
        side = self.region_size or (config.region_size if config is not None else _REGION_SIZE)
        views = []
        for recording in recordings:
            cells, content = self.encoder.sizes(recording.length(layout.rate))
            grid = layout.grid(cells, content, (side,) * len(layout.tile))
            coarse = None if self._native() else self._coarse(recording, grid)
            views.append(AudioView(grid, coarse, recording, layout))
        return views

    def sources(self, views: Sequence[AudioView]) -> list[FineSource]:
        """Windows that are encoded when one of their regions is first chosen, or all of them now (`lazy=False`)."""
        encoder = self.encoder
        if not self.lazy:
            whole = [
                torch.cat([self._fine(*part) for part in windows(v.recording, v.layout, self.micro_batch)])
                for v in views
            ]
            return [
                TensorSource(w.flatten(0, 1)[: v.grid.n_fine], v.grid)
                for w, v in zip(whole, views, strict=True)
            ]

        def encode(units: Sequence[tuple[int, int]]) -> Tensor:
            parts = [views[k].window(index) for k, index in units]
            return self._fine(torch.stack([p for p, _ in parts]), torch.tensor([n for _, n in parts]))

        # one encoder for all recordings of the call, so that a layer's windows share micro-batches
        units = UnitEncoder(
            encode,
            encoder.width,
            encoder.dtype,
            encoder.device,
            self.micro_batch,
            self.window_cache_bytes,
            self.on_error,
        )
        return [
            TiledSource(view.grid, view.layout.tile, units, i, view.recording.name, view.describe)
            for i, view in enumerate(views)
        ]

    def process(self, texts: list[str], views: Sequence[AudioView], **kwargs: Any) -> BatchFeature:
        """Tokens with a placeholder per coarse cell, and the model's own audio inputs if it makes the cells itself."""
        from transformers import BatchFeature

        token, rest = self._token(), iter(views)
        parts = [text.split(token) for text in texts]
        filled = [
            first + "".join(token * next(rest).grid.n_coarse + part for part in others)
            for first, *others in parts
        ]
        inputs = BatchFeature(dict(self._tokenizer()(filled, return_tensors="pt", **kwargs)))
        inputs.pop("token_type_ids", None)
        if views and self._native():
            assert isinstance(self.encoder, TowerEncoder)
            pairs = [
                self.encoder.mels(*part)
                for view in views
                for part in windows(view.recording, view.layout, self.micro_batch)
            ]
            inputs["input_features"] = torch.cat([features for features, _ in pairs])
            name = "input_features_mask" if self.encoder.masked else "feature_attention_mask"
            inputs[name] = torch.cat([mask for _, mask in pairs])
        return inputs

    def seconds(self, grid: Grid, region: int) -> tuple[float, float]:
        """Where a region begins and ends in its recording, in seconds."""
        return region_seconds(grid, region, self.encoder.layout)

    @torch.no_grad()
    def _coarse(self, recording: Recording, grid: Grid) -> Tensor:
        """`[n_coarse, C]` features of a whole recording, made window by window."""
        from tqdm.auto import tqdm

        layout = self.encoder.layout
        total = -(-recording.length(layout.rate) // layout.window)
        hidden = not self.progress if self.progress is not None else None if total >= _MANY_WINDOWS else True
        # in one piece: small ones, kept between the windows' large ones, would scatter over the heap and make it grow
        dtype, device = self.encoder.dtype, self.encoder.device
        out, at = torch.empty(grid.n_coarse, self.encoder.width, dtype=dtype, device=device), 0
        with tqdm(total=total, desc=f"skimming {recording.name}", unit="window", disable=hidden) as bar:
            for samples, lengths in windows(recording, layout, self.micro_batch):
                part = self.encoder.coarse(samples, lengths).flatten(0, 1)[: len(out) - at]
                out[at : at + len(part)] = part
                at += len(part)
                bar.update(len(samples))
        return out[:at]

    @torch.no_grad()
    def _fine(self, samples: Tensor, lengths: Tensor) -> Tensor:
        return self.encoder.fine(samples, lengths)

    def _native(self) -> bool:
        return isinstance(self.encoder, TowerEncoder) and self.encoder.native

    def _token(self) -> str:
        return str(self.processor.audio_token)

    def _token_id(self) -> int:
        if self._native():
            return super()._token_id()
        return int(self._tokenizer().convert_tokens_to_ids(self._token()))

    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def _streams(self, views: Sequence[AudioView]) -> list[FineStream]:
        streams = super()._streams(views)
        return [replace(s, coarse_embeds=view.coarse) for s, view in zip(streams, views, strict=True)]
