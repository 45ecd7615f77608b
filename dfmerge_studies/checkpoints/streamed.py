"""Tensors that stay in the host's memory and are copied to a device one by one, when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from dfmerge_studies.checkpoints.factored import Factored, Factors, PlaceOf
from dfmerge_studies.params import OnDemand


class Streamed(OnDemand[Tensor]):
    """Tensors by name, each copied when it is looked up, and not kept on the device.

    Copies of pinned memory are queued: the host does not wait for them.

    Args:
        held: in the host's memory.
        place: where each is used.
    """

    def __init__(self, held: Mapping[str, Tensor], place: PlaceOf) -> None:
        super().__init__(held)
        self._place = place

    @property
    def held(self) -> Mapping[str, Tensor]:
        """Where they are held."""
        return self._source

    def __getitem__(self, name: str) -> Tensor:
        return self._source[name].to(self._place(name), non_blocking=True)


def streamed(tensors: Mapping[str, Tensor], place: PlaceOf) -> Mapping[str, Tensor]:
    """The same tensors, to be used on devices and kept on the host; factors of matrices, which are small, go there.

    Args:
        tensors: in the host's memory, theta_pre or a task vector.
        place: where each is used.
    """
    if not isinstance(tensors, Factored):
        return Streamed({name: _pinned(tensor, place(name)) for name, tensor in tensors.items()}, place)
    kept = {
        name: entry.to(place(name)) if isinstance(entry, Factors) else _pinned(entry, place(name))
        for name, entry in tensors.entries.items()
    }
    return Streamed(Factored(kept), place)


def on_device(tensors: Mapping[str, Tensor], place: PlaceOf) -> Mapping[str, Tensor]:
    """The same tensors, each on its device.

    Args:
        tensors: in the host's memory, theta_pre or a task vector.
        place: where each goes.
    """
    if isinstance(tensors, Factored):
        return tensors.to(place)
    return {name: tensor.to(place(name)) for name, tensor in tensors.items()}


def kept_bytes(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """What a task vector or theta_pre takes: bytes where it is used, and bytes of the host that are copied from.

    Args:
        tensors: by name.
    """
    inner = tensors.held if isinstance(tensors, Streamed) else tensors
    factors = 0
    if isinstance(inner, Factored):
        pairs = [entry for entry in inner.entries.values() if isinstance(entry, Factors)]
        factors = sum(_size(pair.left) + _size(pair.right) for pair in pairs)
        whole = [entry for entry in inner.entries.values() if isinstance(entry, Tensor)]
    else:
        whole = list(inner.values())
    dense = sum(map(_size, whole))
    return (factors, dense) if isinstance(tensors, Streamed) else (factors + dense, 0)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        with suppress(RuntimeError):  # a system may allow no more of it: copies are slower then
            return tensor.pin_memory()
    return tensor
