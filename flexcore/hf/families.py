"""Tiny random models of every family that the installed transformers has: for the support table and the tests.

Nothing in the library decides by these names; `wrap` finds out by itself what a model can do.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import Grid
from ..sources import TensorSource
from ..streams import FineStream, StreamBatch
from .families_multimodal import MULTIMODAL, Media
from .families_native import NATIVE
from .families_text import COMMON, TEXT

KINDS = ("text", "multimodal")


@dataclass(frozen=True)
class Sample:
    """Text around one medium.

    Args:
        before: Tokens before it.
        after: Tokens after it.
        seed: Of tokens, pixels and features.
    """

    before: int = 3
    after: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        name: The model type, or that of a variant.
        kind: `text` or `multimodal`.
        make: Builds the model; weights are set afterwards.
        model_type: transformers' model type.
        media: For multimodal families: what one medium looks like.
    """

    name: str
    kind: str
    make: Callable[[], Any]
    model_type: str
    media: Media | None = None

    def installed(self) -> bool:
        """Whether the installed transformers has the family."""
        from transformers import CONFIG_MAPPING

        return self.model_type in CONFIG_MAPPING

    def build(self, seed: int = 0) -> Any:
        """A random model in eval mode.

        Raises:
            Exception: Whatever the installed transformers says about a family or a config it doesn't know.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return enliven(self.make().eval())

    def example(self, model: Any, samples: list[Sample], side: str = "left") -> dict[str, Any]:
        """Inputs of a padded batch, one medium per sample, with `flex_streams` among them.

        Args:
            model: What `build` returned; gives the width of the features.
            samples: Text lengths and seeds.
            side: Where the padding goes.
        """
        rows = [self._tokens(sample) for sample in samples]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask, streams = torch.zeros_like(ids), []
        width = model.get_input_embeddings().weight.shape[1]
        for row, ((own, cells), sample) in enumerate(zip(rows, samples, strict=True)):
            shift = length - len(own) if side == "left" else 0
            ids[row, shift : shift + len(own)] = own
            mask[row, shift : shift + len(own)] = 1
            grid = Grid.blocks((len(cells),), (3 * len(cells),), region=4)
            generator = torch.Generator().manual_seed(1000 + sample.seed)
            source = TensorSource(torch.randn(grid.n_fine, width, generator=generator), grid)
            streams.append((FineStream(grid, cells + shift, None, source),))
        out = {"input_ids": ids, "attention_mask": mask, "flex_streams": StreamBatch(tuple(streams))}
        if self.media is not None:
            parts = [
                self.media.tensors(1, torch.Generator().manual_seed(2000 + sample.seed)) for sample in samples
            ]
            out.update({k: torch.cat([part[k] for part in parts]) for k in parts[0]})
            out.update(self.media.more(ids))
        return out

    def _tokens(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Token ids of one sample, and the indices of its coarse tokens."""
        generator = torch.Generator().manual_seed(sample.seed)

        def words(n: int) -> Tensor:
            return torch.randint(5, 90, (n,), generator=generator)

        if self.media is None:
            medium, cells = words(16), torch.arange(16)
        else:
            medium = torch.tensor(self.media.tokens)
            cells = (medium == self.media.tokens[len(medium) // 2]).nonzero()[:, 0]
        return torch.cat([words(sample.before), medium, words(sample.after)]), cells + sample.before


def families(kind: str | None = None) -> Iterator[Family]:
    """Every family, those that the installed transformers lacks among them."""
    if kind in (None, "text"):
        for name, fields in TEXT.items():
            model_type = fields.get("model_type", name)
            yield Family(name, "text", functools.partial(_text_model, name, fields), model_type)
    if kind in (None, "multimodal"):
        for name, media in {**MULTIMODAL, **NATIVE}.items():
            make = functools.partial(_multimodal_model, media)
            yield Family(name, "multimodal", make, media.model_type, media)


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: There is none.
    """
    for found in families():
        if found.name == name:
            return found
    raise ValueError(f"name must be one of {[f.name for f in families()]}, got {name!r}")


def _text_model(name: str, fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {**COMMON, **fields}
    model_type = given.pop("model_type", name)
    config = AutoConfig.for_model(model_type, **{k: v for k, v in given.items() if v is not ...})
    return AutoModelForCausalLM.from_config(config)


def _multimodal_model(media: Media) -> Any:
    import transformers

    config = transformers.AutoConfig.for_model(media.model_type, **copy.deepcopy(media.fields))
    if media.model:
        return getattr(transformers, media.model)(config)
    return transformers.AutoModelForImageTextToText.from_config(config)


@torch.no_grad()
def enliven(model: nn.Module) -> nn.Module:
    """Redraw a tiny model's matrices so that attention has something to say; stock ones leave it all but uniform."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            assert isinstance(weight, Tensor)
            fan_in = weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]
            gain = 1.5 if name.endswith(("q_proj", "k_proj", "query", "key")) else 1.0
            nn.init.normal_(weight, std=gain * fan_in**-0.5)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "experts" in name:
            nn.init.normal_(parameter, std=max(parameter.shape[1:]) ** -0.5)
    return model
