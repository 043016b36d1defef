"""FineCache: one request's projected fine keys and values, by (layer, region), filled on first touch.

A page holds one region of one layer. Fine keys and values depend on the medium, the layer and the positions only,
never on the hidden state, so a page that was projected once serves every later step, beam and turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Project = Callable[[Tensor], tuple[Tensor, Tensor]]


class _Pool:
    """Pages of one shape: keys `[pages, P, Hkv, D]` and values `[pages, P, Hkv, Dv]` in blocks, and the free slots.

    Slots are numbered through all blocks. A block never grows, so that more pages need no copy of those held.
    """

    def __init__(self, key: Tensor, value: Tensor):
        self.blocks: list[tuple[Tensor, Tensor]] = []
        self.starts: list[int] = []
        self.empty = key.new_empty(0, *key.shape[1:]), value.new_empty(0, *value.shape[1:])
        self.page_bytes = sum(t.element_size() * t.shape[1:].numel() for t in (key, value))
        self.capacity = 0
        self.free: list[int] = []
        self.shared = False

    def reserve(self, pages: int, most: int | None) -> int:
        """Have up to `pages` free slots within `most` pages in all; returns how many there are.

        Doubles, so that filling page by page makes few blocks, and unshares the storage before it is written to.
        """
        old = new = self.capacity
        if pages > len(self.free):
            new = max(old + pages - len(self.free), 2 * old)
            new = new if most is None else max(old, min(new, most))
        if new != old or self.shared:
            # pages made under inference_mode couldn't be written to after it
            with torch.inference_mode(False), torch.no_grad():
                if self.shared:
                    self.blocks = [(key.clone(), value.clone()) for key, value in self.blocks]
                    self.shared = False
                if new != old:
                    key, value = (t.new_empty(new - old, *t.shape[1:]) for t in self.empty)
                    self.free += self._add(key, value)
        return min(pages, len(self.free))

    def _add(self, key: Tensor, value: Tensor) -> range:
        start = self.capacity
        self.blocks.append((key, value))
        self.starts.append(start)
        self.capacity += len(key)
        return range(start, self.capacity)

    def adopt(self, fresh: tuple[Tensor, Tensor], most: int | None) -> Tensor | None:
        """Make fresh pages a block as they are, without a copy; returns their slots, or None where that can't be."""
        key, value = fresh
        if not len(key) or self.free or (most is not None and self.capacity + len(key) > most):
            return None
        if key.data_ptr() == value.data_ptr() or not all(_owns_its_memory(t) for t in fresh):
            return None
        return torch.tensor(self._add(key, value))

    def _by_block(self, slots: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Tensor]]:
        """Every block that has some of the slots: the block, which of `slots` they are, and where in the block."""
        owner = torch.bucketize(slots, torch.tensor(self.starts), right=True) - 1
        for i in owner.unique().tolist():
            here = (owner == i).nonzero()[:, 0]
            yield self.blocks[i], here, slots[here] - self.starts[i]

    def write(self, fresh: tuple[Tensor, Tensor]) -> Tensor:
        """Put pages into free slots and return the slots, on the CPU."""
        slots = torch.tensor([self.free.pop() for _ in range(len(fresh[0]))], dtype=torch.long)
        for block, here, at in self._by_block(slots):
            for tensor, new in zip(block, fresh, strict=True):
                tensor.index_copy_(0, at.to(tensor.device), new[here.to(new.device)])
        return slots

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the pages at the given slots, in that order."""
        parts = list(self._by_block(slots))
        if len(parts) == 1:
            (key, value), _, at = parts[0]
            at = at.to(key.device)
            return key.index_select(0, at), value.index_select(0, at)
        key, value = (t.new_empty(len(slots), *t.shape[1:]) for t in self.empty)
        for block, here, at in parts:
            here, at = here.to(key.device), at.to(key.device)
            for out, tensor in zip((key, value), block, strict=True):
                out.index_copy_(0, here, tensor.index_select(0, at))
        return key, value


def _owns_its_memory(tensor: Tensor) -> bool:
    """Whether a tensor may be kept and written to: no view of something larger, nor under autograd or inference."""
    plain = tensor.is_contiguous() and not tensor.requires_grad and not tensor.is_inference()
    return plain and tensor.untyped_storage().nbytes() == tensor.nbytes


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


@dataclass
class _Joined:
    """Pages laid out for attention, and when they were last asked for: in their table only once that is needed."""

    regions: Tensor
    n: int
    key: Tensor
    value: Tensor
    used: int


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
        self._joined: dict[tuple[int, int], _Joined] = {}
        self._clock = 0

    @property
    def bytes(self) -> int:
        """Bytes allocated for pages, and for joined ones that are held."""
        pages = sum(pool.capacity * pool.page_bytes for pool in self._pools.values())
        return pages + sum(held.key.nbytes + held.value.nbytes for held in self._joined.values())

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
        key, value = self._pages(layer, sample, regions, n_regions, project)
        table = self._tables[layer, sample]
        if any(key is held or value is held_value for held, held_value in table.pool.blocks):
            return key.clone(), value.clone()
        return key, value

    def _pages(
        self, layer: int, sample: int, regions: Tensor, n_regions: int, project: Project
    ) -> tuple[Tensor, Tensor]:
        """As `get`, but pages that were projected in one go come as they are held: not to be written to."""
        self._clock += 1
        table = self._tables.get((layer, sample))
        if table is None:
            fresh = self._project(layer, sample, regions, project)
            table = self._tables[layer, sample] = _Table(self._pool(fresh))
            table.widen(n_regions)
            self._keep(table, regions, fresh, as_they_are=True)
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

    def get_unkept(
        self, layer: int, sample: int, regions: Tensor, n_regions: int, project: Project
    ) -> tuple[Tensor, Tensor]:
        """As `get`, but what isn't held yet is handed over without being kept: it will be kept elsewhere."""
        if len(self.missing(layer, sample, regions)) == len(regions):
            return self._project(layer, sample, regions, project)
        return self.get(layer, sample, regions, n_regions, project)

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
        """As `get`, laid out for attention: `[1, Hkv, n * P, D]` and `[1, Hkv, n * P, Dv]`, not to be written to.

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
        if last is not None and (last.regions is regions or torch.equal(last.regions, regions)):
            self._clock += 1
            last.used = self._clock
            self.hits += last.n
            return last.key, last.value
        self._release(at)
        key, value = (
            t.flatten(0, 1).transpose(0, 1)[None] for t in self._pages(*at, regions, n_regions, project)
        )
        if hold:  # read again and again: in rows that follow one another
            key, value = key.contiguous(), value.contiguous()
            if self.max_bytes is None or self.bytes + key.nbytes + value.nbytes <= self.max_bytes:
                self._joined[at] = _Joined(regions, len(regions), key, value, self._clock)
        return key, value

    def _release(self, at: tuple[int, int]) -> None:
        """Let go of what is held joined, having noted in its table when it was last used."""
        last = self._joined.pop(at, None)
        if last is not None:
            self._note(at, last)

    def _note(self, at: tuple[int, int], joined: _Joined) -> None:
        table = self._tables.get(at)
        if table is not None:
            table.used[joined.regions] = joined.used

    def _project(self, layer: int, sample: int, regions: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        self.projected.update((layer, sample, r) for r in regions.tolist())
        return project(regions)

    def _pool(self, fresh: tuple[Tensor, Tensor]) -> _Pool:
        key, value = fresh
        kind = (key.shape[1:], value.shape[1:], key.dtype, value.dtype, key.device)
        if kind not in self._pools:
            self._pools[kind] = _Pool(key, value)
        return self._pools[kind]

    def _keep(
        self, table: _Table, regions: Tensor, fresh: tuple[Tensor, Tensor], as_they_are: bool = False
    ) -> None:
        pool = table.pool
        most = None
        if self.max_bytes is not None:
            others = self.bytes - pool.capacity * pool.page_bytes
            most = max(0, self.max_bytes - others) // pool.page_bytes
        adopted = pool.adopt(fresh, most) if as_they_are else None
        if adopted is not None:
            table.slot[regions] = adopted
            table.used[regions] = self._clock
            return
        room = pool.reserve(len(regions), most)
        if room < len(regions):
            room += self._evict(pool, len(regions) - room)
        if room:
            table.slot[regions[:room]] = pool.write((fresh[0][:room], fresh[1][:room]))
            table.used[regions[:room]] = self._clock

    def _evict(self, pool: _Pool, pages: int) -> int:
        """Free up to `pages` slots that weren't used in this call, oldest first; returns how many."""
        for at, joined in self._joined.items():
            self._note(at, joined)
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
            twin = _Pool(*pool.empty)
            twin.blocks, twin.starts = list(pool.blocks), list(pool.starts)
            twin.capacity, twin.free = pool.capacity, list(pool.free)
            pool.shared = twin.shared = True
            other._pools[kind] = twins[id(pool)] = twin
        for at, table in self._tables.items():
            copied = _Table(twins[id(table.pool)])
            with torch.inference_mode(False):
                copied.slot, copied.used = table.slot.clone(), table.used.clone()
            other._tables[at] = copied
        other._joined = {at: replace(joined) for at, joined in self._joined.items()}
        memo[id(self)] = other
        return other
