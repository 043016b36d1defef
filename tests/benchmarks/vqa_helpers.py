"""Fabricated folders of the four benchmarks' layouts, and a tiny LLaVA on disk to ask about them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import flexcore
from flexcore.hf.tiny import tiny_llava
from tests.hf.helpers import perturb

CONFIG: dict[str, Any] = {"first_layer": 1, "selector": "top_k", "top_k": 4, "region_size": 3}
OPTIONS = ["red", "dark green", "a blue cat", "no"]


def save_checkpoint(folder: Path) -> None:
    """A tiny LLaVA under `model`, and perturbed fine weights under `fine`."""
    model, processor = tiny_llava()
    # It speaks printable ASCII only: half characters make no text, and image tokens can't be answers.
    mute = [i for i in range(len(processor.tokenizer)) if not "!" <= processor.tokenizer.decode([i]) <= "~"]
    with torch.no_grad():
        model.lm_head.weight[mute + processor.tokenizer.all_special_ids] = 0
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    flexcore.wrap(model, flexcore.FlexConfig(**CONFIG))
    perturb(model, scale=0.5)
    model.save_adapter_weights(folder / "fine")


def picture(seed: int, size: tuple[int, int] | None = None) -> Image.Image:
    """Coloured blocks, of a shape of its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size or (90, 40 + 5 * (seed % 8)), Image.Resampling.NEAREST)


def vstar(
    folder: Path, number: int = 6, subsets: tuple[str, ...] = ("direct_attributes", "relative_position")
) -> Path:
    """A JSON and a picture per sample, all suffixes among the pictures."""
    suffixes = (".jpg", ".JPG", ".webp", ".png", ".jpeg")
    for s, subset in enumerate(subsets):
        (folder / subset).mkdir(parents=True)
        for i in range(number):
            stem = folder / subset / f"sa_{i}"
            entry = {
                "target_object": ["thing"],
                "bbox": [[0, 0, 1, 1]],
                "question": f"What colour is thing {i}?",
            }
            write(stem.with_suffix(".json"), {**entry, "options": OPTIONS[i % 4 :] + OPTIONS[: i % 4]})
            picture(10 * s + i).save(stem.with_suffix(suffixes[i % len(suffixes)]))
    return folder


def textvqa(folder: Path, number: int = 6) -> Path:
    """One file of questions, the pictures in a folder."""
    (folder / "train_images").mkdir(parents=True)
    data = []
    for i in range(number):
        picture(i).save(folder / "train_images" / f"img{i}.jpg")
        answers = ["stop"] * 5 + ["Stop!"] * 3 + ["go", "the go"]
        data.append(
            {
                "question_id": 100 + i,
                "question": f"What does sign {i} say?",
                "image_id": f"img{i}",
                "answers": answers,
            }
        )
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": data})
    return folder


def magnifier(folder: Path, number: int = 6) -> Path:
    """Pictures in base64 in one file, instructions in another."""
    folder.mkdir(parents=True)
    images, data = {}, {}
    for i in range(number):
        buffer = io.BytesIO()
        picture(i).save(buffer, "PNG")
        images[f"IMG_{i}"] = base64.b64encode(buffer.getvalue()).decode()
        data[f"INS_{i}"] = {
            "instruction": f"What is number {i}?\n(A) red\n(B) dark red\n(C) blue\n(D) {i}",
            "answer": f"The answer is ({'ABCD'[i % 4]}).",
            "image_ids": [f"IMG_{i}"],
            "rel_ins_ids": [],
        }
    write(folder / "images.json", images)
    write(folder / "data_instructions.json", {"data": data})
    return folder


def rsvqa(folder: Path, number: int = 4) -> Path:
    """Three files, and a picture per question; types take turns."""
    folder.mkdir(parents=True)
    kinds = [("presence", "yes"), ("count", "7"), ("area", "120m2"), ("comp", "no")]
    questions, answers, images = [], [], []
    for i in range(number):
        kind, answer = kinds[i % 4]
        questions.append(
            {
                "id": i,
                "img_id": i,
                "type": kind,
                "question": f"Is it {i}?",
                "answers_ids": [50 + i],
                "active": True,
            }
        )
        answers.append({"id": 50 + i, "question_id": i, "answer": answer, "active": True})
        images.append({"id": i, "active": True})
        picture(i, (64, 64)).save(folder / f"{i}.tif")
    for name, entries in (("questions", questions), ("answers", answers), ("images", images)):
        write(folder / f"USGS_split_test_{name}.json", {name: entries})
    return folder


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))


def change(path: Path, edit: Any) -> None:
    """Apply `edit` to a JSON file's content, in place."""
    content = json.loads(path.read_text())
    edit(content)
    write(path, content)
