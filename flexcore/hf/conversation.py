"""How questions and answers become text: LLaVA-1.5's `v1` conversation, or the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What LLaVA-1.5 was trained to see before the first question.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
KINDS = ("auto", "v1", "template")


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        question: In words; media are not written into it.
        answer: What the model should say.
        media: How many media come before the question.
    """

    question: str
    answer: str
    media: int = 0


def resolve(adapter: Any, kind: str) -> str:
    """`v1` or `template`: what `auto` means for this model.

    A template in LLaVA-1.5's format leaves out the system sentence that the model was trained with, so `v1` stands for
    it; any other template is the model's own language.

    Raises:
        ValueError: `template` for a model that has none, or a kind that there isn't.
    """
    if kind not in KINDS:
        raise ValueError(f"conversation must be one of {', '.join(KINDS)}, got {kind!r}")
    has_template = bool(getattr(adapter, "chat_template", None))
    if kind == "template" and not has_template:
        raise ValueError(
            "conversation must be v1: the model's processor has no chat template, got 'template'"
        )
    if kind != "auto":
        return kind
    if not has_template:
        return "v1"
    shown = _templated(adapter, [_asked(adapter, Turn("?", ""))], True)
    return "v1" if "USER:" in shown and shown.rstrip().endswith("ASSISTANT:") else "template"


def prompt(adapter: Any, turn: Turn, kind: str) -> str:
    """The text up to where the answer to a single question starts.

    Args:
        adapter: Knows the placeholder and the template.
        turn: The question.
        kind: `v1` or `template`.
    """
    if kind == "template":
        return _templated(adapter, [_asked(adapter, turn)], True)
    return f"{SYSTEM} {_v1(adapter, turn)}"


def written(
    adapter: Any, turns: Sequence[Turn], kind: str, stops: Sequence[str] = ()
) -> tuple[str, list[tuple[int, int]]]:
    """A whole conversation, and where in it the model speaks.

    An answer's span begins where the prompt that generation would be given ends, and ends with a token at which
    generation stops: the template's own if it writes one, else the first of `stops`.

    Args:
        adapter: Knows the placeholder and the template.
        turns: In order.
        kind: `v1` or `template`.
        stops: Tokens at which generation stops, as text.

    Returns:
        The text, and the answers' `(start, end)` in characters.

    Raises:
        ValueError: The template writes an answered conversation in another way than it begins one.
    """
    text, spans = "", []
    messages: list[dict[str, Any]] = []
    shown = ""
    for i, turn in enumerate(turns):
        if kind == "v1":
            asked = f"{SYSTEM} {_v1(adapter, turn)}" if not i else _v1(adapter, turn)
            said, after = f" {turn.answer}", ""
        else:
            messages.append(_asked(adapter, turn))
            asked, shown = _rest(_templated(adapter, messages, True), shown)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            segment, shown = _rest(_templated(adapter, messages, False), shown)
            said = segment.rstrip()
            after = segment[len(said) :]
        if stops and not said.endswith(tuple(stops)):
            said += stops[0]
        text += asked
        spans.append((len(text), len(text) + len(said)))
        text += said + (after if i + 1 < len(turns) else "")
    return text, spans


def _v1(adapter: Any, turn: Turn) -> str:
    return f"USER: {(adapter.placeholder + chr(10)) * turn.media}{turn.question} ASSISTANT:"


def _asked(adapter: Any, turn: Turn) -> dict[str, Any]:
    content = [*[{"type": adapter.medium}] * turn.media, {"type": "text", "text": turn.question}]
    return {"role": "user", "content": content}


def _templated(adapter: Any, messages: list[dict[str, Any]], open_ended: bool) -> str:
    return str(adapter.apply_chat_template(messages, add_generation_prompt=open_ended, tokenize=False))


def _rest(whole: str, before: str) -> tuple[str, str]:
    """What a template has added, and all that it has written so far."""
    if not whole.startswith(before):
        raise ValueError(
            "conversation must be v1: the model's chat template writes an answered conversation in another way than "
            f"it begins one ({before[-40:]!r} isn't continued)"
        )
    return whole[len(before) :], whole
