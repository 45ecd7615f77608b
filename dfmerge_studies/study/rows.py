"""The score of a merge on each validation row, as a study keeps it, so that trials can be compared row by row.

bits      a bit per row, where every score is 0 or 1 (accuracy, agreement)
levels    a float32 for each number that is there, and for each row which one, as half a byte or a whole one (f1, mcc)
floats    a float32 per row, otherwise
values    a float64 per row, of probes that an earlier version kept
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
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
    """What a trial keeps of its rows: where that would be too long, those of the tasks that take least.

    Args:
        scores: by task, per validation row.
    """
    every = packed(scores)
    lengths = {task: sum(len(text) for text in row.values() if isinstance(text, str)) for task, row in every.items()}
    ends = accumulate(sorted(lengths.values()))
    fitting = sorted(lengths, key=lengths.__getitem__)[: sum(end <= LONGEST for end in ends)]
    kept = {task: row for task, row in every.items() if task in fitting}
    return {ROWS: kept} if kept else {}


def trial_rows(trial: FrozenTrial) -> dict[str, list[float]]:
    """What a completed trial scores on each validation row, by task, as far as it keeps that (`TaskScore.rows`)."""
    return unpacked(trial.user_attrs.get(ROWS, {}))


def _pack(row: Sequence[float]) -> dict[str, Any]:
    if set(row) <= {0.0, 1.0}:
        return {"rows": len(row), "bits": np.packbits(np.array(row, dtype=bool)).tobytes().hex()}
    floats = np.array(row, dtype="<f4")
    levels, which = np.unique(floats, return_inverse=True)
    digits = 1 if len(levels) <= 16 else 2
    if len(levels) <= 256 and 8 * len(levels) + digits * len(row) < 8 * len(row):
        codes = "".join(f"{code:0{digits}x}" for code in which.tolist())
        return {"rows": len(row), "levels": levels.tobytes().hex(), "codes": codes}
    return {"rows": len(row), "floats": floats.tobytes().hex()}


def _unpack(kept: Mapping[str, Any]) -> list[float]:
    for name, kind in (("floats", "<f4"), ("values", "<f8")):
        if name in kept:
            return [float(value) for value in np.frombuffer(bytes.fromhex(kept[name]), dtype=kind)]
    if "levels" in kept:
        levels = np.frombuffer(bytes.fromhex(kept["levels"]), dtype="<f4")
        digits = len(kept["codes"]) // kept["rows"]
        codes = [int(kept["codes"][at : at + digits], 16) for at in range(0, len(kept["codes"]), digits)]
        return [float(value) for value in levels[codes]]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(kept["bits"]), dtype=np.uint8), count=kept["rows"])
    return [float(bit) for bit in bits]
