"""Tiny multimodal models whose encoders take any resolution, or sound; see `families_multimodal`."""

from __future__ import annotations

from typing import Any

import torch

from .families_multimodal import (
    END,
    IDS,
    OTHER,
    START,
    TOKEN,
    Media,
    pixels,
    text,
    types,
    vision,
)
from .families_text import ALTERNATING, DELTA, EXPERTS, LATENT, ROPE_BY_TYPE, WINDOWED

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
SHORT_MROPE = {**MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
MARKED = {
    **IDS,
    "video_token_id": OTHER,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_start_token_id": START,
    "image_end_token_id": END,
}
FRAMED = [START, *[TOKEN] * 4, END]
TOWER: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 16,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 6,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 24,
    "fullatt_block_indexes": [1],
    "in_channels": 3,
    "in_chans": 3,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "image_size": 24,
}
AUDIO: dict[str, Any] = {
    "num_mel_bins": 8,
    "d_model": 16,
    "hidden_size": 16,
    "intermediate_size": 64,
    "encoder_layers": 2,
    "num_hidden_layers": 2,
    "encoder_attention_heads": 2,
    "num_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "max_source_positions": 16,
    "head_dim": 8,
}


def grid(side: int = 4, patch: int = 2 * 3 * 6 * 6) -> Any:
    """One image of `side` x `side` patches, flattened as the Qwen processors do."""
    return pixels(side * side, patch, flat=True, image_grid_thw=[1, side, side])


def qwen(model_type: str, decoder: dict[str, Any], typed: bool = True, **tower: Any) -> Media:
    """A model with a tower of the Qwen-VL kind: 4x4 patches, merged to 2x2 tokens."""
    fields = {**MARKED, "text_config": decoder, "vision_config": {**TOWER, **tower}}
    return Media(model_type, fields, FRAMED, grid(), types if typed else lambda ids: {})


def sound(
    model_type: str, fields: dict[str, Any], n: int, frames: int = 32, model: str = "", **more: Any
) -> Media:
    """A model that hears `frames` frames of 8 mel bins as `n` tokens."""
    ids = {"audio_token_id": TOKEN, "audio_token_index": TOKEN}
    tensors = pixels(8, frames, name="input_features", **more)
    return Media(model_type, {**ids, **fields}, [TOKEN] * n, tensors, model=model)


NATIVE: dict[str, Media] = {
    "qwen2_vl": qwen("qwen2_vl", text("qwen2_vl_text", rope_parameters=MROPE), hidden_size=32),
    "qwen2_5_vl": qwen("qwen2_5_vl", text("qwen2_5_vl_text", rope_parameters=MROPE)),
    "qwen3_vl": qwen("qwen3_vl", text("qwen3_vl_text", rope_parameters=MROPE)),
    "qwen3_vl_moe": qwen("qwen3_vl_moe", text("qwen3_vl_moe_text", rope_parameters=MROPE, **EXPERTS)),
    "qwen3_5": qwen("qwen3_5", text("qwen3_5_text", layer_types=ALTERNATING, **DELTA)),
    "qwen3_5_moe": qwen("qwen3_5_moe", text("qwen3_5_moe_text", layer_types=ALTERNATING, **DELTA, **EXPERTS)),
    "glm4v": qwen("glm4v", text("glm4v_text", rope_parameters=MROPE)),
    "glm46v": qwen("glm46v", text("glm4v_text", rope_parameters=MROPE)),
    "glm4v_moe": qwen("glm4v_moe", text("glm4v_moe_text", rope_parameters=SHORT_MROPE, **EXPERTS)),
    "glm_ocr": qwen("glm_ocr", text("glm_ocr_text", rope_parameters=MROPE)),
    "exaone4_5": qwen("exaone4_5", text("exaone4", **WINDOWED), typed=False, num_key_value_heads=2),
    "cohere_compass": qwen(
        "cohere_compass", text("cohere_compass_text", **WINDOWED, rope_parameters=ROPE_BY_TYPE)
    ),
    "hyperclovax_vision_v2": qwen("hyperclovax_vision_v2", text("hyperclovax"), typed=False),
    "ernie4_5_vl_moe": Media(
        "ernie4_5_vl_moe",
        {
            **MARKED,
            "text_config": text(
                "ernie4_5_vl_moe_text",
                **{**EXPERTS, "moe_intermediate_size": [32, 32]},
                rope_parameters={**MROPE, "mrope_section": [1, 1, 2]},
            ),
            "vision_config": {**TOWER, "temporal_merge_size": 2},
        },
        FRAMED,
        grid(4, 3 * 6 * 6),
        lambda ids: {**types(ids), "moe_mm_token_type_ids": (ids == TOKEN).long()},
    ),
    "paddleocr_vl": Media(
        "paddleocr_vl",
        {
            **MARKED,
            "text_config": text("paddleocr_vl_text", rope_parameters=MROPE),
            "vision_config": vision(spatial_merge_size=2),
        },
        FRAMED,
        pixels(16, 3, 6, 6, flat=True, image_grid_thw=[1, 4, 4]),
        types,
    ),
    "video_llama_3": Media(
        "video_llama_3",
        {**MARKED, "text_config": text("qwen2"), "vision_config": vision("video_llama_3_vision")},
        [TOKEN] * 4,
        pixels(16, 3 * 6 * 6, flat=True, image_grid_thw=[1, 4, 4], image_merge_sizes=2),
    ),
    "lighton_ocr": Media(
        "lighton_ocr",
        {**IDS, "text_config": text("qwen3"), "vision_config": vision("pixtral", head_dim=8)},
        [TOKEN] * 4,
        pixels(3, 24, 24, image_sizes=[24, 24]),
    ),
    "mistral3": Media(
        "mistral3",
        {
            **IDS,
            "text_config": text("mistral", sliding_window=None),
            "vision_config": vision("pixtral", head_dim=8),
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        [TOKEN] * 4,
        pixels(3, 24, 24, image_sizes=[24, 24]),
    ),
    "qwen2_5_omni_thinker": Media(
        "qwen2_5_omni_thinker",
        {
            **MARKED,
            "audio_token_index": 94,
            "video_token_index": OTHER,
            "audio_start_token_id": 95,
            "audio_end_token_id": 96,
            "user_token_id": 97,
            "text_config": text("qwen2_5_omni_text", rope_parameters=MROPE),
            "vision_config": TOWER,
            "audio_config": {**AUDIO, "n_window": 8, "output_dim": 32},
        },
        FRAMED,
        grid(),
        model="Qwen2_5OmniThinkerForConditionalGeneration",
    ),
    "qwen3_omni_moe_thinker": Media(
        "qwen3_omni_moe_thinker",
        {
            **MARKED,
            "audio_token_id": 94,
            "audio_start_token_id": 95,
            "text_config": text("qwen3_omni_moe_text", rope_parameters=MROPE, **EXPERTS),
            "vision_config": TOWER,
            "audio_config": {**AUDIO, "n_window": 8, "output_dim": 32, "downsample_hidden_size": 8},
        },
        FRAMED,
        grid(),
        model="Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    "qwen2_audio": sound(
        "qwen2_audio",
        {"audio_config": {**AUDIO, "model_type": "qwen2_audio_encoder"}, "text_config": text("qwen2")},
        8,
        feature_attention_mask=[1] * 32,
        model="Qwen2AudioForConditionalGeneration",
    ),
    "voxtral": sound(
        "voxtral",
        {"audio_config": {**AUDIO, "model_type": "voxtral_encoder"}, "text_config": text("llama")},
        8,
        model="VoxtralForConditionalGeneration",
    ),
    "audioflamingo3": sound(
        "audioflamingo3",
        {"audio_config": {**AUDIO, "model_type": "audioflamingo3_encoder"}, "text_config": text("qwen2")},
        8,
        input_features_mask=[1] * 32,
        model="AudioFlamingo3ForConditionalGeneration",
    ),
    "musicflamingo": sound(
        "musicflamingo",
        {
            "audio_config": {**AUDIO, "model_type": "audioflamingo3_encoder"},
            "text_config": text("qwen2"),
            "audio_bos_token_id": START,
            "audio_eos_token_id": END,
        },
        8,
        input_features_mask=[1] * 32,
        model="MusicFlamingoForConditionalGeneration",
    ),
    "glmasr": sound(
        "glmasr",
        {
            "audio_config": {**AUDIO, "model_type": "glmasr_encoder", "num_key_value_heads": 2},
            "text_config": text("llama"),
        },
        4,
        input_features_mask=[1] * 32,
        model="GlmAsrForConditionalGeneration",
    ),
    "granite_speech": Media(
        "granite_speech",
        {
            "audio_token_index": TOKEN,
            "audio_token_id": TOKEN,
            "text_config": text("granite"),
            "encoder_config": {
                "input_dim": 8,
                "num_layers": 2,
                "hidden_dim": 16,
                "num_heads": 2,
                "dim_head": 8,
                "output_dim": 6,
                "context_size": 8,
                "max_pos_emb": 16,
                "feedforward_mult": 2,
                "conv_kernel_size": 3,
            },
            "projector_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "encoder_hidden_size": 16,
            },
            "has_lora_adapter": False,
            "downsample_rate": 2,
            "window_size": 4,
        },
        [TOKEN] * 8,
        pixels(16, 8, name="input_features"),
        model="GraniteSpeechForConditionalGeneration",
    ),
    "lfm2_vl": Media(
        "lfm2_vl",
        {
            **IDS,
            "text_config": text("lfm2", layer_types=["conv", "full_attention"] * 2),
            "vision_config": vision("siglip2_vision_model", num_patches=16, vision_use_head=False),
            "downsample_factor": 2,
            "projector_hidden_size": 32,
        },
        [TOKEN] * 4,
        lambda n, g: {
            "pixel_values": torch.randn(n, 16, 3 * 36, generator=g),
            "spatial_shapes": torch.tensor([[4, 4]] * n),
            "pixel_attention_mask": torch.ones(n, 16, dtype=torch.long),
        },
    ),
    "lfm3_vl": Media(
        "lfm3_vl",
        {
            **MARKED,
            "text_config": text("lfm3", layer_types=["conv", "full_attention"] * 2),
            "vision_config": {
                **TOWER,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
            "projector_hidden_size": 32,
        },
        FRAMED,
        grid(),
    ),
    "kimi_k25": Media(
        "kimi_k25",
        {
            **IDS,
            "text_config": text("deepseek_v3", **EXPERTS, **LATENT),
            "vision_config": vision(pos_emb_height=4, pos_emb_width=4),
            "projection_hidden_size": 16,
        },
        [TOKEN] * 4,
        pixels(16, 3, 6, 6, flat=True, image_grid_thw=[1, 4, 4]),
    ),
}
