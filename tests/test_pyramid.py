"""open_children and share_budget against loops over regions and tokens."""

from __future__ import annotations

import pytest
import torch

from flexcore.grid import Grid
from flexcore.pyramid import child_grid, open_children, share_budget
from flexcore.selection import AllSelector, RandomSelector, TopKSelector

PARENT = Grid.blocks((3, 4), (7, 9), region=3)
CHILD = Grid.blocks((3, 4), (20, 31), region=5)  # no whole number of child tokens per parent token


def touching(region: int) -> list[int]:
    """Parent tokens whose area overlaps a child region's."""
    (ey, ex), (h, w) = CHILD.edges, CHILD.fine
    row, col = divmod(region, len(ex) - 1)
    found = []
    for token in range(PARENT.n_fine):
        y, x = divmod(token, PARENT.fine[1])
        top, bottom = y * h / PARENT.fine[0], (y + 1) * h / PARENT.fine[0]
        left, right = x * w / PARENT.fine[1], (x + 1) * w / PARENT.fine[1]
        if top < ey[row + 1] and bottom > ey[row] and left < ex[col + 1] and right > ex[col]:
            found.append(token)
    return found


@pytest.mark.parametrize(
    "selector", [AllSelector(), TopKSelector(k=3), RandomSelector(k=2)], ids=lambda s: type(s).__name__
)
def test_only_children_are_opened_best_first(selector):
    torch.manual_seed(0)
    grid = child_grid(PARENT, CHILD)
    regions = torch.tensor([1, 5])
    tokens = PARENT.tokens(regions)
    attention = torch.rand(4, *tokens.shape).masked_fill(tokens < 0, 0)
    attention[1, 0] = 0  # the second row doesn't see the first region
    attention[3] = 0  # the fourth sees nothing
    selectable = torch.ones(CHILD.n_regions, dtype=torch.bool)
    selectable[4] = False
    keys = torch.stack([torch.full((4,), 2), torch.arange(4)], dim=1)
    chosen, scores = open_children(selector, attention, tokens, grid, selectable, keys)
    for row in range(4):
        weight = {
            int(t): float(a)
            for t, a in zip(tokens.flatten(), attention[row].flatten(), strict=True)
            if t >= 0
        }
        expected = [max(weight.get(t, 0.0) for t in touching(region)) for region in range(CHILD.n_regions)]
        assert scores[row].tolist() == pytest.approx(expected)
        able = [i for i, s in enumerate(expected) if s > 0 and selectable[i]]
        picked = chosen[row].nonzero()[:, 0].tolist()
        assert set(picked) <= set(able)
        if isinstance(selector, AllSelector):
            assert picked == able
        elif isinstance(selector, TopKSelector):
            assert picked == sorted(sorted(able, key=lambda i: (-expected[i], i))[:3])
        else:
            assert len(picked) == min(2, len(able))
    assert not chosen[3].any() and chosen[0].any()


def test_the_levels_share_one_budget():
    torch.manual_seed(1)
    chosen = [torch.rand(40, n) < p for n, p in ((12, 0.5), (30, 0.2), (50, 0.05))]
    scores = [torch.rand(40, n).round(decimals=1) for n in (12, 30, 50)]  # with ties
    chosen[2][:10] = False
    chosen[1][5:15] = False
    kept = share_budget(chosen, scores)
    for row in range(40):
        budget = int(chosen[0][row].sum())
        share = budget // max(1, sum(bool(c[row].any()) for c in chosen))
        best = [
            sorted(c[row].nonzero()[:, 0].tolist(), key=lambda i: (-float(s[row, i]), i))
            for c, s in zip(chosen, scores, strict=True)
        ]
        finer = [b[:share] for b in best[1:]]
        expected = [best[0][: budget - sum(map(len, finer))], *finer]
        assert [k[row].nonzero()[:, 0].tolist() for k in kept] == [sorted(e) for e in expected]
        assert sum(int(k[row].sum()) for k in kept) <= budget


def test_one_level_keeps_its_selection():
    mask = torch.rand(5, 9) < 0.4
    assert torch.equal(share_budget([mask], [torch.rand(5, 9)])[0], mask)
