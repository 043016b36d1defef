"""Pyramids on tiny models: levels opened by attention, one budget, the design's invariants."""

from __future__ import annotations

import pytest
import torch

import flexcore
from flexcore.errors import StreamError
from flexcore.hf import context as context_file
from flexcore.hf.kv_cache import cache_argument

from .helpers import GRID, WIDE, Sample, batch, embeddings, forward, generate, naive_forward, plain, wrapped

FINER = flexcore.Grid.blocks((6, 6), (54, 54), region=4, tile=18)
FINEST = flexcore.Grid.blocks((6, 6), (108, 108), region=4, tile=18)
CHOICES = {
    "top_k": {"selector": "top_k", "top_k": 6},
    "threshold": {"selector": "threshold", "threshold": 60},
    "top_p": {"selector": "top_p", "top_p": 0.6},
    "all": {"selector": "all"},
}


def pyramid(levels: int = 1, **kwargs) -> Sample:
    return Sample(finer=[FINER, FINEST][:levels], **kwargs)


def close(a, b, tolerance=5e-5):
    return a.shape == b.shape and float((a - b).detach().abs().max()) <= tolerance


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("levels", [1, 2])
def test_levels_equal_the_naive_reference(choice, levels):
    model = wrapped("llama", layers=7, **CHOICES[choice])
    inputs = batch("llama", [pyramid(levels)])
    streams, length = inputs["flex_streams"].samples[0], inputs["input_ids"].shape[1]
    found = forward(model, inputs)[0]
    expected = naive_forward(model, embeddings(model, inputs)[0], streams, [length - 1])
    assert close(found, expected)
    flat = {**inputs, "flex_streams": flexcore.StreamBatch(((_without_finer(streams[0]),),))}
    assert not close(found, forward(model, flat)[0], 1e-3)


def _without_finer(stream):
    return flexcore.FineStream(stream.grid, stream.coarse_positions, None, stream.source)


def test_a_row_reads_what_it_opened_within_the_budget():
    model = wrapped("llama", layers=7, selector="top_k", top_k=6)
    with flexcore.trace(model) as trace:
        forward(model, batch("llama", [pyramid(2)]))
    first = min(trace.layers)
    count = {(r.layer, r.level): int(r.regions.sum()) for r in trace}
    assert [count[first, n] for n in (1, 2, 3)] == [6, 0, 0]  # nothing has been read yet
    assert [count[first + 1, n] for n in (1, 2, 3)] == [3, 3, 0]
    assert [count[first + 2, n] for n in (1, 2, 3)] == [2, 2, 2]
    for record in trace.where(level=2):
        if record.regions.any():
            read = trace.where(layer=record.layer - 1, level=1)[0]
            inside = FINER.tokens(record.regions.nonzero()[:, 0])
            on_first = torch.unique(GRID.tokens(read.regions.nonzero()[:, 0]))
            # a child touches a token that was read
            parents = flexcore.Grid(GRID.fine, FINER.fine, FINER.edges).parents(inside.clamp(min=0))
            assert all(torch.isin(row, on_first).any() for row in parents)
    assert trace.looked_at(level=2).shape == (FINER.n_regions,)


def test_a_mixed_batch_equals_single_runs():
    samples = [
        pyramid(before=3, seed=1),
        Sample(before=7, grids=[WIDE], seed=2),
        Sample(grids=[], seed=3),
        Sample(grids=[GRID, GRID], finer=[FINER], seed=4),
    ]
    model = wrapped("llama", **CHOICES["top_k"])
    inputs = batch("llama", samples)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = forward(model, inputs, position_ids=positions)
    for row, sample in enumerate(samples):
        alone = forward(model, batch("llama", [sample]))[0]
        assert close(together[row, inputs["attention_mask"][row].bool()], alone)
        assert bool(sample.grids) == (
            not close(alone, forward(model, plain(batch("llama", [sample])))[0], 1e-3)
        )


@pytest.mark.parametrize("beams", [1, 2])
def test_decoding_equals_teacher_forcing(beams):
    model = wrapped("llava", **CHOICES["top_k"])
    inputs = batch("llava", [pyramid(before=3, seed=1), pyramid(before=8, seed=2)])
    out = generate(
        model, inputs, num_beams=beams, output_logits=True, output_scores=True, return_dict_in_generate=True
    )
    length = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long)], dim=1)
    forced = {**inputs, "input_ids": out.sequences, "attention_mask": mask}
    forced["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    rows = torch.zeros(mask.shape, dtype=torch.bool)
    rows[:, length - 1 :] = True
    logits = forward(model, forced, readout_mask=rows)[:, length - 1 : -1]
    if beams == 1:
        assert close(logits, torch.stack(out.logits, dim=1))
    else:  # the beam that won, scored alone
        tokens = out.sequences[:, length:, None]
        assert close(out.sequences_scores, logits.log_softmax(-1).gather(2, tokens).sum((1, 2)) / 6, 1e-4)
    control = forward(model, {**forced, "flex_streams": _flat(inputs["flex_streams"])}, readout_mask=rows)
    assert not close(control[:, length - 1 : -1], logits, 1e-3)


def _flat(streams):
    return flexcore.StreamBatch(tuple(tuple(_without_finer(s) for s in sample) for sample in streams))


def test_gradients_equal_the_references():
    model = wrapped("llama", selector="top_k", top_k=6)
    inputs = batch("llama", [pyramid(2, after=8)])
    streams, length = inputs["flex_streams"].samples[0], inputs["input_ids"].shape[1]
    labels = torch.full((1, length), -100)
    labels[:, -5:] = inputs["input_ids"][:, -5:]
    rows = list(range(length - 6, length - 1))
    fine = [level.source.tensor.requires_grad_() for level in streams[0].levels]
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    leaves = [*fine, *model.flex_fine.parameters()]
    loss = model(inputs_embeds=embeds, flex_streams=inputs["flex_streams"], labels=labels).loss
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    logits = naive_forward(model, embeds[0], streams, rows)
    reference = torch.nn.functional.cross_entropy(logits[rows], labels[0, -5:])
    for a, b in zip(found, torch.autograd.grad(reference, leaves, allow_unused=True), strict=True):
        assert (a is None) == (b is None)
        assert a is None or close(a, b, max(1e-6, 1e-4 * float(b.abs().max())))
    assert all(float(g.abs().max()) > 1e-5 for g in found[:3])


def test_a_second_turn_keeps_its_levels_when_a_medium_joins():
    model = wrapped("llama", **CHOICES["top_k"])
    whole = batch("llama", [Sample(before=4, after=5, grids=[GRID, WIDE], finer=[FINER], seed=5)])
    streams, length = whole["flex_streams"].samples[0], whole["input_ids"].shape[1]
    cut = int(streams[1].coarse_positions[0])
    rows = torch.zeros(1, length, dtype=torch.bool)
    rows[0, [cut - 1, length - 1]] = True
    expected = forward(model, whole, readout_mask=rows)[:, -1]
    first = {"input_ids": whole["input_ids"][:, :cut], "flex_streams": flexcore.StreamBatch(((streams[0],),))}
    with torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        later = model(
            input_ids=whole["input_ids"][:, cut:],
            flex_streams=flexcore.StreamBatch(((streams[1],),)),
            **cache_argument(model, cache),
        )
    assert close(later.logits[:, -1], expected)


def test_one_level_does_nothing_of_this(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("called for media of one level")

    model, inputs = wrapped("llama", **CHOICES["top_k"]), batch("llama", [Sample(), Sample(seed=1)])
    monkeypatch.setattr(context_file, "attention_by_level", never)
    monkeypatch.setattr(context_file, "open_levels", never)
    generate(model, inputs)
    with pytest.raises(AssertionError, match="one level"):
        generate(model, batch("llama", [pyramid()]))


def test_static_mode_refuses_levels():
    model = wrapped("llama", static=True, **CHOICES["top_k"])
    with pytest.raises(StreamError, match="static must be False"):
        forward(model, batch("llama", [pyramid()]))
    forward(model, batch("llama", [Sample()]))


@pytest.mark.parametrize(
    ("finer", "match"),
    [
        (flexcore.Grid.blocks((6, 7), (54, 54)), "finer.grid.coarse must be"),
        (flexcore.Grid.blocks((6, 6), (12, 54)), "finer.grid.fine must be at least"),
        (flexcore.Grid.official(6, 54), "official lattice"),
    ],
)
def test_levels_that_do_not_fit_are_refused(finer, match):
    source = flexcore.TensorSource(torch.zeros(GRID.n_fine, 8), GRID)
    other = flexcore.FineStream(finer, None, None, flexcore.TensorSource(torch.zeros(finer.n_fine, 8), finer))
    with pytest.raises(StreamError, match=match):
        flexcore.FineStream(GRID, None, None, source, finer=other)


def test_levels_of_other_widths_or_kinds_are_refused():
    source = flexcore.TensorSource(torch.zeros(GRID.n_fine, 8), GRID)
    wide = flexcore.FineStream(FINER, None, None, flexcore.TensorSource(torch.zeros(FINER.n_fine, 9), FINER))
    with pytest.raises(StreamError, match=r"finer.source.width must be 8.*got 9"):
        flexcore.FineStream(GRID, None, None, source, finer=wide)
    with pytest.raises(StreamError, match="finer must be a FineStream"):
        flexcore.FineStream(GRID, None, None, source, finer=source)


def test_levels_move_and_print_with_their_stream():
    streams = batch("llama", [pyramid(2)])["flex_streams"]
    moved = streams.to(dtype=torch.bfloat16)
    assert [s.source.dtype for s in moved.samples[0][0].levels] == [torch.bfloat16] * 3
    assert streams.to(dtype=torch.float32) is streams
    assert "(6, 6)->(18, 18)->(54, 54)->(108, 108)" in repr(streams)
