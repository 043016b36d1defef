"""Pickling wrapped models: to another process, and with torch.save."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import flexcore

from .helpers import KINDS, Sample, batch, forward, generate, make, perturb, wrapped

CHILD = """
import pickle, sys, torch
model, inputs = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    logits = model(**inputs).logits
torch.save(logits, sys.argv[2])
"""


def test_a_model_travels_to_another_process(tmp_path):
    model, inputs = wrapped("llama"), batch("llama", [Sample()])
    expected = forward(model, inputs)
    sent, answer = tmp_path / "model.pkl", tmp_path / "logits.pt"
    sent.write_bytes(pickle.dumps((model, inputs)))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(sent), str(answer)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(answer, weights_only=True), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flex", [{}, {"share_kv_projections": True}], ids=["own", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_unpickled_model_is_wrapped_and_stands_alone(kind, flex):
    model, inputs = wrapped(kind, **flex), batch(kind, [Sample()])
    # before the first forward: transformers' LLaVA, plain or wrapped, can't be pickled once it has installed hooks
    twin = pickle.loads(pickle.dumps(model))
    expected = forward(model, inputs)
    assert flexcore.is_wrapped(twin) and type(twin) is type(model)
    assert twin.flex_config == model.flex_config
    assert torch.equal(forward(twin, inputs), expected)
    assert torch.equal(generate(twin, inputs), generate(model, inputs))
    with torch.no_grad():
        twin.get_input_embeddings().weight.add_(1)
    perturb(twin, seed=9)
    assert torch.equal(forward(model, inputs), expected)
    flexcore.unwrap(twin)
    assert type(twin) is type(make(kind))


def test_torch_save_and_load_of_a_whole_model(tmp_path):
    model, inputs = wrapped("llama"), batch("llama", [Sample()])
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(forward(twin, inputs), forward(model, inputs))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = wrapped("llama", seed=3)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(forward(other, inputs), forward(model, inputs))


def test_traces_and_running_requests_do_not_travel():
    model, inputs = wrapped("llama"), batch("llama", [Sample()])
    with flexcore.trace(model) as trace:
        twin = pickle.loads(pickle.dumps(model))
        other = copy.deepcopy(model)
        forward(twin, inputs)
        forward(other, inputs)
    assert not len(list(trace)) and not twin._flex_binding.traces and not other._flex_binding.traces
