"""from_pretrained: load a checkpoint that a wrapped model saved, and wrap the model again."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from ..config import FlexConfig
from ..errors import WeightsMismatchError
from .checkpoint import CONFIG_NAME, check_fit, fill
from .saving import PREFIX, Checkpoint
from .wrapping import wrap

logger = logging.getLogger(__name__)


def from_pretrained(
    name_or_path: str | Path,
    model_class: Any = None,
    config: FlexConfig | None = None,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint that a wrapped model saved, and wrap the model again.

    The fine weights keep the dtype they were saved in, unless `dtype` says otherwise.

    Args:
        name_or_path: A folder or a hub name.
        model_class: The transformers class (or Auto class) to load with. Default: what the checkpoint's
            `config.json` names in `architectures`.
        config: Wrap with this one instead of the saved one. The saved fine weights are loaded all the same, if there
            are any, and then its layers must be the saved ones; if there are none, it says how they start.
        **kwargs: For transformers' `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, ...

    Returns:
        The wrapped model, in eval mode.

    Raises:
        FileNotFoundError: There is no such folder.
        WeightsMismatchError: The checkpoint holds no fine weights (and no `config` was given), or they don't fit.
        UnsupportedModelError: The model can't be wrapped.
        ValueError: An argument is of the wrong kind, or the checkpoint's architecture isn't known.
    """
    if config is not None and not isinstance(config, FlexConfig):
        raise ValueError(
            f"config must be a FlexConfig, got {type(config).__name__}; to change the model's own config, load it "
            "with its own class, wrap it and call load_adapter_weights"
        )
    if kwargs.pop("output_loading_info", False):
        raise ValueError("output_loading_info must be left out; load with the model's own class to see it")
    path = Path(name_or_path)
    if (isinstance(name_or_path, Path) or path.is_absolute()) and not path.is_dir():
        raise FileNotFoundError(f"{name_or_path} must be a folder or a hub name, and there is no such folder")
    checkpoint = Checkpoint(name_or_path, kwargs)
    saved = checkpoint.config()
    wanted = config if config is not None or saved is None else saved[0]
    if wanted is None:
        raise WeightsMismatchError(
            f"{name_or_path} holds no {CONFIG_NAME}{'' if path.is_dir() else ' or can not be reached'}, "
            "so no wrapped model was saved there; pass config=FlexConfig(...) to wrap it anew"
        )
    shares = wanted.share_kv_projections or (saved is not None and saved[0].share_kv_projections)
    fine = {} if saved is None or shares else checkpoint.fine_names()
    if config is None and not shares:
        lacking = [n for n in wanted.layers or () if not any(name.startswith(f"{n}.") for name in fine)]
        if lacking:
            raise WeightsMismatchError(
                f"{name_or_path} holds no fine weights for layers {lacking}; save it again from a wrapped model, or "
                "pass config=FlexConfig(...) to start with new ones"
            )
    model = _load(name_or_path, _model_class(name_or_path, model_class, checkpoint.hub, kwargs), kwargs)
    wrap(model, wanted)
    if saved is not None and (fine or config is None):
        check_fit(model, *saved, str(name_or_path))
    if fine:
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        fill(model, checkpoint.tensors(), str(name_or_path), keep_saved_dtype=dtype in (None, "auto"))
    elif not shares:
        logger.info("%s holds no fine weights; they start as init=%r says", name_or_path, wanted.init)
    return model


def _model_class(name: str | Path, given: Any, hub: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """The class to load with: the given one, or what the checkpoint's config names."""
    if given is not None:
        given = getattr(given, "_flex_base", given)
        if not hasattr(given, "from_pretrained"):
            raise ValueError(f"model_class must be a transformers model class, got {given!r}")
        return given
    remote = bool(kwargs.get("trust_remote_code"))
    config = AutoConfig.from_pretrained(str(name), trust_remote_code=remote, **hub)
    architecture = (config.architectures or [None])[0]
    for auto, code in (getattr(config, "auto_map", None) or {}).items():
        if remote and code.rsplit(".", 1)[-1] == architecture and hasattr(transformers, auto):
            return getattr(transformers, auto)
    found: Any = getattr(transformers, architecture or "", None)
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ValueError(
            f"{name}: config.json must name a transformers model class in `architectures`, got {architecture!r}; pass "
            "model_class=..."
        )
    return found


def _load(name: str | Path, model_class: Any, kwargs: dict[str, Any]) -> Any:
    """The plain model, loaded without a warning about the fine weights in its checkpoint."""
    auto = not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel)
    if auto:
        return model_class.from_pretrained(str(name), **kwargs)
    known: Any = getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ()
    pattern = "^" + re.escape(PREFIX)
    quiet: Any = type(
        model_class.__name__,
        (model_class,),
        {
            "__module__": model_class.__module__,
            "__qualname__": model_class.__qualname__,
            "_keys_to_ignore_on_load_unexpected": [*known, pattern],
        },
    )
    model = quiet.from_pretrained(str(name), **kwargs)
    model.__class__ = model_class
    ignored = model.__dict__.get("_keys_to_ignore_on_load_unexpected")
    if ignored is not None:
        model._keys_to_ignore_on_load_unexpected = type(ignored)(p for p in ignored if p != pattern)
    return model
