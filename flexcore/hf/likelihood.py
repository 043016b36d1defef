"""How likely a model finds a given answer: the answer put behind its prompt, and the loss of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def answer_tokens(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """An answer's tokens as they follow the prompt.

    Args:
        tokenizer: The model's.
        prompt: The text up to where the answer starts.
        answer: With the space that sets it off, if any.

    Raises:
        ValueError: It has none.
    """
    before = tokenizer(prompt)["input_ids"]
    tokens: list[int] = tokenizer(prompt + answer)["input_ids"][len(before) :]
    if not tokens:
        raise ValueError(f"an answer must have at least one token, got {answer!r}")
    return tokens


def with_answer(inputs: Mapping[str, Any], answer: Sequence[int]) -> tuple[dict[str, Any], int]:
    """One sample's inputs with an answer behind the prompt, read as in generation.

    Args:
        inputs: The adapter's, of one sample: `input_ids`, `attention_mask` and what else there is per token `[1, T]`.
        answer: Tokens, n of them.

    Returns:
        The inputs over `[1, T + n]`, and the first of the n rows that predict the answer.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    start, length = ids.shape[1] - 1, len(answer)
    # What else there is per token, such as token types, marks the medium: zero for words.
    per_token = [name for name, v in inputs.items() if isinstance(v, Tensor) and v.shape == ids.shape]
    out = {**inputs, **{name: pad(inputs[name], (0, length)) for name in per_token}}
    out["input_ids"] = torch.cat([ids, ids.new_tensor([list(answer)])], dim=1)
    out["attention_mask"] = pad(mask, (0, length), value=1)
    if "flex_streams" in inputs:
        # The prompt's last row, and all of the answer's but one.
        readout = torch.zeros_like(out["attention_mask"], dtype=torch.bool)
        readout[:, start:-1] = True
        out["readout_mask"] = readout
    return out, start


@torch.inference_mode()
def likelihoods(
    model: Any, batch: Mapping[str, Any], answers: Sequence[tuple[int, Sequence[int]]]
) -> list[tuple[float, bool]]:
    """Each row's mean negative log-likelihood of its answer, and whether that is the greedy one.

    Args:
        model: Wrapped or plain.
        batch: Of B samples padded on the right, on the model's device, with `attention_mask` `[B, T]`.
        answers: By sample, the first row that predicts its answer, and the answer's tokens.
    """
    # Logits of the rows that matter only: over the whole prompt they would be the largest tensor of all.
    mask, first = batch["attention_mask"], min(start for start, _ in answers)
    kept = torch.arange(first, mask.shape[1] - 1, device=mask.device)
    logits = model(**batch, logits_to_keep=kept).logits.float()
    found = []
    for row, (start, answer) in zip(logits, answers, strict=True):
        own, ids = row[start - first :][: len(answer)].log_softmax(-1).cpu(), torch.tensor(answer)
        loss = -float(own.gather(1, ids[:, None]).mean())
        found.append((loss, bool(torch.equal(own.argmax(-1), ids))))
    return found
