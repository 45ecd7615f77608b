"""What is merged is what was digested: own memory, digest and tensors from one read, a swap between reads noticed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dfmerge_studies.checkpoints.digest import model_digest
from dfmerge_studies.checkpoints.reference import Checkpoint, resolve
from dfmerge_studies.errors import RunError
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective.loading import load_problem
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.objective.problem import Problem
from dfmerge_studies.spec import StudySpec
from tests.processes import Forked
from tests.project import Project

WEIGHTS = ("*.safetensors", "*.bin")


def problem_of(project: Project, **settings: Any) -> Problem:
    return load_problem(StudySpec.from_yaml(project.write(**settings)), splits=("validation",))


def checkpoint(path: Path) -> Checkpoint:
    return resolve(str(path), root=Path("/"), where="spec.yaml: base")


def weights_files(project: Project) -> list[Path]:
    found = [file for pattern in WEIGHTS for file in project.folder.rglob(pattern)]
    assert found
    return found


def overwrite(file: Path) -> None:
    """Write other numbers over a file's tensors in place: same inode, same header, same size."""
    size = file.stat().st_size
    with file.open("r+b") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little") if file.suffix == ".safetensors" else 0
        stream.seek(start)
        stream.write(b"\x3d" * (size - start))  # 0.046 in float32


def with_adapters(project: Project, *, dora: bool = False) -> Project:
    """The same project with low-rank adapters as experts, which leave most of the base's parameters alone.

    Those of DoRA have to be folded into a copy of the base, which is read for each of them.
    """
    classification = project.family in ("bert", "distilbert", "roberta")
    auto = AutoModelForSequenceClassification if classification else AutoModelForCausalLM
    targets = ["query"] if classification else ["c_attn"]
    for number, name in enumerate(("red", "blue")):
        labels = {"num_labels": 3 - number} if classification else {}
        model = auto.from_pretrained(project.folder / "base", **labels)
        torch.manual_seed(number)
        kind = "SEQ_CLS" if classification else "CAUSAL_LM"
        config = peft.LoraConfig(
            r=2, target_modules=targets, fan_in_fan_out=not classification, task_type=kind, use_dora=dora
        )
        config.modules_to_save = ["classifier", "pooler"] if classification else None
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter_name, parameter in wrapped.named_parameters():
                if "lora_" in parameter_name:
                    parameter.normal_(std=0.3)
        shutil.rmtree(project.folder / name)
        wrapped.save_pretrained(project.folder / name)
        model.config.save_pretrained(project.folder / name)
    return project


def as_bin(project: Project) -> Project:
    for file in list(project.folder.rglob("model.safetensors")):
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    return project


CASES: dict[str, Callable[[Callable[[str], Project]], Project]] = {
    "text-to-text": lambda project_of: project_of("t5"),
    "heads": lambda project_of: project_of("bert"),
    "pickles": lambda project_of: as_bin(project_of("bert")),
    "adapters": lambda project_of: with_adapters(project_of("gpt2")),
    "adapters and heads": lambda project_of: with_adapters(project_of("bert")),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_do_not_change_when_the_files_are_overwritten_in_mid_run(
    project_of: Callable[[str], Project], case: str
) -> None:
    project = CASES[case](project_of)
    problem = problem_of(project)
    merger = Merger(problem, METHODS["df-merge"], None)
    points = [{"red": 0.3, "blue": 0.8}, {"red": 1.0, "blue": 0.1}]
    model = problem.resident.model

    def state() -> dict[str, torch.Tensor]:
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for task, head in problem.resident.heads.items():
            tensors.update({f"{task}:{name}": tensor.clone() for name, tensor in head.items()})
        return tensors

    before = [merger.run(point).tasks for point in points], state()
    for file in weights_files(project):
        overwrite(file)
    after = [merger.run(point).tasks for point in points], state()
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in after[1].items())


def _merge_while_files_are_truncated(project: Project) -> None:
    merger = Merger(problem_of(project), METHODS["df-merge"], None)
    first = merger.run({"red": 0.3, "blue": 0.8}).tasks
    for file in weights_files(project):
        os.truncate(file, 0)
    assert merger.run({"red": 0.3, "blue": 0.8}).tasks == first
    print("alive")


@pytest.mark.parametrize("case", ["heads", "adapters"])
def test_the_process_outlives_files_that_are_truncated_in_mid_run(
    project_of: Callable[[str], Project], case: str
) -> None:
    project = CASES[case](project_of)
    process = Forked(_merge_while_files_are_truncated, project)
    output, errors = process.communicate(timeout=300)
    assert (process.returncode, output) == (0, "alive\n"), errors


def replace(target: Path, source: Path) -> None:
    """Put another file in the place of one, as an upload or a training run does."""
    shutil.copyfile(source, target.with_name("new"))
    target.with_name("new").replace(target)


def changed_copy(file: Path, to: Path) -> Path:
    tensors = {name: tensor + 0.25 for name, tensor in load_file(file).items()}
    save_file(tensors, to, {"format": "pt"})
    return to


def test_the_digest_is_that_of_the_weights_in_memory_when_a_file_is_swapped_before_its_read(
    project: Project, tmp_path: Path
) -> None:
    file = project.folder / "red" / "model.safetensors"
    other = changed_copy(file, tmp_path / "other.safetensors")

    def swap(step: str, done: int, total: int) -> None:
        if step == "loading red":
            replace(file, other)

    problem = load_problem(StudySpec.from_yaml(project.file), progress=swap)
    assert problem.expert_digests["red"] == model_digest(checkpoint(project.folder / "red"))
    vector, base = problem.resident.task_vectors[0], problem.resident.base
    for name, delta in vector.deltas.items():
        torch.testing.assert_close(base[name] + delta, load_file(other)[name])


def test_a_base_that_is_swapped_before_an_adapter_reads_it_again_is_refused_by_name(
    project_of: Callable[[str], Project], tmp_path: Path
) -> None:
    project = with_adapters(project_of("gpt2"), dora=True)
    file = project.folder / "base" / "model.safetensors"
    other = changed_copy(file, tmp_path / "other.safetensors")

    def swap(step: str, done: int, total: int) -> None:
        if step == "loading blue":
            replace(file, other)

    with pytest.raises(RunError, match=r"base/model\.safetensors: changed while"):
        load_problem(StudySpec.from_yaml(project.file), progress=swap)


def test_a_base_that_is_swapped_after_it_was_read_once_for_all_adapters_is_the_one_that_was_read(
    project_of: Callable[[str], Project], tmp_path: Path
) -> None:
    project = with_adapters(project_of("gpt2"))
    file = project.folder / "base" / "model.safetensors"
    other = changed_copy(file, tmp_path / "other.safetensors")
    spec = StudySpec.from_yaml(project.file)
    before = load_problem(spec)

    def swap(step: str, done: int, total: int) -> None:
        if step == "loading blue":
            replace(file, other)

    after = load_problem(spec, progress=swap)
    assert after.base_digest == before.base_digest
    for name, tensor in before.resident.base.items():
        assert torch.equal(after.resident.base[name], tensor)
    assert load_problem(spec).base_digest != before.base_digest


@pytest.mark.parametrize(
    ("name", "old", "new"), [("config.json", "{", '{"added": 1,'), ("tokenizer.json", '"<unk>"', '"<odd>"')]
)
def test_a_small_file_that_is_swapped_while_the_models_load_is_refused_by_name(
    project: Project, monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str
) -> None:
    file = project.folder / "red" / name
    real = AutoTokenizer.from_pretrained

    def swap(path: Path, *args: Any, **settings: Any) -> Any:
        tokenizer = real(path, *args, **settings)
        if Path(path) == file.parent:
            file.write_text(file.read_text().replace(old, new, 1))
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", swap)
    with pytest.raises(RunError, match=rf"red/{name}: changed while"):
        load_problem(StudySpec.from_yaml(project.file))


def test_a_file_that_is_cut_short_while_it_is_read_is_refused_by_name(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = project.folder / "red" / "model.safetensors"

    def cut(step: str, done: int, total: int) -> None:
        if step == "loading red":
            monkeypatch.setattr("dfmerge_studies.checkpoints.load.check_files", lambda checkpoint: None)
            os.truncate(file, file.stat().st_size - 100)

    from dfmerge_studies.errors import InputError

    with pytest.raises(InputError, match=r"red/model\.safetensors"):
        load_problem(StudySpec.from_yaml(project.file), progress=cut)


@pytest.mark.slow
def test_a_multi_task_model_that_is_swapped_after_its_digest_is_not_scored_under_it(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dfmerge_studies.study import session as module

    other = changed_copy(project.folder / "red" / "model.safetensors", tmp_path / "other.safetensors")
    shutil.copytree(project.folder / "red", project.folder / "multi")
    real = module.find_model

    def swap(*arguments: Any) -> Any:
        found = real(*arguments)
        replace(project.folder / "multi" / "model.safetensors", other)
        return found

    monkeypatch.setattr(module, "find_model", swap)
    done = project.cli(
        "compare", project.write(multi_task="multi"), "--methods", "averaging", "--seeds", "1", check=None
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "multi" in done.stderr
    assert "changed while" in done.stderr
