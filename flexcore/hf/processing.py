"""Adapter: a model's own processor, plus the fine side of every medium.

An adapter for a new modality says three things: what a medium's lattice is and how its coarse view is made
(`views`), and where its fine features come from (`sources`). Dealing media out to samples, finding their coarse
tokens in the sequence and passing for a processor are done here, once.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from flexcore.config import FlexConfig
from flexcore.errors import StreamError
from flexcore.grid import Grid
from flexcore.sources import FineSource
from flexcore.streams import FineStream, StreamBatch

from .collation import collate

if TYPE_CHECKING:
    from transformers import BatchFeature

    from .inputs import FlexInputs

__all__ = ["Adapter", "FlexInputs", "View", "collate", "find_positions"]


def __getattr__(name: str) -> Any:
    # FlexInputs derives from a class of transformers; adapters must be importable without it.
    if name == "FlexInputs":
        from .inputs import FlexInputs

        return FlexInputs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, eq=False)
class View:
    """One medium, loaded and checked: its lattice, and its coarse view as the processor takes it.

    Subclasses add what the adapter needs to make the fine features.
    """

    grid: Grid
    coarse: Any


class Adapter(ABC):
    """Base of all adapters: call it like the processor, with text and media.

    Attributes that an adapter lacks are the processor's, so it is accepted where a processor is. A deep copy shares
    the model, which the adapter uses but doesn't own.

    Args:
        model: The model the inputs are for, wrapped or plain.
        processor: The model's own processor.

    Raises:
        TypeError: An option that the adapter doesn't have.
    """

    medium: ClassVar[str] = "image"
    """The processor's `<medium>_token` stands for one medium, the config's `<medium>_token_id` for a coarse cell."""
    keyword: ClassVar[str] = "images"
    """What the processor and the adapter call their media."""

    def __init__(self, model: Any, processor: Any, **unknown: Any):
        if unknown:
            known = [
                name
                for name, parameter in inspect.signature(type(self)).parameters.items()
                if parameter.kind is parameter.KEYWORD_ONLY
            ]
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(map(repr, unknown))}; "
                f"its options are {', '.join(known) or 'none'}"
            )
        self.model = model
        self.processor = processor

    # ------------------------------------------------------------------ what a modality defines

    @abstractmethod
    def views(self, media: Sequence[Any]) -> Sequence[View]:
        """Check and load the media and make their coarse views: all that can go wrong before the expensive part."""

    @abstractmethod
    def sources(self, views: Sequence[Any]) -> list[FineSource]:
        """The fine features of what `views` made, one source per view (a pyramid's levels one after the other)."""

    def levels(self, view: Any) -> Sequence[Any]:
        """A view and, for a pyramid, those of its finer levels, over the same coarse cells; see `flexcore.pyramid`."""
        return [view]

    def is_medium(self, value: Any) -> bool:
        """Whether a value is one medium and not a list of them."""
        return not isinstance(value, (list, tuple))

    @property
    def lead_tokens(self) -> int:
        """Tokens of a medium that come before its lattice in the sequence, such as a class token."""
        return 0

    # ------------------------------------------------------------------ what they all do

    def __call__(self, text: str | Sequence[str], **kwargs: Any) -> FlexInputs:
        """Make model inputs.

        Args:
            text: One prompt or a list of them, with the processor's placeholder where a medium goes.
            **kwargs: Media under `keyword`: none, one, a flat list that the placeholders take in order, or a list
                per sample. The rest goes to the processor.

        Returns:
            What the processor returns, and `flex_streams`: a tuple of streams per sample.

        Raises:
            StreamError: Media and placeholders differ in number.
            ValueError: A medium is unusable.
        """
        from .inputs import FlexInputs

        texts, media = self.deal(text, kwargs.pop(self.keyword, None))
        if (kind := kwargs.pop("return_tensors", None)) not in (None, "pt"):
            raise ValueError(f"return_tensors must be 'pt', got {kind!r}")
        if len(texts) > 1 and "padding" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("padding", True)
        views = self.views([medium for sample in media for medium in sample])
        inputs = self.process(texts, views, **kwargs)
        rest = iter(views)
        # Positions before features: a mismatch must show before the encoder runs.
        positions = self.positions(inputs["input_ids"], [[next(rest) for _ in sample] for sample in media])
        streams = iter(self._streams(views))
        samples = tuple(tuple(next(streams).at(p) for p in sample) for sample in positions)
        return FlexInputs({**inputs, "flex_streams": StreamBatch(samples)})

    def streams(self, media: Any) -> list[FineStream]:
        """The media's streams, without positions; `stream.at(positions)` binds one to a sequence.

        Args:
            media: One medium or a list of them.
        """
        return self._streams(self.views([media] if self.is_medium(media) else list(media)))

    def process(self, texts: list[str], views: Sequence[Any], **kwargs: Any) -> BatchFeature:
        """Run the model's own processor on the text and the coarse views."""
        media = [view.coarse for view in views] or None
        return self.processor(text=texts, return_tensors="pt", **{self.keyword: media}, **kwargs)

    def positions(self, input_ids: Tensor, media: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
        """Where the coarse tokens of every sample's media sit; see `find_positions`.

        Args:
            input_ids: `[B, T]`.
            media: Each sample's views, in the order of its text.
        """
        cells = [[view.grid.n_coarse for view in sample] for sample in media]
        return find_positions(input_ids, self._token_id(), cells, self.lead_tokens, self.medium)

    @property
    def placeholder(self) -> str:
        """What stands for one medium in a prompt.

        Raises:
            ValueError: The processor has no such token.
        """
        token = getattr(self.processor, f"{self.medium}_token", None)
        if token is None:
            raise ValueError(
                f"{type(self.processor).__name__} has no {self.medium}_token, so it isn't the processor of a model "
                f"that takes {self.keyword}"
            )
        return str(token)

    def deal(self, text: str | Sequence[str], media: Any) -> tuple[list[str], list[list[Any]]]:
        """Deal media out to samples by their placeholders.

        Args:
            text: One prompt or a list of them.
            media: As in `__call__`; None in a list per sample stands for no media.

        Returns:
            The prompts, and the media of each.

        Raises:
            StreamError: The numbers differ; the message names both and the sample.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(t, str) for t in texts):
            raise TypeError(
                f"text must be a string or a list of strings, got {type(text).__name__}: {texts[:1]!r}"
            )
        token = self.placeholder
        needed = [t.count(token) for t in texts]
        if media is None:
            media = []
        elif self.is_medium(media):
            media = [media]
        if any(m is None or not self.is_medium(m) for m in media):
            samples = [[] if m is None else [m] if self.is_medium(m) else list(m) for m in media]
            if len(samples) != len(texts):
                raise StreamError(
                    f"{self.keyword} has lists for {len(samples)} sample(s), text has {len(texts)}"
                )
            for i, (sample, count) in enumerate(zip(samples, needed, strict=True)):
                if len(sample) != count:
                    raise StreamError(
                        f"sample {i} has {count} {token} placeholder(s) and {len(sample)} {self.keyword}"
                    )
            return texts, samples
        if len(media) != sum(needed):
            ends = list(itertools.accumulate(needed))
            # Where the media run out, or else the last sample, which would be left with too many.
            i = next((i for i, end in enumerate(ends) if end > len(media)), len(ends) - 1)
            raise StreamError(
                f"text has {sum(needed)} {token} placeholder(s), {needed} by sample, but {len(media)} "
                f"{self.keyword} were given; they first differ at sample {i}"
            )
        rest = iter(media)
        return texts, [list(itertools.islice(rest, count)) for count in needed]

    @property
    def flex_config(self) -> FlexConfig | None:
        """The wrapped model's config; None while it is plain."""
        return getattr(self.model, "flex_config", None)

    def _streams(self, views: Sequence[Any]) -> list[FineStream]:
        pyramids = [list(self.levels(view)) for view in views]
        every = [view for levels in pyramids for view in levels]
        sources = iter(self.sources(every) if every else [])
        streams = []
        for levels in pyramids:
            stream = None
            for view, source in reversed([(view, next(sources)) for view in levels]):
                stream = FineStream(view.grid, None, None, source, finer=stream)
            assert stream is not None
            streams.append(stream)
        return streams

    def _token_id(self) -> int:
        config = self.model.config
        token_id = getattr(config, f"{self.medium}_token_id", None)
        if token_id is None:
            token_id = getattr(config, f"{self.medium}_token_index", None)
        if token_id is None:
            raise ValueError(
                f"{type(config).__name__} has no {self.medium}_token_id to find the coarse tokens by"
            )
        return int(token_id)

    # ------------------------------------------------------------------ passing for a processor

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """The processor's own, but with `tokenize=True` the media of the conversation get their fine side too."""
        if not kwargs.get("tokenize"):
            return self.processor.apply_chat_template(conversation, **kwargs)
        # The method ends by calling its processor, so a twin that calls us instead does the rest.
        twin = copy.copy(self.processor)
        cls = type(self.processor)
        twin.__class__ = type(
            cls.__name__, (cls,), {"__module__": cls.__module__, "__call__": self._as_processor}
        )
        return twin.apply_chat_template(conversation, **kwargs)

    def _as_processor(self, **kwargs: Any) -> FlexInputs:
        absent = [name for name in ("images", "videos", "audio") if kwargs.get(name) is None]
        return self(**{name: value for name, value in kwargs.items() if name not in absent})

    def __getattr__(self, name: str) -> Any:
        # Dunder names are Python's own questions (copy, pickle), and early in unpickling there's no processor yet.
        if name.startswith("__") or "processor" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.processor, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        new = copy.copy(self)
        memo[id(self)] = new
        memo.setdefault(id(self.model), self.model)  # also for what else of ours holds it
        for name, value in vars(self).items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        return new


def find_positions(
    input_ids: Tensor, token_id: int, cells: Sequence[Sequence[int]], lead: int = 0, medium: str = "image"
) -> list[list[Tensor]]:
    """Where each medium's coarse tokens sit in its sample's sequence.

    Args:
        input_ids: `[B, T]`, padded on either side.
        token_id: The token that stands for one coarse cell.
        cells: Coarse cells of each sample's media, in the order of the text.
        lead: Tokens of every medium before its first cell.
        medium: What to call it in messages.

    Returns:
        `[cells]` indices per medium and sample.

    Raises:
        StreamError: A sample has more or fewer such tokens than its media need.
    """
    out = []
    for i, (row, counts) in enumerate(zip(input_ids.cpu(), cells, strict=True)):
        found = torch.nonzero(row == token_id).squeeze(1)
        needed = sum(counts) + lead * len(counts)
        if len(found) != needed:
            raise StreamError(
                f"sample {i} holds {len(found)} {medium} tokens, but its {len(counts)} {medium}(s) need {needed} "
                f"({list(counts)} cells and {lead} more each): is the text truncated, or do the processor's "
                "patch_size, num_additional_image_tokens and vision_feature_select_strategy differ from the model's?"
            )
        sizes = [lead + n for n in counts]
        out.append([part[lead:] for part in found.split(sizes)] if sizes else [])
    return out
