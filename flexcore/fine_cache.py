"""FineCache: one request's projected fine keys and values, by (layer, region), filled on first touch.

A page holds one region of one layer. Fine keys and values depend on the medium, the layer and the positions only,
never on the hidden state, so a page that was projected once serves every later step, beam and turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Project = Callable[[Tensor], tuple[Tensor, Tensor]]


class _Pool:
    """Storage for pages of one shape: keys `[pages, P, Hkv, D]`, values `[pages, P, Hkv, Dv]`, and the free slots."""

    def __init__(self, key: Tensor, value: Tensor):
        self.tensors = [key.new_empty(0, *key.shape[1:]), value.new_empty(0, *value.shape[1:])]
        self.page_bytes = sum(t.element_size() * t.shape[1:].numel() for t in self.tensors)
        self.free: list[int] = []
        self.shared = False

    @property
    def capacity(self) -> int:
        return self.tensors[0].shape[0]

    def reserve(self, pages: int, most: int | None) -> int:
        """Have up to `pages` free slots within `most` pages in all; returns how many there are.

        Doubles, so that filling page by page stays linear, and unshares the storage before it is written to.
        """
        old = new = self.capacity
        if pages > len(self.free):
            new = max(old + pages - len(self.free), 2 * old)
            new = new if most is None else max(old, min(new, most))
        if new != old or self.shared:
            # pages made under inference_mode couldn't be written to after it
            with torch.inference_mode(False), torch.no_grad():
                for i, tensor in enumerate(self.tensors):
                    grown = torch.empty(new, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
                    grown[:old] = tensor
                    self.tensors[i] = grown
            self.free += range(old, new)
            self.shared = False
        return min(pages, len(self.free))

    def write(self, fresh: tuple[Tensor, ...]) -> Tensor:
        """Put pages into free slots and return the slots, on the CPU."""
        slots = torch.tensor([self.free.pop() for _ in range(len(fresh[0]))], dtype=torch.long)
        for tensor, new in zip(self.tensors, fresh, strict=True):
            tensor.index_copy_(0, slots.to(tensor.device), new)
        return slots

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Pages at the given slots, in that order."""
        key, value = self.tensors
        index = slots.to(key.device)
        return key.index_select(0, index), value.index_select(0, index)


class _Table:
    """Where the regions of one (layer, sample) are: slot in the pool (-1 if not held) and time of last use."""

    def __init__(self, pool: _Pool):
        self.pool = pool
        self.slot = torch.empty(0, dtype=torch.long)
        self.used = torch.empty(0, dtype=torch.long)

    def widen(self, n_regions: int) -> None:
        with torch.inference_mode(False):  # as for the pages: written to in any mode later
            more = torch.full((n_regions - len(self.slot),), -1, dtype=torch.long)
            self.slot = torch.cat([self.slot, more])
            self.used = torch.cat([self.used, more])


class FineCache:
    """Fine keys and values of one request.

    Args:
        max_bytes: Budget over all layers and samples; least recently used pages go first. None is unlimited. What
            one layer needs at once is always computed, kept or not.

    `projected` counts, per (layer, sample, region), how often it was projected; `hits` counts pages served.
    """

    def __init__(self, max_bytes: int | None = None):
        self.max_bytes = max_bytes
        self.projected: Counter[tuple[int, int, int]] = Counter()
        self.hits = 0
        self._pools: dict[tuple[Any, ...], _Pool] = {}
        self._tables: dict[tuple[int, int], _Table] = {}
        self._joined: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._clock = 0

    @property
    def bytes(self) -> int:
        """Bytes allocated for pages, and for joined ones that are held."""
        pages = sum(pool.capacity * pool.page_bytes for pool in self._pools.values())
        return pages + sum(key.nbytes + value.nbytes for _, key, value in self._joined.values())

    def clear(self, sample: int | None = None) -> None:
        """Forget every page, or those of one sample."""
        for key in [k for k in self._tables if sample is None or k[1] == sample]:
            table = self._tables.pop(key)
            self._joined.pop(key, None)
            table.pool.free += table.slot[table.slot >= 0].tolist()
        # storage that nobody uses would hold on to the budget when pages of another shape come
        in_use = {id(table.pool) for table in self._tables.values()}
        self._pools = {kind: pool for kind, pool in self._pools.items() if id(pool) in in_use}

    def get(
        self, layer: int, sample: int, regions: Tensor, n_regions: int, project: Project
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the given regions, projecting those that aren't held.

        Args:
            layer: Decoder layer.
            sample: Sample in the request.
            regions: `[n]` indices among all regions of the sample's media, on the CPU, without repeats.
            n_regions: Regions of all the sample's media together.
            project: Called with the missing regions; returns `[m, P, Hkv, D]` and `[m, P, Hkv, Dv]`.

        Returns:
            `[n, P, Hkv, D]` and `[n, P, Hkv, Dv]` in the order asked for.
        """
        self._clock += 1
        table = self._tables.get((layer, sample))
        if table is None:
            fresh = self._project(layer, sample, regions, project)
            table = self._tables[layer, sample] = _Table(self._pool(fresh))
            table.widen(n_regions)
            self._keep(table, regions, fresh)
            return fresh
        if len(table.slot) < n_regions:  # a later turn brought another medium
            table.widen(n_regions)
        slots = table.slot[regions]
        held = slots >= 0
        table.used[regions[held]] = self._clock
        self.hits += int(held.sum())
        if bool(held.all()):
            return table.pool.read(slots)
        missing = regions[~held]
        old = table.pool.read(slots[held])
        fresh = self._project(layer, sample, missing, project)
        order = torch.cat([held.nonzero()[:, 0], (~held).nonzero()[:, 0]]).argsort()
        self._keep(table, missing, fresh)
        key, value = (
            torch.cat([a, b]).index_select(0, order.to(b.device)) for a, b in zip(old, fresh, strict=True)
        )
        return key, value

    def missing(self, layer: int, sample: int, regions: Tensor) -> Tensor:
        """Those of the given regions (`[n]`, on the CPU) that `get` would have to project."""
        table = self._tables.get((layer, sample))
        if table is None:
            return regions
        known = regions < len(table.slot)
        held = torch.zeros_like(known)
        held[known] = table.slot[regions[known]] >= 0
        return regions[~held]

    def joined(
        self, layer: int, sample: int, regions: Tensor, n_regions: int, project: Project, hold: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `get`, laid out for attention: `[Hkv, n * P, D]` and `[Hkv, n * P, Dv]`.

        Args:
            layer: Decoder layer.
            sample: Sample in the request.
            regions: `[n]` as in `get`.
            n_regions: As in `get`.
            project: As in `get`.
            hold: Keep the result for the next call, if the budget allows: in decoding, a layer that asks for the
                regions of the step before gets them without a copy.
        """
        at = (layer, sample)
        last = self._joined.get(at)
        if last is not None and torch.equal(last[0], regions):
            self._clock += 1
            table = self._tables.get(at)
            if table is not None:
                table.used[regions] = self._clock
            self.hits += len(regions)
            return last[1], last[2]
        self._joined.pop(at, None)
        key, value = (
            t.flatten(0, 1).transpose(0, 1).contiguous() for t in self.get(*at, regions, n_regions, project)
        )
        if hold and (self.max_bytes is None or self.bytes + key.nbytes + value.nbytes <= self.max_bytes):
            self._joined[at] = (regions, key, value)
        return key, value

    def _project(self, layer: int, sample: int, regions: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        self.projected.update((layer, sample, r) for r in regions.tolist())
        return project(regions)

    def _pool(self, fresh: tuple[Tensor, Tensor]) -> _Pool:
        key, value = fresh
        kind = (key.shape[1:], value.shape[1:], key.dtype, value.dtype, key.device)
        if kind not in self._pools:
            self._pools[kind] = _Pool(key, value)
        return self._pools[kind]

    def _keep(self, table: _Table, regions: Tensor, fresh: tuple[Tensor, Tensor]) -> None:
        pool = table.pool
        most = None
        if self.max_bytes is not None:
            others = self.bytes - pool.capacity * pool.page_bytes
            most = max(0, self.max_bytes - others) // pool.page_bytes
        room = pool.reserve(len(regions), most)
        if room < len(regions):
            room += self._evict(pool, len(regions) - room)
        if room:
            table.slot[regions[:room]] = pool.write(tuple(t[:room] for t in fresh))
            table.used[regions[:room]] = self._clock

    def _evict(self, pool: _Pool, pages: int) -> int:
        """Free up to `pages` slots that weren't used in this call, oldest first; returns how many."""
        tables = [t for t in self._tables.values() if t.pool is pool]
        found = [
            (t, r, t.used[r])
            for t in tables
            for r in [((t.slot >= 0) & (t.used < self._clock)).nonzero()[:, 0]]
        ]
        owner = torch.cat([torch.full_like(r, i) for i, (_, r, _) in enumerate(found)])
        region = torch.cat([r for _, r, _ in found])
        oldest = torch.cat([used for _, _, used in found]).argsort(stable=True)[:pages]
        for i, r in zip(owner[oldest].tolist(), region[oldest].tolist(), strict=True):
            table = found[i][0]
            pool.free.append(int(table.slot[r]))
            table.slot[r] = -1
        return len(oldest)

    def __deepcopy__(self, memo: dict[int, Any]) -> FineCache:
        """A cache that shares the pages until either side writes (a KV cache is deep-copied to share a prefix)."""
        other = FineCache(self.max_bytes)
        other.projected, other.hits, other._clock = Counter(self.projected), self.hits, self._clock
        twins: dict[int, _Pool] = {}
        for kind, pool in self._pools.items():
            twin = _Pool.__new__(_Pool)
            twin.tensors, twin.page_bytes = list(pool.tensors), pool.page_bytes
            twin.free = list(pool.free)
            pool.shared = twin.shared = True
            other._pools[kind] = twins[id(pool)] = twin
        for at, table in self._tables.items():
            copied = _Table(twins[id(table.pool)])
            with torch.inference_mode(False):
                copied.slot, copied.used = table.slot.clone(), table.used.clone()
            other._tables[at] = copied
        other._joined = dict(self._joined)
        memo[id(self)] = other
        return other
