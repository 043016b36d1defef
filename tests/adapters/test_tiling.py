import pytest
import torch

from flexcore_adapters.tiling import cut_tiles, downscale, paste_tiles


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 3), (2, 5), (4, 1)], ids=str)
def test_cut_tiles_equals_a_loop(rows: int, cols: int) -> None:
    h, w = 6, 7
    images = torch.randn(2, 3, rows * h, cols * w)
    expected = [
        image[:, r * h : (r + 1) * h, c * w : (c + 1) * w]
        for image in images
        for r in range(rows)
        for c in range(cols)
    ]
    assert torch.equal(cut_tiles(images, rows, cols), torch.stack(expected))


@pytest.mark.parametrize(("rows", "cols", "n"), [(1, 1, 4), (3, 3, 4), (2, 5, 3), (4, 1, 1)], ids=str)
def test_paste_tiles_equals_a_loop(rows: int, cols: int, n: int) -> None:
    width = 5
    features = torch.randn(2 * rows * cols, n * n, width)
    expected = torch.full((2, rows * n * cols * n, width), float("nan"))
    for b in range(2):
        for y in range(rows * n):
            for x in range(cols * n):
                tile = (b * rows + y // n) * cols + x // n
                expected[b, y * cols * n + x] = features[tile, (y % n) * n + x % n]
    assert torch.equal(paste_tiles(features, rows, cols), expected)


def test_pasting_what_was_cut_gives_the_picture_back() -> None:
    images = torch.arange(2 * 3 * 12 * 20).reshape(2, 3, 12, 20)
    tiles = cut_tiles(images, 3, 5)
    back = paste_tiles(tiles.flatten(2).transpose(1, 2), 3, 5)
    assert torch.equal(back.transpose(1, 2).reshape(images.shape), images)
    assert tiles.dtype == images.dtype


def test_downscale_keeps_constants_and_means() -> None:
    image = torch.rand(2, 3, 72, 72)
    small = downscale(image, 24)
    assert small.shape == (2, 3, 24, 24)
    assert torch.allclose(
        downscale(torch.full((1, 3, 30, 45), 0.7), (10, 15)), torch.full((1, 3, 10, 15), 0.7)
    )
    # Antialiasing reads every pixel: without it, a third of the rows and columns would decide.
    assert torch.allclose(small.mean(), image.mean(), atol=2e-3)
    row = torch.zeros(1, 1, 9, 9)
    row[..., 3] = 1.0
    # A triangle of half-width 3 around each target pixel, sampled at pixel centres.
    weights = torch.tensor([max(0.0, 1 - abs(3 - centre) / 3) for centre in (1, 4, 7)]) / 3
    edge = sum(max(0.0, 1 - abs(x - 1) / 3) for x in range(9)) / 3
    weights[0] /= edge
    assert torch.allclose(downscale(row, 3)[0, 0, 1], weights, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 3, 10, 12), (1, 3, 12, 10)], ids=str)
def test_cut_tiles_refuses_what_is_no_whole_number_of_tiles(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"multiples of \(3, 3\)"):
        cut_tiles(torch.zeros(shape), 3, 3)


@pytest.mark.parametrize("shape", [(9, 5, 8), (8, 4, 8), (9, 4), (9, 0, 8)], ids=str)
def test_paste_tiles_refuses_maps_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="3 x 3 tiles"):
        paste_tiles(torch.zeros(shape), 3, 3)
