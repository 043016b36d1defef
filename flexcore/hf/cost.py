"""What a model's cost follows from, measured from its config alone: it is built and run on the meta device.

The decoder runs on a few tokens with an attention function that notes shapes and computes nothing: what is left is
what every token costs (projections, MLPs, the experts that it goes to), and the notes say how each layer attends.
Nothing is known about any family here.

Of layers without attention (linear, recurrent) the FLOPs are those of transformers' own torch code; the state that
they keep instead of K/V is not counted. Fine projections are those of key and value and nothing else.
"""

from __future__ import annotations

import copy
import re
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import FlexConfig
from ..cost import MULTIPLY_ADD, DecoderShape
from ..errors import UnsupportedModelError
from ..roofline import Weights
from .dry_run import text_decoder
from .encoder_cost import Encoder, measure_encoder, sized
from .kv_cache import cache_argument
from .meta import counting
from .probes import PARTIAL, layer_index, layer_types
from .wrapping import resolve

# two lengths, to see that the work grows with the tokens; whole chunks for linear attention
SHORT, LONG = 64, 128
NAME = "flexcore_shapes_only"
_calls: ContextVar[list[tuple[nn.Module, tuple[int, int, int, int], int | None]]] = ContextVar(
    "flexcore_calls"
)


@dataclass(frozen=True)
class Measured:
    """A model as its cost sees it.

    Args:
        name: Its class.
        shape: The decoder, with the layers that read fine tokens.
        weights: The decoder's weights.
        encoder: What makes features; None for a model of text alone, or where it wasn't asked for.
    """

    name: str
    shape: DecoderShape
    weights: Weights
    encoder: Encoder | None


def llava_7b() -> Any:
    """The config of LLaVA-1.5-7B: a Llama of 7B behind CLIP ViT-L/14 at 336 pixels."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=31999)


PRESETS = {"llava-1.5-7b": llava_7b}


def load_config(target: str) -> Any:
    """The config that a name stands for: a preset's, a checkpoint folder's or a file's. Nothing is downloaded.

    Raises:
        ValueError: It is none of these.
    """
    if target in PRESETS:
        return PRESETS[target]()
    path = Path(target)
    if not (path / "config.json").is_file() and not path.is_file():
        raise ValueError(
            f"target must be one of {', '.join(PRESETS)}, a folder with a config.json, or such a file; got {target!r}"
        )
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"target: {target!r} isn't a config that this transformers reads ({error})"
        ) from error


def family_config(name: str) -> Any:
    """The config of a tiny model of a known family, see `flexcore families`.

    Raises:
        ValueError: There is no such family, or the installed transformers lacks it.
    """
    from .families import family

    found = family(name)
    if not found.installed():
        raise ValueError(f"family {name!r} isn't in the installed transformers")
    with torch.device("meta"):
        model = found.make()
    model.config.architectures = [type(model).__name__]
    return model.config


def measure(
    config: Any, *, first_layer: int | None = None, side: int | None = None, encoder: bool = True
) -> Measured:
    """Measure a model from its config.

    Args:
        config: A transformers config.
        first_layer: The first layer that selects; None takes `wrap`'s default.
        side: Side in pixels of the picture that the encoder is measured on. None: the tower's own size, or 336 for
            one that takes any size.
        encoder: Measure what makes features too.

    Raises:
        ValueError: The config lacks something, or has something that isn't covered; the message names the field.
        UnsupportedModelError: The model has no decoder, or one whose attention can't be seen.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("is_encoder_decoder=True: only decoder-only models are covered")
    config = sized(copy.deepcopy(config), side)
    with torch.device("meta"):
        model = _build(config).eval()
    decoder = text_decoder(model)
    shape, weights = _decoder(model, decoder, first_layer)
    found = measure_encoder(model, decoder, shape.hidden, side) if encoder else None
    return Measured(type(model).__name__, shape, weights, found)


def _build(config: Any) -> Any:
    import transformers

    for name in getattr(config, "architectures", None) or ():
        # a base model has no head, and a classifier has another
        if hasattr(transformers, name) and re.search("ForCausalLM|ForConditionalGeneration|LMHead", name):
            return getattr(transformers, name)(config)
    for auto in (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return auto.from_config(config)
    raise ValueError(
        f"architectures: no class that generates text is known for a {type(config).__name__}; name the model's "
        "class in the config's `architectures`"
    )


def _shapes_only(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    sizes = (query.shape[1], key.shape[1], key.shape[-1], value.shape[-1])
    _calls.get().append((module, sizes, kwargs.get("sliding_window")))
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]), None


def _look(decoder: Any) -> None:
    """Switch a decoder's attention to the function that only looks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, _shapes_only)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    decoder.set_attn_implementation(NAME)
    if hasattr(decoder, "set_experts_implementation"):
        # the one whose shapes don't depend on where tokens go: each passes through its own experts and no other
        decoder.set_experts_implementation("batched_mm")


def _decoder(model: Any, decoder: Any, first_layer: int | None) -> tuple[DecoderShape, Weights]:
    name, config = type(model).__name__, decoder.config
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(
            f"num_kv_shared_layers={config.num_kv_shared_layers}: layers that share keys and values aren't covered"
        )
    _look(decoder)
    embedding = decoder.get_input_embeddings()
    hidden = getattr(config, "hidden_size", embedding.weight.shape[1])
    flops, calls = {}, []
    for length in (SHORT, LONG):
        token = _calls.set([])
        try:
            with counting() as counter:
                embeds = torch.empty(1, length, hidden, device="meta", dtype=embedding.weight.dtype)
                mask = torch.ones(1, length, dtype=torch.long, device="meta")
                decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
            calls = _calls.get()
        except Exception as error:  # modeling code that asks for values that nobody has
            raise UnsupportedModelError(
                f"{name}: its decoder doesn't run on the meta device ({type(error).__name__}: {error}), so it can't "
                "be counted from its config; build a flexcore.cost.DecoderShape by hand"
            ) from error
        finally:
            _calls.reset(token)
        flops[length] = counter.get_total_flops()
    if not calls:
        raise UnsupportedModelError(
            f"{name}: its layers' attention doesn't go through transformers' attention interface; use a model whose "
            "attention does"
        )
    per_token = flops[LONG] // LONG
    if abs(flops[LONG] - 2 * flops[SHORT]) > 0.01 * flops[LONG]:
        raise UnsupportedModelError(
            f"{name}: {flops[SHORT]} FLOPs for {SHORT} tokens and {flops[LONG]} for {LONG}, attention left out: work "
            "that doesn't grow with the tokens isn't covered (an indexer of sparse attention, for one)"
        )
    windows = _windows(decoder, calls)
    sizes = {sizes for _, sizes, _ in calls}
    if len(sizes) > 1:
        raise ValueError(
            f"head_dim: {name}'s layers differ in (heads, kv_heads, head_dim, value_dim), {sorted(sizes)}; layers of "
            "one kind are covered"
        )
    heads, kv_heads, head_dim, value_dim = sizes.pop()
    head = model.get_output_embeddings()
    head_weight = embedding.weight if head is None or not hasattr(head, "weight") else head.weight
    intermediate = getattr(config, "intermediate_size", None)
    sites = {i: _Layer(w is None) for i, w in enumerate(windows) if w != 0}
    if sum(site.reads for site in sites.values()) < 2:
        raise UnsupportedModelError(
            f"{name}: one layer must select and a later one read, but {sum(s.reads for s in sites.values())} of "
            f"{len(windows)} layers have full attention"
        )
    resolved = resolve(FlexConfig(first_layer=first_layer), cast(Any, sites), name)
    shape = DecoderShape(
        layers=len(windows),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate if isinstance(intermediate, int) and intermediate > 0 else 4 * hidden,
        vocab=head_weight.shape[0],
        reading=resolved.layers or (),
        value_dim=value_dim,
        windows=windows if any(w is not None for w in windows) else (),
        active_params=per_token // MULTIPLY_ADD,
        fine_params=_latent(config, hidden, heads),
        **_latent_cache(decoder, hidden, embedding.weight.dtype),
    )
    return shape, _weights(decoder, shape.params, head_weight)


@dataclass(frozen=True)
class _Layer:
    """All that `resolve` asks of a layer."""

    reads: bool


def _windows(decoder: Any, calls: list[Any]) -> tuple[int | None, ...]:
    """How far back each layer sees; 0 for one that called no attention."""
    config = decoder.config
    kinds = layer_types(config)
    seen: dict[int, int | None] = {}
    for order, (module, _, window) in enumerate(calls):
        index = layer_index(decoder, module)
        index = order if index is None else index
        if index in seen:
            raise UnsupportedModelError(
                f"{type(module).__name__}: layer {index} attends more than once in a pass; such models aren't covered"
            )
        kind = kinds[index] if kinds is not None and index < len(kinds) else ""
        if window is None and PARTIAL.search(kind):
            window = getattr(config, "attention_chunk_size" if "chunk" in kind else "sliding_window", None)
            if not isinstance(window, int) or not re.search("chunk|slid", kind):
                raise ValueError(
                    f"layer_types[{index}]={kind!r}: how many tokens such a layer sees can't be read off the config"
                )
        seen[index] = window
    depth = max(getattr(config, "num_hidden_layers", 0) or 0, max(seen) + 1)
    return tuple(seen.get(i, 0) for i in range(depth))


def _latent(config: Any, hidden: int, heads: int) -> int | None:
    """Weights of a latent attention's key and value projections; None for ordinary attention."""
    rank = getattr(config, "kv_lora_rank", None)
    if not rank:
        return None
    widths = []
    for field in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
        width = getattr(config, field, None)
        if not isinstance(width, int):
            raise ValueError(f"{field} must be an integer beside kv_lora_rank={rank}, got {width!r}")
        widths.append(width)
    rope, plain, value = widths
    return int(hidden * (rank + rope) + rank * heads * (plain + value))


def _latent_cache(decoder: Any, hidden: int, dtype: torch.dtype) -> dict[str, int]:
    """What latent attention caches of a token, and what it makes anew of every cached one in a step."""
    if not getattr(decoder.config, "kv_lora_rank", None):
        return {}

    def embeds(n: int) -> Tensor:
        return torch.empty(1, n, hidden, device="meta", dtype=dtype)

    width, flops = 0, {}
    token = _calls.set([])
    try:
        for length in (SHORT, LONG):
            mask = torch.ones(1, length + 1, dtype=torch.long, device="meta")
            with counting():
                out = decoder(inputs_embeds=embeds(length), attention_mask=mask[:, 1:], use_cache=True)
            held = [t for t in vars(out.past_key_values.layers[0]).values() if isinstance(t, Tensor)]
            width = sum(t.numel() for t in held) // length
            cache = cache_argument(decoder, out.past_key_values)
            with counting() as counter:
                decoder(inputs_embeds=embeds(1), attention_mask=mask, use_cache=True, **cache)
            flops[length] = counter.get_total_flops()
    finally:
        _calls.reset(token)
    again = (flops[LONG] - flops[SHORT]) // (LONG - SHORT) // MULTIPLY_ADD
    return {"cache_width": width, **({"cached_params": again} if again else {})}


def _weights(decoder: nn.Module, active: int, head: Tensor) -> Weights:
    layers = experts = matrices = 0
    for module in decoder.modules():
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter is head:
                continue
            # transformers keeps the experts of a layer in one tensor, an expert to a row
            if parameter.ndim == 3 and not isinstance(module, nn.Conv1d):
                experts += parameter.numel()
                continue
            layers += parameter.numel()
            matrices += parameter.numel() if parameter.ndim == 2 else 0
    routed = min(max((active - matrices) / experts, 0.0), 1.0) if experts else 0.0
    return Weights(layers, experts, head.numel(), routed)
