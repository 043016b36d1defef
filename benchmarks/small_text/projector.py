"""Alignment: a projector that learns to turn what the encoder sees of a word into that word's embedding.

A language model that is shown a projector's random features has thousands of steps to go before it makes anything of
them. It needs no language model to learn that a patch of the word "stop" should come out near the embedding of "stop",
and a patch without a word near the middle of all embeddings: two minutes on one core, after which a language model
reads the words in its first hundred steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..magnifier.loop import generator, train
from .signs import WORDS, Large, shares

_BATCH, _COVERED, _NOISE = 32, 0.5, 0.1


def word_ids(tokenizer: Any) -> Tensor:
    """`[words]` token ids.

    Raises:
        ValueError: A word isn't one token.
    """
    ids = tokenizer(list(WORDS), add_special_tokens=False)["input_ids"]
    if several := [word for word, own in zip(WORDS, ids, strict=True) if len(own) != 1]:
        raise ValueError(f"tokenizer must have each word as one token, not {', '.join(several)}")
    return torch.tensor(ids)[:, 0]


class Aligned(nn.Module):
    """LLaVA's two-layer projector behind a standardisation of its channels, which `fold` takes into its first layer.

    Args:
        features: `[n, cells², C]` whose channels' means and spreads are taken.
        embeddings: `[vocabulary, hidden]` of the language model.
        words: `[words]` token ids.
    """

    def __init__(self, features: Tensor, embeddings: Tensor, words: Tensor):
        super().__init__()
        flat = features.float().flatten(0, -2)
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("spread", flat.std(0))
        width = embeddings.shape[1]
        self.linear_1, self.linear_2 = nn.Linear(features.shape[-1], width), nn.Linear(width, width)
        self.register_buffer("neutral", embeddings.mean(0))
        self.register_buffer("targets", embeddings[words])
        self.register_buffer("scale", embeddings.norm(dim=1).mean())

    def forward(self, features: Tensor) -> Tensor:
        """`[..., hidden]` of `[..., C]`."""
        return self.linear_2(F.gelu(self.linear_1((features - self.mean) / self.spread)))

    def alike(self, projected: Tensor) -> Tensor:
        """`[..., words]` cosines with the words' embeddings, all less the middle of all embeddings."""
        return (
            F.normalize(projected - self.neutral, dim=-1) @ F.normalize(self.targets - self.neutral, dim=-1).T
        )

    def loss(self, features: Tensor, words: Tensor, covered: Tensor) -> Tensor:
        """How far patches are from what they should be.

        Args:
            features: `[B, cells², C]`.
            words: `[B]` of the signs.
            covered: `[B, cells²]` bool, the patches of the signs.
        """
        projected = self(features)
        alike = self.alike(projected)
        # one patch sees a letter or two, all of a sign's the word: both should point to it
        patch = F.cross_entropy(8 * alike[covered], words[:, None].expand_as(covered)[covered])
        sign = F.cross_entropy(4 * (alike * covered[..., None]).sum(1), words)
        wanted = torch.where(covered[..., None], self.targets[words][:, None], self.neutral)
        return patch + sign + (projected - wanted).square().sum(-1).mean() / self.scale**2

    @torch.no_grad()
    def right(self, data: Large, covered: Tensor) -> float:
        """Share of signs that are read from all their patches together."""
        alike = self.alike(self(data.features.float())) * covered[..., None]
        return float((alike.sum(1).argmax(-1) == data.words).float().mean())

    @torch.no_grad()
    def fold(self, projector: Any) -> None:
        """Write the weights, standardisation included, into a LLaVA's projector."""
        weight = self.linear_1.weight / self.spread
        projector.linear_1.weight.copy_(weight)
        projector.linear_1.bias.copy_(self.linear_1.bias - weight @ self.mean)
        projector.linear_2.load_state_dict(self.linear_2.state_dict())


def align(
    folder: Path, llava: Any, words: Tensor, data: Large, held: Large, side: int, steps: int, seed: int = 0
) -> float:
    """Train a LLaVA's projector, or load it; returns the share of held-out signs that it reads.

    Args:
        folder: Where its checkpoints go.
        llava: Whose projector.
        words: `[words]` token ids.
        data: Views with large signs.
        held: Others, for validation.
        side: Of a view in pixels.
        steps: In all.
        seed: Of the weights and the order.
    """
    torch.manual_seed(seed)
    model = Aligned(data.features, llava.get_input_embeddings().weight.detach().float(), words)
    cells = round(data.features.shape[1] ** 0.5)
    covered, held_covered = (shares(d.boxes, cells, side) > _COVERED for d in (data, held))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = generator(seed, 1, step)
        which = torch.from_numpy(rng.integers(len(data.words), size=_BATCH))
        seen = data.features[which].float()
        noise = torch.from_numpy(rng.standard_normal(seen.shape, dtype="float32"))
        seen = seen + _NOISE * model.spread * noise
        return model.loss(seen, data.words[which], covered[which]), {}

    train(
        folder,
        model,
        loss,
        steps=steps,
        learning_rate=1e-3,
        report=lambda: {"val_read": model.right(held, held_covered)},
    )
    model.fold(llava.model.multi_modal_projector)
    return model.right(held, held_covered)
