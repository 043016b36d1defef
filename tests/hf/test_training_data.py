"""Examples from files, and conversations as text: both layouts, bad lines, spans of the answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexcore.hf.conversation import SYSTEM, Turn, prompt, resolve, written
from flexcore.hf.training_data import read_examples


class Chat:
    """An adapter as far as conversations know it, with a ChatML template."""

    placeholder, medium, chat_template = "<image>", "image", "chatml"

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert not tokenize
        out = ""
        for message in messages:
            parts = [p.get("text", "<image>\n") for p in message["content"]]
            out += f"<|im_start|>{message['role']}\n{''.join(parts)}<|im_end|>\n"
        return out + ("<|im_start|>assistant\n" if add_generation_prompt else "")


class Thinking(Chat):
    """A template that begins an answer in one way and shows it in another."""

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        out = super().apply_chat_template(messages, add_generation_prompt, tokenize)
        return out + ("<think>\n" if add_generation_prompt else "")


class Plain:
    placeholder, medium, chat_template = "<image>", "image", None


TURNS = (Turn("What?", "A cat.", 1), Turn("Where?", "Here."))


def test_v1_is_llavas_own_conversation():
    text, spans = written(Plain(), TURNS, "v1", ["</s>"])
    assert text == f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Where? ASSISTANT: Here.</s>"
    assert [text[a:b] for a, b in spans] == [" A cat.</s>", " Here.</s>"]
    assert text[: spans[0][0]] == prompt(Plain(), TURNS[0], "v1")


def test_a_template_is_followed_and_its_end_kept():
    text, spans = written(Chat(), TURNS, "template", ["</s>", "<|im_end|>"])
    assert [text[a:b] for a, b in spans] == ["A cat.<|im_end|>", "Here.<|im_end|>"]
    assert text.startswith(
        prompt(Chat(), TURNS[0], "template") + "A cat.<|im_end|>\n<|im_start|>user\nWhere?"
    )
    assert text.endswith("Here.<|im_end|>")
    # where generation wouldn't stop at what the template writes, a token at which it does
    text, spans = written(Chat(), TURNS[:1], "template", ["</s>"])
    assert text.endswith("A cat.<|im_end|></s>") and spans[0][1] == len(text)


def test_a_template_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="conversation must be v1"):
        written(Thinking(), TURNS[:1], "template")


@pytest.mark.parametrize(
    "adapter, kind, expected", [(Plain(), "auto", "v1"), (Chat(), "auto", "template"), (Chat(), "v1", "v1")]
)
def test_resolve(adapter, kind, expected):
    assert resolve(adapter, kind) == expected


def test_resolve_refuses():
    with pytest.raises(ValueError, match="no chat template"):
        resolve(Plain(), "template")
    with pytest.raises(ValueError, match="must be one of auto, v1, template, got 'v2'"):
        resolve(Plain(), "v2")


# ---------------------------------------------------------------------- files


def llava(*said: str, **more) -> dict:
    who = ("human", "gpt")
    return {
        "id": "x",
        "conversations": [{"from": who[i % 2], "value": s} for i, s in enumerate(said)],
        **more,
    }


def read(folder: Path, lines, raw: str | None = None, **options):
    (folder / "a.png").touch()
    (folder / "b.png").touch()
    text = "".join(json.dumps(line) + "\n" for line in lines) if raw is None else raw
    (folder / "data.json").write_text(text)
    problems: list[str] = []
    found = read_examples(
        folder / "data.json", folder, lambda p: problems.append(str(p)), progress=False, **options
    )
    return found, problems


def test_both_layouts(tmp_path):
    lines = [
        {"image": "a.png", "question": " What? ", "answer": " A "},
        {"image": ["a.png", "b.png"], "question": "<image><image> Same?", "answer": "No"},
        llava("What?\n<image>", "A", "Where?", "B", image="b.png"),
        llava("Hi", "Ho"),
    ]
    found, problems = read(tmp_path, lines)
    assert not problems
    assert [e.turns for e in found] == [
        (Turn("What?", "A", 1),),
        (Turn("Same?", "No", 2),),
        (Turn("What?", "A", 1), Turn("Where?", "B")),
        (Turn("Hi", "Ho"),),
    ]
    assert [[p.name for p in e.media] for e in found] == [["a.png"], ["a.png", "b.png"], ["b.png"], []]
    assert [e.where for e in found] == [f"data.json:{n}" for n in (1, 2, 3, 4)]


def test_a_list_names_the_line_of_each_entry(tmp_path):
    entries = [llava("<image>", "A", image="a.png"), llava("Hi"), llava("Hi", "Ho")]
    found, problems = read(tmp_path, [], raw="\n" + json.dumps(entries, indent=1))
    lines = ["", *json.dumps(entries, indent=1).splitlines()]
    starts = [n for n, line in enumerate(lines, 1) if line == " {"]
    assert [e.where for e in found] == [f"data.json:{starts[0]}", f"data.json:{starts[2]}"]
    assert problems[0].startswith(f"data.json:{starts[1]}: conversations must be a list of questions")
    with pytest.raises(ValueError, match=r"data\.json:3: must be a JSON list or JSON lines"):
        read(tmp_path, [], raw="[\n{},\nnonsense]")


@pytest.mark.parametrize(
    "line, message",
    [
        ("nonsense", "must be JSON: Expecting value at column 1"),
        ("[1]x", "must be JSON"),
        ("3", "must be an object, got int"),
        ({"image": "a.png", "answer": "A"}, "question must be text, got None"),
        ({"image": "a.png", "question": "?", "answer": 3}, "answer must be text, got 3"),
        ({"image": "a.png", "question": "?", "answer": "  "}, "answer must be text"),
        ({"question": "?", "answer": "A"}, "image must be a file's name, it is missing"),
        ({"image": 3, "question": "?", "answer": "A"}, "image must be a file's name, got 3"),
        ({"image": "c.png", "question": "?", "answer": "A"}, "there is no picture"),
        (
            {"image": "a.png", "question": "<image><image>", "answer": "A"},
            "must stand 1 times, once per image, got 2",
        ),
        (llava("?", "A", "<image>", "B", image="a.png"), "must stand in the first question"),
        (llava("<image>", "A"), "must stand 0 times"),
        (llava("?", "A", "?"), "conversations must be a list of questions, each followed by its answer"),
        (
            {"conversations": [{"from": "gpt", "value": "A"}, {}]},
            r"conversations[0].from must be 'human', got 'gpt'",
        ),
    ],
    ids=range(14),
)
def test_a_bad_line_is_reported_and_left_out(tmp_path, line, message):
    good = json.dumps({"image": "a.png", "question": "?", "answer": "A"})
    bad = line if isinstance(line, str) else json.dumps(line)
    found, problems = read(tmp_path, [], raw=f"{good}\n\n{bad}\n{good}")
    assert [e.where for e in found] == ["data.json:1", "data.json:4"]
    (problem,) = problems
    assert problem.startswith("data.json:3: ") and message in problem


def test_what_a_check_refuses_is_reported(tmp_path):
    def check(example):
        if example.media[0].name == "a.png":
            raise OSError("it is broken")

    lines = [{"image": name, "question": "?", "answer": "A"} for name in ("a.png", "b.png")]
    found, problems = read(tmp_path, lines, checks=[check])
    assert len(found) == 1 and problems == ["data.json:1: it is broken"]
    with pytest.raises(ValueError, match="nothing that can be used: 1 lines"):
        read(tmp_path, lines[:1], checks=[check])
    with pytest.raises(ValueError, match="data must be a file"):
        read_examples(tmp_path / "away", tmp_path, print)
    with pytest.raises(ValueError, match="images must be a folder"):
        read_examples(tmp_path / "data.json", tmp_path / "away", print)
