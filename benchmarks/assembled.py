"""A LLaVA put together from a vision tower and a language model that never met.

Architecture and shapes are those of a real vision-language model, and every part but the projector is trained. Its
random projector makes the pictures mean nothing to the language model: good for identity, cost and plumbing; for
answers, train the projector first.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase

IMAGE = "<image>"
# ChatML, as SmolLM2 and its kin speak it, with pictures in the messages.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def assemble(
    tower: nn.Module, decoder: nn.Module, tokenizer: PreTrainedTokenizerBase, side: int = 224, seed: int = 0
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA in eval mode with its processor; the parts' weights are copied.

    Args:
        tower: A vision model with a class token that takes square pictures of any size, such as `Dinov2Model`.
        decoder: A causal language model, such as `LlamaForCausalLM`.
        tokenizer: The decoder's; it is given the image token.
        side: Side in pixels of the pictures that the tower gets to see.
        seed: Of the projector's random weights; the global generator is left alone.

    Raises:
        ValueError: `side` isn't a whole number of patches.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision, text = tower.config, decoder.config
    patch = vision.patch_size
    if side < patch or side % patch:
        raise ValueError(f"side must be a multiple of the tower's patch_size {patch}, got {side}")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    token: Any = tokenizer.convert_tokens_to_ids(IMAGE)
    rows = max(text.vocab_size, len(tokenizer))
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config={**text.to_dict(), "vocab_size": rows},
        image_token_index=token,
        image_seq_length=(side // patch) ** 2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        _fill(model.model.vision_tower, tower, rows)
        _fill(model.get_decoder(), decoder.get_decoder(), rows)
        _fill(model.get_output_embeddings(), decoder.get_output_embeddings(), rows)
        for module in model.model.multi_modal_projector.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    model.generation_config = copy.deepcopy(decoder.generation_config)
    # The image token is for the prompt: its random or average row must not show up in an answer.
    model.generation_config.suppress_tokens = [token]
    return model.to(next(decoder.parameters()).dtype), _processor(tokenizer, patch, side)


def _fill(target: nn.Module, source: nn.Module, rows: int) -> None:
    """Copy weights; a vocabulary that grew gets the average row for its new entries."""
    own = target.state_dict()
    for name, weight in source.state_dict().items():
        if weight.shape != own[name].shape:
            new = rows - len(weight)
            weight = torch.cat([weight, weight.float().mean(0, keepdim=True).expand(new, -1).to(weight)])
        own[name].copy_(weight)


def _processor(tokenizer: PreTrainedTokenizerBase, patch: int, side: int) -> LlavaProcessor:
    import transformers

    # DINOv2's own processor. The plain class needs torchvision; the Pillow one is newer than transformers 5.0.
    cls = getattr(transformers, "BitImageProcessorPil", None) or transformers.BitImageProcessor
    images = cls(
        size={"shortest_edge": side * 8 // 7},
        crop_size={"height": side, "width": side},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    tokenizer.padding_side = "left"
    return transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT,
    )
