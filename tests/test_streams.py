"""Streams and batches: checked when made, never changed after, cheap to move."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from flexcore import FineStream, OnDemandSource, StreamBatch, StreamError, TensorSource
from flexcore.grid import Grid
from tests.helpers import flat_index, region_cells

GRID = Grid.blocks((2, 3), (5, 7), 3)
CELLS = torch.arange(6)


def stream(at: int | None = 4, grid: Grid = GRID, valid: Tensor | None = None, width: int = 3) -> FineStream:
    positions = None if at is None else torch.arange(grid.n_coarse) + at
    return FineStream(grid, positions, valid, TensorSource(torch.randn(grid.n_fine, width), grid))


def batch(*starts: tuple[int, ...]) -> StreamBatch:
    """One sample per argument, one medium per start."""
    return StreamBatch(tuple(tuple(stream(at) for at in sample) for sample in starts))


def starts(batch: StreamBatch) -> list[list[int]]:
    return [
        [int(s.coarse_positions[0]) for s in sample if s.coarse_positions is not None] for sample in batch
    ]


# ---------------------------------------------------------------------- one medium


def test_positions_are_indices_on_the_cpu() -> None:
    for given in (CELLS + 4, (CELLS + 4).int(), (CELLS + 4).tolist()):
        found = FineStream(GRID, given, None, stream().source).coarse_positions  # type: ignore[arg-type]
        assert found is not None
        assert found.dtype == torch.long and found.tolist() == [4, 5, 6, 7, 8, 9]


def test_valid_defaults_to_the_margins() -> None:
    grid = Grid.blocks((2, 3), (5, 7), 3, padding=((0.4, 0), (0, 0.29)))
    expected = [row >= 2 and column < 5 for row in range(5) for column in range(7)]
    assert stream(grid=grid).valid.tolist() == expected  # type: ignore[union-attr]
    assert bool(stream().valid.all())  # type: ignore[union-attr]


def test_region_valid_and_selectable() -> None:
    valid = torch.ones(5, 7, dtype=torch.bool)
    valid[:3, 3:6] = False  # region (0, 1), all of it
    valid[3, 6] = False  # half of region (1, 2)
    one = stream(valid=valid.flatten())
    regions = region_cells(GRID)
    expected = [[bool(valid[cell]) for cell in cells] + [False] * (9 - len(cells)) for cells in regions]
    assert one.region_valid.tolist() == expected
    assert one.selectable.tolist() == [True, False, True, True, True, True]


def test_all_of_the_official_lattice_is_selectable() -> None:
    """Even its empty regions, as in the official code: they are chosen and hold nothing."""
    grid = Grid.official(6, 5, size=(30, 10))
    one = stream(grid=grid)
    assert bool(one.selectable.all()) and len(one.selectable) == 81
    assert one.region_valid.sum(dim=1).tolist() == [len(cells) for cells in region_cells(grid)]


def positions(n: int = 6) -> Tensor:
    return torch.arange(n)


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"coarse_positions": positions(5)},
        r"coarse_positions must hold one index per coarse cell, \[6\].*got \[5\]",
    ),
    ({"coarse_positions": positions().view(2, 3)}, r"coarse_positions.*got \[2, 3\]"),
    ({"coarse_positions": positions() - 1}, r"coarse_positions must be >= 0, got -1"),
    ({"valid": torch.ones(34)}, r"valid must be \[n_fine=35\], got \[34\]"),
    ({"valid": torch.ones(5, 7)}, r"valid must be \[n_fine=35\], got \[5, 7\]"),
    ({"valid": torch.zeros(35)}, "valid must leave at least one fine token"),
    ({"source": None}, "source must be a FineSource, got NoneType"),
    ({"source": torch.zeros(35, 3)}, "source must be a FineSource, got Tensor"),
    ({"grid": Grid.blocks((2, 3), (5, 8), 3)}, "source.grid must have the stream's fine tokens"),
    ({"grid": Grid.blocks((2, 3), (5, 7), 2)}, "source.grid must have the stream's .* region edges"),
]


@pytest.mark.parametrize(
    ("change", "message"), BAD, ids=[b[1].split(" ")[0] + str(i) for i, b in enumerate(BAD)]
)
def test_bad_stream(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "grid": GRID,
        "coarse_positions": positions(),
        "valid": None,
        "source": stream().source,
    }
    FineStream(**good)
    with pytest.raises(StreamError, match=message) as caught:
        FineStream(**{**good, **change})
    assert isinstance(caught.value, ValueError)


def test_at_and_shifted_leave_the_original_alone() -> None:
    unbound = stream(at=None)
    assert unbound.shifted(5) is unbound
    bound = unbound.at(CELLS * 2)
    moved = bound.shifted(3)
    assert unbound.coarse_positions is None
    assert bound.coarse_positions.tolist() == [0, 2, 4, 6, 8, 10]  # type: ignore[union-attr]
    assert moved.coarse_positions.tolist() == [3, 5, 7, 9, 11, 13]  # type: ignore[union-attr]
    assert moved.source is unbound.source and moved.grid is GRID
    with pytest.raises(StreamError, match=">= 0, got -1"):
        bound.shifted(-1)


def test_at_keeps_the_valid_mask() -> None:
    valid = torch.arange(35) % 3 > 0
    assert torch.equal(stream(valid=valid).at(CELLS).shifted(2).to(dtype=torch.float64).valid, valid)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["grid", "coarse_positions", "valid", "source"])
def test_a_stream_cannot_be_changed(field: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(stream(), field, None)


def test_to_is_the_same_stream_where_nothing_changes() -> None:
    one = stream()
    assert one.to("cpu", torch.float32) is one and one.to() is one
    half = one.to(dtype=torch.float16)
    assert half.source.dtype == torch.float16 and one.source.dtype == torch.float32
    assert torch.equal(half.coarse_positions, one.coarse_positions)  # type: ignore[arg-type]
    lazy = FineStream(GRID, CELLS, None, OnDemandSource(lambda r: torch.zeros(len(r), 9, 3), GRID, 3))
    assert lazy.to("meta", torch.float16) is lazy


# ---------------------------------------------------------------------- batches


def test_a_batch_holds_tuples() -> None:
    one = StreamBatch([[stream(1), stream(9)], [], [stream(2)]])  # type: ignore[arg-type]
    assert isinstance(one.samples, tuple) and all(isinstance(sample, tuple) for sample in one.samples)
    assert (len(one), one.n_media, [len(sample) for sample in one]) == (3, 3, [2, 0, 1])
    assert (len(StreamBatch(())), StreamBatch(()).n_media) == (0, 0)
    assert repr(one[:2]) == "StreamBatch(2 sample(s), media per sample: [[%s, %s], []])" % (
        ("'(2, 3)->(5, 7)'",) * 2
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.samples = ()  # type: ignore[misc]


@pytest.mark.parametrize("wrong", [None, "image", torch.zeros(3)], ids=["none", "text", "tensor"])
def test_bad_batch(wrong: Any) -> None:
    kind = type(wrong).__name__
    with pytest.raises(StreamError, match=rf"samples\[1\]\[0\] must be a FineStream, got {kind}"):
        StreamBatch(((stream(),), (wrong,)))


def test_from_features() -> None:
    other = Grid.blocks((2,), (3,), 2)
    features = [torch.randn(35, 3), torch.randn(3, 3)]
    made = StreamBatch.from_features(features, [GRID, other], [CELLS + 1, torch.tensor([5, 7])])
    assert [sample[0].grid for sample in made] == [GRID, other]
    assert torch.equal(made.samples[1][0].source.features(torch.tensor([1]))[0, 0], features[1][2])
    same = StreamBatch.from_features([features[0]] * 3, GRID, [CELLS, CELLS + 2, CELLS + 5])
    assert starts(same) == [[0], [2], [5]]
    for grids, places in (([GRID], [CELLS, CELLS]), (GRID, [CELLS])):
        with pytest.raises(ValueError, match="zip"):
            StreamBatch.from_features([features[0]] * 2, grids, places)


def test_cat_shifts_each_batch_by_its_padding() -> None:
    first, second, text = batch((2, 20), ()), batch((7,)), batch(())
    joined = StreamBatch.cat([first, text, second], offsets=[5, 3, 0])
    assert starts(joined) == [[7, 25], [], [], [7]]
    assert starts(first) == [[2, 20], []]
    assert starts(StreamBatch.cat([first, second])) == [[2, 20], [], [7]]
    assert joined.samples[3][0].source is second.samples[0][0].source
    assert len(StreamBatch.cat([])) == 0
    with pytest.raises(ValueError, match="zip"):
        StreamBatch.cat([first, second], offsets=[1])


def test_indexing_gives_a_batch() -> None:
    one = batch((1,), (), (3, 30), (4,))
    assert starts(one[2]) == [[3, 30]]
    assert starts(one[-1]) == [[4]]
    assert starts(one[1:3]) == [[], [3, 30]]
    assert starts(one[::-2]) == [[4], []]
    assert isinstance(one[0:0], StreamBatch) and len(one[0:0]) == 0
    assert one[2].samples[0][1] is one.samples[2][1]
    with pytest.raises(IndexError):
        one[4]


def test_batch_to() -> None:
    one = batch((1,), (), (3, 30))
    assert one.to("cpu") is one and one.to(dtype=torch.float32) is one
    double = one.to("cpu", torch.float64)
    assert [s.source.dtype for sample in double for s in sample] == [torch.float64] * 3
    assert [s.source.dtype for sample in one for s in sample] == [torch.float32] * 3
    assert starts(double) == starts(one)


@pytest.mark.parametrize(
    "twin_of", [lambda b: pickle.loads(pickle.dumps(b)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_copies_read_the_same(twin_of: Any) -> None:
    one = batch((1,), (), (3, 30))
    assert bool(one.samples[0][0].region_valid.any())  # a filled cache comes along
    twin = twin_of(one)
    assert starts(twin) == starts(one)
    regions = torch.arange(GRID.n_regions)
    for a, b in zip((s for x in one for s in x), (s for x in twin for s in x), strict=True):
        assert a.grid == b.grid and torch.equal(a.region_valid, b.region_valid)
        assert torch.equal(a.source.features(regions), b.source.features(regions))
        assert a.source is not b.source


def test_valid_follows_the_raster() -> None:
    """A single readable token turns up in its own region and nowhere else."""
    for token in ((0, 0), (4, 6), (2, 3)):
        valid = torch.zeros(35, dtype=torch.bool)
        valid[flat_index(token, GRID.fine)] = True
        found = stream(valid=valid).selectable.tolist()
        assert found == [token in cells for cells in region_cells(GRID)]
