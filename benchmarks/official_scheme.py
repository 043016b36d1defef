"""The official FlexAttention scheme, written from its description, as a yardstick for speed.

Eager attention with full maps; in reading layers every row works out fine logits, of which all but the last row's are
masked; fine keys and values are projected anew, by the layer's own two projections, in every layer of every step;
nothing fine is cached. It runs on the weights of a wrapped `LlamaForCausalLM` and gives the numbers of its reference
mode for one sample, which a test checks; it is not meant for anything else.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flexcore.positions import official_tables
from flexcore.selection import ThresholdSelector
from flexcore.streams import FineStream

MASKED = -65504.0


class OfficialScheme:
    """One sample's request: a KV cache of the sequence, and the selection carried from layer to layer.

    Args:
        model: A wrapped `LlamaForCausalLM` in reference mode, eval.
        stream: Its one medium, with all features in a tensor.
        forced: `[n_regions]` bool, used instead of every selection (the work of selecting is still done).
    """

    def __init__(self, model: Any, stream: FineStream, forced: Tensor | None = None):
        self.model = model
        self.decoder = model.model
        self.stream = stream
        self.features = stream.source.features(torch.arange(stream.grid.n_regions))
        tokens = stream.grid.tokens(torch.arange(stream.grid.n_regions))
        flat = torch.zeros(stream.grid.n_fine, self.features.shape[-1])
        flat[tokens[tokens >= 0]] = self.features[tokens >= 0]
        self.features = flat
        self.owner = torch.zeros(stream.grid.n_fine, dtype=torch.long)
        for region, row in enumerate(tokens):
            self.owner[row[row >= 0]] = region
        self.forced = forced
        self.selector = ThresholdSelector(model.flex_config.threshold)
        self.past: list[tuple[Tensor, Tensor]] = []
        positions = stream.coarse_positions
        assert positions is not None
        self.start, self.stop = int(positions[0]), int(positions[-1]) + 1
        cos, sin = self.decoder.rotary_emb(flat, torch.arange(self.start, self.stop)[None])
        self.tables = official_tables(cos[0], sin[0], stream.grid)

    @torch.no_grad()
    def step(self, embeds: Tensor) -> Tensor:
        """Logits `[V]` of the last row after appending `[1, T, C]` embeddings."""
        config, layers = self.model.config, self.decoder.layers
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        n = embeds.shape[1]
        before = self.past[0][0].shape[2] if self.past else 0
        cos, sin = self.decoder.rotary_emb(embeds, torch.arange(before, before + n)[None])
        mask = torch.full((n, before + n), MASKED).triu(1 + before)
        hidden, selected = embeds, None
        for i, layer in enumerate(layers):
            residual, x = hidden, layer.input_layernorm(hidden)
            attention = layer.self_attn
            q = attention.q_proj(x).view(1, n, heads, width).transpose(1, 2)
            k = attention.k_proj(x).view(1, n, kv_heads, width).transpose(1, 2)
            v = attention.v_proj(x).view(1, n, kv_heads, width).transpose(1, 2)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            if len(self.past) > i:
                k, v = torch.cat([self.past[i][0], k], dim=2), torch.cat([self.past[i][1], v], dim=2)
                self.past[i] = (k, v)
            else:
                self.past.append((k, v))
            k, v = k.repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
            logits = q @ k.transpose(2, 3) / math.sqrt(width) + mask
            probabilities = logits.softmax(-1)
            if i in self.model.flex_config.layers and selected is not None and bool(selected.any()):
                out = self._read(i, q, k, v, logits, selected, heads // kv_heads)
            else:
                out = probabilities @ v
            if i >= self.model.flex_config.first_layer:
                selected = self._select(probabilities)
            hidden = residual + attention.o_proj(out.transpose(1, 2).reshape(1, n, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(self.decoder.norm(hidden[:, -1:]))[0, 0]

    def _select(self, probabilities: Tensor) -> Tensor:
        scores = probabilities[0, :, -1, self.start : self.stop].sum(0)[None]
        keys = torch.zeros(1, 2, dtype=torch.long)
        regions = self.selector.select(scores, self.stream.grid, self.stream.selectable, keys)[0]
        regions = regions if self.forced is None else self.forced
        return regions[self.owner]

    def _read(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, selected: Tensor, groups: int
    ) -> Tensor:
        fine = self.model.flex_fine[str(layer)]
        features = self.features[selected]
        shape = (1, len(features), k.shape[1] // groups, k.shape[3])
        kf = fine.k_proj(features).view(shape).transpose(1, 2)
        vf = fine.v_proj(features).view(shape).transpose(1, 2)
        kf = _rotate(kf, self.tables[0][selected][None], self.tables[1][selected][None])
        kf, vf = kf.repeat_interleave(groups, 1), vf.repeat_interleave(groups, 1)
        fine_logits = q @ kf.transpose(2, 3) / math.sqrt(q.shape[3])
        fine_logits[:, :, :-1] += MASKED  # every row works them out, the last one may see them
        joint = torch.cat([logits, fine_logits], dim=-1).softmax(-1)
        return joint @ torch.cat([v, vf], dim=2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin[:, None]
