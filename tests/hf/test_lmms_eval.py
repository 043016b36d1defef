"""The model `flexcore` of lmms-eval on ten questions about ten small pictures, without a network.

Needs `pip install lmms-eval 'filelock<4'`. What its command logs is compared to what adapter and model say by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import flexcore
from flexcore.hf.conversation import SYSTEM
from flexcore.hf.tiny import tiny_llava

from .helpers import perturb

pytestmark = pytest.mark.slow
pytest.importorskip("lmms_eval", reason="needs pip install lmms-eval")

CONFIG = {"first_layer": 1, "selector": "top_k", "top_k": 4, "region_size": 3}
OPTIONS = ["red", "green", "dark blue", "a cat"]
NEW = 6
COMMON = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
"""
ANSWERS = """
output_type: generate_until
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
  image_aspect_ratio: original
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOICES = """
output_type: multiple_choice
doc_to_target: label
doc_to_choice: options
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA on disk, and perturbed fine weights beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = tiny_llava()
    # It speaks printable ASCII only: half characters and image tokens can't be asked about as text.
    mute = [i for i in range(len(processor.tokenizer)) if not "!" <= processor.tokenizer.decode([i]) <= "~"]
    mute += processor.tokenizer.all_special_ids
    with torch.no_grad():
        model.lm_head.weight[mute] = 0
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    flexcore.wrap(model, flexcore.FlexConfig(**CONFIG))
    perturb(model, scale=0.5)
    model.save_adapter_weights(folder / "fine")
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Ten questions: most about one picture, one about two of them, one about none."""
    folder = tmp_path_factory.mktemp("pictures")
    out = []
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        count = {3: 2, 7: 0}.get(i, 1)
        paths = [str(folder / f"{i}-{j}.png") for j in range(count)]
        for j, path in enumerate(paths):
            Image.fromarray(pixels[:, : 6 - j]).resize((90, 40 + 5 * i), Image.Resampling.NEAREST).save(path)
        question = f"What is in picture {i}?" + " Look twice." * (i % 3)
        out.append(
            {"images": paths, "question": question, "options": OPTIONS, "label": i % 4, "answer": "red"}
        )
    return out


@pytest.fixture(scope="module")
def tasks(documents: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two tasks as lmms-eval reads them."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "ten.json"
    data.write_text(json.dumps(documents))
    (folder / "utils.py").write_text(UTILS)
    for name, kind in (("ten_answers", ANSWERS), ("ten_choices", CHOICES)):
        (folder / f"{name}.yaml").write_text(COMMON.format(task=name, data=data) + kind)
    return folder


@pytest.fixture(scope="module")
def by_hand(checkpoint: Path) -> Any:
    """Adapter over the wrapped model, loaded without lmms-eval."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint / "model")
    flexcore.wrap(model, flexcore.FlexConfig(**CONFIG))
    flexcore.load_adapter_weights(model, checkpoint / "fine")
    return flexcore.load_adapter(
        "image", model.eval(), AutoProcessor.from_pretrained(checkpoint / "model"), zoom=2
    )


def prompt(document: dict[str, Any]) -> str:
    return (
        f"{SYSTEM} USER: {'<image>' + chr(10) if document['images'] else ''}{document['question']} ASSISTANT:"
    )


def inputs_of(adapter: Any, document: dict[str, Any], answer: str = "") -> Any:
    text = (
        prompt(document)
        if len(document["images"]) < 2
        else prompt(document).replace("<image>\n", "<image>\n" * 2)
    )
    return adapter(text=[text + answer], images=[[Image.open(p).convert("RGB") for p in document["images"]]])


def answer_of(adapter: Any, document: dict[str, Any], media: bool = True) -> str:
    inputs = inputs_of(adapter, document)
    streams = inputs.pop("flex_streams")
    given = {**inputs, "flex_streams": streams} if media else inputs
    out = adapter.model.generate(**given, max_new_tokens=NEW, do_sample=False)
    return adapter.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def loss_of(adapter: Any, document: dict[str, Any], option: str) -> tuple[float, bool]:
    """Mean negative log-likelihood of ` option`, step by step."""
    length = inputs_of(adapter, document)["input_ids"].shape[1]
    inputs = inputs_of(adapter, document, f" {option}")
    labels = inputs["input_ids"].clone()
    labels[:, :length] = -100
    with torch.no_grad():
        out = adapter.model(**inputs, labels=labels)
    greedy = out.logits[0, length - 1 : -1].argmax(-1)
    return float(out.loss), bool((greedy == inputs["input_ids"][0, length:]).all())


def model_args(checkpoint: Path, **more: Any) -> str:
    options = {"adapter": "image", "zoom": 2, "fine_weights": checkpoint / "fine", **more}
    return f"pretrained={checkpoint / 'model'}," + ",".join(f"{k}={v}" for k, v in options.items())


@pytest.fixture(scope="module")
def loaded(checkpoint: Path, documents: list[dict[str, Any]]) -> Any:
    """The model as lmms-eval makes it."""
    from lmms_eval.models import get_model

    cls = get_model("flexcore")
    made = cls.create_from_arg_string(model_args(checkpoint), {"batch_size": 4, "device": "cpu"})
    made.task_dict = {"ten": {"test": documents}}
    return made


def request(document: int, *, second: Any, context: str | None = None, documents: Any) -> Any:
    """What lmms-eval asks of a model."""
    context = documents[document]["question"] if context is None else context
    visuals = lambda doc: [Image.open(p).convert("RGB") for p in doc["images"]]  # noqa: E731
    return SimpleNamespace(args=(context, second, visuals, document, "ten", "test"))


def run(tasks: Path, output: Path, arguments: str, *launcher: str, more: tuple[str, ...] = ()) -> Any:
    """Run lmms-eval as its users do; its results, and the samples of each task."""
    names = "ten_answers,ten_choices"
    command = [
        *(launcher or [sys.executable]),
        *("-m", "lmms_eval", "--model", "flexcore", "--model_args", arguments),
        *("--tasks", names, "--include_path", str(tasks), "--batch_size", "4", "--device", "cpu"),
        *("--log_samples", "--output_path", str(output), *more),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    home = {"HF_HOME": str(output / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env={**os.environ, **offline, **home}, capture_output=True, text=True, check=False
    )
    said = done.stdout[-3000:] + done.stderr[-3000:]
    if "No module named 'filelock._api'" in said:
        pytest.skip("this lmms-eval's command needs pip install 'filelock<4'")
    # It reports success after an error too.
    written = list(output.rglob("*_results.json"))
    assert done.returncode == 0 and len(written) == 1, said
    (results,) = written
    samples = {}
    for name in names.split(","):
        (log,) = output.rglob(f"*_samples_{name}.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        samples[name] = sorted(lines, key=lambda line: line["doc_id"])
    return json.loads(results.read_text())["results"], samples


def check(results: Any, samples: Any, documents: list[dict[str, Any]], adapter: Any) -> None:
    """What was logged is what adapter and model say by hand, question by question."""
    answers = [sample["filtered_resps"] for sample in samples["ten_answers"]]
    assert answers == [answer_of(adapter, document) for document in documents]
    controls = [answer_of(adapter, document, media=False) for document in documents]
    assert sum(a != b for a, b in zip(answers, controls, strict=True)) >= 8
    right = 0
    for document, sample in zip(documents, samples["ten_choices"], strict=True):
        expected = [loss_of(adapter, document, option) for option in OPTIONS]
        logged, losses = sample["filtered_resps"], [loss for loss, _ in expected]
        assert [float(loss) for loss, _ in logged] == pytest.approx(losses, abs=1e-4)
        assert [greedy for _, greedy in logged] == [str(greedy) for _, greedy in expected]
        right += losses.index(min(losses)) == document["label"]
    assert results["ten_choices"]["acc,none"] == pytest.approx(right / 10)


def test_ten_questions_through_the_command(
    checkpoint: Path, tasks: Path, documents: list[dict[str, Any]], by_hand: Any, tmp_path: Path
) -> None:
    results, samples = run(tasks, tmp_path, model_args(checkpoint))
    check(results, samples, documents, by_hand)


def test_a_run_resumes_from_the_response_cache(
    checkpoint: Path, tasks: Path, documents: list[dict[str, Any]], by_hand: Any, tmp_path: Path
) -> None:
    for name in ("first", "again"):
        cache = ("--use_cache", str(tmp_path / "cache"))
        results, samples = run(tasks, tmp_path / name, model_args(checkpoint), more=cache)
        check(results, samples, documents, by_hand)


def test_two_ranks_share_the_questions(
    checkpoint: Path, tasks: Path, documents: list[dict[str, Any]], by_hand: Any, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    results, samples = run(tasks, tmp_path, model_args(checkpoint), *launcher)
    check(results, samples, documents, by_hand)


def test_answers_do_not_depend_on_the_batch(
    loaded: Any, by_hand: Any, documents: list[dict[str, Any]]
) -> None:
    settings = {"max_new_tokens": NEW, "until": []}
    requests = [request(i, second=dict(settings), documents=documents) for i in range(10)]
    expected = [answer_of(by_hand, document) for document in documents]
    assert loaded.generate_until(requests) == expected
    assert loaded.generate_until(requests[3:4]) == expected[3:4]


def test_answers_end_before_the_first_stop_string(
    loaded: Any, by_hand: Any, documents: list[dict[str, Any]]
) -> None:
    whole = answer_of(by_hand, documents[0])
    first, second = whole[2], whole[3:5]
    ask = lambda until: request(0, second={"max_new_tokens": NEW, "until": until}, documents=documents)  # noqa: E731
    cut, also, plain = loaded.generate_until([ask([second, first]), ask(first), ask("no such thing")])
    assert cut == also == whole[: whole.index(first)]
    assert plain == whole


def test_settings_of_a_batch_are_its_own(loaded: Any, by_hand: Any, documents: list[dict[str, Any]]) -> None:
    some = [
        {"max_new_tokens": 2},
        {"max_new_tokens": NEW, "num_beams": 2},
        {"max_gen_toks": NEW, "temperature": 0.0, "do_sample": True, "top_p": None, "max_agentic_steps": 3},
    ]
    short, beams, greedy = loaded.generate_until([request(0, second=s, documents=documents) for s in some])
    assert greedy == answer_of(by_hand, documents[0])
    assert len(by_hand.tokenizer(short, add_special_tokens=False).input_ids) <= 2
    assert greedy.startswith(short)
    assert isinstance(beams, str)
    hot = [request(0, second={"max_new_tokens": 20, "temperature": 5.0}, documents=documents)] * 2
    torch.manual_seed(0)
    first = loaded.generate_until(hot)
    assert first[0] != first[1]
    torch.manual_seed(0)
    assert loaded.generate_until(hot) == first


def test_pictures_go_where_the_task_puts_them(loaded: Any, documents: list[dict[str, Any]]) -> None:
    ask = loaded._prompt
    assert ask("What?", 0) == f"{SYSTEM} USER: What? ASSISTANT:"
    assert ask("What?", 2) == f"{SYSTEM} USER: <image>\n<image>\nWhat? ASSISTANT:"
    assert ask("<image> What?", 1) == f"{SYSTEM} USER: <image> What? ASSISTANT:"
    try:
        loaded.system_prompt = "Be brief."
        assert ask("What?", 1) == "Be brief. USER: <image>\nWhat? ASSISTANT:"
        loaded.conversation = "template"
        assert ask("What?", 1) == "SYSTEM: Be brief. USER: <image>\nWhat? ASSISTANT:"
        loaded.system_prompt = ""
        assert ask("What?", 0) == "USER: What? ASSISTANT:"
        assert ask("What?", 2) == "USER: <image>\n<image>\nWhat? ASSISTANT:"
        placed = "USER: Left <image>\n or right <image>\n? ASSISTANT:"
        assert ask("Left <image> or right <image>?", 2) == placed
    finally:
        loaded.conversation, loaded.system_prompt = "v1", ""


def test_likelihoods(loaded: Any, by_hand: Any, documents: list[dict[str, Any]]) -> None:
    ask = [(i, option) for i in (0, 3, 7) for option in OPTIONS]
    requests = [request(i, second=f" {option}", documents=documents) for i, option in ask]
    got = [result.text for result in loaded.loglikelihood(requests)]
    expected = [loss_of(by_hand, documents[i], option) for i, option in ask]
    assert [loss for loss, _ in got] == pytest.approx([loss for loss, _ in expected], abs=1e-4)
    # A model's own answer is the greedy one.
    greedy = answer_of(by_hand, documents[0])
    same = request(0, second=lambda doc: greedy, documents=documents)
    other = request(0, second=greedy[:-1] + chr(ord(greedy[-1]) ^ 1), documents=documents)
    assert [result.text[1] for result in loaded.loglikelihood([other, same])] == [False, True]
    with pytest.raises(ValueError, match="an answer must have at least one token, got ''"):
        loaded.loglikelihood([request(0, second="", documents=documents)])


def test_a_saved_wrapped_model_brings_its_fine_weights(
    by_hand: Any, documents: list[dict[str, Any]], tmp_path: Path
) -> None:
    from flexcore.hf.lmms_eval import FlexcoreModel

    by_hand.model.save_pretrained(tmp_path)
    by_hand.processor.save_pretrained(tmp_path)
    made = FlexcoreModel(str(tmp_path), zoom=2, device="cpu", threshold=50)
    made.task_dict = {"ten": {"test": documents}}
    assert made.model.flex_config == by_hand.model.flex_config.replace(threshold=50)
    requests = [request(1, second={"max_new_tokens": NEW}, documents=documents)]
    assert made.generate_until(requests) == [answer_of(by_hand, documents[1])]
    made.clean()
    assert not hasattr(made, "model")
    assert not hasattr(made, "adapter")


def test_options_are_checked(checkpoint: Path) -> None:
    from flexcore.hf.lmms_eval import FlexcoreModel

    path = str(checkpoint / "model")
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 'auto'"):
        FlexcoreModel(path, batch_size="auto")
    with pytest.raises(ValueError, match="threshold"):
        FlexcoreModel(path, device="cpu", threshold=500)
    with pytest.raises(ValueError, match="conversation must be one of auto, v1, template, got 'chatml'"):
        FlexcoreModel(path, device="cpu", conversation="chatml")
    with pytest.raises(TypeError, match="ImageAdapter has no option 'zom'"):
        FlexcoreModel(path, device="cpu", zom=3)
    with pytest.raises(NotImplementedError, match="one round"):
        FlexcoreModel(path, device="cpu").generate_until_multi_round([])
