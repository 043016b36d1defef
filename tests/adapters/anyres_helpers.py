"""Tiny LLaVA-NeXT and LLaVA-OneVision models with their processors, made from parts, and pictures with marks."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from torch import nn

import flexcore
from flexcore.hf.tiny import tiny_tokenizer
from tests.hf.helpers import perturb

KINDS = ("llava_next", "llava_onevision")
PATCH, CELLS = 8, 6
SIDE = PATCH * CELLS
PINPOINTS = [[SIDE * r, SIDE * c] for r, c in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
IMAGE, VIDEO = "<image>", "<video>"
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


def tiny_anyres(kind: str, cells: int = CELLS, pinpoints: Any = None, layers: int = 4) -> tuple[Any, Any]:
    """A random plain model in eval mode, and its processor."""
    side = PATCH * cells
    pinpoints = pinpoints or [[h * cells // CELLS, w * cells // CELLS] for h, w in PINPOINTS]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, VIDEO]})
    image, video = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO])
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower |= {"image_size": side, "patch_size": PATCH}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")},
    }
    fields: dict[str, Any] = {"image_token_index": image, "image_grid_pinpoints": pinpoints}
    if kind == "llava_next":
        fields |= {"vision_config": hf.CLIPVisionConfig(**tower), "text_config": hf.LlamaConfig(**text)}
        config, make = hf.LlavaNextConfig(**fields), hf.LlavaNextForConditionalGeneration
    else:
        vision = hf.SiglipVisionConfig(**tower, vision_use_head=False)
        fields |= {"vision_config": vision, "text_config": hf.Qwen2Config(**text), "video_token_index": video}
        config, make = hf.LlavaOnevisionConfig(**fields), hf.LlavaOnevisionForConditionalGeneration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(config).eval()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=1.2 * module.in_features**-0.5)
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight, std=0.5)
    return model, _processor(kind, tokenizer, side, pinpoints)


def _processor(kind: str, tokenizer: Any, side: int, pinpoints: Any) -> Any:
    name = "LlavaNextImageProcessor" if kind == "llava_next" else "LlavaOnevisionImageProcessor"
    # the plain class needs torchvision; earlier releases knew the other by that name only
    cls = getattr(hf, name + "Pil", None) or getattr(hf, name)
    square = {"height": side, "width": side}
    if kind == "llava_next":
        settings = cls(size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=pinpoints)
        fields = {"patch_size": PATCH, "vision_feature_select_strategy": "default"}
        return hf.LlavaNextProcessor(settings, tokenizer, **fields, num_additional_image_tokens=1)
    settings = cls(size=square, image_grid_pinpoints=pinpoints)
    own = {"num_image_tokens": (side // PATCH) ** 2, "vision_feature_select_strategy": "full"}
    if importlib.util.find_spec("torchvision") is not None:
        video = hf.LlavaOnevisionVideoProcessor(size=square)
        return hf.LlavaOnevisionProcessor(settings, tokenizer, video, **own)
    # the stock processor is made with a video processor or not at all, and that needs torchvision
    body = {"check_argument_for_proper_class": lambda self, name, argument: None}
    return type("LlavaOnevisionProcessor", (hf.LlavaOnevisionProcessor,), body)(
        settings, tokenizer, None, **own
    )


def wrap(model: Any, **flex: Any) -> Any:
    """Wrap it, and move the fine weights away from the copies they start as."""
    flex = {"first_layer": 1, "selector": "top_k", "top_k": 3, "region_size": 3, **flex}
    return perturb(flexcore.wrap(model, flexcore.FlexConfig(**flex)))


def marked(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """A grey picture with a white box `(left, top, right, bottom)`."""
    pixels = np.full((height, width, 3), 60, np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


def answer(model: Any, inputs: Any, new: int = 4, **kwargs: Any) -> Any:
    """Generate; `logits` are those of the new tokens."""
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": None}
    # a random model may well answer with a picture
    return model.generate(**inputs, **{**settings, "suppress_tokens": [3, 260], **kwargs})
