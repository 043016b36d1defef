"""How each kind of model takes a video: where its coarse tokens sit, and what makes the fine features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexcore.errors import StreamError, UnsupportedModelError
from flexcore.hf.processing import find_positions

from .anyres_tower import TileTower
from .image_tower import encode_tiles, lead_tokens, native_size, tower_device, vision_tower
from .image_views import pixels_of
from .native_tower import takes_any_size
from .video_views import Layout, VideoView

if TYPE_CHECKING:
    from transformers import BatchFeature

ASPECTS = ("pad", "stretch")
_AS_IS = {"do_resize": False, "do_center_crop": False, "do_sample_frames": False}


class Family(ABC):
    """One way of taking videos.

    Args:
        model: The model.
        processor: Its own processor.
        aspect: `pad` or `stretch`; None is what the model was trained with.
        zoom: Tiles of the fine view per axis.
    """

    def __init__(self, model: Any, processor: Any, aspect: str | None, zoom: int):
        self.model = model
        self.processor = processor
        self.aspect = aspect
        self.zoom = zoom

    placeholder: str
    """What stands for one clip in a prompt."""

    @property
    @abstractmethod
    def settings(self) -> Any:
        """The image or video processor whose mean, filter and normalisation hold for both views."""

    @abstractmethod
    def layout(self, height: int, width: int) -> Layout:
        """How the model sees a frame of the given pixels."""

    @abstractmethod
    def process(self, texts: list[str], views: Sequence[VideoView], **kwargs: Any) -> BatchFeature:
        """Run the processor on the text and the coarse frames."""

    @abstractmethod
    def positions(self, input_ids: Tensor, media: Sequence[Sequence[VideoView]]) -> list[list[Tensor]]:
        """Where the coarse tokens of every sample's clips sit in `[B, T]` ids."""

    @abstractmethod
    def encode(self, tiles: Sequence[Tensor]) -> Tensor:
        """Features of tiles, each encoded on its own.

        Args:
            tiles: `[stack, 3, height, width]` uint8; those of clips of different shapes may differ.

        Returns:
            `[k, tokens, C]`, a tile's tokens in raster order.
        """

    @property
    def device(self) -> torch.device:
        """Where features are made."""
        return tower_device(vision_tower(self.model))

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return vision_tower(self.model).dtype


class FrameFamily(Family):
    """A model with an image tower (LLaVA): every coarse frame is an image of its own in the sequence.

    The prompt's `<video>` becomes one image placeholder a line for each coarse frame; the clip's coarse cells are
    the frames' tokens one after the other.
    """

    placeholder = "<video>"

    def __init__(self, model: Any, processor: Any, aspect: str | None, zoom: int):
        super().__init__(model, processor, aspect or "pad", zoom)
        self.side, self.cells = native_size(model, processor)
        token = getattr(model.config, "image_token_id", None)
        self.token_id = int(model.config.image_token_index if token is None else token)

    @property
    def settings(self) -> Any:
        return self.processor.image_processor

    @property
    def lead(self) -> int:
        """Tokens of every frame before its first cell."""
        return lead_tokens(self.model, self.processor)

    def layout(self, height: int, width: int) -> Layout:
        cells, side = (self.cells,) * 2, (self.side,) * 2
        return Layout(cells, side, cells, side, self.zoom, self.zoom, self.aspect == "pad")

    def process(self, texts: list[str], views: Sequence[VideoView], **kwargs: Any) -> BatchFeature:
        image = self.processor.image_token
        if any(image in text for text in texts):
            raise ValueError(
                f"text must hold {self.placeholder} where a clip goes and no {image}: pictures beside clips aren't "
                "supported"
            )
        rest = iter(views)
        filled = []
        for text in texts:
            head, *tails = text.split(self.placeholder)
            filled.append(head + "".join("\n".join([image] * len(next(rest).coarse)) + t for t in tails))
        frames = [frame for view in views for frame in view.coarse] or None
        fixed = {"do_resize": False, "do_center_crop": False, "do_pad": False}
        return self.processor(text=filled, images=frames, return_tensors="pt", images_kwargs=fixed, **kwargs)

    def positions(self, input_ids: Tensor, media: Sequence[Sequence[VideoView]]) -> list[list[Tensor]]:
        each = self.cells * self.cells
        cells = [[each] * sum(len(view.coarse) for view in sample) for sample in media]
        found = find_positions(input_ids, self.token_id, cells, self.lead, "video frame")
        out = []
        for frames, sample in zip(found, media, strict=True):
            rest = iter(frames)
            out.append([torch.cat([next(rest) for _ in view.coarse]) for view in sample])
        return out

    def encode(self, tiles: Sequence[Tensor]) -> Tensor:
        flat = torch.stack([tile[0] for tile in tiles])
        return encode_tiles(
            self.model, self.settings, flat, self.cells, self.lead, max(1, len(flat)), progress=False
        )


class PooledFamily(Family):
    """LLaVA-OneVision: frames are encoded, pooled to a quarter, and followed by one line break per clip.

    The fine features are the tower's and projector's own, before pooling.
    """

    def __init__(self, model: Any, processor: Any, aspect: str | None, zoom: int):
        super().__init__(model, processor, aspect or "stretch", zoom)
        self.side, self.cells = native_size(model, processor)
        self.placeholder = str(processor.video_token)
        self.token_id = int(model.config.video_token_id)

    @property
    def settings(self) -> Any:
        return self.processor.video_processor

    def layout(self, height: int, width: int) -> Layout:
        cells, side = (self.cells,) * 2, (self.side,) * 2
        pooled = (-(-self.cells // 2),) * 2
        return Layout(pooled, side, cells, side, self.zoom, self.zoom, self.aspect == "pad")

    def process(self, texts: list[str], views: Sequence[VideoView], **kwargs: Any) -> BatchFeature:
        clips = [torch.stack([pixels_of(frame) for frame in view.coarse]) for view in views] or None
        return self.processor(text=texts, videos=clips, return_tensors="pt", videos_kwargs=_AS_IS, **kwargs)

    def positions(self, input_ids: Tensor, media: Sequence[Sequence[VideoView]]) -> list[list[Tensor]]:
        with_break = [[view.grid.n_coarse + 1 for view in sample] for sample in media]
        found = find_positions(input_ids, self.token_id, with_break, 0, "video")
        return [[clip[:-1] for clip in sample] for sample in found]

    @torch.no_grad()
    def encode(self, tiles: Sequence[Tensor]) -> Tensor:
        # the tiles as frames of one clip, which the video processor normalises and nothing else
        clip = torch.stack([tile[0] for tile in tiles])
        made = self.settings([clip], return_tensors="pt", **_AS_IS)["pixel_values_videos"][0]
        features = TileTower(self.model).get_image_features(made.to(self.device, self.dtype))
        if features.shape[1] != self.cells**2:
            raise StreamError(
                f"the vision tower makes {features.shape[1]} features of a frame, but the map needs "
                f"{self.cells}x{self.cells}"
            )
        return features


def family_of(
    model: Any, processor: Any, aspect: str | None, zoom: int, coarse_pixels: int | None = None
) -> Family:
    """The way in which a model takes videos.

    Args:
        model: The model.
        processor: Its own processor.
        aspect: `pad` or `stretch`; None is what the model was trained with.
        zoom: Tiles of the fine view per axis.
        coarse_pixels: Budget of a coarse frame, for models that take frames of any size.

    Raises:
        ValueError: An argument is out of range, or of no use to this model.
        UnsupportedModelError: None that is known.
    """
    inner, name = getattr(model, "model", model), type(model).__name__
    if hasattr(inner, "audio_tower"):
        raise UnsupportedModelError(
            f"VideoAdapter shows a model frames and plays no sound; {name} has an audio tower, and takes sound alone "
            "or clips with theirs"
        )
    if takes_any_size(model):
        from .video_native import NativeFamily

        return NativeFamily(model, processor, aspect, zoom, coarse_pixels)
    if hasattr(inner, "visual"):
        raise UnsupportedModelError(
            f"VideoAdapter takes models with a vision tower of one fixed size (LLaVA, LLaVA-OneVision) or one of any "
            f"size whose config says how it is patched (Qwen2-VL, Qwen2.5-VL, Qwen3-VL); {name} has neither"
        )
    if coarse_pixels is not None:
        raise ValueError(
            f"coarse_pixels is for models that take frames of any size; {name} sees them at one fixed size, "
            f"so leave it out; got {coarse_pixels}"
        )
    if hasattr(inner, "apply_pooling") and hasattr(processor, "video_processor"):
        return PooledFamily(model, processor, aspect, zoom)
    return FrameFamily(model, processor, aspect, zoom)
