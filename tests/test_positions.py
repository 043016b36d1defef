"""Rotary positions of fine tokens against sums over cells, and the official tables against bicubic arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from flexcore.grid import Grid
from flexcore.positions import fine_positions, official_tables
from tests.helpers import flat_index, gap, raster

GRIDS = {
    "5-to-13": Grid.blocks((5,), (13,), 4),
    "3-to-3": Grid.blocks((3,), (3,), 2),
    "5x3-to-4x8": Grid.blocks((5, 3), (4, 8), 3),
    "1x6-to-3x18": Grid.blocks((1, 6), (3, 18), 3),
    "2x3x2-to-5x7x6": Grid.blocks((2, 3, 2), (5, 7, 6), 2),
}


@pytest.fixture(params=GRIDS.values(), ids=GRIDS.keys())
def grid(request: pytest.FixtureRequest) -> Grid:
    return request.param


def place(token: tuple[int, ...], grid: Grid) -> list[Fraction]:
    """A fine token's centre on the coarse grid, cell u's centre at u, kept between the outer centres."""
    out = []
    for at, fine, cells in zip(token, grid.fine, grid.coarse, strict=True):
        x = Fraction(2 * at + 1, 2 * fine) * cells - Fraction(1, 2)
        out.append(min(max(x, Fraction(0)), Fraction(cells - 1)))
    return out


def tent(token: tuple[int, ...], grid: Grid) -> list[Fraction]:
    """Weight of every coarse cell in linear interpolation: a product of tents, from all cells at once."""
    at = place(token, grid)
    return [
        math.prod(
            (max(Fraction(0), 1 - abs(x - u)) for x, u in zip(at, cell, strict=True)), start=Fraction(1)
        )
        for cell in raster(grid.coarse)
    ]


def test_parent_takes_the_cells_position(grid: Grid) -> None:
    coarse = torch.randint(0, 1000, (grid.n_coarse,))
    tokens = torch.randperm(grid.n_fine).view(-1, 1)
    found = fine_positions(coarse, grid, tokens, "parent")
    assert found.dtype == torch.long and found.shape == tokens.shape
    cells = raster(grid.fine)
    for position, token in zip(found[:, 0].tolist(), tokens[:, 0].tolist(), strict=True):
        cell = [
            (2 * at + 1) * cells // (2 * fine)
            for at, fine, cells in zip(cells[token], grid.fine, grid.coarse, strict=True)
        ]
        assert position == int(coarse[flat_index(cell, grid.coarse)])


def test_fractional_interpolates_between_cells(grid: Grid) -> None:
    coarse = torch.randint(0, 1000, (grid.n_coarse,))
    tokens = torch.arange(grid.n_fine).flip(0).reshape(-1, 1)
    found = fine_positions(coarse, grid, tokens, "fractional")
    assert found.dtype == torch.float32 and found.shape == tokens.shape
    cells = raster(grid.fine)
    expected = []
    for token in tokens[:, 0].tolist():
        weights = tent(cells[token], grid)
        assert sum(weights) == 1
        expected.append([float(sum(w * int(p) for w, p in zip(weights, coarse, strict=True)))])
    assert gap(found, torch.tensor(expected)) < 1e-6


def test_fractional_is_exact_where_a_token_is_a_cell() -> None:
    grid = GRIDS["3-to-3"]
    coarse = torch.tensor([7, 40, 11])
    assert fine_positions(coarse, grid, torch.arange(3), "fractional").tolist() == [7.0, 40.0, 11.0]


def test_fractional_of_a_run_is_a_run() -> None:
    """Zoom 3 over positions 20, 21, 22, 23: thirds in between, flat past the outer centres."""
    grid = Grid.blocks((4,), (12,), 4)
    found = fine_positions(torch.arange(20, 24), grid, torch.arange(12), "fractional").tolist()
    expected = [
        20,
        20,
        20 + 1 / 3,
        20 + 2 / 3,
        21,
        21 + 1 / 3,
        21 + 2 / 3,
        22,
        22 + 1 / 3,
        22 + 2 / 3,
        23,
        23,
    ]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mode", ["parent", "fractional"])
def test_each_axis_of_a_multi_axis_rotary_is_its_own(grid: Grid, mode: str) -> None:
    coarse = torch.randint(0, 50, (3, grid.n_coarse))
    regions = grid.tokens(torch.arange(grid.n_regions)).clamp(min=0)
    found = fine_positions(coarse, grid, regions, mode)
    assert found.shape == (3, *regions.shape)
    for axis in range(3):
        assert torch.equal(found[axis], fine_positions(coarse[axis], grid, regions, mode))


@pytest.mark.parametrize("mode", ["official", "auto", "", "Parent"])
def test_unknown_mode(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode must be 'parent' or 'fractional', got '{mode}'"):
        fine_positions(torch.arange(3), GRIDS["3-to-3"], torch.arange(3), mode)


# ---------------------------------------------------------------------- the official tables


def cubic(x: float, a: float = -0.75) -> float:
    """Keys' kernel."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def axis_weights(cells: int, fine: int) -> Tensor:
    """`[fine, cells]` float64: four taps around each centre, taps outside the grid moved to its border."""
    out = torch.zeros(fine, cells, dtype=torch.float64)
    for a, u in itertools.product(range(fine), range(-3, cells + 3)):
        x = (a + 0.5) * cells / fine - 0.5
        out[a, min(max(u, 0), cells - 1)] += cubic(x - u)
    return out


@pytest.mark.parametrize("sizes", [((6, 6), (18, 18)), ((4, 7), (13, 9)), ((1, 3), (5, 7))], ids=str)
def test_official_tables_are_bicubic(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    coarse, fine = sizes
    grid = Grid.blocks(coarse, fine, 4)
    angle = torch.arange(35, 35 + grid.n_coarse)[:, None] * 10_000 ** (-torch.arange(5) / 5)
    rows, columns = axis_weights(coarse[0], fine[0]), axis_weights(coarse[1], fine[1])
    found = official_tables(angle.cos(), angle.sin(), grid)
    for table, given in zip(found, (angle.cos(), angle.sin()), strict=True):
        image = given.double().view(*coarse, 5)
        expected = torch.einsum("au,bv,uvd->abd", rows, columns, image).flatten(0, 1)
        assert gap(table, expected) < 2e-6
    norm = (found[0] ** 2 + found[1] ** 2).sqrt()
    assert float((norm - 1).abs().max()) > 1e-2  # tables are blended, so this is no rotation


def test_official_tables_of_the_same_size_are_the_same() -> None:
    cos, sin = torch.randn(2, 12, 5)
    found = official_tables(cos, sin, Grid.blocks((3, 4), (3, 4), 2))
    torch.testing.assert_close(found, (cos, sin))


@pytest.mark.parametrize("name", ["5-to-13", "2x3x2-to-5x7x6"])
def test_official_tables_need_two_axes(name: str) -> None:
    grid = GRIDS[name]
    table = torch.zeros(grid.n_coarse, 4)
    with pytest.raises(ValueError, match=f"two axes, got {len(grid.coarse)}"):
        official_tables(table, table, grid)
