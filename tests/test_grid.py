"""Grids against loops and exact fractions; the official lattice against torch's own pooling and upsampling."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from flexcore import FineStream, TensorSource
from flexcore.grid import OFFICIAL_LATTICE, Grid
from tests.helpers import block_edges, flat_index, raster, region_cells, touches

# coarse, fine, region, tile
BLOCKS: list[tuple[Any, ...]] = [
    ((7,), (21,), 4, None),
    ((5,), (13,), 5, 6),
    ((10,), (3,), 2, None),
    ((1,), (1,), 8, None),
    ((24, 24), (72, 72), 8, 24),
    ((24, 24), (72, 72), 5, 24),
    ((6, 4), (19, 9), (4, 5), None),
    ((4, 7), (13, 22), (3, 4), (5, 11)),
    ((3, 5), (2, 3), 1, None),
    ((2, 3, 4), (4, 7, 9), (2, 3, 4), None),
    ((3, 3, 2), (5, 6, 7), (1, 4, 3), (5, 3, 4)),
]


def name(case: tuple[Any, ...]) -> str:
    def one(v: Any) -> str:
        return "x".join(map(str, v)) if isinstance(v, tuple) else str(v)

    return f"{one(case[0])}-to-{one(case[1])}-region{one(case[2])}-tile{one(case[3])}"


@pytest.fixture(params=BLOCKS, ids=name)
def grid(request: pytest.FixtureRequest) -> Grid:
    coarse, fine, region, tile = request.param
    return Grid.blocks(coarse, fine, region, tile)


def all_regions(grid: Grid) -> torch.Tensor:
    return torch.arange(grid.n_regions)


# ---------------------------------------------------------------------- blocks


@pytest.mark.parametrize(("coarse", "fine", "region", "tile"), BLOCKS, ids=map(name, BLOCKS))
def test_blocks_restart_at_every_tile(coarse: Any, fine: Any, region: Any, tile: Any) -> None:
    n = len(fine)
    regions = region if isinstance(region, tuple) else (region,) * n
    tiles = tile if isinstance(tile, tuple) else (tile,) * n
    edges = tuple(block_edges(*axis) for axis in zip(fine, regions, tiles, strict=True))
    grid = Grid.blocks(coarse, fine, region, tile)
    assert grid.edges == edges
    assert grid.region_shape == tuple(len(e) - 1 for e in edges)
    assert (grid.n_coarse, grid.n_fine) == (math.prod(coarse), math.prod(fine))
    assert grid.n_regions == math.prod(grid.region_shape)


def test_a_tile_is_a_whole_number_of_regions() -> None:
    """Tile 11 over regions of 4: blocks 4, 4, 3 in each tile, where one run over all of it would cut tiles."""
    assert Grid.blocks((8,), (22,), 4, tile=11).edges == ((0, 4, 8, 11, 15, 19, 22),)
    assert Grid.blocks((8,), (22,), 4).edges == ((0, 4, 8, 12, 16, 20, 22),)


def test_tokens_are_each_regions_own_with_padding_last(grid: Grid) -> None:
    expected = [[flat_index(cell, grid.fine) for cell in region] for region in region_cells(grid)]
    page = max(map(len, expected))
    assert grid.region_tokens == page
    assert grid.region_lengths.tolist() == list(map(len, expected))
    rows = grid.tokens(all_regions(grid)).tolist()
    assert rows == [tokens + [-1] * (page - len(tokens)) for tokens in expected]
    assert sorted(t for row in rows for t in row if t >= 0) == list(range(grid.n_fine))


def test_tokens_in_any_order(grid: Grid) -> None:
    pick = random.Random(1).choices(range(grid.n_regions), k=7)
    rows = grid.tokens(torch.tensor(pick))
    assert torch.equal(rows, torch.cat([grid.tokens(torch.tensor([r])) for r in pick]))
    assert grid.tokens(torch.tensor([], dtype=torch.long)).shape == (0, grid.region_tokens)
    assert grid.tokens(torch.tensor([])).shape == (0, grid.region_tokens)


def test_tokens_of_a_lattice_too_large_for_a_table(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    pick = torch.tensor(random.Random(2).choices(range(grid.n_regions), k=7))
    expected = grid.tokens(pick)
    monkeypatch.setattr("flexcore.grid._TABLE_TOKENS", 0)
    assert torch.equal(grid.tokens(pick), expected)


def test_unravel_is_raster_order(grid: Grid) -> None:
    found = torch.stack(grid.unravel(all_regions(grid)), dim=1).tolist()
    assert [tuple(r) for r in found] == raster(grid.region_shape)


def centre(token: tuple[int, ...], grid: Grid) -> list[Fraction]:
    """A fine token's centre in units of coarse cells, from the medium's edge."""
    return [
        Fraction(2 * at + 1, 2 * fine) * cells
        for at, fine, cells in zip(token, grid.fine, grid.coarse, strict=True)
    ]


def test_coordinates_and_parents(grid: Grid) -> None:
    tokens = torch.arange(grid.n_fine)
    centres = [centre(cell, grid) for cell in raster(grid.fine)]
    assert grid.parents(tokens).tolist() == [
        flat_index([math.floor(c) for c in at], grid.coarse) for at in centres
    ]
    expected = torch.tensor([[float(c - Fraction(1, 2)) for c in at] for at in centres])
    assert torch.equal(grid.coordinates(tokens), expected)
    assert grid.coordinates(tokens.reshape(-1, 1)).shape == (grid.n_fine, 1, len(grid.fine))
    assert torch.equal(grid.parents(tokens.flip(0).reshape(1, -1))[0].flip(0), grid.parents(tokens))


def test_parents_where_a_centre_falls_on_a_cell_edge() -> None:
    """Every pair of sizes up to 23 over 96, where float32 takes the wrong side now and then (2 cells, 41 tokens)."""
    on_edge = 0
    for cells in range(1, 24):
        for fine in range(1, 97):
            found = Grid.blocks((cells,), (fine,)).parents(torch.arange(fine)).tolist()
            exact = [Fraction(2 * t + 1, 2 * fine) * cells for t in range(fine)]
            on_edge += sum(c.denominator == 1 for c in exact)
            assert found == [math.floor(c) for c in exact], (cells, fine)
    assert on_edge > 100


@pytest.mark.parametrize(("cells", "fine"), [(33_333, 900_000), (1_000_003, 3_000_001)])
def test_parents_on_a_long_axis(cells: int, fine: int) -> None:
    """A day of audio: float32 positions would be cells off."""
    grid = Grid.blocks((cells,), (fine,), region=4096)
    tokens = torch.tensor([random.Random(2).randrange(fine) for _ in range(300)] + [0, fine - 1])
    exact = [Fraction(2 * t + 1, 2 * fine) * cells for t in tokens.tolist()]
    assert grid.parents(tokens).tolist() == [math.floor(c) for c in exact]
    found = grid.coordinates(tokens)[:, 0].tolist()
    assert found == torch.tensor([float(c - Fraction(1, 2)) for c in exact]).tolist()


def test_box_is_the_share_of_the_medium(grid: Grid) -> None:
    for region, index in enumerate(raster(grid.region_shape)):
        expected = tuple(
            (edges[i] / size, edges[i + 1] / size)
            for i, edges, size in zip(index, grid.edges, grid.fine, strict=True)
        )
        assert grid.box(region) == expected
    for region in (-1, grid.n_regions):
        with pytest.raises(ValueError, match="regions must lie in"):
            grid.box(region)


# ---------------------------------------------------------------------- incidence


def test_pool_opens_what_a_cell_overlaps(grid: Grid) -> None:
    relation = touches(grid)
    one_cell = torch.eye(grid.n_coarse, dtype=torch.bool)
    assert torch.equal(grid.pool(one_cell), relation.t())
    assert bool(relation.any(0).all()) and bool(relation.any(1).all())


def test_pool_takes_the_largest_value(grid: Grid) -> None:
    values = torch.randn(2, 3, grid.n_coarse)
    relation = touches(grid)
    expected = torch.stack([values[..., cells].amax(-1) for cells in relation], dim=-1)
    assert torch.equal(grid.pool(values), expected)
    counts = torch.randint(-9, 9, (5, grid.n_coarse))
    assert torch.equal(
        grid.pool(counts), torch.stack([counts[:, cells].amax(-1) for cells in relation], dim=-1)
    )
    assert grid.pool(values[:, :0]).shape == (2, 0, grid.n_regions)


def test_pool_without_a_table(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3, grid.n_coarse, generator=torch.Generator().manual_seed(0))
    expected = [grid.pool(x) for x in (values, values > 0, values[0])]
    monkeypatch.setattr("flexcore.grid._TABLE_TOKENS", 0)
    for x, there in zip((values, values > 0, values[0]), expected, strict=True):
        assert torch.equal(grid.pool(x), there)


def test_pool_with_uneven_edges() -> None:
    """Hand-made edges, where a cell lies under three regions and a region over one and a bit cells."""
    grid = Grid((4, 3), (10, 7), ((0, 1, 2, 7, 10), (0, 6, 7)))
    assert torch.equal(grid.pool(torch.eye(12, dtype=torch.bool)), touches(grid).t())


def test_a_straddling_cell_belongs_to_four_regions() -> None:
    """24 cells over 9 regions: a relation, not a function."""
    grid = Grid.official(24, 72)
    counts = grid.pool(torch.eye(24 * 24, dtype=torch.bool)).sum(dim=1)
    assert sorted(set(counts.tolist())) == [1, 2, 4]


# ---------------------------------------------------------------------- the official lattice

SIDES = "1-1 2-5 5-7 6-18 6-72 7-222 8-8 9-9 9-18 10-111 12-36 13-20 24-3 24-8 24-72 30-89 37-111 74-222"


@pytest.mark.parametrize(
    ("side", "fine"), [[int(n) for n in s.split("-")] for s in SIDES.split()], ids=SIDES.split()
)
def test_official_regions_and_tokens_are_torchs(side: int, fine: int) -> None:
    grid = Grid.official(side, fine)
    assert grid.region_shape == (OFFICIAL_LATTICE, OFFICIAL_LATTICE)
    cells = torch.rand(12, side * side) < torch.rand(12, 1) ** 3
    pooled = F.adaptive_max_pool2d(cells.float().view(12, 1, side, side), OFFICIAL_LATTICE)
    assert torch.equal(grid.pool(cells), pooled.flatten(1).bool())
    upsampled = F.interpolate(pooled, size=(fine, fine), mode="nearest").flatten(1).bool()
    found = torch.zeros(12, fine * fine, dtype=torch.bool)
    tokens = grid.tokens(all_regions(grid))
    for row, chosen in enumerate(grid.pool(cells)):
        picked = tokens[chosen]
        found[row, picked[picked >= 0]] = True
    assert torch.equal(found, upsampled)
    assert 0 < int(cells.sum()) < cells.numel()


def test_official_fine_sides_up_to_400() -> None:
    """The row owner of every fine side, among them those where float32 departs from floor(9 a / F)."""
    index = torch.arange(9.0).view(1, 1, 9)
    departs = []
    for fine in range(1, 400):
        expected = F.interpolate(index, size=fine, mode="nearest").flatten().long().tolist()
        edges = Grid.official(3, fine).edges[0]
        assert [sum(a >= e for e in edges[1:-1]) for a in range(fine)] == expected, fine
        if expected != [9 * a // fine for a in range(fine)]:
            departs.append(fine)
    assert {111, 222} <= set(departs)


def test_official_lattice_with_empty_regions() -> None:
    grid = Grid.official(6, 5)
    assert int((grid.region_lengths == 0).sum()) == 81 - 25
    assert grid.region_tokens == 1
    tokens = grid.tokens(all_regions(grid))
    assert sorted(tokens[tokens >= 0].tolist()) == list(range(25))
    assert bool(grid.fine_valid.all())


# ---------------------------------------------------------------------- margins


def margin(width: int, height: int, side: int) -> tuple[int, int]:
    """Semantics section 3, step 2, in whole numbers: empty cells at both ends of (rows, columns)."""
    k = abs(width - height) // 2 * side // max(width, height)
    return (k, 0) if width > height else (0, k)


WIDTHS, HEIGHTS = (1, 2, 33, 97, 300, 335, 336, 500, 501, 640), (1, 7, 99, 100, 333, 336, 427, 500)


@pytest.mark.parametrize("side", [6, 9, 12, 24, 27])
def test_official_margins(side: int) -> None:
    seen = set()
    for width, height in itertools.product(WIDTHS, HEIGHTS):
        rows, columns = margin(width, height, side)
        seen.add((rows > 0, columns > 0))
        expected = torch.zeros(side, side, dtype=torch.bool)
        expected[rows : side - rows, columns : side - columns] = True
        grid = Grid.official(side, 3 * side, size=(width, height))
        assert torch.equal(grid.coarse_valid.view(side, side), expected), (width, height)
        assert bool(grid.fine_valid.all())
    assert seen == {(False, False), (True, False), (False, True)}


def wholly_padding(at: int, size: int, before: Fraction, after: Fraction) -> bool:
    return Fraction(at + 1, size) <= before or Fraction(at, size) >= 1 - after


@pytest.mark.parametrize("sizes", [((24, 24), (72, 72)), ((7, 13), (22, 40)), ((44, 49), (45, 98))], ids=str)
def test_block_margins_drop_what_is_wholly_padding(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Shares as adapters make them, pixels over pixels, where `15 / 44 * 44` is 14.999... in floating point."""
    coarse, fine = sizes
    pixels = [(15, 15, 44), (1, 2, 49), (13, 12, 45), (0, 3, 7), (49, 0, 98), (335, 336, 1008), (9, 90, 100)]
    for top, bottom, height in pixels:
        for left, right, width in [(0, 0, 10), (13, 12, 45)]:
            shares = ((top / height, bottom / height), (left / width, right / width))
            exact = [
                (Fraction(top, height), Fraction(bottom, height)),
                (Fraction(left, width), Fraction(right, width)),
            ]
            grid = Grid.blocks(coarse, fine, 5, padding=shares)
            for found, lattice in ((grid.coarse_valid, coarse), (grid.fine_valid, fine)):
                expected = [
                    not any(
                        wholly_padding(at, n, *share)
                        for at, n, share in zip(cell, lattice, exact, strict=True)
                    )
                    for cell in raster(lattice)
                ]
                assert found.tolist() == expected, (shares, lattice)
                assert any(expected)


# ---------------------------------------------------------------------- errors

BAD: list[tuple[dict[str, Any], str]] = [
    ({"coarse": ()}, "coarse"),
    ({"coarse": (4, 0)}, "coarse"),
    ({"coarse": (4, -1)}, "coarse"),
    ({"coarse": 4}, "coarse"),
    ({"coarse": (4, 2.5)}, "coarse"),
    ({"coarse": "44"}, "coarse"),
    ({"coarse": None}, "coarse"),
    ({"coarse": (4,)}, "coarse, fine, edges and padding"),
    ({"coarse": (4, 4, 4)}, "coarse, fine, edges and padding"),
    ({"fine": ()}, "fine"),
    ({"fine": (8, 0)}, "fine"),
    ({"fine": (8, None)}, "fine"),
    ({"fine": (8,)}, "coarse, fine, edges and padding"),
    ({"edges": ((0, 8),)}, "coarse, fine, edges and padding"),
    ({"edges": (0, 8)}, r"edges\[0\]"),
    ({"edges": ((0, 8), ())}, r"edges\[1\]"),
    ({"edges": ((0, 8), (0,))}, r"edges\[1\]"),
    ({"edges": ((0, 8), (0, 9))}, r"edges\[1\]"),
    ({"edges": ((0, 8), (0, 7))}, r"edges\[1\]"),
    ({"edges": ((1, 8), (0, 8))}, r"edges\[0\]"),
    ({"edges": ((-1, 8), (0, 8))}, r"edges\[0\]"),
    ({"edges": ((0, 4, 4, 8), (0, 8))}, r"edges\[0\]"),
    ({"edges": ((0, 5, 4, 8), (0, 8))}, r"edges\[0\]"),
    ({"edges": ((0, 3.5, 8), (0, 8))}, r"edges\[0\]"),
    ({"padding": ((0.5, 0.5), (0, 0))}, r"padding\[0\]"),
    ({"padding": ((0, 0), (0, 1))}, r"padding\[1\]"),
    ({"padding": ((0, 0), (-0.1, 0))}, r"padding\[1\]"),
    ({"padding": ((0, 0), (0, math.nan))}, r"padding\[1\]"),
    ({"padding": ((0, 0),)}, "coarse, fine, edges and padding"),
    ({"padding": (0.1, 0.1)}, "padding"),
    ({"padding": ((0.1,), (0.1,))}, "padding"),
    ({"padding": ((0.1, "a"), (0, 0))}, "padding"),
]


@pytest.mark.parametrize(("change", "field"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_grid(change: dict[str, Any], field: str) -> None:
    good: dict[str, Any] = {"coarse": (4, 4), "fine": (8, 8), "edges": ((0, 8), (0, 8))}
    Grid(**good)
    with pytest.raises(ValueError, match=f"^{field}"):
        Grid(**{**good, **change})


BAD_BLOCKS: list[tuple[dict[str, Any], str]] = [
    ({"region": 0}, "region"),
    ({"region": -3}, "region"),
    ({"region": (4, 0)}, "region"),
    ({"region": 2.0}, "region"),
    ({"region": (4,)}, "region"),
    ({"tile": 0}, "tile"),
    ({"tile": (4, 4, 4)}, "region and tile"),
    ({"coarse": None}, "coarse"),
    ({"coarse": (4,)}, "coarse, fine"),
    ({"fine": None}, "fine"),
    ({"padding": (0.1, 0.1)}, "padding"),
    ({"padding": ((0.6, 0.5), (0, 0))}, r"padding\[0\]"),
]


@pytest.mark.parametrize(("change", "field"), BAD_BLOCKS, ids=[str(b[0]) for b in BAD_BLOCKS])
def test_bad_blocks(change: dict[str, Any], field: str) -> None:
    good: dict[str, Any] = {"coarse": (4, 4), "fine": (8, 8), "region": 4, "tile": 4, "padding": ()}
    Grid.blocks(**good)
    with pytest.raises(ValueError, match=f"^{field}"):
        Grid.blocks(**{**good, **change})


BAD_OFFICIAL: list[tuple[tuple[Any, ...], str]] = [
    ((0, 8), "coarse"),
    ((4, 0), "fine"),
    ((4, -8), "fine"),
    ((4, 8.5), "fine"),
    ((4, 8, (0, 0)), "size"),
    ((4, 8, (3, -3)), "size"),
    ((4, 8, (3,)), "size"),
    ((4, 8, 3), "size"),
]


@pytest.mark.parametrize(("arguments", "field"), BAD_OFFICIAL, ids=[str(b[0]) for b in BAD_OFFICIAL])
def test_bad_official(arguments: tuple[Any, ...], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}"):
        Grid.official(*arguments)


@pytest.mark.parametrize("regions", [[-1], [0, 4], [0.0, 1.0], [True, False]], ids=str)
def test_bad_regions(regions: list[Any]) -> None:
    """A mask or a float would have been read as indices."""
    grid = Grid.blocks((2, 2), (4, 4), 2)
    assert grid.check_regions(torch.tensor([3, 0])).tolist() == [3, 0]
    with pytest.raises(ValueError, match=r"^regions must"):
        grid.tokens(torch.tensor(regions))


# ---------------------------------------------------------------------- a value like any other


def test_grids_are_values() -> None:
    grid = Grid.blocks([24, 24], [72, 72], padding=[[0.25, 0.25], [0, 0]])  # type: ignore[list-item]
    same = Grid.blocks((24, 24), (72, 72), padding=((0.25, 0.25), (0.0, 0.0)))
    assert grid == same and hash(grid) == hash(same) and len({grid, same}) == 1
    assert grid != Grid.blocks((24, 24), (72, 72), 9, padding=same.padding)
    assert Grid.official(24, 72) != Grid.blocks((24, 24), (72, 72))
    assert grid.coarse_valid.sum() == 24 * 12  # caches don't count
    for twin in (pickle.loads(pickle.dumps(grid)), copy.deepcopy(grid)):
        assert twin == grid
        assert torch.equal(twin.tokens(all_regions(twin)), grid.tokens(all_regions(grid)))
    with pytest.raises(AttributeError):
        grid.fine = (1, 1)  # type: ignore[misc]


def test_caches_filled_in_inference_mode_serve_training() -> None:
    grid = Grid.blocks((3, 3), (7, 7), 3, padding=((0.3, 0), (0, 0)))
    features = torch.randn(49, 2, requires_grad=True)
    with torch.inference_mode():
        stream = FineStream(grid, None, None, TensorSource(features.detach(), grid))
        assert bool(stream.selectable.any()) and grid.pool(grid.coarse_valid).shape == (9,)
        grid.tokens(all_regions(grid))
    loss = TensorSource(features, grid).features(all_regions(grid)).square().sum()
    loss = loss + (grid.pool(torch.ones(1, 9, requires_grad=True))).sum()
    loss.backward()
    assert torch.equal(features.grad, 2 * features.detach())


def test_parents_from_a_table_are_those_worked_out() -> None:
    for grid in (Grid.blocks((5, 3), (20, 9), region=4), Grid.blocks((7,), (30,), region=4)):
        tokens = torch.arange(grid.n_fine).flip(0).reshape(2, -1)
        assert torch.equal(grid.parents(tokens), grid._parents(tokens))
        assert grid.even == (len(set(grid.region_lengths.tolist())) == 1)
