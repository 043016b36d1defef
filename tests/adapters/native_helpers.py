"""Tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL models with their processors, made from parts."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn

import flexcore
from flexcore.hf.families_native import MROPE, TOWER
from flexcore.hf.tiny import tiny_tokenizer

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PATCH, MERGE, STACK = TOWER["patch_size"], TOWER["spatial_merge_size"], TOWER["temporal_patch_size"]
SIDE = PATCH * MERGE  # pixels of a cell
WIDTH = 64
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)
START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
MARKS = (START, END, IMAGE, VIDEO)
CLASSES = {
    "qwen2_vl": (hf.Qwen2VLConfig, hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLProcessor),
    "qwen2_5_vl": (hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLProcessor),
    "qwen3_vl": (hf.Qwen3VLConfig, hf.Qwen3VLForConditionalGeneration, hf.Qwen3VLProcessor),
}


def tiny_native(family: str, layers: int = 4) -> tuple[Any, Any]:
    """A random plain model in eval mode, and its processor; without torchvision that takes no clips."""
    make_config, make_model, make_processor = CLASSES[family]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    ids = dict(zip(MARKS, tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rope_parameters": {**MROPE, "mrope_section": [2, 3, 3]},
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")},
    }
    # Qwen2-VL's tower calls the decoder's width its own hidden size
    width = {"hidden_size": WIDTH} if family == "qwen2_vl" else {"out_hidden_size": WIDTH}
    config = make_config(
        text_config=text,
        vision_config={**TOWER, **width},
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[START],
        vision_end_token_id=ids[END],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model(config).eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=1.2 * module.in_features**-0.5)
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight, std=0.5)
    if importlib.util.find_spec("torchvision") is not None:
        return model, make_processor(image_processor(), tokenizer, _video_processor(family))
    # the stock processors are made with a video processor or not at all, and those need torchvision
    unchecked = {"check_argument_for_proper_class": lambda self, name, argument: None}
    return model, type(make_processor.__name__, (make_processor,), unchecked)(
        image_processor(), tokenizer, None
    )


def image_processor(**fields: Any) -> Any:
    """The family's image processor, without torchvision."""
    cls = getattr(hf, "Qwen2VLImageProcessorPil", None) or hf.Qwen2VLImageProcessor
    return cls(
        **{**_fields(), "size": {"shortest_edge": 4 * SIDE**2, "longest_edge": 400 * SIDE**2}, **fields}
    )


def _video_processor(family: str) -> Any:
    cls = hf.Qwen3VLVideoProcessor if family == "qwen3_vl" else hf.Qwen2VLVideoProcessor
    return cls(**_fields())


def _fields() -> dict[str, Any]:
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": STACK}
    return {**sizes, "image_mean": list(MEAN), "image_std": list(STD)}


def wrap(model: Any, **flex: Any) -> Any:
    """Wrap it, and move the fine weights away from the copies they start as."""
    flex = {"first_layer": 1, "selector": "top_k", "top_k": 3, "region_size": 2, **flex}
    flexcore.wrap(model, flexcore.FlexConfig(**flex))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.flex_fine.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def features_of(source: Any) -> Tensor:
    """All of a source's features in raster order, `[n_fine, C]`."""
    regions = torch.arange(source.grid.n_regions)
    tokens = source.grid.tokens(regions)
    out = torch.full((source.grid.n_fine, source.width), float("nan"))
    out[tokens[tokens >= 0]] = source.features(regions)[tokens >= 0]
    return out


def by_hand(model: Any, frames: np.ndarray) -> Tensor:
    """The tower's features of `[STACK, H, W, 3]` uint8 frames, `[cells, C]`: patches cut one by one, as in the paper.

    The patches of a cell come one after the other, and each holds its channels, then its frames.
    """
    values = (frames.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    rows, cols = frames.shape[1] // SIDE, frames.shape[2] // SIDE
    patches = []
    for r in range(rows):
        for c in range(cols):
            for i in range(MERGE):
                for j in range(MERGE):
                    y, x = r * SIDE + i * PATCH, c * SIDE + j * PATCH
                    patches.append(values[:, y : y + PATCH, x : x + PATCH].transpose(3, 0, 1, 2).ravel())
    grid = torch.tensor([[1, rows * MERGE, cols * MERGE]])
    with torch.no_grad():
        return model.model.visual(torch.from_numpy(np.stack(patches)), grid_thw=grid).pooler_output


class Brightness:
    """Stands in for the tower: a cell's feature is the mean of its normalised pixels, in every channel."""

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        pixels, grid_thw = (*args, *kwargs.values())
        cells = pixels.unflatten(0, (-1, MERGE**2)).mean(dim=(1, 2))[:, None].expand(-1, WIDTH)
        sizes = (grid_thw.prod(-1) // MERGE**2).tolist()
        return type("Encoded", (), {"pooler_output": cells.split(sizes)})()


class Stubborn:
    """A processor that does what it likes with some arguments, whatever it is told."""

    def __init__(self, processor: Any, **forced: Any):
        self.processor, self.forced = processor, forced

    def __call__(self, **kwargs: Any) -> Any:
        merged = {k: {**kwargs.get(k, {}), **v} for k, v in self.forced.items()}
        return self.processor(**{**kwargs, **merged})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)


def plain(inputs: Any) -> dict[str, Any]:
    """The same inputs without streams."""
    return {k: v for k, v in inputs.items() if k != "flex_streams"}


def logits(model: Any, inputs: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def answer(model: Any, inputs: Any, new: int = 4, **kwargs: Any) -> Any:
    """Generate; `logits` are those of the new tokens."""
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": None}
    # a random model may well answer with a picture
    banned = [model.config.image_token_id, model.config.video_token_id]
    return model.generate(**inputs, **{**settings, "suppress_tokens": banned, **kwargs})


def steps(out: Any) -> Tensor:
    """`[B, new, V]` logits of a generated answer."""
    return torch.stack(out.logits, dim=1)


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def heard(model: Any, inputs: Any) -> list[Tensor]:
    """The positions that the decoder's rotary module is given: `[3, B, N]` of the sequence, then of fine tokens."""
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((kwargs["position_ids"] if "position_ids" in kwargs else args[1])[-3:].float())

    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    logits(model, inputs)
    hook.remove()
    return seen


def forced(model: Any, inputs: Any, new: Tensor) -> Tensor:
    """Logits of an answer's tokens, teacher-forced, for one sample."""
    ids = torch.cat([inputs["input_ids"][0], new])[None]
    labels = torch.full_like(ids, -100)
    labels[0, -len(new) :] = new
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        more["mm_token_type_ids"] = nn.functional.pad(inputs["mm_token_type_ids"], (0, len(new)))
    return logits(model, {**inputs, **more}, labels=labels)[:, -len(new) - 1 : -1]
