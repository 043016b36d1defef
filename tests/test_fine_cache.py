"""The page cache against a dictionary: what it projects, returns, evicts and shares, over random calls."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from flexcore.fine_cache import FineCache
from tests.helpers import poisoned_memory

PAGE = (3, 2, 5), (3, 2, 4)  # [P, Hkv, D] and [P, Hkv, Dv]
PAGE_BYTES = 4 * 3 * 2 * (5 + 4)
Page = tuple[Tensor, Tensor]


class Project:
    """Makes pages that differ at every projection, and notes which regions it was asked for."""

    made = 0

    def __init__(self, dtype: torch.dtype = torch.float32, wide: int = 1):
        self.calls: list[list[int]] = []
        self.pages: dict[int, Page] = {}
        self.dtype, self.wide = dtype, wide

    def __call__(self, regions: Tensor) -> Page:
        self.calls.append(regions.tolist())
        for r in regions.tolist():
            Project.made += 1
            self.pages[r] = tuple(  # type: ignore[assignment]
                torch.rand(p, h, d * self.wide).add(Project.made).to(self.dtype) for p, h, d in PAGE
            )
        return tuple(
            torch.stack([self.pages[r][i] for r in regions.tolist()])
            if len(regions)
            else torch.zeros(0, p, h, d * self.wide, dtype=self.dtype)
            for i, (p, h, d) in enumerate(PAGE)
        )  # type: ignore[return-value]


def ask(
    cache: FineCache, regions: list[int], layer: int = 9, sample: int = 0, n: int = 20, **kwargs: Any
) -> tuple[Page, Project]:
    project = Project(**kwargs)
    found = cache.get(layer, sample, torch.tensor(regions, dtype=torch.long), n, project)
    return found, project


def same(found: Page, pages: list[Page]) -> bool:
    return all(torch.equal(t, torch.stack([page[i] for page in pages])) for i, t in enumerate(found))


# ---------------------------------------------------------------------- by hand


def test_each_region_is_projected_once() -> None:
    cache = FineCache()
    found, first = ask(cache, [4, 1, 7])
    assert first.calls == [[4, 1, 7]] and same(found, [first.pages[r] for r in (4, 1, 7)])
    found, second = ask(cache, [7, 2, 4, 11])
    assert second.calls == [[2, 11]]
    pages = {**first.pages, **second.pages}
    assert same(found, [pages[r] for r in (7, 2, 4, 11)])
    found, third = ask(cache, [11, 1, 2, 4, 7])
    assert third.calls == [] and same(found, [pages[r] for r in (11, 1, 2, 4, 7)])
    assert cache.hits == 2 + 5
    assert cache.projected == {(9, 0, r): 1 for r in (1, 2, 4, 7, 11)}


def test_layers_and_samples_are_apart() -> None:
    cache = FineCache()
    pages = {}
    for layer, sample in ((9, 0), (9, 1), (10, 0), (0, 0)):
        found, project = ask(cache, [0, 19], layer, sample)
        assert project.calls == [[0, 19]]
        pages[layer, sample] = project.pages
    for (layer, sample), kept in pages.items():
        found, project = ask(cache, [19, 0], layer, sample)
        assert project.calls == [] and same(found, [kept[19], kept[0]])


def test_what_comes_back_is_a_copy() -> None:
    cache = FineCache()
    (key, value), project = ask(cache, [3, 5])
    kept = key.clone(), value.clone()
    key.zero_()
    value.zero_()
    found, _ = ask(cache, [3, 5])
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
    found[0].zero_()
    assert same(ask(cache, [5])[0], [project.pages[5]])


def test_least_recently_used_goes_first() -> None:
    cache = FineCache(max_bytes=4 * PAGE_BYTES)
    ask(cache, [0, 1, 2, 3])
    ask(cache, [1], layer=9)
    ask(cache, [0, 2])
    _, project = ask(cache, [7])  # 3 is the oldest
    assert project.calls == [[7]]
    assert ask(cache, [0, 1, 2, 7])[1].calls == []
    ask(cache, [4, 5], layer=10)  # evicts of another layer: all equally old, the lower regions go
    assert ask(cache, [2, 7])[1].calls == []
    assert ask(cache, [4, 5], layer=10)[1].calls == []
    assert ask(cache, [0, 1])[1].calls == [[0, 1]]


def test_pages_in_use_are_never_evicted_for_those_beside_them() -> None:
    """A call for more than the budget keeps what it found, and computes the rest anyway."""
    cache = FineCache(max_bytes=3 * PAGE_BYTES)
    _, first = ask(cache, [0, 1])
    found, second = ask(cache, [5, 0, 6, 1, 7])
    pages = {**first.pages, **second.pages}
    assert second.calls == [[5, 6, 7]] and same(found, [pages[r] for r in (5, 0, 6, 1, 7)])
    assert ask(cache, [0, 1, 5])[1].calls == []
    assert ask(cache, [6, 7])[1].calls == [[6, 7]]
    assert cache.bytes == 3 * PAGE_BYTES


@pytest.mark.parametrize("budget", [0, PAGE_BYTES - 1])
def test_no_room_at_all(budget: int) -> None:
    cache = FineCache(max_bytes=budget)
    for _ in range(3):
        found, project = ask(cache, [2, 0])
        assert project.calls == [[2, 0]] and same(found, [project.pages[2], project.pages[0]])
    assert cache.bytes == 0 and cache.hits == 0
    assert cache.projected == {(9, 0, 0): 3, (9, 0, 2): 3}


def test_growth_is_not_page_by_page() -> None:
    """1,000 calls of a page each copy the storage about ten times, not a thousand."""
    cache = FineCache()
    sizes = set()
    for r in range(1000):
        ask(cache, [r], n=1000)
        sizes.add(cache.bytes)
    assert 8 <= len(sizes) <= 12
    assert 1000 * PAGE_BYTES <= cache.bytes <= 2000 * PAGE_BYTES


def test_more_regions_in_a_later_turn() -> None:
    cache = FineCache()
    _, first = ask(cache, [0, 3], n=4)
    found, second = ask(cache, [9, 3, 4], n=10)
    assert second.calls == [[9, 4]]
    assert same(found, [second.pages[9], first.pages[3], second.pages[4]])
    assert ask(cache, [0, 9], n=10)[1].calls == []


def test_nothing_asked() -> None:
    cache = FineCache(max_bytes=10 * PAGE_BYTES)
    for _ in range(2):
        (key, value), _ = ask(cache, [])
        assert (key.shape, value.shape) == ((0, *PAGE[0]), (0, *PAGE[1]))
        ask(cache, [1])


def test_clear() -> None:
    cache = FineCache()
    ask(cache, [0, 1], sample=0)
    _, kept = ask(cache, [0, 1], sample=1)
    ask(cache, [1], sample=0, layer=12)
    before = cache.bytes
    cache.clear(sample=0)
    found, project = ask(cache, [1, 0], sample=1)
    assert project.calls == [] and same(found, [kept.pages[1], kept.pages[0]])
    assert ask(cache, [0, 1], sample=0)[1].calls == [[0, 1]]
    assert ask(cache, [1], sample=0, layer=12)[1].calls == [[1]]
    assert cache.bytes == before, "free pages are used again"
    cache.clear()
    assert cache.bytes == 0
    assert ask(cache, [0, 1], sample=1)[1].calls == [[0, 1]]


def test_pages_of_another_shape_get_the_budget_of_those_cleared() -> None:
    """A later turn with larger pages: the old storage must not go on counting."""
    cache = FineCache(max_bytes=8 * PAGE_BYTES)
    ask(cache, list(range(8)))
    assert cache.bytes == 8 * PAGE_BYTES
    cache.clear(0)
    ask(cache, [0, 1, 2, 3], wide=2)
    assert ask(cache, [3, 2, 1, 0], wide=2)[1].calls == []
    assert cache.bytes == 8 * PAGE_BYTES


# ---------------------------------------------------------------------- copies


def storages(cache: FineCache) -> list[int]:
    return [t.data_ptr() for pool in cache._pools.values() for block in pool.blocks for t in block]


def test_a_deep_copy_shares_pages_until_written() -> None:
    cache = FineCache()
    _, first = ask(cache, [0, 1, 2])
    cache.clear(0)
    _, first = ask(cache, [0, 1, 2, 3])
    cache.clear(1)
    twin = copy.deepcopy(cache)
    assert storages(twin) == storages(cache)
    assert ask(twin, [2, 0])[1].calls == [] and ask(cache, [1])[1].calls == []
    assert storages(twin) == storages(cache)
    assert (twin.hits, cache.hits) == (2, 1)
    _, ours = ask(cache, [7])
    assert not set(storages(twin)) & set(storages(cache))
    _, theirs = ask(twin, [7, 8])
    for side, own in ((cache, ours), (twin, theirs)):
        found, project = ask(side, [7, 3, 0])
        assert project.calls == [] and same(found, [own.pages[7], first.pages[3], first.pages[0]])
    assert (twin.projected[9, 0, 8], cache.projected[9, 0, 8]) == (1, 0)


def test_eviction_on_one_side_leaves_the_other() -> None:
    cache = FineCache(max_bytes=3 * PAGE_BYTES)
    _, first = ask(cache, [0, 1, 2])
    twin = copy.deepcopy(cache)
    again = copy.deepcopy(twin)
    ask(twin, [5, 6, 7])
    for side in (cache, again):
        found, project = ask(side, [2, 1, 0])
        assert project.calls == [] and same(found, [first.pages[r] for r in (2, 1, 0)])
    assert ask(twin, [5, 6, 7])[1].calls == []
    assert ask(twin, [0])[1].calls == [[0]]


def test_deep_copy_of_what_holds_it_twice() -> None:
    cache = FineCache()
    ask(cache, [0])
    pair = copy.deepcopy([cache, cache])
    assert pair[0] is pair[1] is not cache


# ---------------------------------------------------------------------- against a dictionary


class Dictionary:
    """The cache as one would write it without thinking of speed: page -> (last use, contents)."""

    def __init__(self, pages: int | None):
        self.pages, self.clock, self.hits = pages, 0, 0
        self.held: dict[tuple[int, int, int], tuple[int, Page]] = {}
        self.tables: list[tuple[int, int]] = []  # in order of first use: who goes first among equals
        self.projected: dict[tuple[int, int, int], int] = {}

    def missing(self, layer: int, sample: int, regions: list[int]) -> list[int]:
        return [r for r in regions if (layer, sample, r) not in self.held]

    def get(self, layer: int, sample: int, regions: list[int], fresh: dict[int, Page]) -> list[Page]:
        self.clock += 1
        if (layer, sample) not in self.tables:
            self.tables.append((layer, sample))
        missing = self.missing(layer, sample, regions)
        for r in regions:
            if r not in missing:
                self.hits += 1
                self.held[layer, sample, r] = (self.clock, self.held[layer, sample, r][1])
        out = [fresh[r] if r in missing else self.held[layer, sample, r][1] for r in regions]
        for r in missing:
            self.projected[layer, sample, r] = self.projected.get((layer, sample, r), 0) + 1
        room = len(missing) if self.pages is None else self.pages - len(self.held)
        old = [k for k, (used, _) in self.held.items() if used < self.clock]
        old.sort(key=lambda k: (self.held[k][0], self.tables.index(k[:2]), k[2]))
        while room < len(missing) and old:
            del self.held[old.pop(0)]
            room += 1
        for r in missing[:room]:
            self.held[layer, sample, r] = (self.clock, fresh[r])
        return out

    def clear(self, sample: int | None) -> None:
        self.held = {k: v for k, v in self.held.items() if sample not in (None, k[1])}
        self.tables = [t for t in self.tables if sample not in (None, t[1])]


def play(seed: int, pages: int | None, steps: int = 120) -> int:
    """A random game on up to four copies of one cache; returns how many pages were found."""
    rng = random.Random(seed)
    budget = None if pages is None else pages * PAGE_BYTES + rng.randrange(PAGE_BYTES)
    pairs = [(FineCache(budget), Dictionary(pages))]
    n = 8
    for _ in range(steps):
        cache, twin = rng.choice(pairs)
        move = rng.random()
        if move < 0.04:
            sample = rng.choice([None, 0, 1])
            cache.clear(sample)
            twin.clear(sample)
        elif move < 0.10 and len(pairs) < 4:
            pairs.append((copy.deepcopy(cache), copy.deepcopy(twin)))
        elif move < 0.14:
            n += rng.randrange(3)
        else:
            layer, sample = rng.choice([9, 10, 11]), rng.choice([0, 1])
            regions = rng.sample(range(n), rng.randint(0 if (layer, sample) in twin.tables else 1, min(n, 6)))
            missing = twin.missing(layer, sample, regions)
            found, project = ask(cache, regions, layer, sample, n)
            assert project.calls in ([missing], []) and [r for call in project.calls for r in call] == missing
            expected = twin.get(layer, sample, regions, project.pages)
            assert not regions or same(found, expected)
        for cache, twin in pairs:
            assert cache.hits == twin.hits and dict(cache.projected) == twin.projected
            assert cache.bytes >= len(twin.held) * PAGE_BYTES
            assert budget is None or cache.bytes <= budget
    return sum(cache.hits for cache, _ in pairs)


@pytest.mark.parametrize("pages", [None, 0, 1, 3, 10, 40])
def test_random_games(pages: int | None) -> None:
    hits = 0
    for seed in range(6):
        hits += play(seed, pages)
    assert (hits > 0) == (pages != 0)


def test_nothing_is_read_before_it_is_written() -> None:
    with poisoned_memory():
        assert play(77, 6) > 0
        assert play(78, None) > 0


@pytest.mark.parametrize("pages", [1, 5, 12])
def test_mixed_shapes_stay_within_one_budget(pages: int) -> None:
    """Layers with heads of other widths: storage of several shapes shares the budget."""
    rng = random.Random(4)
    cache = FineCache(pages * PAGE_BYTES)
    contents: dict[tuple[int, int], Page] = {}
    for _ in range(150):
        layer = rng.choice([8, 9, 10])
        regions = rng.sample(range(12), rng.randint(1, 5))
        found, project = ask(cache, regions, layer, n=12, wide=1 + layer % 3)
        contents.update({(layer, r): page for r, page in project.pages.items()})
        assert same(found, [contents[layer, r] for r in regions])
        assert cache.bytes <= pages * PAGE_BYTES
    assert cache.hits > 0


# ---------------------------------------------------------------------- surroundings


@pytest.mark.parametrize("pages", [None, 3])
def test_filled_in_inference_mode_used_after_it(pages: int | None) -> None:
    """One turn in inference mode, the next one not: pages can be read, written and differentiated past."""
    cache = FineCache(None if pages is None else pages * PAGE_BYTES)
    with torch.inference_mode():
        _, first = ask(cache, [0, 1])
        _, more = ask(cache, [2])
    pages_by_region = {**first.pages, **more.pages}
    with torch.no_grad():
        found, project = ask(cache, [1, 5])
        assert project.calls == [[5]]
        assert same(found, [pages_by_region[1], project.pages[5]])
    with torch.inference_mode():
        ask(cache, [1, 6])
        twin = copy.deepcopy(cache)
    with torch.no_grad():
        key, value = ask(cache, [1])[0]
        ask(twin, [8, 9])
    weight = torch.randn(5, requires_grad=True)
    (key * weight).sum().backward()
    assert torch.equal(weight.grad, pages_by_region[1][0].sum(dim=(0, 1)))  # type: ignore[arg-type]
    assert not key.is_inference() and not value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_pages_keep_their_dtype(dtype: torch.dtype) -> None:
    cache = FineCache()
    _, first = ask(cache, [0, 2], dtype=dtype)
    found, second = ask(cache, [2, 3, 0], dtype=dtype)
    assert {t.dtype for t in found} == {dtype}
    assert same(found, [first.pages[2], second.pages[3], first.pages[0]])
    assert cache.bytes % (PAGE_BYTES * dtype.itemsize // 4) == 0


def test_a_failed_projection_leaves_the_cache_as_it_was() -> None:
    cache = FineCache()
    _, first = ask(cache, [0, 1])

    def fail(regions: Tensor) -> Page:
        raise RuntimeError("out of memory")

    for layer, regions in ((9, [1, 2]), (10, [0])):
        with pytest.raises(RuntimeError, match="out of memory"):
            cache.get(layer, 0, torch.tensor(regions), 20, fail)
    found, second = ask(cache, [2, 1])
    assert second.calls == [[2]] and same(found, [second.pages[2], first.pages[1]])
    assert ask(cache, [0], layer=10)[1].calls == [[0]]


def test_joined_pages_are_the_pages_in_attention_order():
    cache, calls = FineCache(), []

    def project(regions):
        calls.append(regions.tolist())
        key = torch.arange(3.0)[None, :, None, None] + 10 * regions[:, None, None, None].float()
        key = key + torch.tensor([0.25, 0.5])[None, None, :, None]
        return key.expand(-1, -1, -1, 4).clone(), -key.expand(-1, -1, -1, 5).clone()

    regions = torch.tensor([4, 1])
    pages = cache.get(0, 0, regions, 6, project)
    for hold in (True, False):
        key, value = cache.joined(0, 0, regions, 6, project, hold=hold)
        assert key.shape == (1, 2, 6, 4) and value.shape == (1, 2, 6, 5)
        assert torch.equal(key[0, 1, 3:], pages[0][1, :, 1])
        assert torch.equal(value[0, 0, :3], pages[1][0, :, 0])
    again = cache.joined(0, 0, regions, 6, project)
    assert again[0] is key  # held by the first of them
    other = cache.joined(0, 0, torch.tensor([1]), 6, project)
    assert torch.equal(other[0], key[:, :, 3:]) and calls == [[4, 1]]
    cache.clear()
    cache.joined(0, 0, regions, 6, project)
    assert calls == [[4, 1], [4, 1]]


def test_joined_pages_count_against_the_budget():
    page = 2 * 3 * 2 * 4 * 4

    def project(regions):
        return torch.zeros(len(regions), 3, 2, 4), torch.zeros(len(regions), 3, 2, 4)

    for budget, held in ((2 * page, False), (4 * page, True)):
        cache = FineCache(budget)
        first = cache.joined(0, 0, torch.tensor([0, 1]), 5, project, hold=True)
        second = cache.joined(0, 0, torch.tensor([0, 1]), 5, project, hold=True)
        assert (first[0] is second[0]) == held and cache.bytes <= budget


def test_pages_of_a_first_call_are_kept_without_a_copy_if_they_are_nobody_elses() -> None:
    key, value = torch.rand(2, 3, 2, 4), torch.rand(2, 3, 2, 4)
    for fresh, kept in (
        ((key, value), True),
        ((torch.rand(3, 3, 2, 4)[:2], value), False),  # a part of something larger
        ((key.transpose(1, 2).contiguous().transpose(1, 2), value), False),
        ((key, key), False),  # one memory for both
    ):
        cache = FineCache()
        found = cache.joined(0, 0, torch.tensor([4, 1]), 6, lambda regions, fresh=fresh: fresh)
        (block,) = cache._pools[next(iter(cache._pools))].blocks
        assert (block[0].data_ptr() == fresh[0].data_ptr()) == kept
        assert torch.equal(found[0][0, :, :3], fresh[0][0].transpose(0, 1))
        assert torch.equal(cache.joined(0, 0, torch.tensor([1]), 6, None)[0][0], fresh[0][1].transpose(0, 1))
    with torch.inference_mode():
        cache, inferred = FineCache(), (key.clone(), value.clone())
        cache.get(0, 0, torch.tensor([4, 1]), 6, lambda regions: inferred)
    assert not any(t.is_inference() for pool in cache._pools.values() for block in pool.blocks for t in block)


def test_more_pages_leave_those_held_where_they_are() -> None:
    cache = FineCache()
    _, first = ask(cache, [0, 1, 2])
    before = storages(cache)
    _, second = ask(cache, [3, 4], layer=10)
    _, third = ask(cache, [5, 1, 6])
    assert storages(cache)[: len(before)] == before and len(storages(cache)) > len(before)
    pages = {**first.pages, **third.pages}
    assert same(ask(cache, [6, 0, 5, 2])[0], [pages[r] for r in (6, 0, 5, 2)])
    assert same(ask(cache, [4, 3], layer=10)[0], [second.pages[r] for r in (4, 3)])


def test_joined_pages_count_as_used_when_others_go() -> None:
    cache = FineCache(max_bytes=7 * PAGE_BYTES)
    made = Project()
    for regions in ([0, 1], [2, 3], [0, 1]):
        cache.joined(9, 0, torch.tensor(regions), 20, made, hold=True)
    for _ in range(2):
        cache.joined(9, 0, torch.tensor([0, 1]), 20, made, hold=True)
    ask(cache, [2, 3])
    cache.joined(9, 0, torch.tensor([0, 1]), 20, made, hold=True)
    ask(cache, [7, 8, 11])  # 2 and 3 are the older ones, though 0 and 1 were only read joined
    assert ask(cache, [0, 1])[1].calls == [] and ask(cache, [2, 3])[1].calls != []


def test_unkept_pages_are_counted_and_not_held() -> None:
    cache, project = FineCache(), Project()
    cache.get_unkept(9, 0, torch.tensor([2, 0]), 20, project)
    assert cache.bytes == 0 and cache.projected == {(9, 0, 0): 1, (9, 0, 2): 1}
    _, kept = ask(cache, [2])
    found = cache.get_unkept(9, 0, torch.tensor([2, 0]), 20, project)
    assert torch.equal(found[0][0], kept.pages[2][0]) and project.calls == [[2, 0], [0]]
