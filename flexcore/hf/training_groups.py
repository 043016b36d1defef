"""What trains, and how fast: freezing, LoRA, and a learning rate of their own for the fine projections."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..errors import WrapStateError
from .dry_run import text_decoder
from .encoder_cost import outermost
from .offload import without_peft
from .training import freeze_base

TRAINS = ("fine", "fine-and-projector", "all-but-tower", "all")
_FINE = "flex_fine"


def media_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters that only media reach: vision or audio tower and projector."""
    inner = _wrapped(model, "media_parameters")
    text = _text_parameters(inner)
    return [p for p in inner.parameters() if id(p) not in text]


def tower_parameters(model: Any) -> list[nn.Parameter]:
    """The tower's parameters: those that only media reach, less the projector's."""
    return _media_parameters(model, between=False)


def projector_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters that only media reach on their way from the tower to the decoder."""
    return _media_parameters(model, between=True)


def _media_parameters(model: Any, between: bool) -> list[nn.Parameter]:
    inner = _wrapped(model, "projector_parameters" if between else "tower_parameters")
    decoder: Any = text_decoder(inner)
    outer = {id(p) for module in outermost(inner, decoder) for p in module.parameters()}
    return [p for p in media_parameters(model) if (id(p) in outer) == between]


def train_only(model: Any, what: str) -> list[str]:
    """Choose what trains.

    Args:
        model: A wrapped model; for LoRA see `lora`.
        what: `fine` (the fine projections alone), `fine-and-projector` (for a projector that was never trained),
            `all-but-tower` (as the paper does: everything but the vision tower) or `all`.

    Returns:
        Names of the parameters that train.

    Raises:
        ValueError: `what` is none of these.
        WrapStateError: The model isn't wrapped.
    """
    if what not in TRAINS:
        raise ValueError(f"what must be one of {', '.join(TRAINS)}, got {what!r}")
    if what == "fine":
        return freeze_base(model)
    inner = _wrapped(model, "train_only")
    if what == "fine-and-projector":
        freeze_base(inner)
        for parameter in projector_parameters(inner):
            parameter.requires_grad_(True)
    else:
        inner.requires_grad_(True)
    if what == "all-but-tower":
        for parameter in tower_parameters(inner):
            parameter.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def lora(model: Any, rank: int, **options: Any) -> Any:
    """peft's LoRA on every linear layer of the decoder, with the fine projections trained whole and saved beside it.

    Args:
        model: A wrapped model.
        rank: Of the adapters.
        **options: For `peft.LoraConfig`. Default: `lora_alpha` twice the rank.

    Returns:
        A `PeftModel`; `merge_and_unload()` gives the wrapped model back with everything merged.

    Raises:
        ValueError: The rank isn't at least 1.
        WrapStateError: The model isn't wrapped.
        ImportError: peft isn't installed.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    inner = _wrapped(model, "lora")
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"peft is needed for LoRA: pip install 'flexcore[train]': {error}") from error
    decoder: Any = text_decoder(inner)
    prefix = next(name for name, module in inner.named_modules() if module is decoder)
    linear = {name.rpartition(".")[2] for name, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    names = "|".join(sorted(re.escape(name) for name in linear))
    start = f"{re.escape(prefix)}\\." if prefix else f"(?!{_FINE})"
    settings = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": f"{start}(.*\\.)?({names})",
        "modules_to_save": [_FINE],
        **options,
    }
    return peft.get_peft_model(inner, peft.LoraConfig(**settings))


def parameter_groups(
    model: Any, learning_rate: float, fine_learning_rate: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: the fine projections have a learning rate of their own, norms and biases no decay.

    With a Trainer, DeepSpeed's too (which takes no `optimizers=`):

    ```
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    groups = parameter_groups(model, arguments.learning_rate, fine_learning_rate, arguments.weight_decay)
    Trainer(model, arguments, optimizer_cls_and_kwargs=(cls, {**options, "params": groups}), ...)
    ```

    Args:
        model: A wrapped model, with peft around it or not.
        learning_rate: Of everything else.
        fine_learning_rate: Of the fine projections and of adapters on them; None is `learning_rate`.
        weight_decay: Of matrices.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, empty ones left out.

    Raises:
        ValueError: A rate is negative, or nothing trains.
        WrapStateError: The model isn't wrapped.
    """
    from transformers import Trainer

    _wrapped(model, "parameter_groups")
    rates = {
        "learning_rate": learning_rate,
        "fine_learning_rate": fine_learning_rate,
        "weight_decay": weight_decay,
    }
    for name, value in rates.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value!r}")
    # which parameters decay is Trainer's own choice, which reads nothing off the Trainer
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    fine_rate = learning_rate if fine_learning_rate is None else fine_learning_rate
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        fine, decays = _FINE in name.split("."), name in decaying
        group = {"params": [], "lr": fine_rate if fine else learning_rate}
        group["weight_decay"] = weight_decay if decays else 0.0
        groups.setdefault((fine, decays), group)["params"].append(parameter)
    if not groups:
        raise ValueError("model must have parameters that train; all of them have requires_grad=False")
    return [groups[kind] for kind in sorted(groups)]


def _text_parameters(inner: Any) -> set[int]:
    """Ids of the decoder's, the embeddings' and the fine projections' parameters."""
    parts = [
        text_decoder(inner),
        inner.get_output_embeddings(),
        inner.get_input_embeddings(),
        inner.flex_fine,
    ]
    return {id(p) for part in parts if part is not None for p in part.parameters()}


def _wrapped(model: Any, what: str) -> Any:
    inner = without_peft(model)
    if getattr(inner, "_flex_binding", None) is None:
        raise WrapStateError(f"{what}: the model isn't wrapped; call flexcore.wrap(model, config) first")
    return inner
