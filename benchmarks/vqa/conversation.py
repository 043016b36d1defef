"""How a question becomes a prompt: LLaVA-1.5's `v1` conversation, or the model's own chat template."""

from __future__ import annotations

from typing import Any

# What LLaVA-1.5 was trained to see before the first question.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
KINDS = ("auto", "v1", "template")


def resolve(adapter: Any, kind: str) -> str:
    """`v1` or `template`: what `auto` means for this model.

    A template in LLaVA-1.5's format leaves out the system sentence that the model was trained with, so `v1` stands for
    it; any other template is the model's own language.

    Raises:
        ValueError: `template` for a model that has none.
    """
    has_template = bool(getattr(adapter, "chat_template", None))
    if kind == "template" and not has_template:
        raise ValueError("--conversation template: the model's processor has no chat template; take v1")
    if kind != "auto":
        return kind
    if not has_template:
        return "v1"
    shown = _templated(adapter, "?", 0)
    return "v1" if "USER:" in shown and shown.rstrip().endswith("ASSISTANT:") else "template"


def prompt(adapter: Any, text: str, pictures: int, kind: str) -> str:
    """The whole prompt, up to where the answer starts.

    Args:
        adapter: Knows the placeholder and the template.
        text: What is asked.
        pictures: How many placeholders come before it.
        kind: `v1` or `template`.
    """
    if kind == "template":
        return _templated(adapter, text, pictures)
    return f"{SYSTEM} USER: {(adapter.placeholder + chr(10)) * pictures}{text} ASSISTANT:"


def _templated(adapter: Any, text: str, pictures: int) -> str:
    content = [*[{"type": adapter.medium}] * pictures, {"type": "text", "text": text}]
    message = {"role": "user", "content": content}
    return str(adapter.apply_chat_template([message], add_generation_prompt=True, tokenize=False))
