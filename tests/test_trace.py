"""Trace: what it keeps, counts and draws, without a model; tests/hf shows that wrapped models fill it."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from flexcore import Trace, trace
from flexcore.grid import Grid
from flexcore.trace import TraceRecord
from flexcore.viz import overlay

GRID = Grid.blocks((4, 4), (12, 12), region=4)


def record(regions: list[int], layer: int = 2, grid: Grid = GRID, **fields: object) -> TraceRecord:
    chosen = torch.zeros(grid.n_regions, dtype=torch.bool)
    chosen[regions] = True
    values = {
        "request": 0,
        "read_in": layer + 1,
        "position": 20,
        "row": 0,
        "sample": 0,
        "medium": 0,
        **fields,
    }
    return TraceRecord(layer=layer, scores=torch.zeros(grid.n_coarse), regions=chosen, grid=grid, **values)


def test_collects_in_order():
    found = Trace()
    first, second = record([0], layer=5), record([1], layer=2)
    found.add([first])
    found.add([second])
    assert len(found) == 2
    assert list(found) == [first, second]
    assert found.layers == [2, 5]


def test_where():
    found = Trace()
    found.add([record([0], layer=layer, position=position) for layer in (2, 3) for position in (20, 21)])
    assert [(r.layer, r.position) for r in found.where(layer=3)] == [(3, 20), (3, 21)]
    assert [r.layer for r in found.where(position=21, read_in=3)] == [2]
    assert found.where(layer=9) == []
    assert found.where() == found.records


def test_looked_at_is_a_share_of_layers_and_rows():
    found = Trace()
    found.add(
        [record([0, 4]), record([4], position=21), record([4, 8], layer=3), record([], layer=3, position=21)]
    )
    expected = torch.zeros(9)
    expected[[0, 4, 8]] = torch.tensor([0.25, 0.75, 0.25])
    assert torch.equal(found.looked_at(), expected)


def test_looked_at_keeps_media_samples_and_requests_apart():
    found = Trace()
    found.add([record([0]), record([1], sample=1), record([2], medium=1), record([3], request=1)])
    assert found.looked_at(sample=1).nonzero().flatten().tolist() == [1]
    assert found.looked_at(medium=1).nonzero().flatten().tolist() == [2]
    assert found.looked_at(request=1).nonzero().flatten().tolist() == [3]
    assert found.looked_at().tolist()[:4] == [0.5, 0, 0, 0.5]


def test_the_last_layers_selection_counts_only_when_asked_for():
    found = Trace()
    found.add([record([0]), record([1], layer=7, read_in=None)])
    assert found.looked_at().nonzero().flatten().tolist() == [0]
    assert found.looked_at(read=False).nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("asked", [{"sample": 3}, {"medium": 1}, {"request": 5}], ids=str)
def test_nothing_recorded(asked):
    found = Trace()
    found.add([record([0])])
    name, value = next(iter(asked.items()))
    with pytest.raises(ValueError, match=f"{name}={value}.*nothing was recorded"):
        found.looked_at(**asked)


def test_requests_are_numbered_by_first_appearance():
    found = Trace()
    numbers = [found.number(object()) for _ in range(50)]
    # each object dies at once, so their ids would come again if the trace didn't hold on to them
    assert numbers == list(range(50))
    request = object()
    assert [found.number(request), found.number(request)] == [50, 50]


def test_threads_may_add_at_once():
    found = Trace()

    def work(layer: int) -> None:
        for _ in range(200):
            found.add([record([0], layer=layer)])
            found.number(layer)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(found.where(layer=layer)) for layer in range(4)] == [200] * 4
    assert sorted(found.number(layer) for layer in range(4)) == [0, 1, 2, 3]


def test_overlay_draws_the_right_medium():
    wide = Grid.blocks((2, 4), (6, 12), region=3)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8))
    found = Trace()
    found.add([record([0]), record([1, 6], medium=1, grid=wide), record([6], medium=1, grid=wide, layer=3)])
    drawn = found.overlay(photo, medium=1)
    assert np.array_equal(drawn, overlay(photo, wide, found.looked_at(medium=1)))
    with pytest.raises(ValueError, match="nothing was recorded"):
        found.overlay(photo, sample=1)


def test_context_manager_attaches_and_detaches():
    model = SimpleNamespace(_flex_binding=SimpleNamespace(traces=[]))
    with trace(model) as outer, trace(model) as inner:
        assert [id(t) for t in model._flex_binding.traces] == [id(outer), id(inner)]
    assert model._flex_binding.traces == []
    with pytest.raises(KeyError), trace(model):
        raise KeyError
    assert model._flex_binding.traces == []


def test_only_wrapped_models():
    with pytest.raises(ValueError, match=r"flexcore\.wrap"), trace(SimpleNamespace()):
        pass
