"""Tiny wrapped models, batches with media, and a naive Llama that says what they should compute."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

import flexcore
from flexcore.hf.tiny import tiny_llama, tiny_llava

# 6 coarse cells and 18 fine tokens a side; tiles of 6 make blocks of 4 and 2: regions of unequal size
GRID = flexcore.Grid.blocks((6, 6), (18, 18), region=4, tile=6)
WIDE = flexcore.Grid.blocks((6, 6), (12, 12), region=4, tile=6, padding=((0.25, 0.25), (0.0, 0.0)))
KINDS = ("llama", "llava")
HIDDEN = 64
IMAGE = 3  # tiny_llava's image token


def make(kind: str, seed: int = 0, **config):
    """An unwrapped tiny model in eval mode."""
    return tiny_llama(seed, **config) if kind == "llama" else tiny_llava(seed, **config)[0]


def perturb(model, scale: float = 0.1, seed: int = 1):
    """Move the fine weights away from the copies they start as: with copies several bugs can't be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.flex_fine.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((scale * noise).to(parameter.dtype))
    return model


def wrapped(kind: str, seed: int = 0, selector: str = "top_k", layers: int = 6, model=None, **flex):
    """A tiny wrapped model with perturbed fine weights."""
    flex = {"first_layer": 1, "selector": selector, "fraction": 0.2, **flex}
    model = make(kind, seed, layers=layers) if model is None else model
    flexcore.wrap(model, flexcore.FlexConfig(**flex))
    return perturb(model)


@dataclass
class Sample:
    """One sample: text lengths around its media, the media's grids, and the grids of their finer levels."""

    before: int = 4
    after: int = 5
    grids: list = field(default_factory=lambda: [GRID])
    seed: int = 0
    finer: list = field(default_factory=list)


def batch(
    kind: str, samples: list[Sample], side: str = "left", model=None, source=flexcore.TensorSource
) -> dict:
    """Inputs of a padded batch, media included."""
    parts = [_tokens(kind, s) for s in samples]
    length = max(len(ids) for ids, _ in parts)
    ids = torch.zeros(len(parts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    streams = []
    for row, ((own, starts), sample) in enumerate(zip(parts, samples, strict=True)):
        shift = length - len(own) if side == "left" else 0
        ids[row, shift : shift + len(own)] = own
        mask[row, shift : shift + len(own)] = 1
        media = []
        for m, (grid, start) in enumerate(zip(sample.grids, starts, strict=True)):
            generator = torch.Generator().manual_seed(1000 * sample.seed + m)
            features = torch.randn(grid.n_fine, HIDDEN, generator=generator)
            positions = torch.arange(start, start + grid.n_coarse) + shift
            finer = None
            for n, level in reversed(list(enumerate(sample.finer))):
                generator = torch.Generator().manual_seed(1000 * sample.seed + 100 * (n + 1) + m)
                more = torch.randn(level.n_fine, HIDDEN, generator=generator)
                finer = flexcore.FineStream(level, None, None, source(more, level), finer=finer)
            media.append(flexcore.FineStream(grid, positions, None, source(features, grid), finer=finer))
        streams.append(tuple(media))
    out = {"input_ids": ids, "attention_mask": mask, "flex_streams": flexcore.StreamBatch(tuple(streams))}
    n_media = sum(len(s.grids) for s in samples)
    if kind == "llava" and n_media:
        pixels = [
            torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(2000 * s.seed + m))
            for s in samples
            for m in range(len(s.grids))
        ]
        out["pixel_values"] = torch.stack(pixels)
    return out


def _tokens(kind: str, sample: Sample) -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(sample.seed)

    def text(n: int) -> Tensor:
        return torch.randint(4, 97, (n,), generator=generator)

    pieces, starts, at = [text(sample.before)], [], sample.before
    for grid in sample.grids:
        coarse = text(grid.n_coarse) if kind == "llama" else torch.full((grid.n_coarse,), IMAGE)
        pieces += [coarse, text(2)]
        starts.append(at)
        at += grid.n_coarse + 2
    return torch.cat([*pieces, text(sample.after)]), starts


def plain(inputs: dict) -> dict:
    """The same inputs without media streams."""
    return {k: v for k, v in inputs.items() if k != "flex_streams"}


def forward(model, inputs: dict, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def generate(model, inputs: dict, new: int = 6, **kwargs):
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, **kwargs}
    settings["suppress_tokens"] = [IMAGE]  # a random model may well answer with an image token
    return model.generate(**inputs, **settings)


def lazy(features: Tensor, grid) -> flexcore.OnDemandSource:
    """A fake lazy source: encodes a region when it is first asked for."""
    whole = flexcore.TensorSource(features, grid)
    return flexcore.OnDemandSource(whole.features, grid, features.shape[1])


def naive_forward(model, embeds: Tensor, streams, rows: list[int], alpha: float = 1.0) -> Tensor:
    """Logits of a wrapped Llama on one unpadded sample, written from the design alone.

    Every layer's whole attention map, fine keys concatenated, fine K/V from plain matrix products. Of a medium with
    finer levels, each level's regions are chosen by the attention to the tokens read of the one before.

    Args:
        embeds: `[T, C]` input embeddings.
        streams: The sample's media.
        rows: Readout rows.
    """
    config, flex = model.config.get_text_config(), model.flex_config
    decoder, selector = model.get_decoder(), model._flex_binding.selector
    n_heads, n_kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = len(embeds)
    causal = torch.full((length, length), -math.inf).triu(1)
    eps = config.rms_norm_eps

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2) / width)
        angle = (positions[:, None].float() * frequency).repeat(1, 2)
        half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
        return x * angle.cos() + half * angle.sin()

    def heads(x: Tensor, linear, n: int) -> Tensor:
        return linear(x).view(len(x), n, width).transpose(0, 1)

    hidden, chosen, seen = embeds, {}, {}
    able = list(range(flex.first_layer, config.num_hidden_layers))
    for index, layer in enumerate(decoder.layers):
        x = norm(hidden, layer.input_layernorm.weight)
        at = torch.arange(length)
        q = rotate(heads(x, layer.self_attn.q_proj, n_heads), at)
        k = rotate(heads(x, layer.self_attn.k_proj, n_kv), at).repeat_interleave(n_heads // n_kv, 0)
        v = heads(x, layer.self_attn.v_proj, n_kv).repeat_interleave(n_heads // n_kv, 0)
        logits = q @ k.transpose(1, 2) / math.sqrt(width) + causal
        out = (logits.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
        if index in flex.layers:
            fine = model.flex_fine[str(index)]
            for r in rows:
                keys, values = [k], [v]
                visible = [logits[:, r]]
                for m, stream in enumerate(streams):
                    for level, regions in zip(stream.levels, chosen[r, m], strict=True):
                        tokens = level.grid.tokens(regions.nonzero()[:, 0]).flatten()
                        tokens = tokens[tokens >= 0]
                        tokens = tokens[level.valid[tokens]]
                        features = level.source.tensor[tokens]
                        if flex.fine_norm:
                            features = norm(features, layer.input_layernorm.weight)
                        places = stream.coarse_positions[level.grid.parents(tokens)]
                        kf = rotate(heads(features, fine.k_proj, n_kv), places)
                        keys.append(kf.repeat_interleave(n_heads // n_kv, 0))
                        vf = heads(features, fine.v_proj, n_kv)
                        values.append(vf.repeat_interleave(n_heads // n_kv, 0))
                        visible.append((q[:, r, None] @ keys[-1].transpose(1, 2))[:, 0] / math.sqrt(width))
                        seen[r, m, level] = tokens
                among_fine = torch.cat(visible[1:], dim=-1).detach().softmax(-1).sum(0)
                mine = [where for where in seen if where[0] == r]
                for where, got in zip(mine, among_fine.split([len(seen[w]) for w in mine]), strict=True):
                    seen[where] = seen[where], got
                p = torch.cat(visible, dim=-1).softmax(-1)
                joint = (p[:, None] @ torch.cat(values, dim=1))[:, 0].reshape(-1)
                replaced = (1 - alpha) * out[r] + alpha * joint
                out = torch.cat([out[:r], replaced[None], out[r + 1 :]])
        if index in able:
            chosen = {}
            for r in rows:
                p = logits[:, r].softmax(-1).sum(0).detach()
                for m, stream in enumerate(streams):
                    key = torch.tensor([[index, r - int(stream.coarse_positions[0])]])
                    scores = p[stream.coarse_positions][None]
                    first = selector.select(scores, stream.grid, stream.selectable, key)[0]
                    chosen[r, m] = _naive_levels(stream, first, scores, selector, key, r, m, seen)
            seen = {}
        hidden = hidden + layer.self_attn.o_proj(out)
        hidden = hidden + layer.mlp(norm(hidden, layer.post_attention_layernorm.weight))
    return model.get_output_embeddings()(norm(hidden, decoder.norm.weight))


@functools.cache
def _touches(grid) -> Tensor:
    """`[n_regions, n_coarse]`: 1 where any token of a region has its centre in a cell."""
    out = torch.zeros(grid.n_regions, grid.n_coarse)
    for region in range(grid.n_regions):
        inside = grid.tokens(torch.tensor([region]))[0]
        out[region, grid.parents(inside[inside >= 0])] = 1
    return out


def _naive_levels(stream, first: Tensor, scores: Tensor, selector, key: Tensor, r: int, m: int, seen: dict):
    """What is read next of every level, region by region; the levels share what was spent on the first."""
    levels = stream.levels
    picked, ranking = [first], [stream.grid.pool(selector.margins(scores, stream.grid))[0]]
    for before, level in pairwise(levels):
        weight = torch.zeros(before.grid.n_fine)
        if (r, m, before) in seen:
            tokens, got = seen[r, m, before]
            weight[tokens] = got
        grid = flexcore.Grid(before.grid.fine, level.grid.fine, level.grid.edges, level.grid.padding)
        ranking.append((weight * _touches(grid)).amax(dim=1))
        able = (level.selectable & (ranking[-1] > 0))[None]
        picked.append(selector.select(weight[None], grid, able, key)[0])
    budget = int(first.sum())
    share = budget // max(1, sum(bool(p.any()) for p in picked))
    kept = [_top(p, s, share) for p, s in zip(picked[1:], ranking[1:], strict=True)]
    return [_top(first, ranking[0], budget - sum(int(k.sum()) for k in kept)), *kept]


def _top(picked: Tensor, score: Tensor, most: int) -> Tensor:
    best = sorted(picked.nonzero()[:, 0].tolist(), key=lambda i: (-float(score[i]), i))[:most]
    out = torch.zeros_like(picked)
    out[best] = True
    return out


def embeddings(model, inputs: dict) -> Tensor:
    """The decoder's input embeddings `[B, T, C]`, coarse tokens included."""
    seen = {}

    def hook(module, args, kwargs):
        embeds = kwargs.get("inputs_embeds")
        seen["x"] = module.get_input_embeddings()(kwargs["input_ids"]) if embeds is None else embeds

    handle = model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(**plain(inputs))
    handle.remove()
    return seen["x"]


def twin(model):
    """A deep copy, so that a test can compare before and after."""
    return copy.deepcopy(model)
