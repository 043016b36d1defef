"""How likely an answer is: what is put behind a prompt, and losses against whole logits."""

from __future__ import annotations

import pytest
import torch

from flexcore.hf.collation import collate
from flexcore.hf.likelihood import answer_tokens, likelihoods, with_answer
from flexcore.hf.tiny import tiny_llama, tiny_llava


def test_an_answer_behind_its_prompt() -> None:
    prompt = {
        "input_ids": torch.tensor([[5, 3, 7]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "token_type_ids": torch.tensor([[0, 1, 0]]),
        "pixel_values": torch.zeros(1, 3, 2, 2),
    }
    inputs, start = with_answer(prompt, [8, 9])
    assert start == 2 and inputs["input_ids"].tolist() == [[5, 3, 7, 8, 9]]
    assert inputs["attention_mask"].tolist() == [[1] * 5]
    assert inputs["token_type_ids"].tolist() == [[0, 1, 0, 0, 0]]
    assert inputs["pixel_values"] is prompt["pixel_values"] and "readout_mask" not in inputs
    assert prompt["input_ids"].shape == (1, 3)
    inputs, _ = with_answer({**prompt, "flex_streams": None}, [8, 9])
    assert inputs["readout_mask"].tolist() == [[False, False, True, True, False]]


def test_losses_are_those_of_whole_logits() -> None:
    model = tiny_llama().eval()
    prompts, answers = [[11, 12, 13, 14, 15], [31, 32, 33]], [[21, 22], [41]]
    with torch.no_grad():
        # the second sample's answer is the greedy one, the first's is not
        answers[1][0] = int(model(torch.tensor([prompts[1]])).logits[0, -1].argmax())
        expected = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            expected.append(float(model(ids, labels=labels).loss))
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        rows.append(with_answer({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, answer))
    batch = collate([row for row, _ in rows], pad_token_id=0)
    found = likelihoods(
        model, batch, [(start, answer) for (_, start), answer in zip(rows, answers, strict=True)]
    )
    assert [loss for loss, _ in found] == pytest.approx(expected, abs=1e-5)
    assert [greedy for _, greedy in found] == [False, True]


def test_an_answer_has_tokens() -> None:
    tokenizer = tiny_llava()[1].tokenizer
    whole = tokenizer("What? red")["input_ids"]
    assert tokenizer("What?")["input_ids"] + answer_tokens(tokenizer, "What?", " red") == whole
    with pytest.raises(ValueError, match="an answer must have at least one token, got ''"):
        answer_tokens(tokenizer, "What?", "")
