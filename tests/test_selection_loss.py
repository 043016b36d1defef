"""The selection loss against loops in float64, values and gradients, and exploration against its own promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flexcore import FlexConfig
from flexcore.exploration import ExploringSelector
from flexcore.grid import Grid
from flexcore.row_attention import RegionRows, row_attention, with_sinks
from flexcore.selection import TopKSelector
from flexcore.selection_loss import cell_scores, region_attention, selection_loss
from tests.helpers import dense_attention, dense_joint, gap

SCALING = 0.3
# batch, query heads, kv heads, rows, keys, width, cells
SHAPES = {
    "B2-H6of2-R5-S63-D16-M11": (2, 6, 2, 5, 63, 16, 11),
    "B1-H3of3-R1-S20-D8-M20": (1, 3, 3, 1, 20, 8, 20),
}


class Given:
    def __init__(self, see: Tensor):
        self.see = see

    def chunk(self, start: int, stop: int) -> Tensor:
        return self.see[:, :, start:stop]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_cell_scores_equal_the_detached_ones_and_have_their_gradients(shape, sinks, softcap):
    batch, heads, kv, rows, keys, width, n_cells = SHAPES[shape]
    query, key = torch.randn(batch, heads, rows, width), torch.randn(batch, kv, keys, width)
    see = torch.rand(batch, 1, rows, keys) < 0.7
    see[..., 0] = True
    sink = torch.randn(heads) if sinks else None
    cells = torch.stack([torch.randperm(keys)[:n_cells] for _ in range(batch)])
    weight = torch.randn(batch, rows, n_cells)

    q, k = query.clone().requires_grad_(), key.clone().requires_grad_()
    _, lse, scores = row_attention(
        q, k, None, Given(see), scaling=SCALING, softcap=softcap, cells=cells, sinks=sink
    )
    assert scores is not None and not scores.requires_grad
    found = cell_scores(q, k, cells, scores, with_sinks(lse, sink), scaling=SCALING, softcap=softcap)
    assert gap(found, scores) < 1e-5
    (found * weight).sum().backward()

    q64, k64 = query.double().requires_grad_(), key.double().requires_grad_()
    _, _, p = dense_attention(q64, k64, k64, see, scaling=SCALING, softcap=softcap, sinks=sink)
    expected = p.sum(1).gather(2, cells[:, None].expand(-1, rows, -1))
    (expected * weight).sum().backward()
    assert gap(found, expected) < 1e-5
    assert q.grad is not None and gap(q.grad, q64.grad) < 1e-4
    assert k.grad is not None and gap(k.grad, k64.grad) < 1e-4
    assert float(q.grad.abs().max()) > 1e-3


def test_a_hidden_cell_gets_no_probability_and_no_gradient_whatever_its_logit():
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 5, 4)
    key[:, :, 3] = 500 * query[:, :, 0]
    see = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    see[..., 3] = False
    q, k = query.requires_grad_(), key.requires_grad_()
    cells = torch.tensor([[1, 3]])
    _, lse, scores = row_attention(q, k, None, Given(see), scaling=1.0, cells=cells)
    found = cell_scores(q, k, cells, scores, lse, scaling=1.0)
    assert float(found[0, 0, 1]) == 0.0 < float(found[0, 0, 0])
    found.sum().backward()
    assert bool(q.grad.isfinite().all()) and float(k.grad[:, :, 3].abs().max()) == 0.0


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_region_attention_is_the_joint_softmax_summed_by_region(masked, softcap):
    heads, kv, rows, keys, regions, page, width = 4, 2, 3, 17, 5, 6, 8
    query, key = torch.randn(1, heads, rows, width), torch.randn(1, kv, keys, width)
    fine = torch.randn(1, kv, regions * page, width)
    selected = torch.rand(1, rows, regions) < 0.5
    selected[0, 0] = False
    valid = torch.rand(1, regions, page) < 0.8
    mask = RegionRows(selected, valid) if masked else None
    see = (
        (selected[..., None] & valid[:, None]).flatten(2)
        if masked
        else torch.ones(1, rows, regions * page).bool()
    )
    _, lse, _ = row_attention(query, key, None, None, scaling=SCALING, softcap=softcap)
    found = region_attention(query, fine, mask, lse, regions, scaling=SCALING, softcap=softcap)
    # one-hot values: what comes out of the joint attention is how much of it each region got
    onehot = torch.eye(regions).repeat_interleave(page, 0)[None, None].expand(1, kv, -1, -1)
    everything = torch.ones(1, 1, rows, keys, dtype=torch.bool)
    expected = dense_joint(
        query,
        key,
        torch.zeros(1, kv, keys, regions),
        fine,
        onehot,
        see=everything,
        fine_see=see,
        scaling=SCALING,
        softcap=softcap,
    ).mean(2)[0]
    assert gap(found, expected) < 1e-5
    assert bool(found.isfinite().all()) and (not masked or float(found[0].abs().max()) == 0.0)


def test_the_loss_is_a_cross_entropy_over_what_was_visible():
    rows, regions = 4, 7
    raw = torch.rand(rows, regions).requires_grad_()
    attention = torch.rand(rows, regions, requires_grad=True)
    visible = torch.rand(rows, regions) < 0.6
    visible[0], visible[1] = False, True
    found = selection_loss(raw, attention, visible)
    expected = []
    for r in range(rows):
        seen = [i for i in range(regions) if visible[r, i]]
        total = sum(float(raw[r, i]) for i in seen)
        expected.append(-sum(float(attention[r, i]) * math.log(float(raw[r, i]) / total) for i in seen))
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5) and float(found[0]) == 0.0
    found.sum().backward()
    assert attention.grad is None  # the reading layer is the teacher
    assert raw.grad is not None and float(raw.grad[~visible].abs().max()) == 0.0
    # d/ds_i = -(a_i / s_i - sum a / sum s)
    slope = attention[1] / raw[1] - attention[1].sum() / raw[1].sum()
    assert torch.allclose(raw.grad[1], -slope.detach(), atol=1e-4)


def test_the_loss_is_least_where_the_scores_equal_the_attention():
    attention = torch.tensor([[0.1, 0.5, 0.2]])
    visible = torch.ones(1, 3, dtype=torch.bool)
    best = selection_loss(3 * attention, attention, visible)
    for other in (attention.flip(1), torch.ones(1, 3), torch.tensor([[0.0, 1.0, 0.0]])):
        assert float(selection_loss(other, attention, visible)) > float(best) + 1e-3


def test_the_option_is_off_unless_asked_for():
    assert FlexConfig().selection_loss == FlexConfig.reference().selection_loss == 0.0
    config = FlexConfig(selection_loss=0.3)
    assert FlexConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"selection_loss must be a number in .* got -1"):
        FlexConfig(selection_loss=-1)


def test_exploration_adds_regions_only_while_gradients_flow():
    grid = Grid.blocks((6, 6), (12, 12), region=2)
    scores = torch.rand(9, grid.n_coarse)
    selectable = torch.ones(grid.n_regions, dtype=torch.bool)
    selectable[4] = False
    keys = torch.zeros(9, 2, dtype=torch.long)
    inner = TopKSelector(k=3)
    share = [0.0]
    selector = ExploringSelector(inner, lambda: share[0])
    chosen = inner.select(scores, grid, selectable, keys)
    assert torch.equal(selector.select(scores, grid, selectable, keys), chosen)
    share[0] = 0.25
    more = selector.select(scores, grid, selectable, keys)
    assert bool((more >= chosen).all()) and 0.1 < float((more & ~chosen).float().mean()) < 0.35
    assert not bool(more[:, 4].any()) and len({tuple(row.tolist()) for row in more & ~chosen}) > 1
    with torch.no_grad():
        assert torch.equal(selector.select(scores, grid, selectable, keys), chosen)
    share[0] = 1.0
    assert bool((selector.select(scores, grid, selectable, keys) == selectable).all())
    assert selector.k == 3
