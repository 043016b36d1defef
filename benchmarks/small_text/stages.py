"""The stages with the language model: a coarse-only base that reads large signs, then arms that meet small ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flexcore
from flexcore import FlexConfig
from flexcore.hf.training import Exploration, ExploringSelector

from ..magnifier.loop import generator, train
from .fine_init import set_fine
from .signs import QUESTION, REGION, ZOOM, Large, Small, grid

BATCH = 8
BASE_RATE, ARM_RATE = 2e-4, 2e-4
TOP_K = 6  # of 64 regions: 9.4 %


def flex_config(first_layer: int, layers: tuple[int, ...], **changes: Any) -> FlexConfig:
    """How the arm `flex` looks closer, or a variation."""
    settings: dict[str, Any] = {"first_layer": first_layer, "layers": layers, "region_size": REGION}
    settings |= {"selector": "top_k", "top_k": TOP_K, "selection_loss": 1.0, "fine_norm": True}
    return FlexConfig(**{**settings, **changes})


class Talk:
    """A model's inputs around pictures: the chat template with the one question, and a word as the answer.

    Args:
        llava: The model.
        processor: Its processor.
        words: `[words]` token ids.
    """

    def __init__(self, llava: Any, processor: Any, words: Tensor):
        ids = processor.tokenizer(chat(processor))["input_ids"]
        picture = ids.index(processor.image_token_id)
        self.before, self.after = torch.tensor(ids[:picture]), torch.tensor(ids[picture + 1 :])
        self.end = processor.tokenizer.eos_token_id
        self.words, self.llava = words, llava

    def __call__(self, coarse: Tensor, words: Tensor) -> dict[str, Any]:
        """Model inputs whose last rows are asked for: the prompt's last, and the answer's two.

        Args:
            coarse: `[B, cells², hidden]` projected.
            words: `[B]` the answers.
        """
        embed, n = self.llava.get_input_embeddings(), len(coarse)
        answers = torch.stack([self.words[words], torch.full((n,), self.end)], dim=1)
        ids = torch.cat([self.after.expand(n, -1), answers], dim=1)
        embeds = torch.cat([embed(self.before).expand(n, -1, -1), coarse, embed(ids)], dim=1)
        return {
            "inputs_embeds": embeds,
            "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long),
            "labels": torch.cat([torch.full((n, 1), -100), answers], dim=1),
            "logits_to_keep": 3,
            "use_cache": False,
        }

    def streams(self, made: dict[str, Any], fine: Tensor) -> dict[str, Any]:
        """What a wrapped model needs beside that, for `[B, fine tokens, hidden]` projected."""
        cells = round(fine.shape[1] ** 0.5) // ZOOM
        at = torch.arange(len(self.before), len(self.before) + cells**2)
        reading = torch.zeros(made["attention_mask"].shape, dtype=torch.bool)
        reading[:, -3:-1] = True
        streams = flexcore.StreamBatch.from_features(list(fine), [grid(cells)] * len(fine), [at] * len(fine))
        return {**made, "flex_streams": streams, "readout_mask": reading}

    def right(self, logits: Tensor, words: Tensor) -> Tensor:
        """`[B]` whether the first row asked for says the word, of all tokens."""
        return logits[:, 0].argmax(-1) == self.words[words]


def chat(processor: Any) -> str:
    """The prompt."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True))


def trained_parts(llava: Any, projector: bool) -> nn.Module:
    """What trains: the decoder's layers, its last norm and fine projections, and the projector if asked for.

    Embeddings and output head stay as they are: a few words' rows would move away from all others'.
    """
    llava.requires_grad_(False)
    decoder = llava.model.language_model
    parts = nn.ModuleDict({"layers": decoder.layers, "norm": decoder.norm})
    if projector:
        parts["projector"] = llava.model.multi_modal_projector
    if hasattr(llava, "flex_fine"):
        parts["fine"] = llava.flex_fine
    return parts.requires_grad_(True)


def accuracy(talk: Talk, n: int, inputs: Callable[[Tensor], tuple[dict[str, Any], Tensor]]) -> float:
    """Share of the first `n` answers that are right.

    Args:
        talk: The model's inputs.
        n: How many.
        inputs: What the model takes for some of them, and the words.
    """
    right = []
    talk.llava.eval()
    for which in torch.arange(n).split(16):
        made, words = inputs(which)
        made.pop("labels")  # no loss
        right.append(talk.right(talk.llava(**made).logits, words))
    return float(torch.cat(right).float().mean())


def train_base(folder: Path, talk: Talk, data: Large, held: Large, steps: int, seed: int = 0) -> None:
    """Teach a LLaVA whose projector is aligned to read what it sees; in place.

    Args:
        folder: Where its checkpoints go.
        talk: The model's inputs.
        data: Views with large signs.
        held: Others, for validation.
        steps: Of `BATCH` views.
        seed: Of their order.
    """
    llava = talk.llava
    parts = trained_parts(llava, projector=True)

    def inputs(of: Large, which: Tensor) -> tuple[dict[str, Any], Tensor]:
        seen = llava.model.multi_modal_projector(of.features[which].float())
        return talk(seen, of.words[which]), of.words[which]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        which = torch.from_numpy(generator(seed, 2, step).integers(len(data.words), size=BATCH))
        made, words = inputs(data, which)
        return answered(talk, made, words)

    def report() -> dict[str, float]:
        return {"val": accuracy(talk, min(96, len(held.words)), lambda which: inputs(held, which))}

    fit(folder, parts, loss, report, steps, BASE_RATE)


def answered(talk: Talk, made: dict[str, Any], words: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The loss of answers, and the share that is right."""
    out = talk.llava.train()(**made)
    return out.loss, {"right": float(talk.right(out.logits.detach(), words).float().mean())}


def train_arm(
    folder: Path,
    talk: Talk,
    flex: FlexConfig | None,
    data: Small,
    held: Small,
    steps: int,
    start: dict[int, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
) -> None:
    """Teach a base small signs, with fine tokens or without; in place. The projector stays as it is.

    Args:
        folder: Where its checkpoints go.
        talk: The model's inputs.
        flex: How it is wrapped; None leaves it coarse-only.
        data: Pictures with small signs.
        held: Others, for validation.
        steps: Of `BATCH` pictures.
        start: Fine projections to start with, see `fine_init`.
        seed: Of their order.
    """
    llava, explore, share = talk.llava, Exploration(anneal=0.5, floor=0.1), [0.0]
    if flex is not None:
        flexcore.wrap(llava, flex)
        set_fine(llava, start or {})
    parts = trained_parts(llava, projector=False)
    project = llava.model.multi_modal_projector

    def inputs(of: Small, which: Tensor) -> tuple[dict[str, Any], Tensor]:
        made = talk(project(of.coarse[which].float()), of.words[which])
        if flex is not None:
            made = talk.streams(made, project(of.fine(which).float()))
        return made, of.words[which]

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        which = torch.from_numpy(generator(seed, 3, step).integers(len(data.words), size=BATCH))
        share[0] = explore.at(step / steps)
        torch.manual_seed(step)  # of the exploration, so that a resumed run does the same
        made, words = inputs(data, which)
        return answered(talk, made, words)

    def report() -> dict[str, float]:
        return {"val": accuracy(talk, min(96, len(held.words)), lambda which: inputs(held, which))}

    if flex is None:
        fit(folder, parts, loss, report, steps, ARM_RATE)
        return
    binding = llava._flex_binding
    chosen = binding.selector
    binding.selector = ExploringSelector(chosen, lambda: share[0])  # explores in training only
    try:
        fit(folder, parts, loss, report, steps, ARM_RATE)
    finally:
        binding.selector = chosen


def fit(
    folder: Path,
    parts: nn.Module,
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    report: Callable[[], dict[str, float]],
    steps: int,
    rate: float,
) -> None:
    """`magnifier.loop.train` as both stages use it."""
    train(
        folder,
        parts,
        loss,
        steps=steps,
        learning_rate=rate,
        weight_decay=0.01,
        warmup=20,
        save_every=100,
        report=report,
        report_every=50,
    )
