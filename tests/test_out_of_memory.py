"""Memory that runs out, in all forms in which devices and their libraries say so, costs a batch or a trial at most."""

from __future__ import annotations

import pytest
import torch

from dfmerge_studies import InputError, StudySpec
from dfmerge_studies.errors import out_of_memory
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.objective.problem import choose_device
from dfmerge_studies.tasks import evaluate
from dfmerge_studies.tasks.evaluate import choice_losses
from tests.models import FAMILIES, make_examples, make_model
from tests.project import Project

FORMS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FORMS, ids=str)
def test_every_form_of_running_out_of_memory_is_known(error: BaseException) -> None:
    found = out_of_memory(error)
    assert found is not None
    assert found.what == "out of memory"


@pytest.mark.parametrize(
    "text", ["mat1 and mat2 shapes cannot be multiplied", "CUDA error: device-side assert triggered"]
)
def test_other_errors_are_not_taken_for_it(text: str) -> None:
    assert out_of_memory(RuntimeError(text)) is None


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
