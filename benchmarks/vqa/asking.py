"""Asking a batch of samples: answers in the model's words, or how likely each option is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from flexcore.hf.collation import collate
from flexcore.hf.likelihood import answer_tokens, likelihoods, with_answer

from .arms import DENSE, see
from .base import Sample
from .conversation import prompt

# None undoes what a checkpoint's generation config says about sampling.
_GREEDY = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p"))
_IDS, _EMBEDS = "input_ids", "inputs_embeds"


class Asker:
    """A model and its adapter, as the benchmarks ask them.

    Args:
        model: Wrapped or plain, in eval mode.
        adapter: Of the model.
        dense_adapter: The one whose fine tokens the dense arm reads.
        conversation: `v1` or `template`.
        new_tokens: The longest answer.
        batch_size: Rows per forward pass.
        dense_limit: Tokens that a dense sequence may have.
    """

    def __init__(
        self,
        model: Any,
        adapter: Any,
        dense_adapter: Any,
        *,
        conversation: str,
        new_tokens: int,
        batch_size: int,
        dense_limit: int,
    ):
        self.model = model
        self.adapter = adapter
        self.dense_adapter = dense_adapter
        self.conversation = conversation
        self.new_tokens = new_tokens
        self.batch_size = batch_size
        self.dense_limit = dense_limit

    def ask(self, arm: str, samples: Sequence[Sample]) -> list[str] | list[list[float]]:
        """The answers to some samples, all with options or all without.

        Returns:
            The words of each answer, or the loss of each option.

        Raises:
            ValueError: A sample's picture or text is unusable; so do OSError and SourceError.
        """
        return self.losses(arm, samples) if samples[0].options else self.answers(arm, samples)

    @torch.inference_mode()
    def answers(self, arm: str, samples: Sequence[Sample]) -> list[str]:
        """Greedy answers in the model's own words."""
        tokenizer = self.adapter.tokenizer
        batch = self._join([self._prompted(arm, sample, self.new_tokens)[1] for sample in samples], "left")
        end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        settings = {
            "max_new_tokens": self.new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "pad_token_id": end,
        }
        out = self.model.generate(**batch, **settings, **_GREEDY)
        # Given embeddings, the model returns the new tokens alone.
        new = out[:, batch[_IDS].shape[1] :] if _IDS in batch else out
        return [text.strip() for text in self.adapter.batch_decode(new, skip_special_tokens=True)]

    @torch.inference_mode()
    def losses(self, arm: str, samples: Sequence[Sample]) -> list[list[float]]:
        """Mean negative log-likelihood of each sample's options, as they follow a space after the prompt."""
        rows: list[tuple[dict[str, Any], int, list[int]]] = []
        for sample in samples:
            (asked,) = self._prompts([sample])
            options = [answer_tokens(self.adapter.tokenizer, asked, f" {o}") for o in sample.options]
            # The options of a question share its picture, and the tiles that one of them had encoded.
            _, seen = self._prompted(arm, sample, max(map(len, options)))
            for answer in options:
                rows.append((*self._extended(seen, answer), answer))
        found: list[float] = []
        for i in range(0, len(rows), self.batch_size):
            some = rows[i : i + self.batch_size]
            batch = self._join([row for row, _, _ in some], "right")
            scored = likelihoods(self.model, batch, [(start, answer) for _, start, answer in some])
            found += [loss for loss, _ in scored]
        rest = iter(found)
        return [[next(rest) for _ in sample.options] for sample in samples]

    # ------------------------------------------------------------------ how

    def _prompts(self, samples: Sequence[Sample]) -> list[str]:
        return [prompt(self.adapter, s.text, len(s.pictures), self.conversation) for s in samples]

    def _prompted(self, arm: str, sample: Sample, reserve: int) -> tuple[str, dict[str, Any]]:
        """A sample's prompt, and what it gives the model."""
        adapter = self.dense_adapter if arm == DENSE else self.adapter
        (text,) = self._prompts([sample])
        inputs = adapter(text=[text], **{adapter.keyword: [sample.media()]})
        inputs = inputs.to(self.model.device, self.model.dtype)
        return text, see(arm, self.model, inputs, self.dense_limit, reserve)

    def _extended(self, seen: Mapping[str, Any], answer: list[int]) -> tuple[dict[str, Any], int]:
        """A prompt with an answer behind it, and where the rows that predict the answer start."""
        if _EMBEDS not in seen:
            return with_answer(seen, answer)
        words = self.model.get_input_embeddings()(torch.tensor([answer], device=self.model.device))
        embeds = torch.cat([seen[_EMBEDS], words.to(seen[_EMBEDS])], dim=1)
        mask = pad(seen["attention_mask"], (0, len(answer)), value=1)
        return {**seen, _EMBEDS: embeds, "attention_mask": mask}, mask.shape[1] - len(answer) - 1

    def _join(self, rows: Sequence[Mapping[str, Any]], side: str) -> Mapping[str, Any]:
        """One batch, padded on a side."""
        if _EMBEDS not in rows[0]:
            return collate(rows, tokenizer=self.adapter, padding_side=side).to(
                self.model.device, self.model.dtype
            )
        length = max(row[_EMBEDS].shape[1] for row in rows)
        embeds, masks = [], []
        for row in rows:
            missing = length - row[_EMBEDS].shape[1]
            gap = (missing, 0) if side == "left" else (0, missing)
            embeds.append(pad(row[_EMBEDS], (0, 0, *gap)))
            masks.append(pad(row["attention_mask"], gap))
        return {_EMBEDS: torch.cat(embeds), "attention_mask": torch.cat(masks)}
