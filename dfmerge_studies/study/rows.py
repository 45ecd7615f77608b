"""The score of a merge on each validation row, as a study keeps it, so that trials can be compared row by row.

bits      a bit per row, where every score is 0 or 1 (accuracy, agreement)
floats    a float32 per row, otherwise
values    a float64 per row, of probes that an earlier version kept
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from dfmerge_studies.trials.marks import ROWS

LONGEST = 32_768  # characters of one trial's rows: a storage reads all trials before every proposal


def packed(scores: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Scores of rows as JSON.

    Args:
        scores: by task, per validation row.
    """
    return {task: _pack(row) for task, row in scores.items()}


def unpacked(kept: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """The scores that `packed` made JSON of, those that are no bits to the precision of a float32.

    Args:
        kept: by task.
    """
    return {task: _unpack(row) for task, row in kept.items()}


def rows_attribute(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What a trial keeps of its rows: nothing where that would be too long.

    Args:
        scores: by task, per validation row.
    """
    kept = packed(scores)
    length = sum(len(text) for row in kept.values() for text in row.values() if isinstance(text, str))
    return {ROWS: kept} if kept and length <= LONGEST else {}


def trial_rows(trial: FrozenTrial) -> dict[str, list[float]]:
    """The score of a completed trial on each validation row, by task; only of tasks that it keeps them of."""
    return unpacked(trial.user_attrs.get(ROWS, {}))


def _pack(row: Sequence[float]) -> dict[str, Any]:
    if set(row) <= {0.0, 1.0}:
        return {"rows": len(row), "bits": np.packbits(np.array(row, dtype=bool)).tobytes().hex()}
    return {"rows": len(row), "floats": np.array(row, dtype="<f4").tobytes().hex()}


def _unpack(kept: Mapping[str, Any]) -> list[float]:
    for name, kind in (("floats", "<f4"), ("values", "<f8")):
        if name in kept:
            return [float(value) for value in np.frombuffer(bytes.fromhex(kept[name]), dtype=kind)]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(kept["bits"]), dtype=np.uint8), count=kept["rows"])
    return [float(bit) for bit in bits]
