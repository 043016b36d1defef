"""The yardstick for speed computes what our reference mode computes."""

from __future__ import annotations

import torch

import flexcore
from benchmarks.official_scheme import OfficialScheme
from flexcore.hf.kv_cache import cache_argument
from flexcore.hf.tiny import tiny_llama


def test_the_official_scheme_equals_our_reference_mode():
    model = flexcore.wrap(tiny_llama(layers=12), flexcore.FlexConfig.reference())
    with torch.no_grad():
        for parameter in model.flex_fine.parameters():
            parameter.normal_(0, 0.2)
    grid = flexcore.Grid.official(12, 36)
    ids, features = torch.randint(0, 97, (1, 170)), torch.randn(36 * 36, 64)
    streams = flexcore.StreamBatch.from_features([features], grid, [torch.arange(10, 154)])
    scheme = OfficialScheme(model, streams.samples[0][0])
    embed = model.get_input_embeddings()
    with torch.no_grad():
        out = model(ids, flex_streams=streams, use_cache=True)
        found = scheme.step(embed(ids))
        assert float((found - out.logits[0, -1]).abs().max()) < 5e-5
        assert float((found - model(ids).logits[0, -1]).abs().max()) > 1e-3
        for token in (5, 6, 7):
            step = torch.tensor([[token]])
            out = model(step, **cache_argument(model, out.past_key_values), use_cache=True)
            assert float((scheme.step(embed(step)) - out.logits[0, -1]).abs().max()) < 5e-5
