"""The design's invariants I1 to I9 on tiny Llama and LLaVA models, each with a control that must differ."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

import flexcore
from flexcore.hf.kv_cache import cache_argument

from .helpers import (
    GRID,
    KINDS,
    WIDE,
    Sample,
    batch,
    embeddings,
    forward,
    generate,
    lazy,
    make,
    naive_forward,
    perturb,
    plain,
    wrapped,
)

TOLERANCE = 5e-5
CONTROL = 1e-3
MIXED = [
    Sample(before=3, after=6, seed=1),
    Sample(before=7, after=2, grids=[GRID, WIDE], seed=2),
    Sample(before=9, after=4, grids=[], seed=3),
    Sample(before=2, after=9, grids=[WIDE], seed=4),
]
DECODING = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
    "beams": {"num_beams": 3},
    "static-cache": {"cache_implementation": "static"},
    "no-cache": {"use_cache": False},
}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return a.shape == b.shape and float((a - b).detach().abs().max()) <= tolerance


# ---------------------------------------------------------------- I1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_i1_no_media_or_nothing_selected_is_bit_identical(kind, side):
    inputs = batch(kind, MIXED, side)
    before = forward(make(kind), plain(inputs))
    model = wrapped(kind, fraction=0.0)
    assert torch.equal(forward(model, plain(inputs)), before)
    assert torch.equal(forward(model, inputs), before)
    control = forward(wrapped(kind), inputs)
    assert not close(control, before, CONTROL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", DECODING)
def test_i1_generate_is_bit_identical(kind, how):
    inputs = batch(kind, MIXED)
    model = make(kind)
    outs = []
    for flex in (None, plain(inputs), inputs):
        if flex is inputs:
            flexcore.wrap(model, flexcore.FlexConfig(first_layer=1, selector="top_k", fraction=0.0))
            perturb(model)
        torch.manual_seed(7)
        outs.append(
            generate(
                model,
                flex or plain(inputs),
                **DECODING[how],
                output_logits=True,
                return_dict_in_generate=True,
            )
        )
    for out in outs[1:]:
        assert torch.equal(out.sequences, outs[0].sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, outs[0].logits, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_i1_unwrap_leaves_no_trace(kind):
    model = make(kind)

    def picture(m):
        hooks = [(n, len(x._forward_hooks), len(x._forward_pre_hooks)) for n, x in m.named_modules()]
        configs = [x.config.to_json_string() for x in m.modules() if hasattr(x, "config")]
        own = sorted(k for k in vars(m) if k not in ("_modules", "_parameters", "_buffers"))
        attention = [x.config._attn_implementation for x in m.modules() if hasattr(x, "config")]
        return (
            type(m),
            sorted(m.state_dict()),
            hooks,
            configs,
            own,
            attention,
            [x.training for x in m.modules()],
        )

    inputs = batch(kind, MIXED)
    forward(model, plain(inputs))  # the vision tower installs capture hooks of its own on its first run
    before, state = picture(model), {k: v.clone() for k, v in model.state_dict().items()}
    with flexcore.attached(model, flexcore.FlexConfig(first_layer=1)) as inside:
        assert inside is model and isinstance(model, before[0]) and picture(model) != before
        forward(model, inputs)
        generate(model, inputs, new=2)
    assert picture(model) == before
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


# ---------------------------------------------------------------- I2, I7

SELECTIONS = {
    "all": {"selector": "all"},
    "threshold": {"selector": "threshold", "threshold": 100},
    "top_k": {"selector": "top_k", "top_k": 3},
    "top_p": {"selector": "top_p", "top_p": 0.3},
    "random": {"selector": "random", "fraction": 0.3},
    "all+fine_norm": {"selector": "all", "fine_norm": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("grids", [[GRID], [GRID, WIDE]], ids=["one-medium", "two-media"])
def test_i2_equals_the_dense_reference(kind, selection, grids):
    model = wrapped(kind, **SELECTIONS[selection])
    inputs = batch(kind, [Sample(grids=grids)])
    streams, length = inputs["flex_streams"].samples[0], inputs["input_ids"].shape[1]
    embeds = embeddings(model, inputs)[0]
    found = forward(model, inputs)[0]
    expected = naive_forward(model, embeds, streams, [length - 1])
    assert close(found, expected.detach())
    assert not close(found[-1], forward(model, plain(inputs))[0, -1], CONTROL)


@pytest.mark.parametrize("readout", ["answer", "text"])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_i7_gradients_equal_the_references(readout, alpha):
    model = wrapped("llama", readout=readout)
    inputs = batch("llama", [Sample(after=8)])
    length = inputs["input_ids"].shape[1]
    streams = inputs["flex_streams"].samples[0]
    labels = torch.full((1, length), -100)
    labels[:, -5:] = inputs["input_ids"][:, -5:]
    rows = list(range(length - 6, length - 1))
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, rows] = True
    fine = streams[0].source.tensor.requires_grad_()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    leaves = [fine, embeds, *model.parameters()]

    loss = model(
        inputs_embeds=embeds,
        flex_streams=inputs["flex_streams"],
        labels=labels,
        alpha=alpha,
        readout_mask=mask if readout == "text" else None,
    ).loss
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    logits = naive_forward(model, embeds[0], streams, rows, alpha)
    reference = torch.nn.functional.cross_entropy(logits[rows], labels[0, -5:])
    expected = torch.autograd.grad(reference, leaves, allow_unused=True)
    assert close(loss, reference)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert close(a, b, max(1e-6, 1e-4 * float(b.abs().max())))
    assert float(found[0].abs().max()) > CONTROL


# ---------------------------------------------------------------- I3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("selection", ["all", "threshold", "top_p", "random"])
def test_i3_a_batch_equals_single_runs(kind, side, selection):
    model = wrapped(kind, **SELECTIONS[selection])
    inputs = batch(kind, MIXED, side)
    # the model itself numbers padded rows from the padding on, unless it is told
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    together = forward(model, inputs, position_ids=positions)
    off = forward(model, plain(inputs), position_ids=positions)
    for row, sample in enumerate(MIXED):
        alone = forward(model, batch(kind, [sample]))[0]
        valid = inputs["attention_mask"][row].bool()
        assert close(together[row, valid], alone)
        assert bool(sample.grids) == (not close(together[row, valid], off[row, valid], CONTROL))


@pytest.mark.parametrize("kind", KINDS)
def test_i3_a_generated_batch_equals_single_runs(kind):
    model = wrapped(kind)
    inputs = batch(kind, MIXED)
    out = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    for row, sample in enumerate(MIXED):
        alone = generate(model, batch(kind, [sample]), output_logits=True, return_dict_in_generate=True)
        assert torch.equal(out.sequences[row, -6:], alone.sequences[0, -6:])
        assert all(close(a[row], b[0]) for a, b in zip(out.logits, alone.logits, strict=True))


# ---------------------------------------------------------------- I4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("readout", ["answer", "text"])
@pytest.mark.parametrize("how", ["greedy", "static-cache", "no-cache"])
def test_i4_teacher_forcing_equals_decoding(kind, readout, how):
    model = wrapped(kind, readout=readout)
    inputs = batch(kind, MIXED)
    out = generate(model, inputs, **DECODING[how], output_logits=True, return_dict_in_generate=True)
    stepwise = torch.stack(out.logits, dim=1)
    n = stepwise.shape[1]
    length = out.sequences.shape[1]
    labels = torch.full_like(out.sequences, -100)
    labels[:, -n:] = out.sequences[:, -n:]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(MIXED), n, dtype=torch.long)], dim=1)
    forced = {**inputs, "input_ids": out.sequences, "attention_mask": mask}
    forced["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if readout == "answer":
        forced["labels"] = labels
    assert close(forward(model, forced)[:, length - n - 1 : -1], stepwise)
    forced["labels"] = torch.full_like(labels, -100)  # no row reads
    control = forward(model, forced)[:, length - n - 1 : -1]
    assert not close(control, stepwise, CONTROL)


@pytest.mark.parametrize("kind", KINDS)
def test_i4_a_hand_written_decode_loop(kind):
    model = wrapped(kind)
    inputs = batch(kind, [Sample()])
    expected = generate(model, inputs)[0, -6:]
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        tokens = []
        for _ in range(6):
            tokens.append(out.logits[:, -1].argmax(-1))
            out = model(
                input_ids=tokens[-1][:, None], **cache_argument(model, out.past_key_values), use_cache=True
            )
    assert torch.equal(torch.cat(tokens), expected)


# ---------------------------------------------------------------- I5


@pytest.mark.parametrize("kind", KINDS)
def test_i5_beams_equal_each_beam_scored_alone(kind):
    model = wrapped(kind)
    samples = [MIXED[0], MIXED[3]]  # one medium each: transformers 5.0 itself mixes up several under beams
    inputs = batch(kind, samples)
    settings = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    out = generate(model, inputs, **settings, output_scores=True, return_dict_in_generate=True)
    prompt = inputs["input_ids"].shape[1]
    for row, tokens in enumerate(out.sequences):
        sample = samples[row // 3]
        alone = batch(kind, [sample])
        new = tokens[prompt:]
        ids = torch.cat([alone["input_ids"][0], new])[None]
        labels = torch.full_like(ids, -100)
        labels[0, -len(new) :] = new
        logits = forward(
            model, {**alone, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=labels
        )
        own = logits[0, -len(new) - 1 : -1].log_softmax(-1).gather(1, new[:, None]).sum()
        assert abs(float(own - out.sequences_scores[row])) < TOLERANCE
    cacheless = generate(model, inputs, **settings, use_cache=False)
    assert torch.equal(out.sequences, cacheless)


# ---------------------------------------------------------------- I6


@pytest.mark.parametrize("kind", KINDS)
def test_i6_a_lazy_source_equals_one_encoded_up_front(kind):
    model = wrapped(kind, fraction=0.05)
    eager, late = batch(kind, MIXED), batch(kind, MIXED, source=lazy)
    assert torch.equal(forward(model, late), forward(model, eager))
    late = batch(kind, MIXED, source=lazy)
    assert torch.equal(generate(model, late), generate(model, eager))
    for sample in late["flex_streams"].samples:
        for stream in sample:
            encoded = stream.source.encoded
            assert 0 < len(encoded) < stream.grid.n_regions and len(encoded) == len(set(encoded))


# ---------------------------------------------------------------- I8


def test_i8_threads_share_a_model():
    model = wrapped("llava")
    requests = [batch("llava", [Sample(seed=s, before=2 + s, grids=[GRID] * (s % 3))]) for s in range(4)]
    expected = [generate(model, r, new=12) for r in requests]
    found: list = [None] * len(requests)
    barrier = threading.Barrier(len(requests))

    def work(i: int) -> None:
        barrier.wait()
        for _ in range(3):
            found[i] = generate(model, requests[i], new=12)
            assert torch.equal(found[i], expected[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(requests))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(f is not None and torch.equal(f, e) for f, e in zip(found, expected, strict=True))


# ---------------------------------------------------------------- I9


@pytest.mark.parametrize("kind", KINDS)
def test_i9_save_load_wrap_again(kind, tmp_path):
    model = wrapped(kind)
    inputs = batch(kind, MIXED)
    expected = forward(model, inputs)
    model.save_adapter_weights(tmp_path / "fine")
    other = flexcore.wrap(make(kind), flexcore.hf.read_adapter_config(tmp_path / "fine")[0])
    assert not close(forward(other, inputs), expected, CONTROL)
    other.load_adapter_weights(tmp_path / "fine")
    assert torch.equal(forward(other, inputs), expected)
    assert copy.deepcopy(other).flex_config == model.flex_config
