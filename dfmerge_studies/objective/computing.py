"""What matrix products are computed in when a model is scored: `compute` of the spec.

    float32   as the weights are
    tf32      float32 with mantissas of 10 bits, by the tensor cores of a CUDA card; elsewhere float32
    bf16      in bfloat16 by autocast: sums, norms and losses stay float32, and so do the weights
    auto      what is fast without a change of answers but for near-ties: bf16 where the hardware multiplies in it

Importance is always computed in the precision of the weights: its squares have twice the range of exponents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dfmerge_studies.spec import StudySpec


def with_compute(spec: StudySpec, device: torch.device) -> StudySpec:
    """The spec with `compute: auto` replaced by what it means on a device.

    Args:
        spec: the settings; weights of another dtype than float32 are computed in their own, and stay `auto`.
        device: where models are scored.
    """
    if spec.compute != "auto" or spec.dtype != "float32":
        return spec
    return spec.derive(compute="bf16" if multiplies_bfloat16(device) else "float32")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has units for products in bfloat16: CUDA cards from Ampere on, CPUs with matrix tiles (AMX).

    Without them bfloat16 is slower than float32, on AVX2 eight times.  AVX-512's bfloat16 doubles large products and
    slows small ones down, so it is for the spec to ask for.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) and torch.cuda.is_bf16_supported()
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and probe is not None and bool(probe())


@contextmanager
def computing(spec: StudySpec, device: torch.device) -> Iterator[None]:
    """Compute products as a spec says inside the block.

    Args:
        spec: the settings.
        device: where the model is.
    """
    compute = with_compute(spec, device).compute
    if compute == "bf16":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    elif compute == "tf32" and device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    else:
        yield
