"""What plain `transformers.Trainer` needs: a collator, what trains, alpha's warm-up, exploration, a time limit.

DDP and FSDP2 need no `find_unused_parameters`, also where a process' batch has no media. To generate with a model that
FSDP2 shards, call `torch.distributed.fsdp.register_fsdp_forward_method(model, "generate")` once, as for any model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import WrapStateError
from ..exploration import ExploringSelector
from .collation import collate
from .inputs import FlexInputs
from .offload import without_peft


def freeze_base(model: Any) -> list[str]:
    """Freeze everything but the fine projections.

    Args:
        model: A wrapped model. Call this before `peft.get_peft_model`, which freezes the rest by itself.

    Returns:
        Names of the parameters that train.

    Raises:
        WrapStateError: The model isn't wrapped.
    """
    inner = without_peft(model)
    if getattr(inner, "_flex_binding", None) is None:
        raise WrapStateError("freeze_base: the model isn't wrapped; call flexcore.wrap(model, config) first")
    inner.requires_grad_(False)
    inner.flex_fine.live().requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


class LiveAlpha:
    """The alpha of the step that is running, read by the model's forward as a number.

    The value lies in shared memory: a collator in a worker process may put this object into batches long before their
    step comes, and forward still reads the value of the step.
    """

    def __init__(self, value: float = 1.0):
        # value, and how often it was read
        self._cell = torch.tensor([value, 0.0], dtype=torch.float64).share_memory_()

    def __float__(self) -> float:
        self._cell[1] += 1
        return float(self._cell[0])

    def set(self, value: float) -> None:
        """Change what forward reads from now on."""
        self._cell[0] = value

    @property
    def reads(self) -> int:
        """How often it was read."""
        return int(self._cell[1])


class AlphaWarmup(TrainerCallback):
    """Alpha rises with the epoch in training, `min(1, epoch * config.alpha_warmup)`, and is 1 in evaluation.

    Nothing is kept on the model: alpha travels in the batch, so the same object goes to the collator.

    ```
    warmup = AlphaWarmup()
    Trainer(model, args, data_collator=FlexCollator(processor, alpha=warmup), callbacks=[warmup], ...)
    ```
    With a collator of your own, put `warmup.alpha` into every batch as `alpha`.

    Args:
        rate: Used instead of the config's `alpha_warmup`.

    Raises:
        ValueError: `rate` is negative.
    """

    def __init__(self, rate: float | None = None):
        if rate is not None and not rate >= 0:
            raise ValueError(f"rate must be at least 0, got {rate!r}")
        self.rate = rate
        self.alpha = LiveAlpha()
        self._reads = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set alpha for the optimizer step that begins."""
        config = without_peft(kwargs["model"]).flex_config
        config = config if self.rate is None else config.replace(alpha_warmup=self.rate)
        self.alpha.set(config.alpha(state.epoch or 0.0))
        self._reads = self.alpha.reads

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Back to 1, for evaluation between steps.

        Raises:
            ValueError: A whole step has passed and no forward read alpha.
        """
        self.alpha.set(1.0)
        if self.alpha.reads == self._reads:
            raise ValueError(
                "alpha must be in the batches for AlphaWarmup to act, and no forward of this step read it; pass "
                "FlexCollator(..., alpha=warmup), or put warmup.alpha into every batch"
            )


class Exploration(TrainerCallback):
    """Let rows read more than was selected: everything at first, then less, at the end a few random regions.

    Ours and not the paper's, like `FlexConfig(selection_loss=...)`, which it goes well with: what is never read can't
    be learned about. The share of the other regions that a row gets to see falls from 1 to `floor` over the first part
    of the training. Evaluation between steps, and the model afterwards, read what the selector chose and no more.

    Args:
        anneal: The part of the training's steps over which the share falls.
        floor: The share from then on.

    Raises:
        ValueError: An argument is outside `[0, 1]`.
    """

    def __init__(self, anneal: float = 0.5, floor: float = 0.1):
        for name, value in (("anneal", anneal), ("floor", floor)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        self.anneal = anneal
        self.floor = floor
        self.share = 0.0

    def at(self, progress: float) -> float:
        """The share when this part of the training, in `[0, 1]`, is over."""
        left = 1 - progress / self.anneal if self.anneal else 0.0
        return self.floor + (1 - self.floor) * max(0.0, left)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put a selector that explores in front of the model's own.

        Raises:
            WrapStateError: The model isn't wrapped.
        """
        binding = getattr(without_peft(kwargs["model"]), "_flex_binding", None)
        if binding is None:
            raise WrapStateError(
                "Exploration: the model isn't wrapped; call flexcore.wrap(model, config) first"
            )
        if not isinstance(binding.selector, ExploringSelector):  # left there by a training that broke off
            binding.selector = ExploringSelector(binding.selector, lambda: self.share)
        binding.selector.share = lambda: self.share

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the share for the optimizer step that begins."""
        self.share = self.at(state.global_step / max(1, state.max_steps))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """No exploration between steps."""
        self.share = 0.0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the model its own selector back."""
        binding = without_peft(kwargs["model"])._flex_binding
        if isinstance(binding.selector, ExploringSelector):
            binding.selector = binding.selector.inner


class TimeLimit(TrainerCallback):
    """Stop training, with a checkpoint, at the first step that ends after so many minutes.

    Of several processes the first one's clock counts: they must all stop at the same step.

    Args:
        minutes: Since training began, or went on.

    Raises:
        ValueError: `minutes` isn't a positive number.
    """

    def __init__(self, minutes: float):
        if not (minutes > 0 and math.isfinite(minutes)):
            raise ValueError(f"minutes must be a number > 0, got {minutes!r}")
        self.minutes = minutes
        self._end = math.inf

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the clock."""
        self._end = time.monotonic() + 60 * self.minutes

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint and for the end once the time is over."""
        over = time.monotonic() >= self._end
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            told = torch.tensor(int(over), device=args.device)
            distributed.broadcast(told, src=0)
            over = bool(told)
        if over:
            control.should_save = control.should_training_stop = True


class FlexCollator:
    """`collate` as a `data_collator` for `Trainer`.

    Samples are an adapter's outputs with `labels`; they may have been made in worker processes. A collator that is
    given `alpha` is for one Trainer: evaluation between steps reads 1 from it.

    Args:
        tokenizer: Where the padding token is taken from; a processor or an adapter will do.
        pad_token_id: The padding token itself, instead of `tokenizer`.
        padding_side: `right`, or `left`.
        alpha: An `AlphaWarmup`, to let alpha rise.

    Raises:
        ValueError: `padding_side` is unknown, or `alpha` is no AlphaWarmup.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        pad_token_id: int | None = None,
        padding_side: str = "right",
        alpha: AlphaWarmup | None = None,
    ):
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be one of right, left, got {padding_side!r}")
        if alpha is not None and not isinstance(alpha, AlphaWarmup):
            raise ValueError(f"alpha must be an AlphaWarmup, got {type(alpha).__name__}")
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        # only the number goes along: the collator is sent to worker processes
        self.pad_token_id = getattr(inner, "pad_token_id", None) if pad_token_id is None else pad_token_id
        self.padding_side = padding_side
        self.alpha = None if alpha is None else alpha.alpha

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> FlexInputs:
        """One padded batch.

        Args:
            features: As `collate` takes them.
        """
        batch = collate(features, pad_token_id=self.pad_token_id, padding_side=self.padding_side)
        if self.alpha is not None:
            batch["alpha"] = self.alpha
        return batch
