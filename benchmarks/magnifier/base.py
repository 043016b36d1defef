"""Stage one: a coarse-only base that learns to look up a frame by its colour and read it, on pictures it can read."""

from __future__ import annotations

from functools import partial
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
from .questions import IMAGE_AT, KINDS, Questions
from .scenes import Scene, readable
from .task import PLACES, Close, Readable, Task

AIM_LAYER, PLACE_LAYER, AIM_WEIGHT = 3, 1, 0.5


def readable_pictures(tower: nn.Module, split: str, n: int, seed: int) -> Close:
    """Readable scenes as the encoder's features `[n, 64, C]`, with what is asked about them.

    Args:
        tower: The frozen encoder.
        split: Whose digits and photographs.
        n: How many scenes.
        seed: Where they are drawn from.
    """
    features, digits, aims, places = [], [], [], []
    for start in tqdm(range(0, n, 64), desc=f"readable {split}", disable=None):
        scenes = [readable(generator(seed, 3, i), split) for i in range(start, min(start + 64, n))]
        pixels = np.stack([scene.pixels for scene in scenes])
        with torch.no_grad():
            shown = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            features.append(tower(shown).last_hidden_state)
        digits.append(answers(scenes)[0])
        aims.append(targets(scenes))
        places += [columns(scene, pixels.shape[2]) for scene in scenes]
    where = np.stack(places)[:, None].repeat(len(KINDS), axis=1)
    return Close(torch.cat(features), np.concatenate(digits), np.concatenate(aims), where)


def columns(scene: Scene, width: int) -> np.ndarray:
    """`[6]` the column, of `PLACES`, in which each colour's frame has its middle."""
    middle = scene.boxes[:, 1] + scene.boxes[:, 2] // 2
    return (middle * PLACES // width)[np.argsort(scene.colours)]


class Base(nn.Module):
    """Projector and decoder, called with the encoder's features.

    Only the row that answers looks at the picture, so that it learns to look for itself: it is the one that selects
    and reads later. Left to itself the base lets the colour's word look, and copies from there. Early on it may:
    there, finding the frame takes one layer and not two, and what was learned is of use to the answering row.

    Linear heads on the answering row, thrown away afterwards, say after the second layer in which column the frame is
    that the question names, and in the middle of the decoder which frame it is about: "left of" takes two lookups
    before the reading, and from the answer alone the two aren't learned in this many steps.
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
        self.place = nn.Linear(HIDDEN, PLACES)
        self.kept: dict[int, Tensor] = {}  # what the answering rows were in the last forward, by layer
        layers = llava.model.language_model.layers
        self.hooks = [
            layers[at].register_forward_hook(partial(self._keep, at)) for at in (PLACE_LAYER, AIM_LAYER)
        ]

    def _keep(self, at: int, layer: nn.Module, inputs: Any, output: Any) -> None:
        self.kept[at] = (output[0] if isinstance(output, tuple) else output)[:, self.ends]

    def lookups(self, data: Readable, which: Any) -> tuple[Tensor, dict[str, float]]:
        """How badly the heads do on the media of the last forward, and how often they are right.

        Args:
            data: The media.
            which: Which ones of them the forward saw.
        """
        colours = self.questions.colours(data.digits[which])
        found = {"aim": (self.aim(self.kept[AIM_LAYER]), data.aims)}
        if data.places is not None:
            found["place"] = (self.place(self.kept[PLACE_LAYER]), data.places)
        loss, right = torch.zeros(()), {}
        for name, (logits, all_wanted) in found.items():
            wanted = self.questions.of(all_wanted[which], colours)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            right |= {f"{name}_{kind}": share for kind, share in self.right(logits, wanted).items()}
        return loss, right

    def right(self, logits: Tensor, wanted: Tensor) -> dict[str, float]:
        """Share of `[B, Q, n]` that are right, by kind of question."""
        found = (logits.argmax(-1) == wanted).float().mean(0)[: len(self.questions)]
        of = np.array(self.questions.kind_of)
        return {kind: float(found[torch.from_numpy(of == kind)].mean()) for kind in self.questions.kinds}

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

    Where a question takes two lookups, finding is taught on the task's own media as well: their coarse view can't be
    read, but shows where things are, smaller than in the readable ones.

    Args:
        folder: Where its checkpoints go.
        reader: The trained encoder, which holds the tower.
        steps: In all, on readable media alone.
        seed: Of the weights and the data.
        batch: Media in a step; each is asked all questions.
        task: The medium.
    """
    llava = with_encoder(reader, seed, task)
    base = Base(llava, task)
    finding = folder / "finding"
    if not ((finding if task.finding_steps else folder) / "done").exists():
        data = task.readable(reader.tower.eval(), "train", task.base_media, seed)
        held = task.readable(reader.tower, "val", 200, seed)

    def readable(step: int, size: int, early: bool = False) -> tuple[Tensor, dict[str, float]]:
        which = generator(seed, 4, step).integers(task.base_media, size=size)
        logits, wanted = base(data.features[which], data.digits[which], early=early)
        aside, found = base.lookups(data, which)
        value = F.cross_entropy(logits.flatten(0, 1), wanted.flatten()) + AIM_WEIGHT * aside
        return value, {**base.right(logits, wanted), **found}

    def validate() -> dict[str, float]:
        return {f"val_{kind}": share for kind, share in base.right(*base(held.features, held.digits)).items()}

    train(
        folder,
        base,
        lambda step: readable(step, batch, early=step < steps // 4),
        steps=steps,
        learning_rate=2e-3,
        save_every=100,
        report=validate,
        report_every=100,
    )
    if task.finding_steps:
        if not (finding / "done").exists():
            small, small_held = (task.small(folder.parent, llava, split) for split in ("train", "val"))

        def both(step: int) -> tuple[Tensor, dict[str, float]]:
            value, numbers = readable(steps + step, batch // 2)
            which = generator(seed, 7, step).integers(len(small.digits), size=batch)
            base(small.features[which], small.digits[which])
            aside, found = base.lookups(small, which)
            return value + AIM_WEIGHT * aside, {**numbers, **found}

        def validate_both() -> dict[str, float]:
            found = validate()
            base(small_held.features, small_held.digits)
            right = base.lookups(small_held, slice(None))[1]
            return found | {f"val_{name}": share for name, share in right.items()}

        train(
            finding,
            base,
            both,
            steps=task.finding_steps,
            learning_rate=1e-3,
            save_every=100,
            report=validate_both,
            report_every=100,
        )
    for hook in base.hooks:
        hook.remove()
    return llava.eval()
