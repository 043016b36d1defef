"""The video adapter on a tiny LLaVA-OneVision, which takes clips as videos of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexcore
from flexcore.hf.tiny import tiny_tokenizer
from flexcore_adapters.video import VideoAdapter

from .video_helpers import stripes

pytest.importorskip("torchvision", reason="the model's video processor needs torchvision")

SIDE, CELLS, POOLED = 56, 7, 4
PROMPT = "USER: <video>\nWhat happens? ASSISTANT:"


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    import transformers as hf

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    size = {"height": SIDE, "width": SIDE}
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=size),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=CELLS**2,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=SIDE // CELLS,
            vision_use_head=False,
        ),
        text_config=hf.Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=[[SIDE, SIDE]],
    )
    model = hf.LlavaOnevisionForConditionalGeneration(config).eval()
    flexcore.wrap(model, flexcore.FlexConfig(first_layer=1, selector="top_k", top_k=3, region_size=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, processor


def adapter_of(model: tuple[Any, Any], **options: Any) -> VideoAdapter:
    return VideoAdapter(*model, **{"coarse_frames": 3, "fine_fps": 4, "fps": 2, "zoom": 1, **options})


def test_coarse_tokens_are_pooled_frames(model):
    inputs = adapter_of(model)(PROMPT, videos=stripes(12))
    ((stream,),) = inputs["flex_streams"].samples
    assert inputs["pixel_values_videos"].shape == (1, 3, 3, SIDE, SIDE)
    assert (stream.grid.coarse, stream.grid.fine) == ((3, POOLED, POOLED), (12, CELLS, CELLS))
    video = model[0].config.video_token_id
    found = (inputs["input_ids"][0] == video).nonzero()[:, 0]
    # the last of them is the line break after the clip
    assert len(found) == 3 * POOLED**2 + 1 and torch.equal(stream.coarse_positions, found[:-1])


def test_fine_features_pool_to_the_coarse_ones(model):
    adapter = adapter_of(model)
    frames = stripes(12)
    inputs = adapter(PROMPT, videos=frames)
    ((stream,),) = inputs["flex_streams"].samples
    regions = torch.arange(stream.grid.n_regions)
    tokens = stream.grid.tokens(regions)
    fine = torch.zeros(stream.grid.n_fine, stream.source.width)
    fine[tokens[tokens >= 0]] = stream.source.features(regions)[tokens >= 0]
    (view,) = adapter.views([frames])
    same = [int((view.fine_index[:, 0] == i).nonzero()[0][0]) for i in view.coarse_index[:, 0]]
    with torch.no_grad():
        pooled = model[0].model.apply_pooling(fine.view(12, CELLS**2, -1)[same])
        own = model[0].get_video_features(
            inputs["pixel_values_videos"], vision_feature_layer=-1, vision_feature_select_strategy="full"
        )
    assert torch.allclose(pooled.flatten(0, 1), own.pooler_output[0, :-1], atol=1e-5)


def test_a_batch_equals_its_samples_alone_and_reads(model):
    adapter = adapter_of(model)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "suppress_tokens": [model[0].config.video_token_id]}
    texts, clips = (
        [PROMPT, "USER: Hello? ASSISTANT:", PROMPT + " In short:"],
        [stripes(12), stripes(10, 30, 20)],
    )
    together = model[0].generate(**adapter(texts, videos=[[clips[0]], [], [clips[1]]]), **settings)
    for row, (text, own) in enumerate(zip(texts, [[clips[0]], [], [clips[1]]], strict=True)):
        alone = adapter([text], videos=[own])
        expected = model[0].generate(**alone, **settings)
        for a, b in zip(together.logits, expected.logits, strict=True):
            assert float((a[row] - b[0]).abs().max()) < 5e-5
    plain = {k: v for k, v in alone.items() if k != "flex_streams"}
    off = model[0].generate(**plain, **settings)
    assert float((off.logits[0] - expected.logits[0]).abs().max()) > 1e-3
