"""Stage one: a coarse-only base that learns to look up a frame by its colour and read it, on pictures it can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .image_task import IMAGE
from .loop import generator, train
from .model import HIDDEN, assemble
from .pictures import answers, targets
from .questions import IMAGE_AT, Questions
from .scenes import readable
from .task import Task

AIM_LAYER, AIM_WEIGHT = 3, 0.5


class ReadablePictures:
    """Readable scenes as the encoder's features `[n, 64, C]`, the answers and the colours of their frames `[n, 2, 6]`.

    Args:
        tower: The frozen encoder.
        split: Whose digits and photographs.
        n: How many scenes.
        seed: Where they are drawn from.
    """

    def __init__(self, tower: nn.Module, split: str, n: int, seed: int):
        features, digits, aims = [], [], []
        for start in tqdm(range(0, n, 64), desc=f"readable {split}", disable=None):
            scenes = [readable(generator(seed, 3, i), split) for i in range(start, min(start + 64, n))]
            pixels = np.stack([scene.pixels for scene in scenes])
            with torch.no_grad():
                shown = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
                features.append(tower(shown).last_hidden_state)
            digits.append(answers(scenes)[0])
            aims.append(targets(scenes))
        self.features = torch.cat(features)
        self.digits, self.aims = np.concatenate(digits), np.concatenate(aims)


class Base(nn.Module):
    """Projector and decoder, called with the encoder's features.

    Only the row that answers looks at the picture, so that it learns to look for itself: it is the one that selects
    and reads later. Left to itself the base lets the colour's word look, and copies from there. Early on it may:
    there, finding the frame takes one layer and not two, and what was learned is of use to the answering row.

    A linear head on the answering row, thrown away afterwards, says in the middle of the decoder which frame the
    question is about. Without it "left of" isn't learned in this many steps: it takes two lookups before the reading.
    """

    def __init__(self, llava: nn.Module, task: Task = IMAGE):
        super().__init__()
        self.llava = llava
        self.questions = asked = Questions(wording=task.wording)
        before = IMAGE_AT + task.coarse
        self.positions = asked.positions(torch.arange(before))[None]
        ends = asked.rows(before)
        self.rows = {True: torch.cat([ends, asked.naming(before)]), False: ends}
        self.masks = {early: asked.mask(before, answers_look=not early) for early in (True, False)}
        self.ends = ends
        self.aim = nn.Linear(HIDDEN, len(task.wording.names))
        self.middle: Tensor | None = None  # what the layer in the middle put out last
        self.hook = llava.model.language_model.layers[AIM_LAYER].register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        self.middle = output[0] if isinstance(output, tuple) else output

    def aimed(self, digits: np.ndarray, aims: np.ndarray) -> tuple[Tensor, Tensor]:
        """Logits `[B, Q, 6]` of the frame's colour in the last forward, and the colours."""
        assert self.middle is not None
        return self.aim(self.middle[:, self.ends]), self.questions.of(aims, self.questions.colours(digits))

    def forward(self, features: Tensor, digits: np.ndarray, early: bool = False) -> tuple[Tensor, Tensor]:
        """Logits `[B, Q, vocabulary]` of the answers, and the answers; early on two of each."""
        colours = self.questions.colours(digits)
        text = self.questions.text(colours)
        ids = torch.cat([text.new_full((len(text), 1), self.questions.begin), text], dim=1)
        embeds = self.llava.get_input_embeddings()(ids)
        seen = self.llava.model.multi_modal_projector(features)
        logits = self.llava(
            inputs_embeds=torch.cat([embeds[:, :IMAGE_AT], seen, embeds[:, IMAGE_AT:]], dim=1),
            attention_mask=self.masks[early],
            position_ids=self.positions.expand(len(ids), -1),
            logits_to_keep=self.rows[early],
            use_cache=False,
        ).logits
        wanted = self.questions.digits[self.questions.of(digits, colours)]
        return logits, wanted.repeat(1, 2) if early else wanted


def assembled(task: Task = IMAGE, seed: int = 0) -> Any:
    """A LLaVA for a task with random weights."""
    return assemble(seed, task.wording, task.tower_config(), task.coarse)


def with_encoder(reader: Any, seed: int = 0, task: Task = IMAGE) -> Any:
    """A LLaVA whose tower is the trained encoder; the rest is random."""
    llava = assembled(task, seed)
    llava.model.vision_tower.load_state_dict(reader.tower.state_dict())
    llava.model.vision_tower.requires_grad_(False)
    return llava


def train_base(
    folder: Path, reader: Any, steps: int, seed: int = 0, batch: int = 16, task: Task = IMAGE
) -> Any:
    """Train the base, or load it if it is done; returns the LLaVA.

    Args:
        folder: Where its checkpoints go.
        reader: The trained encoder, which holds the tower.
        steps: In all.
        seed: Of the weights and the data.
        batch: Pictures in a step; each is asked all questions.
        task: The medium.
    """
    llava = with_encoder(reader, seed, task)
    base = Base(llava, task)
    if not (folder / "done").exists():
        data = task.readable(reader.tower.eval(), "train", task.base_media, seed)
        held = task.readable(reader.tower, "val", 200, seed)

    at = {k: torch.tensor([kind == k for kind in base.questions.kind_of]) for k in task.kinds}

    def right(logits: Tensor, wanted: Tensor) -> dict[str, float]:
        found = (logits.argmax(-1) == wanted).float().mean(0)[: len(base.questions)]
        return {kind: float(found[mine].mean()) for kind, mine in at.items()}

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        which = generator(seed, 4, step).integers(task.base_media, size=batch)
        logits, wanted = base(data.features[which], data.digits[which], early=step < steps // 4)
        found, aims = base.aimed(data.digits[which], data.aims[which])
        value = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        value = value + AIM_WEIGHT * F.cross_entropy(found.flatten(0, 1), aims.flatten())
        return value, {
            **right(logits, wanted),
            **{f"aim_{kind}": share for kind, share in right(found, aims).items()},
        }

    def validate() -> dict[str, float]:
        return {f"val_{kind}": share for kind, share in right(*base(held.features, held.digits)).items()}

    train(
        folder, base, loss, steps=steps, learning_rate=2e-3, save_every=100, report=validate, report_every=100
    )
    base.hook.remove()
    return llava.eval()
