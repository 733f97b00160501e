"""The model-free table: what a culture is known to say, whatever the question. A prompt that learns popular words alone is no more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .data import Dataset
from .metrics import Floats


class Table:
    """Mean shares of option texts.

    For every option text and culture: the mean, over the records of the training file that offer this text and that the culture answered,
    of its share (1 or 0 where a record has one answer). Asked about a record, each option gets its text's mean, or 1 / options where the
    culture was never offered the text, and all are divided by their sum (1 / options each where that is 0). Questions are not read.

    Args:
        train: every culture's answers.
    """

    def __init__(self, train: Dataset):
        sums: dict[tuple[str | None, str], list[float]] = {}
        for item in train.items:
            for culture, shares in item.targets.items():
                for text, share in zip(item.record.options, shares.tolist(), strict=True):
                    sums.setdefault((culture, text), []).append(share)
                    sums.setdefault((None, text), []).append(share)
        self._means = {key: float(np.mean(shares)) for key, shares in sums.items()}

    def shares(self, texts: Sequence[str], culture: str | None) -> Floats:
        """float64 `[options]`, summing to one. `culture=None`: the mean over every answer of every culture."""
        even = 1 / len(texts)
        found = np.array([self._means.get((culture, text), even) for text in texts])
        return found / found.sum() if found.sum() > 0 else np.full(len(texts), even)
