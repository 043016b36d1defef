"""Contact sheets: what is shown, in which order, on which scale."""

import numpy as np
import pytest
import torch

from flexcore.grid import Grid
from flexcore.viz import WARM, overlay
from flexcore.viz_video import UNREAD, boxes, contact_sheet, per_step, pick, slice_grid

GRID = Grid.blocks((2, 3, 4), (8, 6, 8), region=(4, 3, 4))  # 2 x 2 x 2 regions of 4 x 3 x 4


def weights(**read: float) -> torch.Tensor:
    out = torch.zeros(GRID.n_regions)
    for name, value in read.items():
        out[int(name[1:])] = value
    return out


def frame(step: int) -> np.ndarray:
    return np.full((60, 80, 3), 40 + 20 * step, dtype=np.uint8)


def test_slice_keeps_the_padding():
    padded = Grid.blocks((2, 3, 4), (8, 6, 8), 3, padding=((0, 0), (0.25, 0.25), (0, 0)))
    plane = slice_grid(padded)
    assert (plane.coarse, plane.fine, plane.padding) == ((3, 4), (6, 8), ((0.25, 0.25), (0.0, 0.0)))


def test_steps_count_fine_tokens():
    steps = per_step(GRID, weights(r0=1.0, r1=0.5, r6=0.5))
    assert [s.share for s in steps] == [1.0] * 4 + [pytest.approx(1 / 3)] * 4
    assert steps[0].weights.tolist() == [1.0, 0.5, 0.0, 0.0] and steps[7].weights.tolist() == [0, 0, 0.5, 0]
    uneven = Grid.blocks((1, 1, 1), (3, 2, 5), region=(2, 2, 4))
    steps = per_step(uneven, torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert [s.share for s in steps] == [1.0, 1.0, 0.25]  # 8 tokens, then 2


def test_boxes_lie_where_the_regions_do():
    first, *_ = per_step(GRID, weights(r1=0.5, r2=1.0))
    assert boxes(GRID, first, (80, 60)) == [(0, 30, 40, 60), (40, 0, 80, 30)]
    assert boxes(GRID, first, (80, 60), most=1) == [(0, 30, 40, 60)]


def test_pick_is_in_order_of_time_and_spreads():
    steps = per_step(GRID, weights(r0=0.5, r4=1.0))
    assert [s.index for s in pick(steps, 2)] == [0, 4]
    assert [s.index for s in pick(steps, 8)] == list(range(8))
    assert [s.index for s in pick(per_step(GRID, weights(r5=1.0)), 4)] == [4, 6]
    assert [s.index for s in pick(per_step(GRID, weights()), 2)] == [2, 6]


@pytest.mark.parametrize(
    "read", [weights(r0=1.0, r5=0.2), weights(), torch.ones(8)], ids=["some", "none", "all"]
)
def test_sheet(read):
    sheet = contact_sheet(
        GRID,
        read,
        frame,
        lambda step: f"0:0{step}",
        columns=3,
        most=4,
        width=640,
        title="clip",
        coarse=[0.25, 0.75],
    )
    assert sheet.mode == "RGB" and sheet.width == 640
    pixels = {tuple(p) for p in np.asarray(sheet).reshape(-1, 3).tolist()}
    assert (tuple(WARM) in pixels) == bool(read.any())
    assert (UNREAD in pixels) == (not bool((read == 1).all()))


def test_one_scale_for_all_pictures():
    faint = torch.tensor([0.1, 0.0, 0.0, 0.0])
    plane = slice_grid(GRID)
    own, common = (np.asarray(overlay(frame(0), plane, faint, top)) for top in (None, 1.0))
    assert not np.array_equal(own, common)
    assert np.array_equal(common, np.asarray(overlay(frame(0), plane, faint / 2, 0.5)))
    with pytest.raises(ValueError, match="weights must lie in"):
        overlay(frame(0), plane, faint * 11, 1.0)


def test_errors():
    with pytest.raises(ValueError, match="three axes"):
        per_step(Grid.blocks((2, 2), (4, 4), 2), torch.ones(4))
    with pytest.raises(ValueError, match=r"weights must be \[n_regions=8\], got \[9\]"):
        per_step(GRID, torch.ones(9))
