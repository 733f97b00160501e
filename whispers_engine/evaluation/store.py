"""What has been computed, kept as lines beside the report: a run that was interrupted, or one with another committee, computes the rest."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from whispers_engine.errors import WhispersError

FORMAT = 1  # changes with what a line holds
Logprobs = NDArray[np.float32]


class Store:
    """Numbers by what they depend on.

    A question's key is a hash of the base, its prompting, the dtype, the prompt and the options; an expert's is its placement and the hash
    of its values. So whatever has the same key has the same numbers, from whichever file or committee it came. Lines are appended whole; a
    torn last one, of a machine that went down, is cut off.

    Args:
        path: the file; it may not exist yet.
        base: the base's fingerprint.
        prompting: hash of what turns the prompt into token ids (`ChatEncoder.content_hash`).
        dtype: what is computed in.

    Raises:
        WhispersError: a line before the last that no evaluation wrote.
    """

    def __init__(self, path: Path, base: str, prompting: str, dtype: str):
        self._path = path
        self._salt = [FORMAT, base, prompting, dtype]
        self._logprobs: dict[tuple[str, str], Logprobs] = {}
        self._features: dict[tuple[str, str], NDArray[np.float32]] = {}
        self._seconds: dict[str, list[float]] = {}
        self._file: BinaryIO | None = None
        self._keep = self._read() if path.exists() else 0

    def key(self, *parts: Any) -> str:
        """Of a question and its options, or of whatever else numbers belong to."""
        return hashlib.sha256(json.dumps([*self._salt, *parts]).encode()).hexdigest()[:32]

    def _read(self) -> int:
        data = self._path.read_bytes()
        keep = data.rfind(b"\n") + 1
        number = 0
        try:
            for number, line in enumerate(data[:keep].splitlines(), 1):  # noqa: B007 - for the message
                self._add(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise WhispersError(
                f"{self._path}:{number}: is no line of an evaluation; accepted: a file that `whispers eval` wrote, or another --report"
            ) from error
        return keep

    def _add(self, value: Mapping[str, Any]) -> None:
        key = value["key"]
        for who, numbers in value.get("logprobs", {}).items():
            self._logprobs[key, who] = np.array(numbers, dtype=np.float32)
        if "feature" in value:
            values = np.frombuffer(base64.b64decode(value["feature"]), dtype="<f4").astype(np.float32)
            self._features[key, str(value["layer"])] = values
        if "seconds" in value:
            self._seconds[key] = [float(number) for number in value["seconds"]]

    def __enter__(self) -> Store:
        self._file = self._path.open("ab")
        self._file.truncate(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write((json.dumps(line, allow_nan=False) + "\n").encode())
        self._file.flush()

    # --- option log-probabilities ----------------------------------------------------------------------------------------------

    def missing(self, key: str, experts: Sequence[str]) -> list[str]:
        return [expert for expert in experts if (key, expert) not in self._logprobs]

    def logprobs(self, key: str, expert: str) -> Logprobs:
        """float32 `[options]`."""
        return self._logprobs[key, expert]

    def add_logprobs(self, key: str, found: Mapping[str, Logprobs]) -> None:
        for expert, values in found.items():
            self._logprobs[key, expert] = values
        # As short as reads back to the same float32.
        self._append({"key": key, "logprobs": {who: [float(str(v)) for v in values] for who, values in found.items()}})

    # --- router features -------------------------------------------------------------------------------------------------------

    def feature(self, key: str, reader: str) -> NDArray[np.float32] | None:
        """float32 `[width]`, of a reader's key."""
        return self._features.get((key, reader))

    def add_feature(self, key: str, reader: str, values: NDArray[np.float32]) -> None:
        self._features[key, reader] = values
        encoded = base64.b64encode(values.astype("<f4").tobytes()).decode()
        self._append({"key": key, "layer": reader, "feature": encoded})

    # --- latency ---------------------------------------------------------------------------------------------------------------

    def seconds(self, key: str) -> list[float] | None:
        return self._seconds.get(key)

    def add_seconds(self, key: str, values: list[float]) -> None:
        self._seconds[key] = values
        self._append({"key": key, "seconds": values})
