"""EmbeddingAdapter: media for a model that reads text only.

Such a model has a tokenizer and no processor, no token for a medium and no tower. The adapter brings the medium's
coarse view as embeddings, and the wrapped model puts them where the placeholder was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flexcore.streams import FineStream

from .processing import Adapter, View

if TYPE_CHECKING:
    from transformers import BatchFeature

    from .inputs import FlexInputs

__all__ = ["EmbeddingAdapter"]


class EmbeddingAdapter(Adapter):
    """Base of adapters that put a medium of their own in front of a text-only model.

    A subclass's `views` return views whose `coarse` is a tensor `[n_coarse, width]`: the coarse cells as the
    decoder's input embeddings. In a prompt `<medium>`, such as `<series>`, stands for one medium, unless the tokenizer
    has a `<medium>_token` of its own. The embeddings travel in `flex_streams`; a coarse cell's `input_ids` is the
    padding token, so the model's vocabulary needs no token for it.

    Args:
        model: The model the inputs are for, wrapped or plain.
        processor: The model's tokenizer. The adapter works on a copy, which knows the placeholder.

    Raises:
        TypeError: An option that the adapter doesn't have.
    """

    def __init__(self, model: Any, processor: Any, **unknown: Any):
        super().__init__(model, copy.deepcopy(processor), **unknown)
        name = f"{self.medium}_token"
        placeholder = getattr(self.processor, name, None) or f"<{self.medium}>"
        # Special: a tokenizer never splits such a token, nor joins it with its neighbours.
        self.processor.add_tokens([placeholder], special_tokens=True)
        setattr(self.processor, name, placeholder)

    @property
    def width(self) -> int:
        """The decoder's hidden size: the width of coarse embeddings and of fine features."""
        return int(self.model.config.get_text_config().hidden_size)

    def __call__(self, text: str | Sequence[str], **kwargs: Any) -> FlexInputs:
        """Make model inputs.

        Args:
            text: One prompt or a list of them, with the placeholder where a medium goes.
            **kwargs: Media under `keyword`: none, one, a flat list that the placeholders take in order, or a list
                per sample. The rest goes to the tokenizer.

        Returns:
            What the tokenizer returns, and `flex_streams`.

        Raises:
            StreamError: Media and placeholders differ in number.
            ValueError: A medium is unusable.
        """
        inputs = super().__call__(text, **kwargs)
        ids, tokenizer = inputs["input_ids"], self.processor
        stand_in = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        inputs["input_ids"] = ids.masked_fill(ids == self._token_id(), stand_in)
        return inputs

    def process(self, texts: list[str], views: Sequence[View], **kwargs: Any) -> BatchFeature:
        """Tokenize, with a placeholder for every coarse cell."""
        token, rest = self._token(), iter(views)
        spread = []
        for text in texts:
            first, *others = text.split(token)
            spread.append(first + "".join(token * next(rest).grid.n_coarse + other for other in others))
        return self.processor(spread, return_tensors="pt", **kwargs)

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """The tokenizer's own, as text: write the placeholder into a message, then call the adapter.

        Raises:
            ValueError: `tokenize=True`: a tokenizer's template carries no media.
        """
        if kwargs.setdefault("tokenize", False):
            raise ValueError(
                f"tokenize must be False, got {kwargs['tokenize']!r}: a tokenizer's template carries no "
                f"{self.keyword}; call the adapter with the text it returns"
            )
        return super().apply_chat_template(conversation, **kwargs)

    def embeds(self, views: Sequence[Any]) -> Sequence[Any]:
        """The coarse cells as the decoder's input embeddings, `[n_coarse, width]` per medium: the views' `coarse`."""
        return [view.coarse for view in views]

    def _streams(self, views: Sequence[Any]) -> list[FineStream]:
        streams = super()._streams(views)
        return [replace(s, coarse_embeds=e) for s, e in zip(streams, self.embeds(views), strict=True)]

    def _token(self) -> str:
        return str(getattr(self.processor, f"{self.medium}_token"))

    def _token_id(self) -> int:
        return int(self.processor.convert_tokens_to_ids(self._token()))
