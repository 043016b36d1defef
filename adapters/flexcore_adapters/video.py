"""The video adapter: a few frames of the whole clip in the sequence, many more and sharper ones on demand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flexcore.errors import SourceError
from flexcore.hf.processing import Adapter
from flexcore.hookspecs import Register, hookimpl
from flexcore.sources import FineSource
from flexcore.tiled_source import ON_ERROR, TiledSource, UnitEncoder

from .extras import need
from .image_views import mean_colour, resample_filter
from .video_decoder import Decoder
from .video_families import ASPECTS, family_of
from .video_io import Video, is_clip, open_video
from .video_time import clock, frames_at, span, steps
from .video_views import Look, VideoView, lattice

if TYPE_CHECKING:
    from transformers import BatchFeature

    from flexcore.hf.inputs import FlexInputs

_REGION_SIZE = 8
# Regions reach over this many steps of time at most: what one coarse frame looks at is more than one fine frame.
_REGION_STEPS = 4
_MANY_FRAMES = 16


@hookimpl
def flexcore_register_adapters(register: Register) -> None:
    """Register the video adapter."""
    register("video", VideoAdapter)


class VideoAdapter(Adapter):
    """Clips: coarse frames in the sequence, fine frames decoded and encoded when one of their regions is chosen.

    Both views cover the same span of time evenly. With a LLaVA the prompt's `<video>` stands for a clip and becomes
    an image for every coarse frame; LLaVA-OneVision and the Qwen-VL models take it as a video of its own, the latter
    merging two frames into one step of time. Where key frames are dense compared with the frames looked at (a long
    clip), the nearest key frames are taken: they cost no decoding of others, and every time stamp is the frame's own.

    Args:
        model: The model, wrapped or plain; a wrapped one's config lays out the regions.
        processor: The model's own processor.
        coarse_frames: Frames in the sequence, single ones or merged; a shorter clip has fewer.
        fine_fps: Frames per second of the fine view, rounded to a whole number per coarse frame.
        max_frames: The most frames of the fine view, whatever the length of the clip.
        zoom: Tiles of a fine frame per axis; each is encoded like a whole coarse frame.
        coarse_pixels: Budget of a coarse frame, for models that take frames of any size (Qwen-VL), which keep the
            clip's shape; None is 128 tokens' worth. Others have one size, and take None.
        region: Sides of a region in fine tokens, `(t, h, w)`; None takes the wrapped model's `region_size`, or 8, and
            up to 4 steps of time.
        aspect: `pad` centres frames in a square, `stretch` fills it; None is what the model was trained with.
        start: Where to begin, in seconds; None is the clip's start.
        end: Where to stop, in seconds; None is the clip's end.
        fps: Frame rate of clips that are given as arrays.
        micro_batch: Tiles per call of the vision tower.
        lazy: Decode and encode a frame when one of its regions is first chosen; False does it all in the call.
        tile_cache_bytes: Budget of the encoded tiles that a call's clips keep; None is unlimited.
        on_error: `raise` fails on a frame that can't be read; `skip` warns, shows a blank frame or leaves its regions
            out, and also accepts files that were cut short.
        timeout: Seconds without progress after which decoding is given up.
        progress: Show a bar while decoding coarse frames or encoding up front; None shows one when there are many.

    Raises:
        ValueError: An option is out of range.
        UnsupportedModelError: The model takes videos in a way that isn't known.
    """

    medium = "video"
    keyword = "videos"

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        coarse_frames: int = 6,
        fine_fps: float = 2.0,
        max_frames: int = 256,
        zoom: int = 2,
        coarse_pixels: int | None = None,
        region: Sequence[int] | None = None,
        aspect: str | None = None,
        start: float | None = None,
        end: float | None = None,
        fps: float = 25.0,
        micro_batch: int = 8,
        lazy: bool = True,
        tile_cache_bytes: int | None = None,
        on_error: str = "raise",
        timeout: float = 30.0,
        progress: bool | None = None,
        **unknown: Any,
    ):
        super().__init__(model, processor, **unknown)
        counts = {
            "coarse_frames": coarse_frames,
            "max_frames": max_frames,
            "zoom": zoom,
            "micro_batch": micro_batch,
        }
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        for name, rate in {"fine_fps": fine_fps, "fps": fps}.items():
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
                raise ValueError(f"{name} must be a number > 0, got {rate!r}")
        if max_frames < coarse_frames:
            raise ValueError(f"max_frames must be >= coarse_frames={coarse_frames}, got {max_frames}")
        if region is not None and (len(region) != 3 or any(not isinstance(r, int) or r < 1 for r in region)):
            raise ValueError(f"region must be three integers >= 1, (t, h, w), got {region!r}")
        if aspect is not None and aspect not in ASPECTS:
            raise ValueError(f"aspect must be None or one of {', '.join(ASPECTS)}, got {aspect!r}")
        if start is not None and end is not None and not start < end:
            raise ValueError(f"start must be < end={end}, got {start}")
        if not isinstance(lazy, bool):
            raise ValueError(f"lazy must be a bool, got {lazy!r}")
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {on_error!r}")
        self.coarse_frames, self.fine_fps, self.max_frames = coarse_frames, fine_fps, max_frames
        self.region = None if region is None else tuple(region)
        self.start, self.end, self.fps = start, end, fps
        self.micro_batch, self.lazy, self.tile_cache_bytes = micro_batch, lazy, tile_cache_bytes
        self.on_error, self.progress = on_error, progress
        self.zoom = zoom
        self.family = family_of(model, processor, aspect, zoom, coarse_pixels)
        self.decoder = Decoder(timeout)

    # Spelt out for its signature; the work is the base's.
    def __call__(self, text: str | Sequence[str], videos: Any = None, **kwargs: Any) -> FlexInputs:
        """Make model inputs.

        Args:
            text: One prompt or a list of them, with `<video>` (the processor's own placeholder, if it has one) where
                a clip goes.
            videos: None, one clip, a flat list that the placeholders take in order, or a list per sample. A clip is a
                path, a list of frames, an array, a tensor or an opened `Video`, see `open_video`.
            **kwargs: For the processor's text side; `padding=True` unless given.

        Returns:
            What the processor returns, and `flex_streams`.

        Raises:
            StreamError: Clips and placeholders differ in number.
            ValueError: A clip is unusable; the message says which and why.
            SourceError: A coarse frame can't be read.
        """
        return super().__call__(text, **{self.keyword: videos}, **kwargs)

    @property
    def placeholder(self) -> str:
        return self.family.placeholder

    def is_medium(self, value: Any) -> bool:
        return is_clip(value)

    def positions(self, input_ids: Tensor, media: Sequence[Sequence[VideoView]]) -> list[list[Tensor]]:
        return self.family.positions(input_ids, media)

    def process(self, texts: list[str], views: Sequence[VideoView], **kwargs: Any) -> BatchFeature:
        return self.family.process(texts, views, **kwargs)

    def views(self, media: Sequence[Any]) -> list[VideoView]:
        """Open all clips, choose their frames and decode the coarse ones."""
        from tqdm.auto import tqdm

        need("PIL.Image", "video")  # frames are made to fit with it
        partial = self.on_error == "skip"
        clips = [
            open_video(m, decoder=self.decoder, fps=self.fps, name=f"video {i}", partial=partial)
            for i, m in enumerate(media)
        ]
        plans = [self._plan(clip) for clip in clips]
        total = sum(view.coarse_index.size for view in plans)
        hidden = not self.progress if self.progress is not None else None if total >= _MANY_FRAMES else True
        with tqdm(total=total, desc="decoding coarse frames", unit="frame", disable=hidden) as bar:
            for i, view in enumerate(plans):
                shown: dict[int, Any] = {}
                for index, frame in view.video.frames(view.coarse_index.ravel()):
                    shown[index] = self._coarse_frame(view, index, frame, i)
                    bar.update()
                view.coarse.extend(shown[int(index)] for index in view.coarse_index.ravel())
        return plans

    def _plan(self, video: Video) -> VideoView:
        """A view without its coarse frames."""
        layout = self.family.layout(*video.size)
        first, last = span(video, self.start, self.end)
        coarse, fine = steps(
            video, first, last, self.coarse_frames, self.fine_fps, self.max_frames, layout.stack
        )
        config = self.flex_config
        side = config.region_size if config is not None else _REGION_SIZE
        region = self.region or (min(fine // coarse, _REGION_STEPS), side, side)
        grid = lattice(video, layout, coarse, fine, (region[0], region[1], region[2]))
        few, many = (frames_at(video, first, last, n * layout.stack).reshape(n, -1) for n in (coarse, fine))
        look = Look(mean_colour(self.family.settings), resample_filter(self.family.settings))
        return VideoView(grid, [], video, layout, look, few, many, (first, last))

    def _coarse_frame(self, view: VideoView, index: int, frame: np.ndarray | Exception, number: int) -> Any:
        size = view.layout.coarse_size
        if not isinstance(frame, Exception):
            return view.look.fit(frame, size, view.layout.pad)
        when = clock(float(view.video.times[index]))
        message = f"{self._name(view, number)}, coarse frame {index} at {when}, can't be read: {frame}"
        if self.on_error == "raise":
            raise SourceError(message) from frame
        warnings.warn(f"{message}; it is shown blank", stacklevel=2)
        return view.look.blank(size)

    def _name(self, view: VideoView, number: int) -> str:
        own = f"video {number}"
        return own if view.video.name == own else f"{own} ({view.video.name})"

    def sources(self, views: Sequence[VideoView]) -> list[FineSource]:
        """Tiles of frames that are decoded and encoded when first chosen, or all of them now (`lazy=False`)."""

        def encode(units: Sequence[tuple[int, int]]) -> Tensor:
            tiles: dict[tuple[int, int], Tensor] = {}
            for i, view in enumerate(views):
                own = [unit for unit in units if unit[0] == i]
                if own:  # each clip's frames in one pass
                    tiles.update(zip(own, view.tiles([tile for _, tile in own]), strict=True))
            return self.family.encode([tiles[unit] for unit in units])

        # one encoder for all clips of the call, so that a layer's tiles share micro-batches
        encoder = UnitEncoder(
            encode,
            self.model.config.get_text_config().hidden_size,
            self.family.dtype,
            self.family.device,
            self.micro_batch,
            self.tile_cache_bytes if self.lazy else None,
            self.on_error,
        )
        lazy: list[FineSource] = [
            TiledSource(view.grid, (1, *view.layout.tile), encoder, i, self._name(view, i), view.describe)
            for i, view in enumerate(views)
        ]
        return lazy if self.lazy else self._up_front(lazy)

    def _up_front(self, sources: list[FineSource]) -> list[FineSource]:
        """Ask for every region once, a step of time after the other, so that all of it is held."""
        from tqdm.auto import tqdm

        slabs = [
            (source, torch.arange(source.grid.n_regions).view(source.grid.region_shape[0], -1))
            for source in sources
        ]
        total = sum(len(regions) for _, regions in slabs)
        hidden = not self.progress if self.progress is not None else None if total >= _MANY_FRAMES else True
        with tqdm(total=total, desc="encoding fine frames", unit="step", disable=hidden) as bar:
            for source, regions in slabs:
                for slab in regions:
                    source.features(slab)
                    bar.update()
        return sources
