"""Which way to the Fisher information of a model: batched, or row by row where that is not exact.

Two short inputs are computed both ways when a model is first seen, and the batched way is only taken where it gives
the same.  So a module that the hooks misread costs time, and never a wrong number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import DFMergeError, RunError, first_line, out_of_memory
from dfmerge_studies.importance.passes import Job
from dfmerge_studies.importance.rows import sum_by_rows
from dfmerge_studies.methods import Estimator
from dfmerge_studies.params import stacked

logger = logging.getLogger(__name__)

PROBED_CHOICES = 2
# In L2, relative to a parameter's and, for those that are all rounding, to that of all.  What is misread is off by 1.
TOLERANCE = {torch.float64: (1e-4, 1e-8), torch.float32: (2e-2, 1e-5)}
TOLERANCE_16_BIT = (0.5, 2e-2)

_batched: WeakKeyDictionary[nn.Module, dict[tuple[str, frozenset[str]], bool]] = WeakKeyDictionary()


def can_batch(job: Job, names: Collection[str], sums: Callable[[Job], dict[str, Tensor]]) -> bool:
    """Whether batched sums of this model's squared gradients are those of its rows.

    Raises:
        InputError: the model cannot be differentiated row by row either.
        RunError: a loss is not finite, or memory ran out.
    """
    known, key = _batched.setdefault(job.model, {}), (job.kind.value, frozenset(names))
    if key not in known:
        why = _difference(_probing(job), names, sums)
        known[key] = why is None
        if why is not None:
            logger.warning(
                "%s: importance is computed one row at a time, which is slower (%s)", type(job.model).__name__, why
            )
    return known[key]


def _probing(job: Job) -> Job:
    """The exact sum over the shortest input and the next of another length, so that one of the two is padded.

    Where there is no other, the one input is there twice.
    """
    lengths = [len(example.input_ids) for example in job.examples]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    other = next((i for i in order if lengths[i] > lengths[order[0]]), order[-1])
    pair = [order[0], other]
    probes = [replace(job.examples[i], choices=job.examples[i].choices[:PROBED_CHOICES]) for i in pair]
    return replace(job, examples=probes, draws=job.draws[pair], estimator=Estimator.EXACT)


def _difference(job: Job, names: Collection[str], sums: Callable[[Job], dict[str, Tensor]]) -> str | None:
    """Why the batched way is not to be taken, None where both agree."""
    try:
        found = sums(job)
    except RunError:
        raise
    except Exception as error:
        # Whatever a model does to the hooks: the other way has none, and says what is wrong with the model itself.
        if out_of_memory(error) is not None:
            raise
        return error.what if isinstance(error, DFMergeError) else first_line(error)
    expected = sum_by_rows(job, names)
    relative, absolute = TOLERANCE.get(next(job.model.parameters()).dtype, TOLERANCE_16_BIT)
    whole = stacked([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        if not (found[name] - value).norm() <= relative * value.norm() + absolute * whole.to(value.device):
            return f"batched, that of {name} comes out otherwise"
    return None
