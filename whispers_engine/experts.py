"""Experts: a soft prompt with its placement and its base, and the folders they are kept in. PEFT reads those folders too."""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import ModelConfig, read_json
from .errors import WhispersError
from .files import new_folder, system_errors, write_json
from .router import FILE as ROUTER_FILE
from .router import Router, load_router

if TYPE_CHECKING:
    from .engine import Engine

PLACEMENTS = ("prefix", "suffix", "detached")
KINDS = ("embeddings", "kv")
COMMITTEE_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ADAPTER, _TENSORS, _EXPERT, _COMMITTEE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "expert.json",
    "committee.json",
)
_KEY = "prompt_embeddings"  # the one tensor of a PEFT prompt-learning adapter
_PEFT_KINDS = {"PROMPT_TUNING": "embeddings", "PREFIX_TUNING": "kv"}


@dataclass(frozen=True, eq=False)
class Expert:
    """A named soft prompt.

    Args:
        name: letters, digits, `_`, `.`, `-`; also its folder's name in a committee. "base" is taken.
        embeddings: `[m, hidden]` virtual token embeddings, or for kind "kv" `[layers, 2, kv_heads, m, head_dim]` learned keys and values,
            not rotated, for a context that starts at position m (as PEFT's prefix tuning has them). Kept as float32 on the CPU.
        placement: "prefix" (before the context, which sees it), "suffix" (between context and header) or "detached" (in front, unseen
            by the context).
        kind: "embeddings" or "kv"; a kv expert is "prefix" or "detached".
        culture: whom it speaks for, as the data names them.
        base: fingerprint of the base it was made for; None where that is not known.
        record: what it was made from or trained on.

    Raises:
        WhispersError: a bad name, shape, placement or kind, or values that are NaN or infinite.
    """

    name: str
    embeddings: Tensor
    placement: str = "suffix"
    kind: str = "embeddings"
    culture: str | None = None
    base: str | None = None
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        who = f"expert {self.name!r}"
        if self.kind not in KINDS:
            raise WhispersError(f"{who}: kind {self.kind!r}; accepted: {', '.join(KINDS)}")
        accepted = PLACEMENTS if self.kind == "embeddings" else ("prefix", "detached")
        if self.placement not in accepted:
            raise WhispersError(
                f"{who}: placement {self.placement!r} of kind {self.kind!r}; accepted: {', '.join(accepted)}"
            )
        value = self.embeddings
        if not isinstance(value, Tensor):
            raise WhispersError(f"{who}: embeddings are a {type(value).__name__}; accepted: a tensor")
        want = "[m, hidden]" if self.kind == "embeddings" else "[layers, 2, kv_heads, m, head_dim]"
        right = value.dim() == 2 if self.kind == "embeddings" else value.dim() == 5 and value.shape[1] == 2
        if not right or 0 in value.shape or not value.is_floating_point():
            raise WhispersError(
                f"{who}: embeddings {list(value.shape)} {value.dtype}; accepted: {want} of a float dtype"
            )
        # A copy: what the caller does to its tensor later must not change an expert that is loaded, or hashed, already.
        value = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        if not bool(torch.isfinite(value).all()):
            raise WhispersError(
                f"{who}: {int((~torch.isfinite(value)).sum())} values are NaN or infinite; accepted: finite values"
            )
        object.__setattr__(self, "embeddings", value)

    @property
    def num_tokens(self) -> int:
        """m, the positions that the soft prompt takes."""
        return self.embeddings.shape[0 if self.kind == "embeddings" else 3]

    @cached_property
    def content_hash(self) -> str:
        """Names the function, not the expert: of the kind, the shape and the values."""
        head = f"{self.kind} {list(self.embeddings.shape)}".encode()
        return hashlib.sha256(head + self.embeddings.numpy().tobytes()).hexdigest()

    def check_fits(self, config: ModelConfig, fingerprint: str) -> None:
        """Raises WhispersError where the expert was made for another base, or has another width, depth or number of heads."""
        who = f"expert {self.name!r}"
        if self.kind == "embeddings":
            found, want = list(self.embeddings.shape[1:]), [config.hidden_size]
            what = "width"
        else:
            layers, _, heads, _, dim = self.embeddings.shape
            found, want = [layers, heads, dim], [config.num_layers, config.kv_heads, config.head_dim]
            what = "[layers, kv_heads, head_dim]"
        if found != want:
            raise WhispersError(f"{who}: {what} {found}; this base has {want}")
        _check_length(self.name, self.num_tokens, config)
        if self.base is not None and self.base != fingerprint:
            raise WhispersError(f"{who}: made for the base {self.base}; this base's fingerprint is {fingerprint}")

    @classmethod
    def from_text(
        cls,
        name: str,
        text: str,
        engine: Engine,
        placement: str = "suffix",
        culture: str | None = None,
        virtual_tokens: int | None = None,
    ) -> Expert:
        """The embeddings of a text's tokens: the usual initialisation of a soft prompt (Lester et al., arXiv 2104.08691).

        Args:
            virtual_tokens: m; the text is cut or repeated to it, as PEFT does. By default as many as the text has.
        """
        ids = engine.chat.encode(text)
        if not ids:
            raise WhispersError(f"expert {name!r}: the text {text!r} has no tokens")
        if virtual_tokens is not None and virtual_tokens < 1:
            raise WhispersError(f"expert {name!r}: virtual_tokens {virtual_tokens}; accepted: at least 1")
        length = virtual_tokens or len(ids)
        _check_length(name, length, engine.model.config)
        ids = (ids * -(-length // len(ids)))[:length]
        embeddings = engine.model.embed(torch.tensor(ids, device=engine.model.device))
        return cls(name, embeddings, placement, culture=culture, base=engine.fingerprint, record={"text": text})

    # --- folders ---------------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, folder: str | Path) -> Expert:
        """Reads a folder that `save` wrote. Raises WhispersError for one that is incomplete or damaged, or holds a pickle."""
        folder = Path(folder)
        meta = read_json(folder / _EXPERT)
        missing = [key for key in ("name", "placement", "kind") if not isinstance(meta.get(key), str)]
        if missing:
            raise WhispersError(f"{folder / _EXPERT}: without {', '.join(missing)}; accepted: strings")
        for key, kind in (("culture", str), ("base", str), ("record", dict)):
            if not isinstance(meta.get(key), kind | None):
                raise WhispersError(f"{folder / _EXPERT}: {key} {meta[key]!r}; accepted: null or a {kind.__name__}")
        expert = cls.from_peft(folder, meta["name"], meta["placement"])
        if expert.kind != meta["kind"]:
            raise WhispersError(f"{folder}: expert.json says kind {meta['kind']!r}, the adapter is {expert.kind!r}")
        return cls(
            expert.name,
            expert.embeddings,
            expert.placement,
            expert.kind,
            meta.get("culture"),
            meta.get("base"),
            meta.get("record") or {},
        )

    def save(self, folder: str | Path) -> None:
        """Writes a PEFT adapter and `expert.json`, replacing an expert that was there. Raises WhispersError for anything else there."""
        with new_folder(_room_for(Path(folder), _EXPERT)) as new:
            self._write_adapter(new)
            meta = {"name": self.name, "culture": self.culture, "placement": self.placement, "kind": self.kind}
            write_json(new / _EXPERT, {**meta, "base": self.base, "record": self.record})

    @classmethod
    def from_peft(cls, folder: str | Path, name: str, placement: str = "prefix", culture: str | None = None) -> Expert:
        """Reads a PEFT adapter: prompt tuning becomes kind "embeddings", prefix tuning kind "kv".

        Only `placement="prefix"` is the function that PEFT computes. Raises WhispersError for other adapters, for pickles, and for tensors
        that do not fit the adapter's own config.
        """
        folder = Path(folder)
        config = read_json(folder / _ADAPTER)
        peft_type = config.get("peft_type")
        if not isinstance(peft_type, str) or peft_type not in _PEFT_KINDS:
            raise WhispersError(f"{folder}: peft_type {peft_type!r}; accepted: {', '.join(_PEFT_KINDS)}")
        if config.get("num_transformer_submodules") not in (None, 1):
            raise WhispersError(
                f"{folder}: num_transformer_submodules {config['num_transformer_submodules']}; accepted: 1"
            )
        path = folder / _TENSORS
        if not path.is_file():
            pickles = sorted(file.name for file in folder.glob("*.bin"))
            found = f"the pickle {pickles[0]}, which is never read" if pickles else f"no {_TENSORS}"
            raise WhispersError(f"{folder}: holds {found}; accepted: {_TENSORS}")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise WhispersError(f"{path}: not a safetensors file: {error}") from error
        if set(tensors) != {_KEY} or tensors[_KEY].dim() != 2:
            found = ", ".join(f"{key} {list(value.shape)}" for key, value in tensors.items())
            raise WhispersError(f"{path}: holds {found or 'nothing'}; accepted: {_KEY} of two dimensions alone")
        value = tensors[_KEY]
        if config.get("num_virtual_tokens") not in (None, value.shape[0]):
            raise WhispersError(
                f"{path}: {_KEY} {list(value.shape)} does not fit its config's num_virtual_tokens {config['num_virtual_tokens']}"
            )
        kind = _PEFT_KINDS[peft_type]
        if kind == "kv":
            try:
                layers, width, heads = (int(config[key]) for key in ("num_layers", "token_dim", "num_attention_heads"))
                # [m, layers * 2 * heads * D], keys and values alternating per layer -> [layers, 2, heads, m, D]
                value = value.view(-1, layers, 2, heads, width // heads).permute(1, 2, 3, 0, 4)
            except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, ZeroDivisionError) as error:
                raise WhispersError(
                    f"{folder}: {_KEY} {list(tensors[_KEY].shape)} does not fit its config's num_layers, token_dim and "
                    f"num_attention_heads: {error!r}"
                ) from error
        return cls(name, value, placement, kind, culture)

    def to_peft(self, folder: str | Path) -> None:
        """Writes a PEFT adapter alone, replacing one that was there. PEFT places it in front of a context that sees it: any placement
        but `prefix` gets a warning. Raises WhispersError where something else is there."""
        room = _room_for(Path(folder), _ADAPTER)
        if self.placement != "prefix":
            warnings.warn(
                f"expert {self.name!r} is {self.placement}; PEFT will compute it as prefix, another function",
                stacklevel=2,
            )
        with new_folder(room) as new:
            self._write_adapter(new)

    def _write_adapter(self, folder: Path) -> None:
        if self.kind == "embeddings":
            peft_type, value, width = "PROMPT_TUNING", self.embeddings, self.embeddings.shape[1]
            shape: dict[str, Any] = {"prompt_tuning_init": "RANDOM"}
        else:
            layers, _, heads, m, dim = self.embeddings.shape
            value, width = self.embeddings.permute(3, 0, 1, 2, 4).reshape(m, -1).contiguous(), heads * dim
            peft_type, shape = (
                "PREFIX_TUNING",
                {"prefix_projection": False, "num_layers": layers, "num_attention_heads": heads},
            )
        with system_errors(folder / _TENSORS):
            save_file({_KEY: value}, folder / _TENSORS, metadata={"format": "pt"})
        config = {
            "peft_type": peft_type,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": self.num_tokens,
        }
        write_json(folder / _ADAPTER, {**config, "token_dim": width, "num_transformer_submodules": 1, **shape})


def check_name(name: str) -> str:
    """Returns the name. Raises WhispersError for one that could not be a folder's, is the base's own, or a committee's file's."""
    right = isinstance(name, str) and _NAME.fullmatch(name) is not None
    if not right or name == "base" or name.casefold() in (_COMMITTEE, ROUTER_FILE):
        raise WhispersError(
            f"expert name {name!r}: accepted are 1 to 64 of the characters A-Z a-z 0-9 _ . -, the first a letter or digit, and not "
            f"'base', '{_COMMITTEE}' or '{ROUTER_FILE}'"
        )
    return name


def _check_length(name: str, tokens: int, config: ModelConfig) -> None:
    """Raises WhispersError for a soft prompt that no question fits beside: it would be kept, and refused whenever it is asked."""
    if tokens + 2 > config.max_position:  # a token of the question, one of the answer
        raise WhispersError(
            f"expert {name!r}: {tokens} virtual tokens; accepted: at most {config.max_position - 2}, which leaves room for a question "
            f"and its answer in this base's max_position_embeddings {config.max_position}"
        )


def _room_for(folder: Path, mark: str) -> Path:
    """The folder, where nothing is there that writing it would lose but an older one, which holds the file `mark`."""
    if (folder / mark).is_file() or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    raise WhispersError(f"{folder}: exists, and holds no {mark}; accepted: a new or empty folder, or one to replace")


@dataclass(frozen=True)
class Committee:
    """A folder of experts for one base."""

    base_name: str
    fingerprint: str
    experts: tuple[Expert, ...]
    router: Router | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Committee:
        """Reads `committee.json` and every expert it names.

        Raises:
            WhispersError: files that are missing or damaged, another version, a name that leads out of the folder or that its
                `expert.json` contradicts, a name twice.
        """
        folder = Path(folder)
        if not (folder / _COMMITTEE).is_file():
            raise WhispersError(f"{folder}: no {_COMMITTEE}; accepted: a committee's folder")
        meta = read_json(folder / _COMMITTEE)
        base, names = meta.get("base"), meta.get("experts")
        if meta.get("version") != COMMITTEE_VERSION:
            raise WhispersError(
                f"{folder / _COMMITTEE}: version {meta.get('version')!r}; accepted: {COMMITTEE_VERSION}"
            )
        if not isinstance(base, dict) or not all(isinstance(base.get(key), str) for key in ("name", "fingerprint")):
            raise WhispersError(f"{folder / _COMMITTEE}: base {base!r}; accepted: an object with name and fingerprint")
        if not isinstance(names, list) or len(set(map(str, names))) != len(names):
            raise WhispersError(f"{folder / _COMMITTEE}: experts {names!r}; accepted: a list of names, none twice")
        experts = []
        for name in names:
            inside = folder / check_name(name)
            if inside.resolve().parent != folder.resolve():
                raise WhispersError(f"{inside}: leads out of the committee's folder, to {inside.resolve()}")
            expert = Expert.load(inside)
            if expert.name != name:
                raise WhispersError(f"{inside}: its expert.json names {expert.name!r}")
            experts.append(expert)
        return cls(base["name"], base["fingerprint"], tuple(experts), load_router(folder))

    @staticmethod
    def add(folder: str | Path, expert: Expert, base_name: str, fingerprint: str) -> None:
        """Writes an expert into a committee's folder, which is made where it does not exist; an expert of that name is replaced.

        Raises:
            WhispersError: the committee or the expert is for another base, or something else has the expert's name in the folder.
        """
        folder = Path(folder)
        if expert.base not in (None, fingerprint):
            raise WhispersError(
                f"expert {expert.name!r}: made for the base {expert.base}; accepted here: {fingerprint}"
            )
        names: list[str] = []
        if (folder / _COMMITTEE).is_file():
            found = Committee.load(folder)
            if found.fingerprint != fingerprint:
                raise WhispersError(
                    f"{folder}: a committee for the base {found.base_name} ({found.fingerprint}); the expert is for {fingerprint}"
                )
            base_name, names = found.base_name, [member.name for member in found.experts]
        expert.save(folder / expert.name)
        base = {"name": base_name, "fingerprint": fingerprint}
        listed = names if expert.name in names else [*names, expert.name]
        write_json(folder / _COMMITTEE, {"version": COMMITTEE_VERSION, "base": base, "experts": listed})
