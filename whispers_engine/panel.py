"""The committee's experts as they live on the device: embeddings ready to be gathered, soft prompts in front computed and pinned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whispers_kernels.reference import rotate

from .batch import Span, Work
from .errors import WhispersError
from .experts import Expert
from .kv_cache import Lease
from .scheduler import Scheduler


@dataclass(eq=False)
class Member:
    """An expert, and what of it lives on the device."""

    expert: Expert
    soft: Tensor | None = None  # [m, hidden], for rows that embed it
    front: Span | None = None  # its pinned pages, for a soft prompt in front
    lease: Lease | None = None

    @property
    def num_tokens(self) -> int:
        return self.expert.num_tokens


class Panel:
    """The experts of one engine, by name.

    Args:
        scheduler: computes soft prompts in front.
        fingerprint: of the base.
    """

    def __init__(self, scheduler: Scheduler, fingerprint: str):
        self._scheduler = scheduler
        self._pool = scheduler.pool
        self._model = scheduler.model
        self._fingerprint = fingerprint
        self._members: dict[str, Member] = {}

    @property
    def names(self) -> list[str]:
        """In the order they were added."""
        return list(self._members)

    def __getitem__(self, name: str) -> Member:
        if name not in self._members:
            raise WhispersError(
                f"expert {name!r} is not in this committee; accepted: {', '.join(self._members) or 'none'}"
            )
        return self._members[name]

    def remove(self, name: str) -> None:
        """Forgets an expert; requests that hold its pages keep them until they are done."""
        lease = self[name].lease
        del self._members[name]
        if lease is not None:
            lease.close()

    def add(self, experts: Sequence[Expert]) -> None:
        """Adds all or none; soft prompts in front are computed together."""
        names = set(self._members)
        for expert in experts:
            expert.check_fits(self._model.config, self._fingerprint)
            if not bool(torch.isfinite(expert.embeddings.to(self._model.dtype)).all()):
                raise WhispersError(
                    f"expert {expert.name!r}: values up to {float(expert.embeddings.abs().max()):.3g} are infinite in "
                    f"{self._model.dtype}; accepted: smaller values, or an engine of another dtype"
                )
            if expert.name in names:
                raise WhispersError(
                    f"expert {expert.name!r}: the name is taken; accepted: one not in {', '.join(names)}"
                )
            names.add(expert.name)
        fronts = [expert for expert in experts if expert.placement != "suffix"]
        needed = sum(self._pool.pages_for(expert.num_tokens) for expert in fronts)
        if needed > self._pool.available:
            raise WhispersError(
                f"kv_cache_tokens: the page pool is too small to pin {len(fronts)} soft prompts: {needed} pages of "
                f"{self._pool.page_size} needed, {self._pool.available} of {self._pool.num_pages} free"
            )
        members = {expert.name: self._place(expert) for expert in experts}
        spans = [member.front for member in members.values() if member.front is not None]
        try:
            with torch.inference_mode():
                while work := self._some_rows([span for span in spans if span.pending]):
                    self._scheduler.compute(work)
        except BaseException:
            for member in members.values():
                if member.lease is not None:
                    member.lease.close()
            raise
        self._members.update(members)

    def _some_rows(self, spans: list[Span]) -> list[Work]:
        work, budget = [], self._scheduler.max_num_batched_tokens
        for span in spans:
            if budget:
                work.append(Work(span, min(span.pending, budget)))
                budget -= work[-1].rows
        return work

    def _place(self, expert: Expert) -> Member:
        """Moves an expert to the device; kv experts are written into their pages here, embeddings are computed by the caller."""
        member, m = Member(expert), expert.num_tokens
        if expert.kind == "embeddings":
            member.soft = expert.embeddings.to(self._model.device, self._model.dtype)
        if expert.placement != "suffix":
            member.lease = self._pool.lease(self._pool.pages_for(m))
            assert member.lease is not None  # the caller has counted
            member.front = Span("pinned", -m, [-1 - j for j in range(m)], soft=member.soft, lease=member.lease)
            if expert.kind == "kv":
                self._write_kv(expert, member.front, member.lease)
        return member

    def _write_kv(self, expert: Expert, span: Span, lease: Lease) -> None:
        """Stores learned keys and values. Their context would start at m and ours starts at 0: the keys are rotated by -m, once."""
        m = expert.num_tokens
        span.pages = [lease.take("pinned") for _ in range(self._pool.pages_for(m))]
        span.computed = m
        cos, sin = self._model.rotation(torch.full((m,), -m, device=self._model.device))
        values = expert.embeddings.to(self._model.device).transpose(2, 3)  # [L, 2, m, Hkv, D], float32
        offset = torch.arange(m, device=self._model.device)
        size = self._pool.page_size
        slots = torch.tensor(span.pages, device=self._model.device)[offset // size] * size + offset % size
        for layer in range(values.shape[0]):
            self._pool.write(layer, slots, rotate(values[layer, 0], cos, sin), values[layer, 1])
