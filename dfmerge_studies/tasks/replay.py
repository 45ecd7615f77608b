"""Forward passes over batches that are scored again and again, recorded once and replayed on a CUDA card.

A small model's pass has a thousand kernels that each compute for less time than the host takes to launch them.  A study
scores the same batches in every trial, and a trial's weights are written where the last one's were, so the kernels and
all their addresses are the same: a pass over a batch is recorded as a CUDA graph when the batch is first seen, and
replayed whenever it is scored.  The first score is a replay too, since a model may build other masks while it is
recorded, and a study that goes on in another process must round as one that does not.

A recording is of addresses.  It is only used while all weights have those that they had, and it holds the tensors of
its batch.  Recordings of a model share the memory of their activations, since one is played at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dfmerge_studies.checkpoints.spread import is_spread
from dfmerge_studies.errors import first_line
from dfmerge_studies.tasks.encoding import Encoded
from dfmerge_studies.tasks.placing import KEPT, held

logger = logging.getLogger(__name__)

# Architectures whose replays were compared with computed passes on a card (`tests/test_cuda.py`).  Others, such as
# mixtures of experts, may ask the host for sizes in between, and are computed.
COMPARED = frozenset({"t5", "mt5", "bert", "distilbert", "roberta", "gpt2", "llama"})


@dataclass(frozen=True, slots=True)
class _Recording:
    """A pass over a batch: its kernels, where its result is, and what has to stay where it is."""

    graph: torch.cuda.CUDAGraph
    output: Tensor
    inputs: tuple[Any, ...]


@dataclass(slots=True)
class _Replays:
    """A model's recordings by batch, and whether there may be more."""

    pool: Any = None
    recordings: dict[Hashable, _Recording] = field(default_factory=dict)
    refused: bool = False


_allowed: WeakKeyDictionary[nn.Module, _Replays] = WeakKeyDictionary()


def allow_replays_(model: nn.Module) -> None:
    """Let passes of a model be recorded: it stays where it is, and there is memory for the activations of a batch.

    Args:
        model: on its device; nothing changes for one on several, or for an architecture that is not among those
            compared.
    """
    ours = type(model).__module__.startswith("transformers.")  # and no code that came with a checkpoint
    if ours and getattr(model.config, "model_type", None) in COMPARED and not is_spread(model):
        _allowed.setdefault(model, _Replays())


def forget_replays_(model: nn.Module) -> None:
    """Give the memory of a model's recordings back, and record none any more.

    Args:
        model: any model.
    """
    if model in _allowed:
        _allowed[model] = _Replays(refused=True)


def state_of(model: nn.Module) -> Hashable:
    """Where a model's weights and buffers are, and the precision of its products; None where nothing is recorded.

    Args:
        model: on one device.
    """
    if model not in _allowed or _allowed[model].refused:
        return None
    device = next(model.parameters()).device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    tensors = chain(model.parameters(), model.buffers())
    return precision, torch.get_float32_matmul_precision(), *((t.data_ptr(), t.shape, t.dtype) for t in tensors)


def replayed(
    model: nn.Module, state: Hashable, batch: Sequence[Encoded], compute: Callable[[Sequence[Encoded]], Tensor]
) -> Tensor:
    """What a function computes of a batch, by a replay where that is possible.

    Args:
        model: the model of the pass.
        state: its `state_of`, and what else the function depends on; None computes.
        batch: inputs; the same batch has the same objects in the same order.
        compute: a forward pass without a step on the host in between, apart from what `once` has made.
    """
    replays = _allowed.get(model)
    if state is None or replays is None or replays.refused:
        return compute(batch)
    key = (state, *map(id, batch))
    if key not in replays.recordings:
        computed = compute(batch)  # also makes what is made once
        recording = None if len(replays.recordings) >= KEPT else _recorded(replays, batch, compute)
        if recording is None:
            return computed
        replays.recordings[key] = recording
    recording = replays.recordings[key]
    recording.graph.replay()
    return recording.output.clone()  # the next replay writes over it


def _recorded(
    replays: _Replays, batch: Sequence[Encoded], compute: Callable[[Sequence[Encoded]], Tensor]
) -> _Recording | None:
    """A recording; None where there is no memory for it, or a model asks the host for something in between."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    replays.pool = replays.pool or torch.cuda.graph_pool_handle()
    torch.clear_autocast_cache()  # casts of weights that an earlier pass has made are of that pass
    try:
        with held() as inputs, torch.cuda.graph(graph, pool=replays.pool, capture_error_mode="thread_local"):
            output = compute(batch)
    except Exception as error:  # whatever a model does: computing it anew is always right
        logger.info("passes are not recorded (%s)", first_line(error))
        replays.recordings.clear()
        replays.refused = True
        return None
    finally:
        torch.cuda.set_stream(stream)  # a recording that fails leaves its own
        torch.clear_autocast_cache()
    return _Recording(graph, output, (*batch, *inputs))  # the batch, lest its ids be given to others
