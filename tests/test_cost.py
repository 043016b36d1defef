"""The cost model against design section 6, torch's own FLOP counter, and a wrapped model."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flexcore
from flexcore.cost import (
    Cost,
    DecoderShape,
    coarse_prefill,
    decode,
    dense_prefill,
    flex_prefill,
    kv_bytes,
)
from flexcore.grid import Grid
from flexcore.hf.kv_cache import cache_argument
from flexcore.hf.tiny import tiny_llama
from flexcore.streams import StreamBatch

# LLaVA-1.5-7B, whose table design section 6 holds: 64 text, 576 coarse, 5,184 fine tokens, 10 % of them read
LLAVA_7B = DecoderShape(32, 4096, 32, 32, 128, 11008, 32000, reading=tuple(range(9, 32)))
TEXT, COARSE, FINE, READ = 64, 576, 5184, 518
TERA = 1e12


def test_design_table_prefill():
    assert coarse_prefill(LLAVA_7B, TEXT, COARSE).total / TERA == pytest.approx(8.4, abs=0.05)
    assert dense_prefill(LLAVA_7B, TEXT, COARSE, FINE).total / TERA == pytest.approx(84.3, abs=0.05)
    assert flex_prefill(LLAVA_7B, TEXT, COARSE, READ).total / TERA == pytest.approx(9.2, abs=0.05)


def test_design_table_decode():
    context = TEXT + COARSE + 1  # the prompt and the new token itself
    plain = decode(LLAVA_7B, context)
    official = decode(LLAVA_7B, context, fine_read=READ, fine_projected=READ)
    cached = decode(LLAVA_7B, context, fine_read=READ)
    assert plain.total / TERA == pytest.approx(0.0136, abs=0.00005)
    assert official.total / TERA == pytest.approx(0.81, abs=0.005)
    # the table adds two rounded numbers, and we count the readout logits too: within one of its last digits
    assert cached.total / TERA == pytest.approx(0.0138, abs=0.0001)
    assert official.total - cached.total == official.fine_projection
    assert official.total / plain.total == pytest.approx(60, abs=0.5)


def test_design_memory():
    """Section 6: 1.95 GB of fine K/V in 23 layers, against .34 GB for the prompt."""
    assert kv_bytes(LLAVA_7B, FINE, layers=23) / 1e9 == pytest.approx(1.95, abs=0.005)
    assert kv_bytes(LLAVA_7B, TEXT + COARSE) / 1e9 == pytest.approx(0.34, abs=0.005)
    assert kv_bytes(LLAVA_7B, [FINE] * 23) == kv_bytes(LLAVA_7B, FINE, layers=23)


def counted(model, **inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(**inputs, logits_to_keep=1)
    return counter.get_total_flops(), out


@pytest.fixture(scope="module")
def llama():
    """GQA, an MLP that is no multiple of the width, and eager attention, whose products torch counts."""
    return tiny_llama(
        layers=5,
        hidden=96,
        heads=6,
        kv_heads=2,
        vocab=211,
        intermediate_size=250,
        attn_implementation="eager",
    )


@pytest.mark.parametrize("n_text, n_coarse", [(1, 0), (17, 100), (200, 57)])
def test_prefill_matches_torch(llama, n_text, n_coarse):
    flops, _ = counted(llama, input_ids=torch.randint(211, (1, n_text + n_coarse)))
    cost = coarse_prefill(DecoderShape.from_config(llama.config), n_text, n_coarse)
    # eager attention works out the masked half as well
    assert cost.total + cost.attention == pytest.approx(flops, rel=0.02)


def test_decode_matches_torch(llama):
    _, out = counted(llama, input_ids=torch.randint(211, (1, 63)), use_cache=True)
    flops, _ = counted(
        llama, input_ids=torch.randint(211, (1, 1)), **cache_argument(llama, out.past_key_values)
    )
    assert decode(DecoderShape.from_config(llama.config), 64).total == pytest.approx(flops, rel=0.02)


def test_flex_matches_a_wrapped_model(llama):
    """What reading adds, in a prefill and in a step that finds its fine K/V cached."""
    grid = Grid.blocks((6, 6), (18, 18), region=5)
    streams = StreamBatch.from_features([torch.randn(grid.n_fine, 96)], grid, [torch.arange(3, 39)])
    ids, step = torch.randint(211, (1, 63)), torch.randint(211, (1, 1))
    plain, _ = counted(llama, input_ids=ids)
    with flexcore.attached(llama, flexcore.FlexConfig(selector="all", first_layer=1)):
        shape = DecoderShape.from_config(llama.config, reading=llama.flex_config.layers)
        counted(
            llama, input_ids=ids, flex_streams=streams
        )  # the first forward tries out how layers rotate keys
        prefill, out = counted(llama, input_ids=ids, flex_streams=streams, use_cache=True)
        again, _ = counted(
            llama, input_ids=step, flex_streams=streams, **cache_argument(llama, out.past_key_values)
        )
    assert shape.reading == (2, 3, 4)
    # every region is padded to the largest one, and the padding runs through the products as well
    read = grid.n_regions * grid.region_tokens
    model = flex_prefill(shape, 63 - 36, 36, read)
    extra = model.fine_projection + model.readout_logits + model.fine_attention
    assert prefill - plain == pytest.approx(extra, rel=0.02)
    assert again == pytest.approx(decode(shape, 64, fine_read=read).total, rel=0.02)


def test_parts():
    shape = DecoderShape(4, 32, 4, 2, 8, 64, 50, reading=(1, 3))
    per_layer = flex_prefill(shape, 5, 9, fine_projected=[10, 30], fine_read=[10, 50], rows=2)
    assert per_layer.fine_projection == 2 * (2 * 32 * 16) * 40
    assert per_layer.readout_logits == 2 * 3 * 2 * 14 * 32
    assert per_layer.fine_attention == 4 * 60 * 32
    assert per_layer.linear == coarse_prefill(shape, 5, 9).linear
    every = flex_prefill(shape, 5, 9, fine_projected=20, rows=2)
    assert (every.fine_projection, every.fine_attention) == (per_layer.fine_projection, 4 * 80 * 32)
    assert Cost(1, 2, 3, 4, 5, 6).total == 21
    nothing_read = decode(shape, 14, fine_read=0)
    assert nothing_read.total - decode(shape, 14).total == nothing_read.readout_logits > 0


def test_from_config_reads_composite_and_old_names():
    gpt2 = SimpleNamespace(n_embd=48, n_head=4, n_layer=3, n_inner=None, vocab_size=10)
    shape = DecoderShape.from_config(SimpleNamespace(text_config=gpt2), reading=[1, 2], mlp_matrices=2)
    assert shape == DecoderShape(3, 48, 4, 4, 12, 192, 10, mlp_matrices=2, reading=(1, 2))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_experts": 8}, "num_experts=8"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_key_value_heads": 3}, "kv_heads must divide heads=4, got 3"),
        ({"vocab_size": 0}, "vocab must be an integer >= 1, got 0"),
    ],
)
def test_from_config_refuses(config, message):
    good = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "vocab_size": 9,
    }
    with pytest.raises(ValueError, match=message):
        DecoderShape.from_config(SimpleNamespace(**{**good, **config}))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.__class__(2, 8, 1, 1, 8, 8, 8, reading=(2,)), r"reading must lie in \[0, 2\)"),
        (lambda s: s.__class__(2, 8, 1, 1, 8, 8, 8, reading=(1, 0)), "reading must rise"),
        (lambda s: s.__class__(2, 8, 1, 1, 8, 8, 8, mlp_matrices=4), "mlp_matrices must be 3"),
        (lambda s: coarse_prefill(s, -1, 4), "n_text must be an integer >= 0, got -1"),
        (lambda s: flex_prefill(s, 1, 4, [1, 2]), r"one number per reading layer \(1\), got 2"),
        (lambda s: flex_prefill(s, 1, 4, 3, rows=-2), "rows must be an integer >= 0, got -2"),
        (lambda s: decode(s, 1, fine_read=-1), "fine_read must be"),
        (lambda s: kv_bytes(s, [1, -2]), "tokens must hold"),
    ],
)
def test_bad_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call(DecoderShape(2, 8, 1, 1, 8, 8, 8, reading=(1,)))
