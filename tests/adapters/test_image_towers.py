"""The image adapter over other vision towers than CLIP: sizes, class tokens, registers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

import flexcore
from flexcore.hf.tiny import tiny_llava
from flexcore_adapters.image import ImageAdapter

PATCH, SHOWN, TRAINED = 14, 56, 84
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"
DINOV2 = {"num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2}
FIXED = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}

# Config, its fields, tokens before the map, what the model does with them.
TOWERS: dict[str, tuple[Any, dict[str, Any], int, str]] = {
    "dinov2": (Dinov2Config, DINOV2, 1, "default"),
    "dinov2, class token kept": (Dinov2Config, DINOV2, 1, "full"),
    "dinov2 with registers": (Dinov2WithRegistersConfig, {**DINOV2, "num_register_tokens": 4}, 5, "default"),
    "dinov2 with registers, all kept": (
        Dinov2WithRegistersConfig,
        {**DINOV2, "num_register_tokens": 4},
        5,
        "full",
    ),
    "siglip": (SiglipVisionConfig, FIXED, 0, "full"),
    "clip": (CLIPVisionConfig, FIXED, 1, "default"),
}
INTERPOLATES = [name for name in TOWERS if "dinov2" in name]


def llava(name: str, trained: int = TRAINED, shown: int = SHOWN) -> tuple[Any, Any]:
    """A tiny LLaVA whose tower was trained on one size and whose processor shows it another."""
    make, fields, extra, strategy = TOWERS[name]
    base, processor = tiny_llava(layers=2, patch_size=PATCH, image_size=shown)
    torch.manual_seed(0)
    vision = make(hidden_size=32, image_size=trained, patch_size=PATCH, **fields)
    config = LlavaConfig(
        vision_config=vision,
        text_config=base.config.text_config,
        image_token_index=base.config.image_token_index,
        image_seq_length=(shown // PATCH) ** 2,
        vision_feature_select_strategy=strategy,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    processor.num_additional_image_tokens = extra
    processor.vision_feature_select_strategy = strategy
    return model, processor


@pytest.fixture
def coffee(photo: Callable[[str], Path]) -> Image.Image:
    return Image.open(photo("coffee.png")).convert("RGB")


@pytest.mark.parametrize("name", TOWERS)
def test_features_of_any_tower_fit_their_cells(name: str, coffee: Image.Image) -> None:
    trained = TRAINED if name in INTERPOLATES else SHOWN
    model, processor = llava(name, trained)
    adapter = ImageAdapter(model, processor, zoom=2)
    assert (adapter.side, adapter.cells) == (SHOWN, SHOWN // PATCH)
    inputs = adapter(PROMPT, images=coffee)
    ((stream,),) = inputs["flex_streams"].samples
    assert stream.grid.coarse == (4, 4)
    assert stream.grid.fine == (8, 8)

    # The coarse cells in the sequence are the map's, whatever stands before it.
    kept = adapter.lead_tokens
    found = torch.nonzero(inputs["input_ids"][0] == model.config.image_token_id).squeeze(1)
    assert len(found) == kept + 16
    assert torch.equal(stream.coarse_positions, found[kept:])
    with torch.no_grad():
        coarse = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
        assert coarse.shape == (kept + 16, 64)
        whole = ImageAdapter(model, processor, zoom=1)(PROMPT, images=coffee)["flex_streams"]
        features = whole.samples[0][0].source.features(torch.tensor([0]))[0]
        torch.testing.assert_close(features, coarse[kept:], atol=1e-4, rtol=1e-4)
        model(**{k: v for k, v in inputs.items() if k != "flex_streams"})


@pytest.mark.parametrize(("name", "kept"), [("dinov2", 0), ("dinov2 with registers", 4), ("siglip", 0)])
def test_lead_tokens_are_those_that_the_model_keeps(name: str, kept: int) -> None:
    trained = TRAINED if name in INTERPOLATES else SHOWN
    assert ImageAdapter(*llava(name, trained)).lead_tokens == kept


def test_a_tower_of_one_size_keeps_it(coffee: Image.Image) -> None:
    model, processor = llava("clip", trained=TRAINED)
    adapter = ImageAdapter(model, processor, zoom=2)
    assert (adapter.side, adapter.cells) == (TRAINED, TRAINED // PATCH)
    model(**{k: v for k, v in adapter(PROMPT, images=coffee).items() if k != "flex_streams"})


def test_a_size_that_is_no_whole_number_of_patches_is_not_taken() -> None:
    model, processor = llava("dinov2")
    processor.image_processor.crop_size = {"height": SHOWN + 1, "width": SHOWN + 1}
    assert ImageAdapter(model, processor).side == TRAINED


def test_a_processor_that_resizes_and_does_not_crop() -> None:
    model, processor = llava("dinov2")
    cls = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor
    processor.image_processor = cls(size={"height": 70, "width": 70})
    assert ImageAdapter(model, processor).side == 70
    processor.image_processor = cls(size={"height": 70, "width": 56})
    assert ImageAdapter(model, processor).side == TRAINED


def test_wrapped_over_dinov2_answers_and_differs_only_when_something_is_read(coffee: Image.Image) -> None:
    model, processor = llava("dinov2")
    inputs = ImageAdapter(model, processor, zoom=2)(PROMPT, images=coffee)
    plain = {k: v for k, v in inputs.items() if k != "flex_streams"}
    with torch.no_grad():
        before = model(**plain).logits
        flexcore.wrap(model, flexcore.FlexConfig(first_layer=0, selector="all"))
        assert torch.equal(model(**plain).logits, before)
        assert not torch.equal(model(**inputs).logits[:, -1], before[:, -1])
