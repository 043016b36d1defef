"""All questions about a picture in one sequence: the picture is seen once, and no question sees another.

A question costs nine tokens, a picture 64 or 640. Behind the picture, the questions follow one another; each starts at
the position after the picture and attends to the picture and to itself, so that every one is answered exactly as if it
had been asked alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .model import WORDING, tokenizer
from .task import Wording

KINDS = WORDING.kinds
IMAGE_AT = 1  # the picture's first token comes after <s>


def question_tokens(kind: str, wording: Wording = WORDING) -> Tensor:
    """`[6, T]` token ids of a question behind its picture, one row for each colour named."""
    some = [wording.question(kind, name) for name in range(len(wording.names))]
    return torch.tensor(tokenizer(wording)(some)["input_ids"])[:, IMAGE_AT:]


class Questions:
    """The questions of some kinds that a picture is asked at once.

    Args:
        kinds: Of question; every one that has an answer is asked. None is all of them.
        wording: What can be asked.
    """

    def __init__(self, kinds: Sequence[str] | None = None, wording: Wording = WORDING):
        self.wording = wording
        self.kinds = wording.kinds if kinds is None else tuple(kinds)
        self.tokens = {kind: question_tokens(kind, wording) for kind in self.kinds}
        self.kind_of = [kind for kind in self.kinds for _ in range(wording.asked[kind])]
        lengths = torch.tensor([self.tokens[kind].shape[1] for kind in self.kind_of])
        self.ends = lengths.cumsum(0)  # within the text; the answer is predicted by the token before
        self.starts = self.ends - lengths
        # the row that predicts the last answer needs a token after it for its label
        self.length = int(self.ends[-1]) + 1
        words = tokenizer(wording)
        self.begin = words.bos_token_id
        self.pad = words.pad_token_id
        self.digits = torch.tensor(words.convert_tokens_to_ids(list(map(str, range(10)))))

    def __len__(self) -> int:
        return len(self.kind_of)

    def colours(self, digits: np.ndarray) -> Tensor:
        """`[B, Q]` the colour that each question names.

        Args:
            digits: `[B, 2, 6]` answers by kind and colour, -1 where there is none.
        """
        parts = []
        for kind in self.kinds:
            rows, named = np.nonzero(digits[:, self.wording.kinds.index(kind)] >= 0)
            assert len(rows) == len(digits) * self.wording.asked[kind]
            parts.append(torch.from_numpy(named.reshape(len(digits), -1)))
        return torch.cat(parts, dim=1)

    def of(self, values: np.ndarray, colours: Tensor) -> Tensor:
        """`[B, Q, ...]` the entries of `[B, 2, 6, ...]` that belong to the questions asked."""
        kinds = torch.tensor([self.wording.kinds.index(kind) for kind in self.kind_of])
        return torch.from_numpy(values)[torch.arange(len(values))[:, None], kinds[None], colours]

    def text(self, colours: Tensor) -> Tensor:
        """`[B, length]` token ids of the questions `[B, Q]`."""
        parts = [self.tokens[kind][colours[:, q]] for q, kind in enumerate(self.kind_of)]
        return torch.cat([*parts, torch.full((len(colours), 1), self.pad)], dim=1)

    def labels(self, answers: Tensor, before: int) -> Tensor:
        """`[B, before + length]` labels for digits `[B, Q]`, to be shifted by one as in any causal model."""
        out = torch.full((len(answers), before + self.length), -100)
        out[:, before + self.ends] = self.digits[answers]
        return out

    def rows(self, before: int) -> Tensor:
        """`[Q]` the rows that predict the answers, behind `before` tokens."""
        return before + self.ends - 1

    def naming(self, before: int) -> Tensor:
        """`[Q]` the rows of the words that name a colour."""
        # it is the one word in which a kind's questions differ
        at = {kind: int((ids[0] != ids[1]).nonzero()) for kind, ids in self.tokens.items()}
        return before + self.starts + torch.tensor([at[kind] for kind in self.kind_of])

    def mask(self, before: int, answers_look: bool = False) -> Tensor:
        """`[1, 1, L, L]` bool: causal, and no question sees another.

        Args:
            before: Tokens in front of the questions: `<s>` and the picture.
            answers_look: Hide the picture from all rows of a question but the one that answers.
        """
        block = torch.searchsorted(self.ends, torch.arange(self.length), right=True)
        owner = torch.cat([torch.full((before,), -1), block])
        seen = (owner[None] == -1) | (owner[None] == owner[:, None])
        if answers_look:
            blind = owner >= 0
            blind[self.rows(before)] = False
            seen[blind, IMAGE_AT:before] = False
        return (seen & torch.ones(len(owner), len(owner), dtype=torch.bool).tril())[None, None]

    def positions(self, picture: Tensor) -> Tensor:
        """`[L]` rotary positions; every question goes on after the picture's.

        Args:
            picture: `[before]` positions of what comes before the questions.
        """
        within = torch.arange(self.length) - torch.cat([self.starts, self.ends[-1:]]).repeat_interleave(
            torch.cat([self.ends - self.starts, torch.ones(1, dtype=torch.long)])
        )
        return torch.cat([picture, int(picture.max()) + 1 + within])
