"""Memory that runs out, in all forms in which devices and their libraries say so, costs a batch or a trial at most."""

from __future__ import annotations

import errno

import pytest
import torch

from dfmerge_studies import InputError, StudySpec
from dfmerge_studies.errors import out_of_memory
from dfmerge_studies.objective.loading import choose_device
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.tasks import evaluate
from dfmerge_studies.tasks.evaluate import choice_losses
from tests.models import FAMILIES, make_examples, make_model
from tests.project import Project

# As torch, its allocators, and the libraries below it say it.
FORMS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasLtCreate(&handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnXsyevd(handle, params)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cusolver error: 7, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("CUDA error: insufficient resources when calling `cusparseCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("Search for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/cuda/cuda-runtime-api"),
    RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("HIP error: hipErrorOutOfMemory"),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasGemmEx(handle, opa, opb)`"),
    RuntimeError("rocblas error: rocblas_status_memory_error"),
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError("C10 Out of Memory. Trying to allocate 4294967296"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried"),
    RuntimeError("unable to mmap 4096 bytes from file </dev/shm/torch_1>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FORMS, ids=str)
def test_every_form_of_running_out_of_memory_is_known(error: BaseException) -> None:
    found = out_of_memory(error)
    assert found is not None
    assert found.what == "out of memory"


def test_an_allocation_that_the_cpu_refuses_is_known() -> None:
    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(told.value) is not None


OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, opa, opb, m, n, k)`"),
    RuntimeError("CUDA error: too many resources requested for launch"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory"),
]


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert out_of_memory(error) is None


@pytest.mark.parametrize("family", ["t5", "bert", "llama"])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(family: str, monkeypatch) -> None:
    model, examples, kind = make_model(family).eval(), make_examples(family), FAMILIES[family].kind
    whole = choice_losses(model, kind, examples, pad_id=0)
    score, sizes = evaluate.forward_losses, []

    def small(model, kind, batch, **more):
        if len(batch) > 2:
            raise FORMS[1]
        sizes.append(len(batch))
        return score(model, kind, batch, **more)

    monkeypatch.setattr(evaluate, "forward_losses", small)
    halved = choice_losses(model, kind, examples, pad_id=0)
    assert max(sizes) == 2
    for one, other in zip(whole, halved, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_an_input_that_does_not_fit_alone_fails_the_trial_and_the_study_goes_on(project: Project, monkeypatch) -> None:
    score, merge_and_score, trials = evaluate.forward_losses, Merger.run, []

    def lacking(model, kind, batch, **more):
        if trials == ["running"]:
            raise FORMS[2]
        return score(model, kind, batch, **more)

    def first_lacks(merger, *point):
        trials.append("running")
        try:
            return merge_and_score(merger, *point)
        finally:
            trials.append("done")

    monkeypatch.setattr(evaluate, "forward_losses", lacking)
    monkeypatch.setattr(Merger, "run", first_lacks)
    done = project.cli("run", "spec.yaml", "--trials", "3")
    assert "out of memory" in done.stderr
    states = project.json("status", "spec.yaml")["trials"]
    assert (states["complete"], states["failed"]) == (3, 1)


def test_mps_is_refused_with_what_it_lacks(project: Project) -> None:
    with pytest.raises(InputError, match="mps"):
        choose_device(StudySpec.from_yaml(project.file, ["device=mps"]))
