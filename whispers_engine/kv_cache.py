"""The page pool: the one place where keys and values live, who holds which page, and which full pages can be found again."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from whispers_kernels.panels import empty_panels, read_panels, write_panels

from .errors import WhispersError

Role = Literal["pinned", "context", "branch"]


def root_hash(base: str, expert: str = "") -> bytes:
    """Start of a chain of page hashes: the base's fingerprint, and the expert's content where the context sees a soft prompt."""
    return hashlib.sha256(f"{base}\0{expert}".encode()).digest()


def page_hashes(root: bytes, ids: Sequence[int], page_size: int) -> list[bytes]:
    """One hash for every full page of a context; each covers all the tokens before it."""
    hashes, parent = [], root
    for begin in range(0, len(ids) - page_size + 1, page_size):
        parent = hashlib.sha256(parent + np.asarray(ids[begin : begin + page_size], dtype=np.int64).tobytes()).digest()
        hashes.append(parent)
    return hashes


class PagePool:
    """`num_pages` pages of keys and values of all layers, with reference counts.

    A page is free, held by one or more leases, or kept: full, hashed, held by nobody, found again by its hash until the space is needed.

    Args:
        num_pages, page_size: size of the pool and positions a page.
        num_layers, kv_heads, head_dim: shape of one position's keys and values.
        dtype, device: of the store.
        panels: whether it lies as the C++ kernels multiply it (`whispers_kernels.panels`).

    Raises:
        WhispersError: a pool that the device has no memory for.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        panels: bool = False,
    ):
        shape = (num_layers, num_pages, page_size, kv_heads, head_dim)
        self._panels = panels
        try:
            if panels:
                self.k, self.v = empty_panels(*shape, dtype)
            else:
                self.k = torch.empty(shape, dtype=dtype, device=device)  # [L, N, page_size, Hkv, D]
                self.v = torch.empty(shape, dtype=dtype, device=device)
        except (OSError, RuntimeError) as error:  # of the system, and of PyTorch
            size = 2e-9 * math.prod(shape) * dtype.itemsize
            raise WhispersError(
                f"kv_cache_tokens: {num_pages * page_size}, {size:.0f} GB of keys and values; "
                f"accepted: what {device} has memory for ({error})"
            ) from error
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._kept: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._holders: Counter[int] = Counter()
        self._role: dict[int, Role] = {}  # of held pages
        self._by_hash: dict[bytes, int] = {}  # held or kept
        self._hash_of: dict[int, bytes] = {}
        self._notes: dict[
            int, dict[bytes, Tensor]
        ] = {}  # what readers keep beside a page, as long as it holds what they read
        self._reserved = 0  # pages promised to leases and not yet taken

    def read(self, pages: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of pages, `[L, len(pages), page_size, Hkv, D]`, copies."""
        at = torch.tensor(pages, dtype=torch.long, device=self.k.device)  # of no pages it would be float
        return read_panels(self.k, self.v, at) if self._panels else (self.k[:, at], self.v[:, at])

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores keys, rotated, and values `[T, Hkv, D]` in int64 slots `[T]` (page * page_size + offset), rounded to the store's dtype."""
        pages, offsets = slots // self.page_size, slots % self.page_size
        if self._panels:
            write_panels(self.k, self.v, layer, pages, offsets, keys, values)
        else:
            self.k[layer, pages, offsets] = keys.to(self.k.dtype)
            self.v[layer, pages, offsets] = values.to(self.v.dtype)

    def pages_for(self, positions: int) -> int:
        """Pages that so many consecutive positions take."""
        return -(-positions // self.page_size)

    @property
    def available(self) -> int:
        """Pages that a new lease can reserve."""
        return len(self._free) + len(self._kept) - self._reserved

    def stats(self) -> dict[str, int]:
        """Counts of pages. `pages_free` includes `pages_kept`: kept pages make way for new ones."""
        roles = Counter(self._role.values())
        return {
            "pages_total": self.num_pages,
            "pages_free": len(self._free) + len(self._kept),
            "pages_kept": len(self._kept),
            "pages_pinned": roles["pinned"],
            "pages_context": roles["context"],
            "pages_branch": roles["branch"],
        }

    def lookup(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning of a chain of hashes."""
        pages: list[int] = []
        for page_hash in hashes:
            if page_hash not in self._by_hash:
                break
            pages.append(self._by_hash[page_hash])
        return pages

    def publish(self, page: int, page_hash: bytes) -> None:
        """Makes a full, computed page known by its hash. Where two requests computed the same page, the first one stays
        known, and gets the other's notes: one from before there was a router is computed anew for those alone."""
        known = self._by_hash.get(page_hash)
        if known is None and page not in self._hash_of:
            self._by_hash[page_hash] = page
            self._hash_of[page] = page_hash
        elif known is not None and known != page and page in self._notes:
            self._notes[known] = {**self._notes[page], **self._notes.get(known, {})}

    def note(self, page: int, key: bytes, value: Tensor) -> None:
        """Keeps a value beside a full page, under a key, until the page is used for something else."""
        self._notes.setdefault(page, {})[key] = value

    def noted(self, page: int, key: bytes) -> Tensor | None:
        """What was noted beside a page under that key."""
        return self._notes.get(page, {}).get(key)

    def forget(self) -> None:
        """Drops all kept pages: what is not held is found no more."""
        while self._kept:
            self._free.append(self._evict())

    def lease(self, pages: int, shared: Iterable[int] = ()) -> Lease | None:
        """Reserves `pages` new pages and takes hold of `shared` known ones; None, and nothing held, where they do not fit now."""
        shared = list(shared)
        kept = sum(self._holders[page] == 0 for page in shared)  # holding those makes them unavailable to others
        if pages + kept > self.available:
            return None
        lease = Lease(self, pages)
        lease.share(shared)
        return lease

    def _take(self, role: Role) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = self._evict()
        self._role[page] = role
        self._holders[page] = 1
        return page

    def _evict(self) -> int:
        """Forgets the least recently used kept page and returns it."""
        page_hash, page = self._kept.popitem(last=False)
        del self._by_hash[page_hash], self._hash_of[page]
        self._notes.pop(page, None)
        return page

    def _hold(self, page: int) -> None:
        if self._holders[page] == 0:
            del self._kept[self._hash_of[page]]
            self._role[page] = "context"  # only context pages are hashed
        self._holders[page] += 1

    def _drop(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] == 0:
            del self._role[page]
            if page in self._hash_of:
                self._kept[self._hash_of[page]] = page
            else:
                self._notes.pop(page, None)
                self._free.append(page)


class Lease:
    """The pages of one owner: a request, or an expert's pinned soft prompt. Closing it gives back everything, whatever happened."""

    def __init__(self, pool: PagePool, budget: int):
        self._pool = pool
        self._budget = budget  # reserved, not yet taken
        self._held: dict[int, None] = {}  # in the order of taking
        pool._reserved += budget

    def take(self, role: Role) -> int:
        """A new page out of the reserved ones."""
        if self._budget == 0:
            raise RuntimeError("a lease took more pages than it reserved")
        self._budget -= 1
        self._pool._reserved -= 1
        page = self._pool._take(role)
        self._held[page] = None
        return page

    def share(self, pages: Iterable[int]) -> None:
        """Holds pages that exist already, so that they outlive their other holders."""
        for page in pages:
            if page not in self._held:
                self._pool._hold(page)
                self._held[page] = None

    def drop(self, pages: Iterable[int]) -> None:
        """Gives pages back early."""
        for page in pages:
            del self._held[page]
            self._pool._drop(page)

    def shrink(self, budget: int) -> None:
        """Gives back what is reserved beyond `budget` pages still to take."""
        self._pool._reserved -= self._budget - min(budget, self._budget)
        self._budget = min(budget, self._budget)

    def close(self) -> None:
        """Gives everything back; a second call does nothing."""
        self.shrink(0)
        # Last pages first: of a kept chain, the end is the first to make way, so that its beginning stays findable.
        self.drop(list(reversed(self._held)))
