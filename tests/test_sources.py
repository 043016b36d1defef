"""Sources: what is in a tensor and what is encoded on demand come out the same, bit for bit."""

from __future__ import annotations

import pickle
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from flexcore import FineSource, OnDemandSource, TensorSource
from flexcore.grid import Grid
from tests.helpers import flat_index, region_cells

GRIDS = {
    "7of3": Grid.blocks((2,), (7,), 3),
    "13x22of5-tile11": Grid.blocks((4, 7), (13, 22), 5, tile=11),
    "3x5x4of2": Grid.blocks((1, 2, 2), (3, 5, 4), 2),
    "official-g6-F5": Grid.official(6, 5),
}


@pytest.fixture(params=GRIDS.values(), ids=GRIDS.keys())
def grid(request: pytest.FixtureRequest) -> Grid:
    return request.param


def expected_pages(features: Tensor, grid: Grid) -> Tensor:
    """`[n_regions, P, C]`, filled token by token into zeros."""
    regions = region_cells(grid)
    out = torch.zeros(len(regions), max(map(len, regions)), features.shape[1], dtype=features.dtype)
    for r, cells in enumerate(regions):
        for i, cell in enumerate(cells):
            out[r, i] = features[flat_index(cell, grid.fine)]
    return out


class Encoder:
    """Stands for an expensive encoder: hands out pages of a tensor and notes what it was asked for."""

    def __init__(self, features: Tensor, grid: Grid, padding: float = 0.0):
        self.source, self.padding = TensorSource(features, grid), padding
        self.calls: list[list[int]] = []

    def __call__(self, regions: Tensor) -> Tensor:
        self.calls.append(regions.tolist())
        out = self.source.features(regions)
        past = torch.arange(out.shape[1]) >= self.source.lengths[regions][:, None]
        return out.masked_fill(past[..., None], self.padding)


def picks(grid: Grid, n: int = 6) -> list[Tensor]:
    """Region lists with repeats, in no order, and an empty one."""
    rng = random.Random(3)
    lists = [rng.choices(range(grid.n_regions), k=rng.randint(1, 7)) for _ in range(n)]
    return [torch.tensor(p, dtype=torch.long) for p in [*lists, []]]


# ---------------------------------------------------------------------- a tensor


def test_pages_are_padded_with_zeros(grid: Grid) -> None:
    features = torch.randn(grid.n_fine, 3)
    source = TensorSource(features, grid)
    expected = expected_pages(features, grid)
    for regions in picks(grid):
        assert torch.equal(source.features(regions), expected[regions])
    assert source.lengths.tolist() == [len(cells) for cells in region_cells(grid)]
    assert (source.width, source.dtype, source.device) == (3, torch.float32, torch.device("cpu"))


def test_padding_is_zero_though_the_first_token_is_not_a_number() -> None:
    """Padding looks up token 0 before it is overwritten."""
    grid = GRIDS["7of3"]
    features = torch.randn(7, 2)
    features[0] = torch.nan
    last = TensorSource(features, grid).features(torch.tensor([2]))
    assert torch.equal(last[0], torch.stack([features[6], torch.zeros(2), torch.zeros(2)]))


def test_gradient_reaches_the_tokens_that_were_read(grid: Grid) -> None:
    features = torch.randn(grid.n_fine, 3, requires_grad=True)
    regions = picks(grid)[0]
    pages = TensorSource(features, grid).features(regions)
    weight = torch.randn_like(pages)
    (pages * weight).sum().backward()
    expected = torch.zeros(grid.n_fine, 3)
    for page, r in enumerate(regions.tolist()):
        for i, cell in enumerate(region_cells(grid)[r]):
            expected[flat_index(cell, grid.fine)] += weight[page, i]
    torch.testing.assert_close(features.grad, expected)
    assert bool((expected == 0).any()) or len(set(regions.tolist())) == grid.n_regions


def test_to_makes_a_source_only_where_something_changes() -> None:
    grid = GRIDS["7of3"]
    source = TensorSource(torch.randn(7, 2), grid)
    for same in (
        source.to(),
        source.to("cpu"),
        source.to(torch.device("cpu"), torch.float32),
        source.to(None, None),
    ):
        assert same is source
    half = source.to(dtype=torch.bfloat16)
    assert (half.dtype, half.grid, half.width) == (torch.bfloat16, grid, 2)
    assert torch.equal(half.tensor, source.tensor.bfloat16()) and source.dtype == torch.float32
    meta = source.to("meta")
    assert meta.device.type == "meta" and meta.dtype == torch.float32


def test_to_keeps_the_gradient() -> None:
    features = torch.randn(7, 2, requires_grad=True)
    TensorSource(features, GRIDS["7of3"]).to(dtype=torch.float64).features(torch.tensor([0])).sum().backward()
    assert torch.equal(features.grad, (torch.arange(7) < 3).float()[:, None].expand(7, 2))


BAD_FEATURES: list[tuple[Tensor, str]] = [
    (torch.zeros(6, 2), r"features must be \[n_fine=7, C\].*got \[6, 2\]"),
    (torch.zeros(1, 7, 2), r"features must be \[n_fine=7, C\].*got \[1, 7, 2\]"),
    (torch.zeros(7), r"features must be .*got \[7\]"),
    (torch.zeros(7, 2, dtype=torch.long), "features must be floating point.*int64"),
]


@pytest.mark.parametrize(("features", "message"), BAD_FEATURES, ids=["6x2", "1x7x2", "7", "int64"])
def test_bad_features(features: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorSource(features, GRIDS["7of3"])


@pytest.mark.parametrize("region", [-1, 3])
def test_region_outside_the_grid(region: int) -> None:
    grid = GRIDS["7of3"]
    features = torch.zeros(7, 2)
    encoder = Encoder(features, grid)
    for source in (TensorSource(features, grid), OnDemandSource(encoder, grid, 2)):
        with pytest.raises(ValueError, match=r"regions must lie in \[0, 3\)"):
            source.features(torch.tensor([0, region]))
    assert encoder.calls == []


# ---------------------------------------------------------------------- on demand


def test_each_region_is_encoded_once(grid: Grid) -> None:
    features = torch.randn(grid.n_fine, 3)
    encoder, whole = Encoder(features, grid), TensorSource(features, grid)
    source = OnDemandSource(encoder, grid, 3)
    known: set[int] = set()
    calls = []
    for regions in [*picks(grid), *picks(grid)]:
        missing = sorted(set(regions.tolist()) - known)
        calls += [missing] if missing else []
        known |= set(missing)
        assert torch.equal(source.features(regions), whole.features(regions))
        assert encoder.calls == calls
        assert source.encoded == [r for call in calls for r in call]
    assert len(source.encoded) == len(set(source.encoded)) == len(known) > 1


def test_nothing_asked_nothing_encoded() -> None:
    grid = GRIDS["13x22of5-tile11"]
    encoder = Encoder(torch.randn(grid.n_fine, 3), grid)
    empty = OnDemandSource(encoder, grid, 3, torch.float16).features(torch.tensor([], dtype=torch.long))
    assert empty.shape == (0, grid.region_tokens, 3) and empty.dtype == torch.float16
    assert encoder.calls == []


def test_what_an_encoder_leaves_in_the_padding_is_dropped(grid: Grid) -> None:
    """A NaN in a row that nobody reads would reach the output as `0 * NaN`."""
    features = torch.randn(grid.n_fine, 3)
    regions = torch.arange(grid.n_regions)
    encoder = Encoder(features, grid, padding=torch.nan)
    assert bool(encoder(regions).isnan().any())
    found = OnDemandSource(encoder, grid, 3).features(regions)
    assert torch.equal(found, TensorSource(features, grid).features(regions))


def test_a_failed_encoding_is_tried_again() -> None:
    grid = GRIDS["7of3"]
    features = torch.randn(7, 2)
    attempts = []

    def encode(regions: Tensor) -> Tensor:
        attempts.append(regions.tolist())
        if len(attempts) == 1:
            raise RuntimeError("decoder hiccup")
        return TensorSource(features, grid).features(regions)

    source = OnDemandSource(encode, grid, 2)
    with pytest.raises(RuntimeError, match="hiccup"):
        source.features(torch.tensor([1]))
    assert source.encoded == []
    assert torch.equal(source.features(torch.tensor([1]))[0], features[3:6])
    assert attempts == [[1], [1]]


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 2, 2), (1, 3, 2), (6, 2)], ids=str)
def test_encoder_that_returns_another_shape(shape: tuple[int, ...]) -> None:
    source = OnDemandSource(lambda regions: torch.zeros(shape), GRIDS["7of3"], 2)
    with pytest.raises(ValueError, match=r"encode must return \(2, 3, 2\) for 2 regions, got"):
        source.features(torch.tensor([0, 2]))
    assert source.encoded == []


def test_encoded_in_inference_mode_read_under_grad() -> None:
    grid = GRIDS["7of3"]
    source = OnDemandSource(Encoder(torch.randn(7, 2), grid), grid, 2)
    weight = torch.randn(2, requires_grad=True)
    with torch.inference_mode():
        pages = source.features(torch.tensor([0, 2])).clone()
    (source.features(torch.tensor([0, 2])) * weight).sum().backward()
    assert torch.equal(weight.grad, pages.sum(dim=(0, 1)))


def test_on_demand_stays_where_it_is() -> None:
    source = OnDemandSource(Encoder(torch.zeros(7, 2), GRIDS["7of3"]), GRIDS["7of3"], 2, torch.float16, "cpu")
    assert source.to("meta", torch.float64) is source
    assert (source.dtype, source.device) == (torch.float16, torch.device("cpu"))


def test_pickle(grid: Grid) -> None:
    features = torch.randn(grid.n_fine, 3)
    regions = torch.arange(grid.n_regions)
    for source in (TensorSource(features, grid), OnDemandSource(Encoder(features, grid), grid, 3)):
        source.features(regions[:1])
        twin: Any = pickle.loads(pickle.dumps(source))
        assert torch.equal(twin.features(regions), TensorSource(features, grid).features(regions))


def test_a_source_of_ones_own_needs_features_only() -> None:
    class Constant(FineSource):
        def __init__(self, grid: Grid):
            self.grid, self.width, self.dtype, self.device = grid, 1, torch.float32, torch.device("cpu")

        def features(self, regions: Tensor) -> Tensor:
            return (self.grid.tokens(regions) >= 0).float()[..., None]

    source = Constant(GRIDS["7of3"])
    assert source.to("meta", torch.float64) is source
    assert source.lengths.tolist() == [3, 3, 1]
    assert source.readable(torch.tensor([2, 0])).tolist() == [True, True]
    with pytest.raises(TypeError, match="abstract"):
        FineSource()  # type: ignore[abstract]
