"""Asking a batch of samples: answers in the model's words, or how likely each option is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from flexcore.hf.collation import collate

from .arms import DENSE, FLEX, see
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
            options = [self._tokens(asked, f" {option}") for option in sample.options]
            # The options of a question share its picture, and the tiles that one of them had encoded.
            _, seen = self._prompted(arm, sample, max(map(len, options)))
            for answer in options:
                rows.append((*self._extended(arm, seen, answer), answer))
        found: list[float] = []
        for i in range(0, len(rows), self.batch_size):
            found += self._score(rows[i : i + self.batch_size])
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

    def _tokens(self, text: str, target: str) -> list[int]:
        """An option's tokens as they follow the prompt."""
        tokenizer = self.adapter.tokenizer
        tokens: list[int] = tokenizer(text + target)[_IDS][len(tokenizer(text)[_IDS]) :]
        if not tokens:
            raise ValueError(f"options must have at least one token each, got {target!r}")
        return tokens

    def _extended(self, arm: str, seen: Mapping[str, Any], answer: list[int]) -> tuple[dict[str, Any], int]:
        """A prompt with an answer behind it, and where the rows that predict the answer start."""
        out, new = dict(seen), torch.tensor([answer], device=self.model.device)
        mask = out["attention_mask"]
        start, length = mask.shape[1], len(answer)
        if _EMBEDS in out:
            words = self.model.get_input_embeddings()(new)
            out[_EMBEDS] = torch.cat([out[_EMBEDS], words.to(out[_EMBEDS])], dim=1)
        else:
            # What else there is per token, such as token types, marks the medium: zero for words.
            per_token = [n for n, v in out.items() if isinstance(v, torch.Tensor) and v.shape == mask.shape]
            out |= {name: pad(out[name], (0, length)) for name in per_token}
            out[_IDS] = torch.cat([seen[_IDS], new], dim=1)
        out["attention_mask"] = pad(mask, (0, length), value=1)
        if arm == FLEX:
            readout = torch.zeros_like(out["attention_mask"], dtype=torch.bool)
            # As in generation: the prompt's last row, and all of the answer's but one.
            readout[:, start - 1 : -1] = True
            out["readout_mask"] = readout
        return out, start - 1

    def _score(self, rows: Sequence[tuple[dict[str, Any], int, list[int]]]) -> list[float]:
        """The loss of each row's answer."""
        batch = self._join([row for row, _, _ in rows], "right")
        first = min(start for _, start, _ in rows)
        # Logits of the rows that matter only: over the whole prompt they would be the largest tensor of all.
        kept = torch.arange(first, batch["attention_mask"].shape[1] - 1, device=self.model.device)
        logits = self.model(**batch, logits_to_keep=kept).logits.float()
        losses = []
        for row, (_, start, answer) in zip(logits, rows, strict=True):
            own = row[start - first :][: len(answer)].log_softmax(-1).cpu()
            losses.append(-float(own.gather(1, torch.tensor(answer)[:, None]).mean()))
        return losses

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
