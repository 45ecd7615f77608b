"""Task vectors of LoRA adapters as their factors, each matrix made when it is asked for.

    B      (out, r)        A    (r, in)        the factors of one matrix
    s      alpha / r, or alpha / sqrt(r)
    tau    s B A, (out, in); its transpose where the base's layer keeps (in, out)

A rank of 16 keeps of a 4096 x 4096 matrix 1/128 of what the matrix would take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dfmerge_studies.params import OnDemand, at_least_float32

PlaceOf = Callable[[str], torch.device]  # from a parameter's name to where it is


@dataclass(frozen=True)
class Factors:
    """One matrix as a product.

    Attributes:
        left: B, (out, r).
        right: A, (r, in).
        scale: s.
        transposed: whether the parameter is (in, out).
    """

    left: Tensor
    right: Tensor
    scale: float
    transposed: bool = False

    def dense(self) -> Tensor:
        """The matrix, in float32 or in the factors' own type where that is wider."""
        dtype = at_least_float32(self.left)
        product = (self.left.to(dtype) @ self.right.to(dtype)).mul_(self.scale)
        return product.T if self.transposed else product

    @property
    def is_zero(self) -> bool:
        """Whether the matrix is zero throughout, as far as one factor alone says it."""
        return self.scale == 0.0 or not bool(self.left.any()) or not bool(self.right.any())

    @property
    def numel(self) -> int:
        """Entries of the matrix."""
        return self.left.shape[0] * self.right.shape[1]

    def to(self, device: torch.device) -> Factors:
        """The same on a device."""
        return Factors(self.left.to(device), self.right.to(device), self.scale, self.transposed)


class Factored(OnDemand[Factors | Tensor]):
    """Tensors by name, some of them kept as factors.

    Args:
        entries: by parameter name, in the order of the model: the factors of a matrix, or a tensor as it is.
    """

    def __init__(self, entries: Mapping[str, Factors | Tensor]) -> None:
        super().__init__(dict(entries))

    @property
    def entries(self) -> Mapping[str, Factors | Tensor]:
        """What they are made of."""
        return self._source

    def __getitem__(self, name: str) -> Tensor:
        entry = self._source[name]
        return entry.dense() if isinstance(entry, Factors) else entry

    def to(self, place: PlaceOf) -> Factored:
        """The same, each on its device.

        Args:
            place: from a name to where it goes.
        """
        return Factored({name: entry.to(place(name)) for name, entry in self.entries.items()})
