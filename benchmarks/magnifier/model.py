"""The model: a LLaVA of the frozen encoder and a Llama of about a million parameters, with a vocabulary of words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .encoder import CELLS, PATCH, SIDE, vision_config
from .scenes import FRAMES, NAMES, QUESTIONS
from .task import Wording

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 128, 6, 4, 2, 256
# One frame is the leftmost, so one question of six has no answer.
WORDING = Wording(QUESTIONS, NAMES, {"frame": FRAMES, "left": FRAMES - 1})
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_CHAT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% elif part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def prompt(kind: str, colour: int) -> str:
    """A question about one picture, as the processor takes it."""
    return "<image> " + WORDING.question(kind, colour)


def tokenizer(wording: Wording = WORDING) -> PreTrainedTokenizerFast:
    """One token per word of the questions, per digit and per punctuation mark."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    questions = wording.questions.values()
    words = sorted({w for q in questions for w in q.lower().replace("?", " ?").split() if w != "{}"})
    vocab = {w: i for i, w in enumerate([*_SPECIAL, *map(str, range(10)), *wording.names, *words])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def processor(wording: Wording = WORDING, pixels: int = SIDE) -> LlavaProcessor:
    """The model's processor: pictures of 64 pixels or as many as given, bilinear, in `[-1, 1]`."""
    import transformers

    # the plain class needs torchvision and warns without it; earlier releases knew it by that name only
    cls = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    side = {"height": pixels, "width": pixels}
    half = [0.5, 0.5, 0.5]
    return transformers.LlavaProcessor(
        image_processor=cls(size=side, crop_size=side, resample=2, image_mean=half, image_std=half),
        tokenizer=tokenizer(wording),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=_CHAT,
    )


def assemble(
    seed: int = 0, wording: Wording = WORDING, tower: Any = None, cells: int = CELLS**2
) -> LlavaForConditionalGeneration:
    """The model with random weights.

    Args:
        seed: Of the weights.
        wording: What it can be asked.
        tower: Config of its encoder; None is the pictures'.
        cells: Coarse tokens of a picture, or of a frame.
    """
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    words = tokenizer(wording)
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=1024,
        # the encoder's features say where they are; long wavelengths leave most of a head to what they are
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision_config() if tower is None else tower,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=cells,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "vision_tower" not in name:
                deep = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=module.in_features**-0.5 / (2 if deep else 1))
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
    return model.eval()


def freeze_vision(model: Any) -> None:
    """The encoder never trains again; nor does the projector, so that the features of a picture can be kept."""
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
