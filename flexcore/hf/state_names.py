"""A checkpoint's names of weights, where a model's own are others.

transformers saves some models under names of older releases and translates them when it loads: LLaVA's
`model.language_model.layers.0` is `language_model.model.layers.0` in its files. Trainer, which resumes by reading a
checkpoint's file into `load_state_dict(..., strict=False)`, doesn't translate: no name fits, a warning is logged, and
training goes on with the weights that the model happened to have.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import WeightsMismatchError


def own_names(model: Any, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict under the model's own names; the same object if it has no others.

    Args:
        model: A transformers model.
        state_dict: Weights by name, as the model has them or as its checkpoints do. Names that are neither are kept.

    Raises:
        WeightsMismatchError: A checkpoint's weight is a part of one of the model's, or the other way round, so that a
            new name isn't enough.
    """
    own = model.state_dict()
    if all(name in own for name in state_dict):
        return state_dict
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    out = {}
    for name, weight in state_dict.items():
        renamed = name
        if name not in own:
            found, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
            if converter is not None and found in own:
                raise WeightsMismatchError(
                    f"state_dict: {name} is saved in another form than {type(model).__name__} holds it; "
                    "load the folder with flexcore.from_pretrained"
                )
            renamed = found if found in own else name
        out[renamed] = weight
    return out


def loading_methods(base: Any) -> dict[str, Any]:
    """`load_state_dict` for the wrapped class of a model class."""

    @functools.wraps(base.load_state_dict)
    def load_state_dict(self: Any, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return base.load_state_dict(self, own_names(self, state_dict), *args, **kwargs)

    return {"load_state_dict": load_state_dict}
