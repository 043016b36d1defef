"""What a training is judged by: whole answers that are right, and the share of regions that was selected."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import ModelOutput

from ..errors import WrapStateError
from ..exploration import ExploringSelector
from ..grid import Grid
from ..selection import Selector
from .offload import without_peft


def other_outputs() -> list[str]:
    """What an evaluation must not gather: all that models hand out beside loss and logits.

    LLaVA's config names nothing for Trainer to leave out, and a KV cache can't be gathered. These are the fields of
    every output class that was imported, the model's own among them.
    """
    found: set[str] = set()
    classes: list[type] = [ModelOutput]
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        found |= {field.name for field in fields(cls)} if is_dataclass(cls) else set()
    return sorted(found - {"loss", "logits"})


def right_tokens(logits: Any, labels: Tensor) -> Tensor:
    """`preprocess_logits_for_metrics` of a Trainer: per sample, how many of its labels the model would have said.

    Args:
        logits: `[B, T, V]`, or a tuple that begins with them.
        labels: `[B, T]`, -100 where nothing was asked.

    Returns:
        `[B, 2]` labels that are the likeliest token, and labels in all.
    """
    first = logits[0] if isinstance(logits, (tuple, list)) else logits
    asked = labels[:, 1:] != -100
    right = (first[:, :-1].argmax(-1) == labels[:, 1:]) & asked
    return torch.stack([right.sum(dim=1), asked.sum(dim=1)], dim=1)


class CountingSelector(Selector):
    """Another selector, whose choices are counted: with gradients and without, apart.

    Args:
        inner: The other selector.
    """

    def __init__(self, inner: Selector):
        self.inner = inner
        self.counts: dict[bool, list[Tensor | float]] = {True: [0.0, 0.0], False: [0.0, 0.0]}

    def __getattr__(self, name: str) -> Any:
        # early in unpickling there is no inner selector yet
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def choose(self, scores: Tensor, grid: Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        chosen = self.inner.choose(scores, grid, selectable, keys)
        able = selectable.to(chosen.device).expand_as(chosen)
        own = self.counts[torch.is_grad_enabled()]
        # on the device: to know them now would wait for it
        own[0] = own[0] + (chosen & able).sum()
        own[1] = own[1] + able.sum()
        return chosen

    def take(self, training: bool) -> float | None:
        """The share chosen since the last call; None if nothing was asked."""
        chosen, able = (float(n) for n in self.counts[training])
        self.counts[training] = [0.0, 0.0]
        return chosen / able if able else None


class SelectedShare(TrainerCallback):
    """Logs `selected`, the share of regions that a row's selection held, and judges evaluations.

    ```
    share = SelectedShare(model)
    trainer = Trainer(
        ..., callbacks=[share, ...], compute_metrics=share.metrics, preprocess_logits_for_metrics=right_tokens
    )
    trainer.train(ignore_keys_for_eval=other_outputs())
    ```
    What `Exploration` adds isn't counted: it is what the selector chose. Every process counts its own samples.

    Args:
        model: A wrapped model, with peft around it or not.

    Raises:
        WrapStateError: The model isn't wrapped.
    """

    def __init__(self, model: Any):
        binding = getattr(without_peft(model), "_flex_binding", None)
        if binding is None:
            raise WrapStateError(
                "SelectedShare: the model isn't wrapped; call flexcore.wrap(model, config) first"
            )
        self.binding = binding
        self.counter = CountingSelector(binding.selector)
        binding.selector = self.counter

    def close(self) -> None:
        """Give the model its own selector back."""
        if (
            isinstance(self.binding.selector, ExploringSelector)
            and self.binding.selector.inner is self.counter
        ):
            self.binding.selector.inner = self.counter.inner
        elif self.binding.selector is self.counter:
            self.binding.selector = self.counter.inner

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the share of the steps since the last log to it."""
        if logs is None or "loss" not in logs:
            return
        share = self.counter.take(training=True)
        if share is not None:
            logs["selected"] = round(share, 4)
            state.log_history[-1]["selected"] = logs["selected"]

    def metrics(self, predicted: Any) -> dict[str, float]:
        """`compute_metrics` of a Trainer: `answers` and `tokens` that are right, and the share `selected`.

        An answer is right if every one of its tokens is the likeliest after the true ones before it, the end
        included. That is when greedy generation would say it, so no generation is needed to know.
        """
        counts = torch.as_tensor(predicted.predictions)
        right, asked = counts[:, 0], counts[:, 1]
        found = {
            "answers": float((right == asked).double().mean()),
            "tokens": float(right.sum() / asked.sum().clamp(min=1)),
        }
        share = self.counter.take(training=False)
        return found if share is None else {**found, "selected": share}
