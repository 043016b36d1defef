"""Tiny random models, made on the spot: for tests, and for examples without a checkpoint. Their answers are noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import (
        LlamaForCausalLM,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

_PAD, _BOS, _EOS, _IMAGE = "<pad>", "<s>", "</s>", "<image>"
_CHAT = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_llava(
    seed: int = 0,
    layers: int = 6,
    *,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    image_size: int = 48,
    patch_size: int = 8,
    vision_hidden: int = 32,
    vision_layers: int = 3,
    **text_config: Any,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A random LLaVA with its processor, in eval mode; the default sees 6x6 coarse cells.

    Args:
        seed: Of the weights; the same seed gives the same model, and the global generator is left alone.
        layers: Decoder layers.
        hidden: Hidden size of the decoder.
        heads: Query heads.
        kv_heads: Key and value heads.
        image_size: Side of the vision tower's input in pixels.
        patch_size: Side of a patch in pixels; a coarse cell per patch.
        vision_hidden: Hidden size of the vision tower.
        vision_layers: Layers of the vision tower; LLaVA reads the last but one.
        **text_config: Further fields of the decoder's `LlamaConfig`.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    processor = _processor(image_size, patch_size)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=2 * vision_hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=vision_hidden,
    )
    text = LlamaConfig(
        **_text(layers, hidden, heads, kv_heads, len(tokenizer), {**_special(tokenizer), **text_config})
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return _random(LlavaForConditionalGeneration, config, seed), processor


def tiny_llama(
    seed: int = 0,
    layers: int = 6,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    **config: Any,
) -> LlamaForCausalLM:
    """A random Llama in eval mode.

    Args:
        seed: Of the weights; the same seed gives the same model, and the global generator is left alone.
        layers: Decoder layers.
        hidden: Hidden size.
        heads: Query heads.
        kv_heads: Key and value heads.
        vocab: Size of the vocabulary.
        **config: Further fields of `LlamaConfig`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = _text(layers, hidden, heads, kv_heads, vocab, {"pad_token_id": 0, **config})
    return _random(LlamaForCausalLM, LlamaConfig(**fields), seed)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens of `tiny_llava`: any text goes in and comes out again."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [_PAD, _BOS, _EOS, _IMAGE]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + letters)}
    # Without merges every byte stays a token of its own.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", pair=f"{_BOS} $A $B", special_tokens=[(_BOS, vocab[_BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        additional_special_tokens=[_IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _processor(image_size: int, patch_size: int) -> LlavaProcessor:
    import transformers

    # The plain class needs torchvision and warns without it; earlier releases knew it by that name only.
    cls = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    side = {"height": image_size, "width": image_size}
    return transformers.LlavaProcessor(
        image_processor=cls(size={"shortest_edge": image_size}, crop_size=side),
        tokenizer=tiny_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=_IMAGE,
        chat_template=_CHAT,
    )


def _special(tokenizer: Any) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


def _text(
    layers: int, hidden: int, heads: int, kv_heads: int, vocab: int, more: dict[str, Any]
) -> dict[str, Any]:
    fields = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": 4096,
    }
    return {**fields, **more}


def _random(cls: Any, config: Any, seed: int) -> Any:
    """A model whose attention has something to say: the stock initialisation leaves its maps all but uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).eval()
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear):
                    gain = 1.5 if name.endswith(("q_proj", "k_proj")) else 1.0
                    nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
                elif isinstance(module, nn.Embedding):
                    nn.init.normal_(module.weight, std=0.5)
    return model
