"""Which image adapter a model gets: one name, `image`, for all kinds."""

from __future__ import annotations

import copy
import sys
import types
from typing import Any

import pytest
import torch
import transformers as hf

import flexcore
from flexcore.errors import UnsupportedModelError
from flexcore.hf.tiny import tiny_llama, tiny_llava, tiny_tokenizer
from flexcore_adapters.image import ImageAdapter
from flexcore_adapters.image_kinds import adapter_class

from .anyres_helpers import KINDS, tiny_anyres


def test_a_llava_gets_the_adapter_itself(llava: tuple[Any, Any]) -> None:
    adapter = flexcore.load_adapter("image", *llava, zoom=2)
    assert type(adapter) is ImageAdapter and adapter.zoom == 2
    model, processor = tiny_llava()
    flexcore.wrap(model, flexcore.FlexConfig(first_layer=1))
    assert type(ImageAdapter(model, processor)) is ImageAdapter


@pytest.mark.parametrize("kind", KINDS)
def test_anyres_models_get_theirs(kind: str) -> None:
    adapter = flexcore.load_adapter("image", *tiny_anyres(kind, layers=2))
    assert type(adapter).__name__ == "AnyResImageAdapter" and isinstance(adapter, ImageAdapter)


def test_native_resolution_models_get_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand:
        def __init__(self, model: Any, processor: Any, **options: Any):
            self.given = model, processor, options

    module = types.ModuleType("flexcore_adapters.image_native")
    module.NativeImageAdapter = Stand  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flexcore_adapters.image_native", module)
    model = types.SimpleNamespace(model=types.SimpleNamespace(visual=torch.nn.Identity()), config=None)
    adapter = ImageAdapter(model, "processor", zoom=2)
    assert type(adapter) is Stand and adapter.given == (model, "processor", {"zoom": 2})


def test_a_class_that_is_named_is_meant(llava: tuple[Any, Any]) -> None:
    class Own(ImageAdapter):
        pass

    assert type(Own(*llava)) is Own


def test_copies_keep_their_class(llava: tuple[Any, Any]) -> None:
    for model, processor in (llava, tiny_anyres("llava_next", layers=2)):
        adapter = ImageAdapter(model, processor)
        for again in (copy.copy(adapter), copy.deepcopy(adapter)):
            assert type(again) is type(adapter) and again.model is model
            tower = getattr(again, "tower", None)
            assert tower is None or tower.vision_tower is model.model.vision_tower


def test_the_registered_class_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert flexcore.plugins.load_adapter_class("image") is ImageAdapter
    assert flexcore.plugins.adapters()["image"].cls is ImageAdapter


def test_other_models_are_told_which_kinds_work() -> None:
    whisper = hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            vocab_size=100,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )
    kinds = r"LLaVA.*LLaVA-NeXT.*Qwen2-VL.*text-only models.*tower="
    with pytest.raises(
        UnsupportedModelError, match=f"ImageAdapter takes .*{kinds}.*; Whisper.* is none of these"
    ):
        flexcore.load_adapter("image", whisper, tiny_tokenizer())
    with pytest.raises(UnsupportedModelError, match=kinds):
        flexcore.load_adapter("image", tiny_llama(layers=1), tiny_tokenizer())
    model, _ = tiny_anyres("llava_next", layers=2)
    del model.model.image_newline
    with pytest.raises(UnsupportedModelError, match="is none of these"):
        adapter_class(model)
