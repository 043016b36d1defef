"""How a question becomes a prompt: as in training, see `flexcore.hf.conversation`."""

from __future__ import annotations

from typing import Any

from flexcore.hf.conversation import KINDS, SYSTEM, Turn, resolve
from flexcore.hf.conversation import prompt as turn_prompt

__all__ = ["KINDS", "SYSTEM", "prompt", "resolve"]


def prompt(adapter: Any, text: str, pictures: int, kind: str) -> str:
    """The whole prompt, up to where the answer starts.

    Args:
        adapter: Knows the placeholder and the template.
        text: What is asked.
        pictures: How many placeholders come before it.
        kind: `v1` or `template`.
    """
    return turn_prompt(adapter, Turn(text, "", pictures), kind)
