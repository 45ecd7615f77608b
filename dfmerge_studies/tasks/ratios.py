"""What each input makes of a score that is no mean over inputs, to first order: a mean of ratios, and a correlation.

a[i][c]  b[i][c]   what input i adds above and below the line for class c: of F1 twice the hits, labels plus answers
R[c]               Σ_i a[i][c] / Σ_i b[i][c]; the score is the mean of R over the C classes with Σ_i b[i][c] > 0
s[i]               score + Σ_c (a[i][c] - R[c] b[i][c]) / (C mean_i b[i][c])

The mean of s is the score, and its spread is what the standard error of the score rests on (linearisation: Cochran
1977, chapter 6).  An input that has nothing to do with a rare class says nothing of its F1: its s is the score itself,
whereas those few that have are far from it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from math import sqrt

Part = tuple[int, float, float]  # class, above, below


def of_ratios(inputs: Iterable[Iterable[Part]]) -> list[float]:
    """Per input its s.

    Args:
        inputs: per input, what it adds; a class may be there several times, or not at all where it adds nothing.
    """
    rows = [list(parts) for parts in inputs]
    above, below = defaultdict[int, float](float), defaultdict[int, float](float)
    for parts in rows:
        for kind, a, b in parts:
            above[kind] += a
            below[kind] += b
    ratios = {kind: above[kind] / total for kind, total in below.items() if total > 0}
    score = sum(ratios.values()) / max(1, len(ratios))  # 0 where nothing is below any line, as scikit-learn has it
    scale = {kind: len(rows) / (len(ratios) * below[kind]) for kind in ratios}
    return [
        score + sum((a - ratios[kind] * b) * scale[kind] for kind, a, b in parts if kind in ratios) for parts in rows
    ]


def of_correlation(wanted: Sequence[int], taken: Sequence[int]) -> list[float]:
    """The same of Matthews's correlation, (Σ_k P(k, k) - p_k q_k) / sqrt((1 - Σ_k p_k²) (1 - Σ_k q_k²)).

    Args:
        wanted: class per input, of shares p.
        taken: class per input that the model takes, of shares q.
    """
    n = len(wanted)
    p, q = ({kind: count / n for kind, count in Counter(side).items()} for side in (wanted, taken))
    if len(p) == 1 or len(q) == 1:  # there is no correlation, and the score is 0 whatever an input is
        return [0.0] * n
    right = sum(one == other for one, other in zip(wanted, taken, strict=True)) / n
    product = sum(share * q.get(kind, 0.0) for kind, share in p.items())
    of_p, of_q = (sum(share**2 for share in shares.values()) for shares in (p, q))
    root = sqrt((1 - of_p) * (1 - of_q))
    score = (right - product) / root
    return [
        score
        + ((w == t) - right - (q.get(w, 0.0) + p.get(t, 0.0) - 2 * product)) / root
        + score * ((p[w] - of_p) / (1 - of_p) + (q[t] - of_q) / (1 - of_q))
        for w, t in zip(wanted, taken, strict=True)
    ]
