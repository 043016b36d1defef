"""Scores and layouts of the four benchmarks, against answers worked out by hand; no model is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.vqa import magnifier_bench, rsvqa, textvqa, vstar
from benchmarks.vqa.base import Benchmark, Problem, Sample
from benchmarks.vqa.vqa_answers import accuracy, normalise

from . import vqa_helpers as made

HINT = "\nAnswer the question using a single word or phrase."


def read(benchmark: Benchmark, folder: Path) -> tuple[list[Sample], list[str]]:
    problems: list[Problem] = []
    return benchmark.read(folder, problems.append), [str(problem) for problem in problems]


def sample(group: str, truth: Any, text: str = "?") -> Sample:
    return Sample("key", "here", group, text, (), truth)


# ---------------------------------------------------------------------- V*-Bench


def test_vstar_reads_questions_options_and_pictures_of_every_suffix(tmp_path: Path) -> None:
    samples, problems = read(vstar.BENCHMARK, made.vstar(tmp_path / "v", 5))
    assert not problems and len(samples) == 10
    assert [s.pictures[0].suffix for s in samples[:5]] == [".jpg", ".JPG", ".webp", ".png", ".jpeg"]
    assert samples[1].text == "What colour is thing 1?" + HINT
    assert samples[1].options == ("dark green", "a blue cat", "no", "red")
    assert (samples[6].key, samples[6].group) == ("relative_position/sa_1", "relative_position")


def test_vstar_takes_the_likeliest_option_and_the_first_is_right() -> None:
    asked = [
        ("direct_attributes", [0.1, 0.2]),
        ("direct_attributes", [0.3, 0.2]),
        ("direct_attributes", [1.0, 2.0]),
    ]
    asked += [("relative_position", [5.0, 4.0, 6.0])]
    scored = [(sample(group, 0), losses, vstar.score(sample(group, 0), losses)) for group, losses in asked]
    assert [value for *_, value in scored] == [1.0, 0.0, 1.0, 0.0]
    assert vstar.rows(scored) == [
        ("direct_attributes", 2 / 3, 3),
        ("relative_position", 0.0, 1),
        ("overall", 0.5, 4),
    ]
    # further subsets stay out of the total that others report
    more = [*scored, (sample("OCR", 0), [0.0, 1.0], 1.0)]
    assert vstar.rows(more)[2:] == [
        ("OCR", 1.0, 1),
        ("overall (direct_attributes and relative_position)", 0.5, 4),
    ]


def test_vstar_reports_what_cannot_be_asked(tmp_path: Path) -> None:
    folder = made.vstar(tmp_path / "v", 5)
    here = folder / "direct_attributes"
    (here / "sa_0.json").write_text('{"question": "What?",\n "options": [}')
    made.change(here / "sa_1.json", lambda entry: entry.pop("question"))
    made.change(here / "sa_2.json", lambda entry: entry.update(options=["one"]))
    (here / "sa_3.png").unlink()
    samples, problems = read(vstar.BENCHMARK, folder)
    assert len(samples) == 6
    assert problems[0].startswith("direct_attributes/sa_0.json:2: must be JSON")
    assert problems[1:] == [
        "direct_attributes/sa_1.json: question must be a str and not empty, got None",
        "direct_attributes/sa_2.json: options must be two strings or more, the right one first, got ['one']",
        "direct_attributes/sa_3.json: there is no picture sa_3 beside it (.jpg, .JPG, .webp, .png, .jpeg)",
    ]
    with pytest.raises(ValueError, match="must hold a folder per subset"):
        read(vstar.BENCHMARK, here)


# ---------------------------------------------------------------------- TextVQA


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Stop Sign.", "stop sign"),
        ("a  cat\n and an owl", "cat and owl"),
        ("Two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("1,000,000", "1000000"),
        ("$3.50", "$3.50"),
        ("10:30 a.m.", "10:30 am"),
        ("dont stop", "don't stop"),
        ("don't stop", "don't stop"),
        ("its", "its"),
        ("t-shirt", "t shirt"),
        ("yes!", "yes"),
        ("what? (really)", "what really"),
        ("rock 'n roll", "rock 'n roll"),
        ("", ""),
    ],
)
def test_answers_are_normalised(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


@pytest.mark.parametrize(
    ("matching", "expected"),
    # leaving out one that matches leaves m - 1 matches, leaving out another leaves m
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_leaves_each_annotator_out(matching: int, expected: float) -> None:
    annotators = ["The red."] * matching + [f"other {i}" for i in range(10 - matching)]
    assert accuracy("red", annotators) == pytest.approx(expected)


def test_textvqa_layout(tmp_path: Path) -> None:
    folder = made.textvqa(tmp_path / "t", 6)
    file = folder / "TextVQA_0.5.1_val.json"

    def spoil(content: Any) -> None:
        data = content["data"]
        data[1]["answers"] = ["stop"] * 9
        data[2] = "no entry"
        data[3]["question_id"] = 100
        del data[4]["image_id"]

    made.change(file, spoil)
    samples, problems = read(textvqa.BENCHMARK, folder)
    assert [s.key for s in samples] == ["100", "105"]
    assert samples[0].text == "What does sign 0 say?" + HINT
    assert samples[0].pictures == (folder / "train_images" / "img0.jpg",)
    assert textvqa.score(samples[0], "STOP") == 1.0 and textvqa.score(samples[0], "go") == pytest.approx(0.6)
    name = file.name
    assert problems == [
        f"{name}: data[1]: answers must be 10 strings, got {['stop'] * 9}",
        f"{name}: data[2]: must be an object, got str",
        f"{name}: data[3] (question_id 100): '100' is at {name}: data[0] (question_id 100) already",
        f"{name}: data[4]: image_id must be a str and not empty, got None",
    ]
    file.write_text('{"data":\n\n [,]}')
    with pytest.raises(ValueError, match=r"TextVQA_0\.5\.1_val\.json:3: must be JSON"):
        read(textvqa.BENCHMARK, folder)


# ---------------------------------------------------------------------- MagnifierBench

CHOICES = "What colour is it?\n(A) red\n(B) dark red\n(C) blue car\n(D) 12"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The answer is B.", "B"),
        ("I see D, but the answer is (C)", "C"),
        ("the answer is: A", "A"),
        ("The answer is blue car", "C"),
        ("C", "C"),
        ("(D)", "D"),
        ("B. dark red", "B"),
        ("Option A.", "A"),
        ("A man in dark red", "B"),
        ("A or B", None),
        ("dark red", "B"),
        ("Red!", "A"),
        ("it is a blue car", "C"),
        ("12", "D"),
        ("123", None),
        ("red or blue car", None),
        ("ABBA", None),
        ("", None),
    ],
)
def test_the_letter_of_a_response(response: str, expected: str | None) -> None:
    assert magnifier_bench.letter(response, CHOICES) == expected


@pytest.mark.parametrize(
    "instruction",
    ["Q?\n(A) red\n(B) blue", "Q? A. red B. blue", "Q?\nA) red\nB) blue", "Q? A: red\nB: blue\n"],
)
def test_options_are_found_however_they_are_written(instruction: str) -> None:
    assert magnifier_bench.options(instruction) == {"A": "red", "B": "blue"}


def test_a_judge_decides_only_where_there_is_no_letter() -> None:
    asked: list[tuple[str, str, str]] = []

    def judge(*what: str) -> bool:
        asked.append(what)
        return True

    one = sample("all", {"letter": "C", "answer": "(C) blue car"}, CHOICES)
    assert magnifier_bench.score(one, "B", judge) == 0.0 and magnifier_bench.score(one, "C", judge) == 1.0
    assert not asked
    assert magnifier_bench.score(one, "the azure automobile") == 0.0
    assert magnifier_bench.score(one, "the azure automobile", judge) == 1.0
    assert asked == [(CHOICES, "(C) blue car", "the azure automobile")]


def test_magnifier_layout(tmp_path: Path) -> None:
    folder = made.magnifier(tmp_path / "m", 6)

    def spoil(content: Any) -> None:
        content["data"]["INS_1"]["image_ids"] = ["IMG_9"]
        content["data"]["INS_2"]["answer"] = "purple"
        content["data"]["INS_3"]["image_ids"] = ["IMG_3", "IMG_4"]
        content["data"]["INS_5"] = {}

    made.change(folder / "data_instructions.json", spoil)
    made.change(folder / "images.json", lambda images: images.update(IMG_4="!!"))
    samples, problems = read(magnifier_bench.BENCHMARK, folder)
    assert [s.key for s in samples] == ["INS_0", "INS_3", "INS_4"]
    assert samples[0].text == "What is number 0?\n(A) red\n(B) dark red\n(C) blue\n(D) 0"
    assert samples[0].truth["letter"] == "A" and samples[0].media()[0].size == (90, 40)
    assert len(samples[1].pictures) == 2
    with pytest.raises(ValueError, match="must be base64"):
        samples[2].media()
    name = "data_instructions.json"
    assert problems == [
        f"{name}: data['INS_1']: image_ids must name pictures of images.json, got ['IMG_9']",
        f"{name}: data['INS_2']: answer must name one of A to D, or an option's text, got 'purple'",
        f"{name}: data['INS_5']: instruction must be a str and not empty, got None",
    ]


# ---------------------------------------------------------------------- RSVQA-HR


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("Yes.", "yes", 1),
        ("no", "yes", 0),
        ("9", "7", 1),
        ("10", "7", 1),
        ("11", "7", 0),
        ("0", "0", 1),
        ("1", "0", 0),
        ("between 0 and 10", "7", 1),
        ("100", "11", 1),
        ("101", "1000", 1),
        ("5,000", "1001", 1),
        ("121 m2", "999m2", 1),
        ("121", "999m2", 0),
        ("0 m²", "0m2", 1),
    ],
)
def test_numbers_count_by_class(answer: str, truth: str, score: int) -> None:
    assert rsvqa.score(sample("count", truth), answer) == score


def test_rsvqa_rows() -> None:
    asked = [("presence", "yes", "yes"), ("presence", "yes", "no"), ("count", "7", "9"), ("count", "7", "7")]
    asked += [("comp", "no", "yes")]
    scored = [(sample(g, t), a, rsvqa.score(sample(g, t), a)) for g, t, a in asked]
    assert rsvqa.rows(scored) == [
        ("presence", 0.5, 2),
        ("count", 1.0, 2),
        ("comp", 0.0, 1),
        ("average of types", 0.5, 5),
        ("overall", 0.6, 5),
        ("count, to the number", 0.5, 2),
    ]


def test_rsvqa_layout(tmp_path: Path) -> None:
    folder = made.rsvqa(tmp_path / "r", 8)

    def spoil(content: Any) -> None:
        questions = content["questions"]
        questions[0]["active"] = False
        questions[1]["answers_ids"] = [999]
        questions[2]["answers_ids"] = [50, 52]  # an answer to another question comes first
        del questions[4]["type"]

    made.change(folder / "USGS_split_test_questions.json", spoil)
    made.change(folder / "USGS_split_test_images.json", lambda c: c["images"][5].update(active=False))
    made.change(folder / "USGS_split_test_answers.json", lambda c: c["answers"][6].update(active=False))
    samples, problems = read(rsvqa.BENCHMARK, folder)
    assert [(s.key, s.group, s.truth) for s in samples] == [
        ("2", "area", "120m2"),
        ("3", "comp", "no"),
        ("7", "comp", "no"),
    ]
    assert samples[0].text == "Is it 2?" + HINT and samples[0].pictures[0] == folder / "2.tif"
    name = "USGS_split_test_questions.json"
    wanted = "answers_ids must name an active answer of USGS_split_test_answers.json to question"
    assert problems == [
        f"{name}: questions[1]: {wanted} 1, got [999]",
        f"{name}: questions[4]: type must be a str and not empty, got None",
        f"{name}: questions[6]: {wanted} 6, got [56]",
    ]
