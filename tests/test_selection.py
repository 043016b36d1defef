"""Selectors against loops over cells; what rows without attention, margins and broken scores come to."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flexcore import FlexConfig, plugins
from flexcore.grid import Grid
from flexcore.selection import (
    AllSelector,
    RandomSelector,
    Selector,
    ThresholdSelector,
    TopKSelector,
    TopPSelector,
    make_selector,
)
from tests.helpers import touches

GRIDS = {
    "7-to-21": Grid.blocks((7,), (21,), 4),
    "6x4-to-19x9": Grid.blocks((6, 4), (19, 9), (4, 5)),
    "5x9-to-15x27-margins": Grid.blocks((5, 9), (15, 27), 4, padding=((0, 0.21), (0.35, 0.12))),
    "2x3x4-to-4x7x9": Grid.blocks((2, 3, 4), (4, 7, 9), (2, 3, 4)),
    "official-g12": Grid.official(12, 36),
    "official-g7-wide": Grid.official(7, 21, size=(90, 31)),
}
EVERY: dict[str, Selector] = {
    "threshold": ThresholdSelector(48),
    "threshold0": ThresholdSelector(0),
    "top_k": TopKSelector(k=3),
    "top_p": TopPSelector(0.5),
    "random": RandomSelector(k=3),
    "all": AllSelector(),
}


@pytest.fixture(params=GRIDS.values(), ids=GRIDS.keys())
def grid(request: pytest.FixtureRequest) -> Grid:
    return request.param


@pytest.fixture(params=EVERY.values(), ids=EVERY.keys())
def selector(request: pytest.FixtureRequest) -> Selector:
    return request.param


def attention(grid: Grid, rows: int = 17) -> Tensor:
    """Head-summed probabilities, from flat to peaked; some cells tie."""
    scores = torch.softmax(torch.randn(rows, grid.n_coarse) * torch.linspace(0.1, 5, rows)[:, None], dim=-1)
    scores[1::4, ::3] = scores[1::4, :1]
    return scores


def keys(rows: int, layer: int = 9, first: int = 0) -> Tensor:
    return torch.stack([torch.full((rows,), layer), torch.arange(first, first + rows)], dim=1)


def run(selector: Selector, scores: Tensor, grid: Grid, selectable: Tensor | None = None) -> Tensor:
    selectable = torch.ones(grid.n_regions, dtype=torch.bool) if selectable is None else selectable
    found = selector.select(scores, grid, selectable, keys(len(scores)))
    assert found.dtype == torch.bool and found.shape == (len(scores), grid.n_regions)
    return found


def windows(grid: Grid) -> list[list[int]]:
    """Cells that each region opens for: those it overlaps, or adaptive pooling's window in the official lattice."""
    if grid.lattice is None:
        return [[u for u, touched in enumerate(row) if touched] for row in touches(grid).tolist()]
    side = grid.coarse[0]
    spans = [range(math.floor(p * side / 9), math.ceil((p + 1) * side / 9)) for p in range(9)]
    return [[u * side + v for u in spans[p] for v in spans[q]] for p in range(9) for q in range(9)]


def without_margins(scores: Tensor, grid: Grid) -> np.ndarray:
    """Float32 scores with every cell that is wholly padding at zero, cell by cell."""
    out = scores.numpy().copy()
    for flat, cell in enumerate(itertools.product(*(range(n) for n in grid.coarse))):
        for at, n, (before, after) in zip(cell, grid.coarse, grid.padding, strict=True):
            if at + 1 <= before * n or at >= n - math.floor(after * n):
                out[:, flat] = 0
    return out


def opened(chosen: list[list[bool]], grid: Grid) -> Tensor:
    return torch.tensor([[any(row[u] for u in window) for window in windows(grid)] for row in chosen])


# ---------------------------------------------------------------------- threshold


def above(row: np.ndarray, threshold: int) -> list[bool]:
    """Semantics section 3, steps 3 and 4, one cell at a time in float32."""
    low, high = row.min(), row.max()
    if low == high:
        return [False] * len(row)
    return [bool(np.float32(255) * ((s - low) / (high - low)) > threshold) for s in row]


@pytest.mark.parametrize("threshold", [0, 1, 48, 64, 128, 254, 255])
def test_threshold(grid: Grid, threshold: int) -> None:
    scores = attention(grid)
    rows = without_margins(scores, grid)
    expected = opened([above(row, threshold) for row in rows], grid)
    assert torch.equal(run(ThresholdSelector(threshold), scores, grid), expected)
    assert bool(expected.any(dim=1).all()) == (threshold < 255)


def test_threshold_is_strict() -> None:
    """Scores 0, .5, .75 and 1 normalise to 0, 127.5, 191.25 and 255: equal is not above."""
    grid = Grid.blocks((5,), (5,), 1)
    scores = torch.tensor([[0.0, 0.5, 0.75, 1.0, 1e-6]])
    for threshold, expected in (
        (0, "01111"),
        (127, "01110"),
        (128, "00110"),
        (191, "00110"),
        (254, "00010"),
        (255, "00000"),
    ):
        found = run(ThresholdSelector(threshold), scores, grid)[0]
        assert "".join(str(int(x)) for x in found) == expected, threshold


def test_threshold_is_relative_to_the_row() -> None:
    """Min-max per row: scale and, without margins, a constant make no difference."""
    grid = GRIDS["6x4-to-19x9"]
    scores = torch.randint(0, 256, (9, grid.n_coarse)).float()
    expected = run(ThresholdSelector(48), scores, grid)
    assert torch.equal(run(ThresholdSelector(48), scores * 2**-30, grid), expected)
    assert torch.equal(run(ThresholdSelector(48), scores + 64, grid), expected)
    assert not torch.equal(run(ThresholdSelector(200), scores, grid), expected)


def test_margins_count_as_zero_in_the_minimum() -> None:
    """With a margin, a flat row is 0 there and 1 elsewhere: everything inside is chosen, not nothing."""
    flat = torch.full((1, 7), 0.1)
    without, with_margin = Grid.blocks((7,), (7,), 1), Grid.blocks((7,), (7,), 1, padding=((0.3, 0.15),))
    assert run(ThresholdSelector(48), flat, without).sum() == 0
    assert run(ThresholdSelector(48), flat, with_margin).tolist() == [[False] * 2 + [True] * 4 + [False]]


@pytest.mark.parametrize("size", [(90, 31), (31, 90), (101, 30), (40, 41)], ids=str)
def test_what_is_in_an_odd_margin_never_chooses(size: tuple[int, int]) -> None:
    grid = Grid.official(9, 27, size=size)
    scores = torch.rand(5, 81)
    loud = torch.where(grid.coarse_valid, scores, scores + 100)
    k = int(abs(size[0] - size[1]) // 2 / max(size) * 9)
    assert int((~grid.coarse_valid).sum()) == 2 * k * 9
    for threshold in (0, 48):
        assert torch.equal(
            run(ThresholdSelector(threshold), loud, grid), run(ThresholdSelector(threshold), scores, grid)
        )
    assert (loud != scores).any() == (k > 0)


# ---------------------------------------------------------------------- top-k and top-p


@pytest.mark.parametrize("k", [1, 2, 5, 1000])
def test_top_k(grid: Grid, k: int) -> None:
    scores = attention(grid)
    selectable = torch.arange(grid.n_regions) % 5 != 1
    found = run(TopKSelector(k=k), scores, grid, selectable)
    for row, got in zip(without_margins(scores, grid), found, strict=True):
        best = [max(float(row[u]) for u in window) for window in windows(grid)]
        ranked = sorted((r for r in range(grid.n_regions) if selectable[r]), key=lambda r: (-best[r], r))
        assert sorted(ranked[:k]) == got.nonzero()[:, 0].tolist()


def test_ties_go_to_the_lower_index() -> None:
    grid = Grid.blocks((40,), (40,), 1)
    scores = torch.full((1, 40), 0.25)
    scores[0, 31] = 0.5
    assert run(TopKSelector(k=4), scores, grid)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 31]
    assert run(TopPSelector(0.09), scores, grid)[0].nonzero()[:, 0].tolist() == [0, 1, 31]


@pytest.mark.parametrize(
    ("regions", "fraction", "k"),
    [
        (30, 0.1, 3),
        (81, 0.1, 9),
        (81, 1 / 9, 9),
        (10, 0.7, 7),
        (7, 0.29, 3),
        (100, 0.29, 29),
        (100, 0.07, 7),
        (5, 0.01, 1),
        (5, 0.0, 0),
        (5, 1.0, 5),
    ],
)
@pytest.mark.parametrize("kind", [TopKSelector, RandomSelector])
def test_fraction_is_rounded_up(kind: Any, regions: int, fraction: float, k: int) -> None:
    """But 0.07 * 100 = 7.000000000000001 is seven."""
    grid = Grid.blocks((regions,), (regions,), 1)
    assert k == math.ceil(Fraction(fraction).limit_denominator(1000) * regions)
    found = run(kind(fraction=fraction), attention(grid, 3), grid)
    assert found.sum(dim=1).tolist() == [k] * 3
    assert run(kind(k=2, fraction=fraction), attention(grid, 3), grid).sum(dim=1).tolist() == [2] * 3


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.93])
def test_top_p(grid: Grid, p: float) -> None:
    scores = attention(grid)
    scores[:, 0] += 0.01
    rows = without_margins(scores, grid)
    chosen = []
    for row in rows:
        total, held = sum(map(Fraction, row.tolist())), Fraction(0)
        needed = [False] * len(row)
        for u in sorted(range(len(row)), key=lambda u: (-row[u], u)):
            assert abs(held / total - Fraction(p)) > 1e-6, "too close to call in float32"
            needed[u] = held / total < Fraction(p)
            held += Fraction(float(row[u]))
        chosen.append(needed)
    assert torch.equal(run(TopPSelector(p), scores, grid), opened(chosen, grid))


def test_top_p_takes_the_fewest_cells() -> None:
    grid = Grid.blocks((5,), (5,), 1)
    scores = torch.tensor([[0.25, 0.0, 0.5, 0.125, 0.125]]) * 3
    for p, expected in (
        (0.0, "00000"),
        (0.001, "00100"),
        (0.5, "00100"),
        (0.51, "10100"),
        (0.75, "10100"),
        (0.8, "10110"),
    ):
        assert "".join(str(int(x)) for x in run(TopPSelector(p), scores, grid)[0]) == expected, p


def test_top_p_of_one_is_every_cell_with_attention() -> None:
    """However small: a running sum in float32 reaches 1 long before the last of them."""
    grid = Grid.blocks((24, 24), (24, 24), 1)
    scores = torch.softmax(torch.randn(9, 576) * 6, dim=-1)
    scores[:, 100:110] = 0
    assert torch.equal(run(TopPSelector(1.0), scores, grid), scores > 0)


# ---------------------------------------------------------------------- random and all


def chi_square(counts: Tensor, expected: float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_random_is_uniform_over_regions() -> None:
    """81 regions, 8 of them per row: 80 degrees of freedom, whose 99.99th percentile is about 135."""
    grid = Grid.official(12, 36)
    scores = torch.full((500, 144), 1 / 144)
    for seed in (0, 1, 7):
        counts = torch.zeros(81)
        for layer in range(8, 16):
            drawn = RandomSelector(k=8, seed=seed).select(
                scores, grid, torch.ones(81, dtype=torch.bool), keys(500, layer, 30)
            )
            assert drawn.sum(dim=1).tolist() == [8] * 500
            counts += drawn.sum(dim=0)
        assert 30 < chi_square(counts, 8 * 500 * 8 / 81) < 135
    skewed = counts + torch.linspace(-60, 60, 81)
    assert chi_square(skewed, 8 * 500 * 8 / 81) > 135


def draw(layer: int = 9, position: int = 0, seed: int = 0, rows: int = 300) -> Tensor:
    grid = Grid.official(12, 36)
    return RandomSelector(k=8, seed=seed).select(
        torch.ones(rows, 144), grid, torch.ones(81, dtype=torch.bool), keys(rows, layer, position)
    )


def test_random_depends_on_layer_position_and_seed_only() -> None:
    first = draw()
    assert torch.equal(draw(), first)
    assert torch.equal(draw(position=120)[:180], first[120:])
    others = [
        draw(layer=10),
        draw(position=1),
        draw(seed=1),
        draw(layer=0),
        draw(position=81),
        draw(position=-900),
    ]
    for other in others:
        shared = float((first & other).sum(dim=1).float().mean())
        assert abs(shared - 64 / 81) < 0.25, "independent draws of 8 of 81 share 64/81 on average"
    # five of 300 rows of their own, and positions 300 to 380 of layer 9
    assert len({tuple(row.nonzero()[:, 0].tolist()) for row in torch.cat([first, *others])}) == 5 * 300 + 81


def test_random_ignores_the_scores_and_never_takes_the_unselectable(grid: Grid) -> None:
    selectable = torch.arange(grid.n_regions) % 3 != 0
    scores = attention(grid, 50)
    found = run(RandomSelector(k=2), scores, grid, selectable)
    assert torch.equal(found, run(RandomSelector(k=2), scores.flip(0) + 1, grid, selectable))
    assert not bool(found[:, ~selectable].any())
    assert found.sum(dim=1).tolist() == [min(2, int(selectable.sum()))] * 50
    everything = run(RandomSelector(k=10_000), scores, grid, selectable)
    assert torch.equal(everything, selectable.expand(50, -1))


def test_all(grid: Grid) -> None:
    assert bool(run(AllSelector(), attention(grid), grid).all())
    selectable = torch.arange(grid.n_regions) % 2 == 1
    assert torch.equal(run(AllSelector(), attention(grid), grid, selectable), selectable.expand(17, -1))


# ---------------------------------------------------------------------- every selector


def test_rows_without_attention_choose_nothing(selector: Selector, grid: Grid) -> None:
    scores = attention(grid)
    expected = run(selector, scores, grid)
    assert bool(expected.any())
    dead = torch.tensor([0, 5, 16])
    scores[dead] = 0
    expected[dead] = False
    assert torch.equal(run(selector, scores, grid), expected)
    assert not bool(run(selector, torch.zeros(3, grid.n_coarse), grid).any())
    assert run(selector, scores[:0], grid).shape == (0, grid.n_regions)


@pytest.mark.parametrize("broken", [math.nan, "row"])
def test_not_a_number_stays_in_its_row(selector: Selector, grid: Grid, broken: Any) -> None:
    scores = attention(grid)
    expected = run(selector, scores, grid)
    scores[3, slice(None) if broken == "row" else 2] = math.nan
    expected[3] = False
    assert torch.equal(run(selector, scores, grid), expected)


def test_uniform_rows() -> None:
    """The paper's selector has nothing to go by; the others take what they are told to."""
    grid = GRIDS["7-to-21"]
    flat = torch.full((2, 7), 1 / 7)
    counts = {name: run(selector, flat, grid).sum(dim=1).tolist() for name, selector in EVERY.items()}
    # p = 0.5 needs 4 of 7 cells: 12 of 21 tokens, the first three blocks of 4
    assert counts == {
        "threshold": [0, 0],
        "threshold0": [0, 0],
        "top_k": [3, 3],
        "top_p": [3, 3],
        "random": [3, 3],
        "all": [6, 6],
    }


def test_nothing_selectable(selector: Selector, grid: Grid) -> None:
    assert not bool(run(selector, attention(grid), grid, torch.zeros(grid.n_regions, dtype=torch.bool)).any())


def test_rows_are_independent_of_their_batch(selector: Selector, grid: Grid) -> None:
    scores, selectable = attention(grid), torch.arange(grid.n_regions) % 4 != 2
    together = selector.select(scores, grid, selectable, keys(17))
    for row in range(17):
        alone = selector.select(scores[row : row + 1], grid, selectable, keys(17)[row : row + 1])
        assert torch.equal(alone[0], together[row])
    order = torch.randperm(17)
    assert torch.equal(selector.select(scores[order], grid, selectable, keys(17)[order]), together[order])


def test_inputs_are_left_alone(selector: Selector) -> None:
    grid = GRIDS["5x9-to-15x27-margins"]
    scores = attention(grid).requires_grad_()
    before = scores.detach().clone()
    found = run(selector, scores, grid)
    assert torch.equal(scores.detach(), before) and not found.requires_grad


def test_scores_are_handled_in_float32(selector: Selector) -> None:
    grid = Grid.blocks((256,), (256,), 1)
    half = (torch.rand(50, 1) * torch.arange(256)).bfloat16()
    assert torch.equal(run(selector, half, grid), run(selector, half.float(), grid))


@pytest.mark.parametrize("shape", [(3, 6), (7,), (1, 3, 7), (3, 14)], ids=str)
def test_scores_that_do_not_fit(selector: Selector, shape: tuple[int, ...]) -> None:
    grid = GRIDS["7-to-21"]
    with pytest.raises(ValueError, match=r"scores must be \[R, n_coarse=7\]"):
        selector.select(torch.ones(shape), grid, torch.ones(6, dtype=torch.bool), keys(3))


# ---------------------------------------------------------------------- from a config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FlexConfig(), ThresholdSelector(48)),
        (FlexConfig(threshold=7), ThresholdSelector(7)),
        (FlexConfig(selector="top_k"), TopKSelector(None, 0.1)),
        (FlexConfig(selector="top_k", top_k=4), TopKSelector(4, 0.1)),
        (FlexConfig(selector="top_k", fraction=0.3), TopKSelector(None, 0.3)),
        (FlexConfig(selector="top_p", top_p=0.9), TopPSelector(0.9)),
        (FlexConfig(selector="random", top_k=2, seed=5), RandomSelector(2, 0.1, 5)),
        (FlexConfig(selector="all"), AllSelector()),
    ],
    ids=lambda v: v.selector if isinstance(v, FlexConfig) else repr(v),
)
def test_built_in_selectors_read_their_fields(config: FlexConfig, expected: Selector) -> None:
    assert make_selector(config) == expected


def test_unknown_selector_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"unknown selector 'nearest'.*all, .*random, threshold, top_k, top_p"
    ):
        make_selector(FlexConfig(selector="nearest"))


class Nearest(Selector):
    """A plug-in's selector: the regions around the best cell's, with a constructor of its own."""

    def __init__(self, radius: int = 0):
        self.radius = radius

    def choose(self, scores: Tensor, grid: Grid, selectable: Tensor, keys: Tensor) -> Tensor:
        best = grid.pool(scores).argmax(dim=1, keepdim=True)
        return (torch.arange(grid.n_regions) - best).abs() <= self.radius


@dataclass
class Changeable(Nearest):
    radius: int = 0


@dataclass(frozen=True)
class Frozen(Nearest):
    radius: int = 0


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_registry", plugins._Registry())


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("kind", [Nearest, Changeable, Frozen])
def test_a_plugins_selector_takes_selector_options(kind: type[Nearest]) -> None:
    plugins.register_selector("nearest", kind)
    config = FlexConfig(selector="nearest", selector_options={"radius": 1})
    made = make_selector(FlexConfig.from_json(config.to_json()))
    assert type(made) is kind and made.radius == 1
    grid = Grid.blocks((6,), (6,), 1, padding=((0, 0.2),))
    scores = torch.tensor([[0.1, 0.2, 0.4, 0.1, 0.1, 0.9], [0.5, 0, 0, 0, 0, 0], [0.0] * 6, [math.nan] * 6])
    found = run(made, scores, grid, torch.tensor([True, True, True, False, True, True]))
    picked = [row.nonzero()[:, 0].tolist() for row in found]
    assert picked == [[1, 2], [0, 1], [], []]
    with pytest.raises(TypeError, match="diameter"):
        make_selector(FlexConfig(selector="nearest", selector_options={"diameter": 1}))


@pytest.mark.parametrize("selector", [TopKSelector(k=3), ThresholdSelector(), TopPSelector(0.4)], ids=str)
def test_nothing_left_out_is_known_without_looking(selector: Selector) -> None:
    grid = Grid.blocks((6, 5), (12, 10), region=3)
    scores, keys = torch.rand(4, grid.n_coarse), torch.zeros(4, 2, dtype=torch.long)
    scores[1] = 0  # a row that attends to nothing
    found = selector.select(scores, grid, grid.everything, keys)
    assert torch.equal(found, selector.select(scores, grid, torch.ones_like(grid.everything), keys))
    assert found.any() and not found[1].any()
    fewer = grid.everything.clone()
    fewer[found[0].nonzero()[0, 0]] = False
    assert not torch.equal(found, selector.select(scores, grid, fewer, keys))
