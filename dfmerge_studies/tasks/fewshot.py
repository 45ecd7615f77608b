"""Which rows stand as examples before a row: drawn as lm-evaluation-harness draws them, never the row itself."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from dfmerge_studies.errors import InputError

Question = tuple[str, tuple[str, ...]]  # a row's input, and its choices in one order for all rows


def draw_examples(
    questions: Sequence[Question],
    pool: Sequence[Question],
    count: int,
    seed: int,
    *,
    same: bool,
    spare: bool = False,
    where: str,
) -> list[list[int]]:
    """Rows of the few-shot split for each row that is scored, in the order in which they stand in its prompt.

    One generator serves all rows in turn, Python's own, since it is the harness's: with the same seed and the same
    splits the examples are the same as there.  A row of the few-shot split that asks what the scored row asks would
    give its answer away, and is left out, whichever splits the two are of.

    Args:
        questions: the rows that are scored, all of the split, in order.
        pool: the rows of the few-shot split.
        count: examples of each.
        seed: of the draw.
        same: whether the two splits are one, so that each row is in the pool itself.
        spare: whether the harness draws one more than it shows all the same.
        where: file and task, for messages.

    Raises:
        InputError: the pool has too few rows that may be shown.
    """
    generator = Random(seed)
    if count + same > len(pool):
        raise _too_few(count, len(pool) - same, "besides the scored row" if same else "", where)
    wanted = min(count + (same or spare), len(pool))
    found = []
    for question in questions:
        drawn = [row for row in generator.sample(range(len(pool)), wanted) if pool[row] != question][:count]
        if len(drawn) < count:
            others = [row for row in range(len(pool)) if pool[row] != question]
            if len(others) < count:
                raise _too_few(count, len(others), "that do not ask what a scored row asks", where)
            drawn = generator.sample(others, count)
        found.append(drawn)
    return found


def _too_few(count: int, there: int, which: str, where: str) -> InputError:
    return InputError(
        f"{count} example{'s' * (count > 1)} asked for, but the few-shot split has {there} row{'s' * (there != 1)} "
        f"{which}".rstrip(),
        where=f"{where}.num_fewshot",
        hint="Ask for fewer, or name a larger fewshot_split",
    )
