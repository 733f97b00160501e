"""What soft prompts start from, and how the trained ones become experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import WhispersError
from ..experts import Committee, Expert
from .base import Base
from .branch import run_alone
from .examples import Culture
from .settings import INITS, VIRTUAL_TOKENS, Settings

TEXT = "Answer as people in {culture} would answer."  # what `init="text"` says of a culture


def virtual_tokens(base: Base, cultures: Sequence[Culture], settings: Settings) -> int:
    """m. Raises WhispersError where the experts to start from have another number than the settings ask for."""
    if str(settings.init) in INITS:
        return settings.virtual_tokens or VIRTUAL_TOKENS
    found = _experts(base, cultures, settings)
    sizes = {expert.num_tokens for expert in found}
    if len(sizes) > 1 or settings.virtual_tokens not in (None, *sizes):
        raise WhispersError(
            f"init: {settings.init} holds soft prompts of {', '.join(map(str, sorted(sizes)))} virtual tokens; accepted: one size, "
            f"and no other in virtual_tokens (it is {settings.virtual_tokens})"
        )
    return sizes.pop()


def first_values(base: Base, cultures: Sequence[Culture], settings: Settings, m: int) -> Tensor:
    """What the cultures' soft prompts start from: float32 `[E, m, hidden]`, or `[E, layers, 2, Hkv, m, D]` for kind "kv".

    Keys and values start as those that the embeddings would leave in the base.

    Raises:
        WhispersError: a folder without an expert for a culture, or whose experts do not fit the base or the settings.
    """
    if str(settings.init) not in INITS:
        return torch.stack([expert.embeddings for expert in _experts(base, cultures, settings)]).to(base.device)
    values = []
    for number, culture in enumerate(cultures):
        if settings.init == "text":
            ids = base.chat.encode(TEXT.format(culture=culture.name.replace("_", " ")))
            ids = (ids * -(-m // len(ids)))[:m]
        else:
            # PyTorch takes seeds of 64 bits.
            generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + number) % 2**64)
            ids = torch.randint(base.config.vocab_size, (m,), generator=generator).tolist()
        values.append(F.embedding(torch.tensor(ids, device=base.device), base.weights.embeddings))
    if settings.kind == "kv":
        values = [run_alone(base, value, 0) for value in values]
    return torch.stack(values).float()


def _experts(base: Base, cultures: Sequence[Culture], settings: Settings) -> list[Expert]:
    """The expert of a folder for every culture: the only one, or the one of that culture or name."""
    folder = Path(settings.init)
    if (folder / "expert.json").is_file():
        there: Sequence[Expert] = [Expert.load(folder)]
    elif folder.is_dir():
        there = Committee.load(folder).experts
    else:
        raise WhispersError(
            f"init: {str(settings.init)!r}; accepted: {', '.join(INITS)}, the folder of an expert or committee"
        )
    by_name = {expert.name: expert for expert in there} | {expert.culture: expert for expert in there if expert.culture}
    found = []
    for culture in cultures:
        expert = there[0] if len(there) == 1 else by_name.get(culture.name) or by_name.get(culture.expert)
        if expert is None:
            raise WhispersError(
                f"init: {folder} has no expert for {culture.name!r}; accepted: one expert, or one for every culture"
            )
        if expert.kind != settings.kind:
            raise WhispersError(
                f"init: {folder}: {expert.name!r} is of kind {expert.kind!r}; accepted here: {settings.kind!r}"
            )
        expert.check_fits(base.config, base.fingerprint)
        found.append(expert)
    return found
