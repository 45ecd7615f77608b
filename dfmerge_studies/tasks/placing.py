"""Tensors of a batch of inputs, made and put on the device once: a study scores the same batches in every trial."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dfmerge_studies.tasks.encoding import Encoded

T = TypeVar("T")
KEPT = 512  # batches of a model and a function, those last used; one takes some hundred kilobytes at most

_holding: list[list[Any]] = []
_kept: WeakKeyDictionary[nn.Module, OrderedDict[Any, tuple[Sequence[Encoded], Any]]] = WeakKeyDictionary()


@contextmanager
def held() -> Iterator[list[Any]]:
    """A list of what `once` gives inside the block: whoever holds the list keeps those tensors where they are."""
    found: list[Any] = []
    _holding.append(found)
    try:
        yield found
    finally:
        _holding.remove(found)


def once(make: Callable[[nn.Module, Sequence[Encoded], int], T]) -> Callable[[nn.Module, Sequence[Encoded], int], T]:
    """Keep what a function makes of a batch for as long as the model lives, as far as there is room.

    A batch is the same if it holds the same objects in the same order.  Nobody may write into what is kept.

    Args:
        make: from a model, which says the device, a batch and the id to pad with.
    """

    @wraps(make)
    def kept(model: nn.Module, batch: Sequence[Encoded], pad_id: int) -> T:
        found = _kept.setdefault(model, OrderedDict())
        device = next(model.parameters()).device
        key = (make, device, pad_id, *map(id, batch))
        if key in found:
            found.move_to_end(key)
        else:
            with torch.inference_mode(False):  # whose tensors no gradient may pass
                found[key] = tuple(batch), make(model, batch, pad_id)  # the batch, lest its ids be given to others
            if len(found) > KEPT:
                found.popitem(last=False)
        made: T = found[key][1]
        for each in _holding:
            each.append(made)
        return made

    return kept
