"""Tiny multimodal models: configs, and what one medium looks like to each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .families_text import COMMON, EXPERTS, ROPE, WINDOWED

TOKEN = 90  # stands for one coarse token
START, END, OTHER = 91, 92, 93
Tensors = Callable[[int, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Media:
    """One medium as a family takes it.

    Args:
        model_type: transformers' model type.
        fields: Of its config.
        tokens: Placeholder and marker tokens of one medium, as its processor would write them.
        tensors: Random tensors that `n` media need in the forward.
        more: Further inputs, made from the token ids.
        model: Class of the model, where the auto class for image-text models doesn't have it.
    """

    model_type: str
    fields: dict[str, Any]
    tokens: list[int]
    tensors: Tensors
    more: Callable[[Tensor], dict[str, Tensor]] = field(default=lambda ids: {})
    model: str = ""


def text(model_type: str, **fields: Any) -> dict[str, Any]:
    """Fields of a tiny text decoder."""
    return {**COMMON, "vocab_size": 100, "model_type": model_type, **fields}


def vision(model_type: str | None = None, **fields: Any) -> dict[str, Any]:
    """Fields of a tiny vision tower: 4x4 patches of 6 pixels."""
    named = {} if model_type is None else {"model_type": model_type}
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 6,
        "num_channels": 3,
        **named,
        **fields,
    }


def pixels(*shape: int, name: str = "pixel_values", flat: bool = False, **others: Any) -> Tensors:
    """Random tensors of one shape per medium, and constants repeated for every medium."""

    def make(n: int, generator: torch.Generator) -> dict[str, Tensor]:
        out = {
            name: torch.randn(
                n * shape[0] if flat else n, *(shape[1:] if flat else shape), generator=generator
            )
        }
        for key, value in others.items():
            out[key] = torch.tensor([value] * n)
        return out

    return make


def types(ids: Tensor) -> dict[str, Tensor]:
    """Which tokens are a medium's."""
    return {"mm_token_type_ids": (ids == TOKEN).long()}


IDS = {"image_token_id": TOKEN, "image_token_index": TOKEN}
FRAMED = [START, *[TOKEN] * 4, END]

QFORMER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "encoder_hidden_size": 16,
    "vocab_size": 100,
}
MULTIMODAL: dict[str, Media] = {
    "llava": Media(
        "llava",
        {
            **IDS,
            "text_config": text("llama"),
            "vision_config": vision("clip_vision_model"),
            "image_seq_length": 16,
        },
        [TOKEN] * 16,
        pixels(3, 24, 24),
    ),
    "llava-pixtral": Media(
        "llava",
        {
            **IDS,
            "text_config": text("mistral", sliding_window=None),
            "vision_config": vision("pixtral", head_dim=8),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        [TOKEN] * 16,
        pixels(3, 24, 24, image_sizes=[24, 24]),
    ),
    "vipllava": Media(
        "vipllava",
        {
            **IDS,
            "text_config": text("llama"),
            "vision_config": vision("clip_vision_model", num_hidden_layers=3),
            "vision_feature_layers": [-1, -2],
        },
        [TOKEN] * 16,
        pixels(3, 24, 24),
    ),
    "llava_next": Media(
        "llava_next",
        {
            **IDS,
            "text_config": text("mistral", sliding_window=None),
            "vision_config": vision("clip_vision_model"),
            "image_grid_pinpoints": [[24, 24]],
        },
        [TOKEN] * (16 + 16 + 4),
        pixels(2, 3, 24, 24, image_sizes=[24, 24]),
    ),
    "llava_next_video": Media(
        "llava_next_video",
        {
            **IDS,
            "video_token_index": OTHER,
            "video_token_id": OTHER,
            "text_config": text("llama"),
            "vision_config": vision("clip_vision_model"),
            "image_grid_pinpoints": [[24, 24]],
        },
        [TOKEN] * (16 + 16 + 4),
        pixels(2, 3, 24, 24, image_sizes=[24, 24]),
    ),
    "llava_onevision": Media(
        "llava_onevision",
        {
            **IDS,
            "video_token_index": OTHER,
            "video_token_id": OTHER,
            "text_config": text("qwen2"),
            "vision_config": vision("siglip_vision_model"),
            "image_grid_pinpoints": [[24, 24]],
        },
        [TOKEN] * (16 + 16 + 4),
        pixels(2, 3, 24, 24, image_sizes=[24, 24]),
    ),
    "idefics2": Media(
        "idefics2",
        {
            **IDS,
            "text_config": text("mistral", sliding_window=None),
            "vision_config": vision(),
            "perceiver_config": {
                "resampler_n_latents": 8,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "num_key_value_heads": 1,
                "resampler_head_dim": 8,
                "hidden_size": 32,
            },
        },
        [TOKEN] * 8,
        pixels(1, 3, 24, 24),
    ),
    "idefics3": Media(
        "idefics3",
        {**IDS, "text_config": text("llama"), "vision_config": vision(), "scale_factor": 2},
        [TOKEN] * 4,
        pixels(1, 3, 24, 24),
    ),
    "smolvlm": Media(
        "smolvlm",
        {**IDS, "text_config": text("llama"), "vision_config": vision(), "scale_factor": 2},
        [TOKEN] * 4,
        pixels(1, 3, 24, 24),
    ),
    "internvl": Media(
        "internvl",
        {
            **IDS,
            "text_config": text("qwen2"),
            "vision_config": vision(image_size=[24, 24], patch_size=[6, 6]),
            "downsample_ratio": 0.5,
        },
        [TOKEN] * 4,
        pixels(3, 24, 24),
    ),
    "paligemma": Media(
        "paligemma",
        {
            **IDS,
            "text_config": text("gemma"),
            "vision_config": vision("siglip_vision_model", vision_use_head=False),
            "projection_dim": 32,
        },
        [TOKEN] * 16,
        pixels(3, 24, 24),
    ),
    "gemma3": Media(
        "gemma3",
        {
            **IDS,
            "text_config": text("gemma3_text", **WINDOWED),
            "vision_config": vision("siglip_vision_model", vision_use_head=False),
            "mm_tokens_per_image": 4,
        },
        FRAMED,
        pixels(3, 24, 24),
        lambda ids: {"token_type_ids": (ids == TOKEN).long()},
    ),
    "aria": Media(
        "aria",
        {
            **IDS,
            "text_config": text("aria_text", **EXPERTS),
            "vision_config": vision("idefics3_vision"),
            "projector_patch_to_query_dict": {16: 8},
        },
        [TOKEN] * 8,
        pixels(3, 24, 24),
    ),
    "video_llava": Media(
        "video_llava",
        {
            "image_token_index": TOKEN,
            "video_token_index": OTHER,
            "text_config": text("llama"),
            "vision_config": vision("clip_vision_model"),
            "vision_feature_layer": -1,
        },
        [TOKEN] * 16,
        pixels(3, 24, 24, name="pixel_values_images"),
    ),
    "aya_vision": Media(
        "aya_vision",
        {
            **IDS,
            "text_config": text("cohere2", **WINDOWED),
            "vision_config": vision("siglip_vision_model", vision_use_head=False),
            "downsample_factor": 2,
            "alignment_intermediate_size": 32,
        },
        [TOKEN] * 4,
        pixels(3, 24, 24),
    ),
    "cohere2_vision": Media(
        "cohere2_vision",
        {
            **IDS,
            "text_config": text("cohere2", **WINDOWED),
            "vision_config": vision("siglip_vision_model", vision_use_head=False),
            "downsample_factor": 2,
            "alignment_intermediate_size": 32,
        },
        [TOKEN] * 4,
        pixels(3, 24, 24),
    ),
    "llama4": Media(
        "llama4",
        {
            **IDS,
            "text_config": text(
                "llama4_text",
                **EXPERTS,
                intermediate_size_mlp=64,
                attention_chunk_size=64,
                layer_types=["chunked_attention", "full_attention"] * 2,
            ),
            "vision_config": vision(
                vision_output_dim=32,
                projector_input_dim=32,
                projector_output_dim=32,
                intermediate_size=64,
                pixel_shuffle_ratio=0.5,
            ),
        },
        [TOKEN] * 4,
        pixels(3, 24, 24),
    ),
    "got_ocr2": Media(
        "got_ocr2",
        {
            **IDS,
            "text_config": text("qwen2"),
            "vision_config": vision(
                image_size=128,
                patch_size=16,
                output_channels=8,
                window_size=2,
                global_attn_indexes=[1],
                mlp_dim=32,
            ),
        },
        [TOKEN] * 4,
        pixels(3, 128, 128),
    ),
    "ovis2": Media(
        "ovis2",
        {
            **IDS,
            "text_config": text("qwen2"),
            "vision_config": vision(hidden_stride=2, vocab_size=32, num_visual_indicator_tokens=5),
            "visual_indicator_token_ids": [94, 95, 96, 97, 98],
            "vocab_size": 100,
            "hidden_size": 32,
        },
        [94, *[TOKEN] * 4, 95],
        pixels(3, 24, 24),
    ),
    "instructblip": Media(
        "instructblip",
        {
            **IDS,
            "text_config": text("opt", ffn_dim=64, word_embed_proj_dim=32),
            "vision_config": vision(),
            "qformer_config": QFORMER,
            "num_query_tokens": 4,
        },
        [TOKEN] * 4,
        lambda n, g: {
            "pixel_values": torch.randn(n, 3, 24, 24, generator=g),
            "qformer_input_ids": torch.full((n, 3), 5),
            "qformer_attention_mask": torch.ones(n, 3, dtype=torch.long),
        },
    ),
    "blip-2": Media(
        "blip-2",
        {
            **IDS,
            "text_config": text("opt", ffn_dim=64, word_embed_proj_dim=32),
            "vision_config": vision(),
            "qformer_config": QFORMER,
            "num_query_tokens": 4,
        },
        [TOKEN] * 4,
        pixels(3, 24, 24),
    ),
    "deepseek_vl": Media(
        "deepseek_vl",
        {**IDS, "text_config": text("llama"), "vision_config": vision("siglip_vision_model")},
        [TOKEN] * 16,
        pixels(3, 24, 24),
    ),
    "janus": Media(
        "janus",
        {
            **IDS,
            "text_config": text("llama"),
            "vision_config": vision(projection_dim=32, num_image_tokens=16),
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_patches": 4,
                "projection_dim": 32,
                "image_token_embed_dim": 32,
            },
        },
        [TOKEN] * 16,
        pixels(3, 24, 24),
    ),
    "qianfan_ocr": Media(
        "qianfan_ocr",
        {
            **IDS,
            "text_config": text("qwen3"),
            "vision_config": vision(image_size=[24, 24], patch_size=[6, 6]),
            "downsample_ratio": 0.5,
        },
        [TOKEN] * 4,
        pixels(3, 24, 24),
    ),
    "fuyu": Media(
        "fuyu",
        {**IDS, "text_config": text("persimmon"), "patch_size": 6, "image_size": 24},
        [TOKEN] * 16,
        pixels(16, 108, name="image_patches"),
    ),
    "instructblipvideo": Media(
        "instructblipvideo",
        {
            "video_token_index": TOKEN,
            "text_config": text("opt", ffn_dim=64, word_embed_proj_dim=32),
            "vision_config": vision(),
            "qformer_config": QFORMER,
            "num_query_tokens": 4,
        },
        [TOKEN] * 8,
        lambda n, g: {
            "pixel_values": torch.randn(n, 2, 3, 24, 24, generator=g),
            "qformer_input_ids": torch.full((n, 3), 5),
            "qformer_attention_mask": torch.ones(n, 3, dtype=torch.long),
        },
        model="InstructBlipVideoForConditionalGeneration",
    ),
    "gemma4": Media(
        "gemma4",
        {
            **IDS,
            "video_token_id": OTHER,
            "audio_token_id": 94,
            "text_config": text(
                "gemma4_text",
                **WINDOWED,
                num_kv_shared_layers=0,
                vocab_size_per_layer_input=100,
                hidden_size_per_layer_input=8,
                global_head_dim=8,
            ),
            "vision_config": vision(
                num_key_value_heads=2, head_dim=8, pooling_kernel_size=2, position_embedding_size=16
            ),
            "audio_config": None,
        },
        [TOKEN] * 4,
        lambda n, g: {
            "pixel_values": torch.randn(n, 16, 108, generator=g),
            "image_position_ids": torch.stack(
                torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1
            )
            .reshape(1, 16, 2)
            .repeat(n, 1, 1),
        },
        types,
    ),
    "mllama": Media(
        "mllama",
        {
            "image_token_index": 99,
            "text_config": text("mllama_text_model", cross_attention_layers=[1], rope_parameters=ROPE),
            "vision_config": vision(
                attention_heads=2,
                num_global_layers=1,
                vision_output_dim=32,
                intermediate_layers_indices=[0],
                max_num_tiles=1,
                supported_aspect_ratios=[[1, 1]],
            ),
        },
        list(range(10, 26)),
        lambda n, g: {},
    ),
}
