"""Machines, bytes and the least time they take."""

import pytest

from flexcore.cost import DecoderShape, decode, flex_prefill, kv_bytes
from flexcore.roofline import MACHINES, Machine, Weights, Work, decoder_parts, machine

SHAPE = DecoderShape(4, 32, 4, 2, 8, 64, 50, reading=(1, 3))
DENSE = Weights(layers=4 * SHAPE.params_per_layer, head=32 * 50)


def test_seconds_are_the_slower_of_the_two():
    on = Machine("x", flops=100.0, bytes_per_second=10.0)
    assert Work(1000, 1).seconds(on) == 10.0
    assert Work(1, 50).seconds(on) == 5.0
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)


def test_machines():
    assert machine("a100") is MACHINES["a100"]
    assert (MACHINES["v100"].flops, MACHINES["v100"].bytes_per_second) == (125e12, 900e9)
    assert all("datasheet" in m.source for m in MACHINES.values())
    own = machine("2e12:1e11")
    assert (own.flops, own.bytes_per_second) == (2e12, 1e11)
    for name in ("k80", "1:2:3", "a:b"):
        with pytest.raises(ValueError, match=f"machine must be one of v100, a100, h100 or .* got '{name}'"):
            machine(name)
    with pytest.raises(ValueError, match="bytes_per_second must be a number > 0, got 0"):
        machine("1:0")


def test_experts_are_read_as_tokens_choose_them():
    weights = Weights(layers=100, experts=800, head=10, routed=0.25)
    assert weights.touched(1) == 100 + 200 + 10
    assert weights.touched(2) == 100 + 350 + 10  # half of what is left is met again
    assert weights.touched(1000) == 910


def test_bytes_of_a_prompt():
    """Every byte spelt out: weights once, K/V written, features read and fine K/V written, then read."""
    n, fine, batch = 14, 6, 3
    cost = flex_prefill(SHAPE, 5, 9, fine)
    parts = decoder_parts(SHAPE, DENSE, cost, tokens=n, context=n, projected=fine, read=fine, batch=batch)
    kv = 2 * 2 * 8  # numbers of one token's K/V in a layer
    assert parts["decoder"].bytes == 2 * (DENSE.layers + DENSE.head + batch * 4 * n * kv)
    assert parts["fine projection"].bytes == 2 * 2 * (32 * kv + batch * fine * (32 + kv))
    assert parts["fine attention"].bytes == 2 * batch * (3 * n * 2 * 8 + 2 * fine * kv)
    assert sum(p.flops for p in parts.values()) == batch * cost.total


def test_bytes_of_a_step():
    cached = decoder_parts(SHAPE, DENSE, decode(SHAPE, 15, 6), tokens=1, context=15, read=6)
    again = decoder_parts(SHAPE, DENSE, decode(SHAPE, 15, 6, 6), tokens=1, context=15, projected=6, read=6)
    assert cached["fine projection"] == Work()
    assert again["fine projection"].bytes > 0
    assert cached["decoder"] == again["decoder"]
    plain = decoder_parts(SHAPE, DENSE, decode(SHAPE, 15), tokens=1, context=15)
    assert plain["fine attention"] == Work()
    four = decoder_parts(SHAPE, DENSE, decode(SHAPE, 15), tokens=1, context=15, itemsize=4)
    assert four["decoder"].bytes == 2 * plain["decoder"].bytes


def test_windows():
    """A layer with a window, one without attention, and two that see everything."""
    shape = DecoderShape(4, 32, 4, 2, 8, 64, 50, windows=(5, None, 0, None))
    assert (shape.seen(20), shape.kept(20)) == (5 + 20 + 20, 4 + 20 + 20)
    assert (shape.seen(3), shape.kept(3)) == (9, 9)
    assert kv_bytes(shape, 20) == (4 + 20 + 20) * 2 * 2 * 8 * 2
    pairs = {w: sum(min(i + 1, w or 20) for i in range(20)) for w in (5, None)}
    exact = (pairs[5] + 2 * pairs[None]) * shape.pair_flops
    assert flex_prefill(shape, 20, 0, 0).attention == pytest.approx(exact, rel=0.1)  # the diagonal by half
    with pytest.raises(ValueError, match=r"windows must hold one entry per layer \(4\), got 1"):
        DecoderShape(4, 32, 4, 2, 8, 64, 50, windows=(5,))
    with pytest.raises(ValueError, match=r"windows\[0\] must be an integer >= 0, got -1"):
        DecoderShape(1, 32, 4, 2, 8, 64, 50, windows=(-1,))
