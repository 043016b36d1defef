"""benchmarks.vqa and the model `flexcore` of lmms-eval, asked the same samples: what goes in, answers and scores.

Needs `pip install lmms-eval`. Its own TextVQA task runs as it ships, over a local folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationMixin

from benchmarks.vqa import textvqa, vstar
from benchmarks.vqa.__main__ import main

from . import vqa_helpers as made

pytestmark = pytest.mark.slow
pytest.importorskip("lmms_eval", reason="needs pip install lmms-eval")

NEW = 6
FILE = "TextVQA_0.5.1_val.json"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant{{ '\n' }}"
)


@dataclass
class Asked:
    """What one sample gave the model: tokens without padding, coarse pixels, fine features."""

    ids: list[int]
    pixels: torch.Tensor
    fine: torch.Tensor

    def same(self, other: Asked) -> bool:
        tensors = ((self.pixels, other.pixels), (self.fine, other.fine))
        same = (a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in tensors)
        return self.ids == other.ids and all(same)


@contextmanager
def overheard(tokenizer: Any) -> Iterator[dict[str, Asked]]:
    """What `generate` is given while this is open, by question."""
    asked: dict[str, Asked] = {}
    generate = GenerationMixin.generate

    def listening(self: Any, *args: Any, **given: Any) -> Any:
        out = generate(self, *args, **given)
        rows = zip(given["input_ids"], given["attention_mask"].bool(), given["pixel_values"], strict=True)
        for (ids, mask, pixels), sample in zip(rows, given["flex_streams"].samples, strict=True):
            (stream,) = sample.media
            words = tokenizer.decode(ids[mask])
            question = words[words.lower().index("what does") :].partition("\n")[0]
            assert question not in asked
            fine = stream.source.features(torch.arange(stream.grid.n_regions))
            asked[question] = Asked(ids[mask].tolist(), pixels.clone(), fine.clone())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", listening)
        yield asked


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five questions of different lengths, so that batches are padded."""
    folder = made.textvqa(tmp_path_factory.mktemp("data") / "textvqa", 5)

    def lengthen(content: Any) -> None:
        for i, entry in enumerate(content["data"]):
            entry["question"] = entry["question"].replace("say?", "say" + " on its far side" * (i % 3) + "?")

    made.change(folder / FILE, lengthen)
    return folder


Load = Callable[..., Any]


@pytest.fixture(scope="module")
def load(checkpoint: Path) -> Load:
    """The model as lmms-eval makes it from `--model_args`."""
    from lmms_eval.models import get_model

    def make(batch_size: int, **more: Any) -> Any:
        options = {"pretrained": checkpoint / "model", "fine_weights": checkpoint / "fine", "zoom": 2, **more}
        arguments = ",".join(f"{name}={value}" for name, value in options.items())
        chosen = {"batch_size": batch_size, "device": "cpu"}
        return get_model("flexcore").create_from_arg_string(arguments, chosen)

    return make


def shipped_task(data: Path, folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """lmms-eval's TextVQA task with its own prompts, pictures and score, over the pictures of a folder."""
    import lmms_eval.tasks
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.utils import load_yaml_config

    shutil.copytree(data / textvqa.PICTURES, folder / "validation")
    entries = json.loads((data / FILE).read_text())["data"]
    lines = [json.dumps({"file_name": f"{entry['image_id']}.jpg", **entry}) for entry in entries]
    (folder / "validation" / "metadata.jsonl").write_text("\n".join(lines))
    patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
    path = Path(lmms_eval.tasks.__file__).parent / "textvqa" / "textvqa_val.yaml"
    config = load_yaml_config(str(path))
    local = {"dataset_path": "imagefolder", "dataset_kwargs": {"data_dir": str(folder)}}
    short = {"generation_kwargs": {**config["generation_kwargs"], "max_new_tokens": NEW}}
    task = ConfigurableTask(config={**config, **local, **short})
    task.build_all_requests()
    return task


def ask_plugin(model: Any, task: Any) -> list[str]:
    """What the model answers to a task's requests, in the order of the documents."""
    model.task_dict[task.config.task] = task.dataset
    assert [type(request).__name__ for request in task.instances] == ["Instance"] * len(task.instances)
    return model.generate_until(task.instances)


def ask_vqa(checkpoint: Path, data: Path, output: Path, *more: str, name: str = "textvqa") -> dict[str, Any]:
    """What the benchmark's command answers, by key."""
    given = ["--data", data, "--model", checkpoint / "model", "--fine-weights", checkpoint / "fine"]
    given += ["--output", output, "--zoom", "2", "--max-new-tokens", NEW, "--device", "cpu"]
    assert main([name, *map(str, given), "--arms", "flex,coarse", *more]) == 0
    lines = [json.loads(line) for line in (output / "flex-000.jsonl").open()]
    return {line["key"]: line["answer"] for line in lines}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("template") / "chatml.jinja"
    file.write_text(CHATML)
    return file


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("conversation", ["auto", "template"])
def test_textvqa_by_both(
    batch: int,
    conversation: str,
    checkpoint: Path,
    data: Path,
    load: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = {} if conversation == "auto" else {"conversation": conversation}
    model = load(batch, **chosen)
    task = shipped_task(data, tmp_path / "task", monkeypatch)
    with overheard(model.tokenizer) as by_plugin:
        answers = ask_plugin(model, task)
    more = ["--batch-size", str(batch), *(f"--{name}={value}" for name, value in chosen.items())]
    with overheard(model.tokenizer) as by_vqa:
        ours = ask_vqa(checkpoint, data, tmp_path / "out", "--arms", "flex", *more)

    # what went in: the same prompts, pictures and fine features, question by question
    assert len(by_plugin) == 5 and by_plugin.keys() == by_vqa.keys()
    assert all(asked.same(by_vqa[question]) for question, asked in by_plugin.items())
    # the control: what differs between questions shows
    assert not any(by_plugin[a].same(by_vqa[b]) for a in by_plugin for b in by_vqa if a != b)
    opening = "A chat between a curious user" if conversation == "auto" else "USER:"
    shown = [model.tokenizer.decode(asked.ids, skip_special_tokens=True) for asked in by_plugin.values()]
    assert all(text.startswith(opening) for text in shown)

    # what came out, and what it scores
    keys = [str(document["question_id"]) for document in task.eval_docs_no_media]
    assert [answer.strip() for answer in answers] == [ours[key] for key in keys]
    assert len(set(answers)) >= 4
    samples = {sample.key: sample for sample in textvqa.BENCHMARK.read(data, print)}
    for answer, key, document in zip(answers, keys, task.eval_docs_no_media, strict=True):
        theirs = task.process_results(document, [answer])["exact_match"]
        assert theirs == pytest.approx(textvqa.score(samples[key], ours[key]))


def test_another_picture_prompt_or_zoom_shows(
    checkpoint: Path, data: Path, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the above: each of these makes the two disagree."""
    ours = ask_vqa(checkpoint, data, tmp_path / "out", "--arms", "flex")
    turned = tmp_path / "turned"
    shutil.copytree(data, turned)
    for path in (turned / textvqa.PICTURES).iterdir():
        with Image.open(path) as picture:
            picture.transpose(Image.Transpose.ROTATE_180).save(path)
    told = tmp_path / "told"
    shutil.copytree(data, told)
    made.change(
        told / FILE, lambda c: [e.update(question=e["question"].replace("say", "spell")) for e in c["data"]]
    )
    for name, folder, more in (
        ("picture", turned, {}),
        ("prompt", told, {}),
        ("conversation", data, {"conversation": "template"}),
        ("zoom", data, {"zoom": 3}),
    ):
        task = shipped_task(folder, tmp_path / f"{name} task", monkeypatch)
        answers = [answer.strip() for answer in ask_plugin(load(2, **more), task)]
        assert sum(a != b for a, b in zip(answers, ours.values(), strict=True)) >= 3, name


def test_the_shipped_task_words_questions_its_own_way(
    data: Path, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capital at the start and none behind it; the benchmark asks what the file says."""
    folder = tmp_path / "mixed"
    shutil.copytree(data, folder)
    made.change(folder / FILE, lambda c: c["data"][0].update(question="what does the STOP sign say?"))
    task = shipped_task(folder, tmp_path / "task", monkeypatch)
    (first, *_) = textvqa.BENCHMARK.read(folder, print)
    assert first.text == "what does the STOP sign say?\nAnswer the question using a single word or phrase."
    assert task.instances[0].args[0] == first.text.replace("what", "What").replace("STOP", "stop")
    assert [r.args[0] for r in task.instances[1:]] == [
        s.text for s in textvqa.BENCHMARK.read(data, print)[1:]
    ]


@pytest.mark.parametrize(
    "answer",
    ["stop", "The Stop.", "STOP!", "go", "the  go", "", "stop sign", "10:30 a.m.", "two", "1,000", "dont go"],
)
def test_scores_are_those_of_the_shipped_task(answer: str, data: Path) -> None:
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    annotators = ["stop"] * 3 + ["Stop!", "go", "10:30 am", "2", "2", "1000", "don't go"]
    (sample, *_) = textvqa.BENCHMARK.read(data, print)
    ours = textvqa.score(type(sample)("1", "", "all", "", (), annotators), answer)
    document = {"question_id": 1, "answers": list(annotators)}
    theirs = textvqa_process_results(document, [answer])["exact_match"]
    assert ours == pytest.approx(theirs)
    assert (ours > 0) == (answer not in ("", "stop sign"))


def test_losses_of_options_by_both(checkpoint: Path, load: Load, tmp_path: Path) -> None:
    from lmms_eval.api.instance import Instance

    folder = made.vstar(tmp_path / "vstar", 3)
    ours = ask_vqa(checkpoint, folder, tmp_path / "out", "--arms", "flex", "--batch-size", "3", name="vstar")
    samples = vstar.BENCHMARK.read(folder, print)
    model = load(3)
    model.task_dict["vstar"] = {"test": samples}

    def show(sample: Any) -> list[Any]:
        return [Image.open(path).convert("RGB") for path in sample.media()]

    requests = []
    for i, sample in enumerate(samples):
        about = {"task": "vstar", "doc_id": i, "repeats": 1}
        for j, option in enumerate(sample.options):
            arguments = (sample.text, f" {option}", show, i, "vstar", "test")
            requests.append(Instance("loglikelihood", arguments, j, about))
    losses = [result.text[0] for result in model.loglikelihood(requests)]
    expected = [loss for sample in samples for loss in ours[sample.key]]
    assert len(losses) == 24 and losses == pytest.approx(expected, abs=1e-4)
    # the control: another question's losses are not these
    moved = expected[4:] + expected[:4]
    assert max(abs(a - b) for a, b in zip(losses, moved, strict=True)) > 1e-2


def test_a_template_of_another_language_is_taken_by_default(
    checkpoint: Path, data: Path, template: Path, load: Load, tmp_path: Path
) -> None:
    """A ChatML checkpoint is asked in ChatML by both, and so is any whose user gives a template."""
    from benchmarks.vqa.conversation import prompt, resolve

    folder = tmp_path / "chatml"
    shutil.copytree(checkpoint / "model", folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    asked = "<|im_start|>user\n<image>What?<|im_end|>\n<|im_start|>assistant\n"
    own = load(1, pretrained=folder)
    assert own._prompt("What?", 1) == asked == prompt(own.adapter, "What?", 1, resolve(own.adapter, "auto"))
    assert load(1, chat_template=template)._prompt("What?", 1) == asked
