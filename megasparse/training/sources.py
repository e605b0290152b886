"""How many tokens a run has read from each data set of its blend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from megasparse.config import Config


class SourceTokens:
    """Counts from Megatron's index of a blend, which says for every sample where it is from: no communication.

    Args:
        cfg: the run.
        dataset: its training data. Without a blend there is nothing to tell apart, and nothing is reported.
    """

    def __init__(self, cfg: Config, dataset: Any) -> None:
        blend = cfg.data.blend or cfg.data.train or ()
        self._names = source_names([prefix for _, prefix in blend]) if len(blend) > 1 else []
        self._index = dataset.dataset_index if self._names else None
        self._sequence_length = cfg.data.sequence_length
        self._samples = np.zeros(len(self._names), dtype=np.int64)
        self._counted = 0

    def metrics(self, consumed_samples: int) -> dict[str, int]:
        """`progress/tokens/NAME` of every data set, for the first `consumed_samples` samples of the run."""
        if self._index is None:
            return {}
        new = np.asarray(self._index[self._counted : consumed_samples])
        self._samples += np.bincount(new, minlength=len(self._names))
        self._counted = consumed_samples
        tokens = self._samples * self._sequence_length
        return {f"progress/tokens/{name}": int(count) for name, count in zip(self._names, tokens, strict=True)}


def source_names(prefixes: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a data set that is named twice is numbered."""
    parts = [PurePath(prefix).parts for prefix in prefixes]
    length = 1
    while len({part[-length:] for part in parts}) < len(set(parts)):
        length += 1
    names: list[str] = []
    for part in parts:
        name = "/".join(piece for piece in part[-length:] if piece != "/")
        same = sum(other == name or other.startswith(f"{name}#") for other in names)
        names.append(f"{name}#{same + 1}" if same else name)
    return names
