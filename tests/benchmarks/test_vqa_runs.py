"""Runs over fabricated folders on a tiny LLaVA: what the arms answer, malformed samples, kills, several processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import flexcore
from benchmarks.vqa.__main__ import main
from benchmarks.vqa.conversation import SYSTEM, prompt, resolve

from . import vqa_helpers as made

ROOT = Path(__file__).resolve().parents[2]
NEW = 6
FOLDERS: dict[str, Callable[..., Path]] = {
    "vstar": made.vstar,
    "textvqa": made.textvqa,
    "magnifier": made.magnifier,
    "rsvqa-hr": made.rsvqa,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {name: make(folder / name) for name, make in FOLDERS.items()}


@pytest.fixture(scope="module")
def by_hand(checkpoint: Path) -> Any:
    """Adapter over the wrapped model, loaded without the benchmarks."""
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint / "model")
    flexcore.wrap(model, flexcore.FlexConfig(**made.CONFIG))
    flexcore.load_adapter_weights(model, checkpoint / "fine")
    return flexcore.load_adapter(
        "image", model.eval(), AutoProcessor.from_pretrained(checkpoint / "model"), zoom=2
    )


def command(name: str, data: Path, checkpoint: Path, output: Path, *more: str) -> list[str]:
    """Arguments of a run with the perturbed fine weights."""
    paths = {
        "data": data,
        "model": checkpoint / "model",
        "fine-weights": checkpoint / "fine",
        "output": output,
    }
    given = [part for option, path in paths.items() for part in (f"--{option}", str(path))]
    return [
        name,
        *given,
        "--zoom",
        "2",
        "--max-new-tokens",
        str(NEW),
        "--batch-size",
        "4",
        "--device",
        "cpu",
        *more,
    ]


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def records(output: Path, arm: str) -> dict[str, Any]:
    """What is on disk about an arm; no key twice."""
    lines = [json.loads(line) for path in sorted(output.glob(f"{arm}-*.jsonl")) for line in path.open()]
    assert len({line["key"] for line in lines}) == len(lines)
    return {line["key"]: line for line in lines}


def asked(text: str, pictures: int = 1) -> str:
    return f"{SYSTEM} USER: {'<image>' + chr(10)}{text} ASSISTANT:"


def answer_of(adapter: Any, inputs: Any, streams: bool = True) -> str:
    """The greedy answer, token by token."""
    given = {**inputs} if streams else {k: v for k, v in inputs.items() if k != "flex_streams"}
    out = adapter.model.generate(**given, max_new_tokens=NEW, do_sample=False)
    return adapter.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def dense_embeds(model: Any, inputs: Any) -> torch.Tensor:
    """`[1, T, C]` words, coarse tokens and, behind those, all fine tokens in raster order."""
    (stream,) = inputs["flex_streams"].samples[0]
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach().clone()
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    embeds[0, ids[0] == 3] = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])[0].detach()
    fine = torch.zeros(stream.grid.n_fine, embeds.shape[-1])
    every = torch.arange(stream.grid.n_regions)
    features, tokens = stream.source.features(every).detach(), stream.grid.tokens(every)
    fine[tokens[tokens >= 0]] = features[tokens >= 0]
    after = int(torch.nonzero(ids[0] == 3).max()) + 1
    kept = fine[stream.grid.fine_valid.view(-1)]
    return torch.cat([embeds[:, :after], kept[None], embeds[:, after:]], dim=1)


# ---------------------------------------------------------------------- what is answered


def test_answers_are_what_each_arm_says_by_hand(
    checkpoint: Path, data: dict[str, Path], by_hand: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("textvqa", data["textvqa"], checkpoint, tmp_path, "--json", "--limit", "4")) == 0
    found = {arm: records(tmp_path, arm) for arm in ("coarse", "flex", "dense")}
    content = json.loads((data["textvqa"] / "TextVQA_0.5.1_val.json").read_text())["data"]
    differ = 0
    for entry in content[:4]:
        key = str(entry["question_id"])
        path = data["textvqa"] / "train_images" / f"{entry['image_id']}.jpg"
        question = entry["question"] + "\nAnswer the question using a single word or phrase."
        inputs = by_hand(text=[asked(question)], images=[path])
        flex, coarse = answer_of(by_hand, inputs), answer_of(by_hand, inputs, streams=False)
        embeds = dense_embeds(by_hand.model, inputs)
        out = by_hand.model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
        dense = by_hand.decode(out[0], skip_special_tokens=True).strip()
        assert [found[arm][key]["answer"] for arm in found] == [coarse, flex, dense]
        differ += len({coarse, flex, dense}) == 3
    assert differ >= 3  # arms that answer the same would prove nothing
    shown = capsys.readouterr()
    assert "flex: 100%" in shown.err  # progress shows where no terminal is, too
    text = shown.out
    assert re.search(r"\| TextVQA \| samples \| coarse \| flex \| dense \|", text)
    assert "| overall | 4 | 0.0 % | 0.0 % | 0.0 % |" in text
    last = json.loads(text.splitlines()[-1])
    assert last["rows"] == results(tmp_path)["rows"] and "torch" in last["versions"]
    assert set(last["seconds"]) == {"coarse", "flex", "dense"}


def test_losses_are_what_each_arm_says_by_hand(
    checkpoint: Path, data: dict[str, Path], by_hand: Any, tmp_path: Path
) -> None:
    # three rows a batch: options of one question are split, and batches mix two questions
    assert (
        main(command("vstar", data["vstar"], checkpoint, tmp_path, "--limit", "4", "--batch-size", "3")) == 0
    )
    found = {arm: records(tmp_path, arm) for arm in ("coarse", "flex", "dense")}
    assert len(found["flex"]) == 4
    right = {"coarse": 0, "flex": 0, "dense": 0}
    for key, record in found["flex"].items():
        path = data["vstar"] / f"{key}.json"
        entry = json.loads(path.read_text())
        (picture,) = [file for file in path.parent.glob(f"{path.stem}.*") if file != path]
        question = entry["question"] + "\nAnswer the question using a single word or phrase."
        expected: dict[str, list[float]] = {"coarse": [], "flex": [], "dense": []}
        for option in entry["options"]:
            length = by_hand(text=[asked(question)], images=[picture])["input_ids"].shape[1]
            inputs = by_hand(text=[f"{asked(question)} {option}"], images=[picture])
            labels = inputs["input_ids"].clone()
            labels[:, :length] = -100
            plain = {k: v for k, v in inputs.items() if k != "flex_streams"}
            dense = dense_embeds(by_hand.model, inputs)
            tail = torch.full((1, dense.shape[1]), -100)
            tail[:, length - labels.shape[1] :] = labels[:, length:]
            with torch.no_grad():
                expected["coarse"].append(float(by_hand.model(**plain, labels=labels).loss))
                expected["flex"].append(float(by_hand.model(**inputs, labels=labels).loss))
                expected["dense"].append(float(by_hand.model(inputs_embeds=dense, labels=tail).loss))
        for arm, losses in expected.items():
            assert found[arm][key]["answer"] == pytest.approx(losses, abs=1e-4)
            right[arm] += losses.index(min(losses)) == 0
        assert max(abs(a - b) for a, b in zip(expected["coarse"], expected["flex"], strict=True)) > 1e-2
        assert max(abs(a - b) for a, b in zip(expected["dense"], expected["flex"], strict=True)) > 1e-2
        assert record["seconds"] > 0
    rows = results(tmp_path)["rows"]["overall"]
    assert {arm: cell["score"] for arm, cell in rows.items()} == {arm: n / 4 for arm, n in right.items()}


@pytest.mark.parametrize("name", ["magnifier", "rsvqa-hr"])
def test_the_other_layouts_go_all_the_way(
    name: str, checkpoint: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    assert (
        main(command(name, data[name], checkpoint, tmp_path, "--arms", "flex,coarse", "--batch-size", "3"))
        == 0
    )
    found = results(tmp_path)
    assert found["rows"]["overall"].keys() == {"flex", "coarse"} and not found["problems"]
    keys = (
        {"INS_0", "INS_1", "INS_2", "INS_3", "INS_4", "INS_5"}
        if name == "magnifier"
        else {"0", "1", "2", "3"}
    )
    assert set(records(tmp_path, "flex")) == keys
    assert records(tmp_path, "flex") != records(tmp_path, "coarse")
    if name == "rsvqa-hr":
        names = ["presence", "count", "area", "comp", "average of types", "overall", "count, to the number"]
        assert list(found["rows"]) == names


def test_a_plain_model_and_what_is_not_run(
    checkpoint: Path, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "textvqa",
        "--data",
        str(data["textvqa"]),
        "--model",
        str(checkpoint / "model"),
        "--device",
        "cpu",
    ]
    given += ["--zoom", "2", "--max-new-tokens", "2", "--limit", "2"]
    assert main([*given, "--output", str(tmp_path / "one"), "--arms", "coarse"]) == 0
    assert main([*given, "--output", str(tmp_path / "two"), "--dense-limit", "300"]) == 0
    text = capsys.readouterr().out
    assert "| overall | 2 | 0.0 % | 0.0 % | not run |" in text
    assert re.search(
        r"dense: not run: 2 of 2 samples don't fit, the first: \d+ tokens .* the limit is 300", text
    )
    assert "flex: its fine projections are untrained" in text
    # looking closer is not what makes coarse-only answers: the wrapped model gives the plain one's
    one, two = (records(tmp_path / run, "coarse") for run in ("one", "two"))
    assert {k: r["answer"] for k, r in one.items()} == {k: r["answer"] for k, r in two.items()}


# ---------------------------------------------------------------------- what can't be asked


def test_malformed_samples_are_reported_and_do_not_stop_the_run(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made.textvqa(tmp_path / "data", 6)
    pictures = folder / "train_images"
    (pictures / "img1.jpg").write_bytes((pictures / "img1.jpg").read_bytes()[:50])
    (pictures / "img2.jpg").unlink()
    made.change(folder / "TextVQA_0.5.1_val.json", lambda content: content["data"][4].pop("question"))
    output = tmp_path / "out"
    given = command("textvqa", folder, checkpoint, output, "--arms", "coarse,flex")
    assert main(given) == 0
    found = results(output)
    name = "TextVQA_0.5.1_val.json"
    assert [re.sub(r" \(question_id \d+\)", "", problem).split(": ")[1] for problem in found["problems"]] == [
        "data[4]",
        "data[1]",
        "data[2]",
    ]
    assert all(problem.startswith(name) for problem in found["problems"])
    assert "there is no picture" in found["problems"][2]
    assert {cell["samples"] for cell in found["rows"]["overall"].values()} == {3}
    shown = capsys.readouterr()
    assert "3 malformed sample(s) left out:" in shown.out
    assert f"left out: {name}: data[4]: question must be a str and not empty, got None" in shown.err
    # mended, the sample is asked on the next run, and nothing else is
    made.picture(2).save(pictures / "img2.jpg")
    before = records_by_line(output)
    assert main(given) == 0
    assert len(results(output)["problems"]) == 2
    assert {cell["samples"] for cell in results(output)["rows"]["overall"].values()} == {4}
    assert [key for key in records_by_line(output)[len(before) :] if key not in ("101", "102")] == []


def records_by_line(output: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (output / "flex-000.jsonl").open()]


def test_nothing_that_can_be_asked_is_an_error(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made.textvqa(tmp_path / "data", 2)
    for picture in (folder / "train_images").iterdir():
        picture.unlink()
    assert main(command("textvqa", folder, checkpoint, tmp_path / "out", "--arms", "coarse")) == 1
    assert main(command("vstar", folder, checkpoint, tmp_path / "out2")) == 2
    assert "must hold a folder per subset" in capsys.readouterr().err


def test_answers_of_another_model_or_setting_are_not_mixed_in(
    checkpoint: Path, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = command("textvqa", data["textvqa"], checkpoint, tmp_path, "--arms", "coarse", "--limit", "1")
    assert main(given) == 0
    assert main([*given, "--zoom", "3"]) == 2
    assert (
        "holds answers with another zoom (2, now 3), dense_zoom (2, now 3); choose" in capsys.readouterr().err
    )
    (tmp_path / "coarse-000.jsonl").write_text('{"key": "100", "answer": "a", "seconds": 1}\nnot ours\n')
    assert main(given) == 2
    assert "coarse-000.jsonl:2: must be a JSON object with a key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "coarse,fast"], "--arms must be some of coarse,flex,dense, got fast"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    ],
)
def test_options_are_checked(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["vstar", "--data", "x", "--model", "y", *more])
    assert message in capsys.readouterr().err


def test_prompts(by_hand: Any) -> None:
    assert (
        resolve(by_hand, "auto") == "v1"
    )  # its template speaks LLaVA-1.5's format, without the system sentence
    assert prompt(by_hand, "What?", 2, "v1").endswith(
        "user's questions. USER: <image>\n<image>\nWhat? ASSISTANT:"
    )
    assert prompt(by_hand, "What?", 1, "template") == "USER: <image>\nWhat? ASSISTANT:"


# ---------------------------------------------------------------------- several processes, and kills

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(checkpoint: Path, tmp_path: Path) -> None:
    folder = made.textvqa(tmp_path / "data", 12)
    more = ("--arms", "coarse,flex", "--batch-size", "1")
    whole, output = tmp_path / "whole", tmp_path / "killed"
    assert main(command("textvqa", folder, checkpoint, whole, *more)) == 0
    given = command("textvqa", folder, checkpoint, output, *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.vqa", *given], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    file = output / "flex-000.jsonl"
    deadline = time.monotonic() + 300
    while not (file.exists() and file.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "results.json").exists()
    # as if it had been killed in the middle of a line
    lines = file.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n")]
    assert 2 <= len(kept) < 12
    file.write_bytes(b"".join(kept) + b'{"key": "1')
    assert main(given) == 0
    assert file.read_bytes().splitlines(keepends=True)[: len(kept)] == kept  # none of them was asked again
    for arm in ("coarse", "flex"):
        first, second = records(whole, arm), records(output, arm)
        assert {k: r["answer"] for k, r in first.items()} == {k: r["answer"] for k, r in second.items()}
    assert results(whole)["rows"] == results(output)["rows"]
    before = {path: path.read_bytes() for path in output.glob("*.jsonl")}
    assert main(given) == 0  # nothing is left to ask
    assert before == {path: path.read_bytes() for path in output.glob("*.jsonl")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vstar", "textvqa"])
def test_two_processes_give_the_table_of_one(
    name: str, checkpoint: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    assert main(command(name, data[name], checkpoint, tmp_path / "one")) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = command(name, data[name], checkpoint, tmp_path / "two", "--json")
    done = subprocess.run(
        [*launcher, "-m", "benchmarks.vqa", *given],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("| samples |") == 1  # one process reports
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one["rows"] == two["rows"] and one["problems"] == two["problems"] == []
    shares = [len((tmp_path / "two" / f"flex-00{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert sum(shares) == len(records(tmp_path / "one", "flex")) and max(shares) - min(shares) <= 1
