"""Tasks of lm-evaluation-harness by name: the scores of its own command line, on task files and data of our own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

from dfmerge_studies.errors import InputError, RunError
from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective import preflight
from dfmerge_studies.objective.importances import check_importance, writer_for
from dfmerge_studies.objective.loading import load_problem
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.objective.rehearsal import rehearse_
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.answers import given_answers
from dfmerge_studies.tasks.data import load_rows
from dfmerge_studies.tasks.encoding import Kind
from dfmerge_studies.tasks.evaluate import choice_losses
from dfmerge_studies.tasks.settings import ChoiceTask
from dfmerge_studies.tasks.tokenise import encode_rows, prompted
from tests.models import CHOICES, FAMILIES, TEXTS
from tests.project import Project, make_project
from tests.test_prompts import PLAIN_CHAT

ROWS = 14
LETTER = {"function": "regex", "regex_pattern": "(\\w)"}


def documents(shift: int) -> list[dict[str, Any]]:
    found = []
    for i in range(ROWS):
        text = TEXTS[(i + shift) % len(TEXTS)]
        choices = [*CHOICES[: 2 + i % 3], f"{text[:6]} é"]
        found.append({"q": f"{text[:12]} {i + shift}", "choices": choices, "label": i % len(choices), "text": text})
    return found


def write_tasks(folder: Path) -> Path:
    """Task files of each kind that the harness has, with data beside them."""
    folder.mkdir()
    data = {}
    for split, shift in (("train", 20), ("validation", 0), ("test", 7)):
        data[split] = str(folder / f"{split}.jsonl")
        Path(data[split]).write_text("".join(json.dumps(row) + "\n" for row in documents(shift)))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": data}, "training_split": "train"}
    whole = {**shared, "validation_split": "validation"}
    choices = {"doc_to_text": "{{q}}", "doc_to_target": "{{label}}", "doc_to_choice": "choices"}
    accuracies = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    tasks: dict[str, dict[str, Any]] = {
        "tiny_choices": {**whole, **choices, "output_type": "multiple_choice", "metric_list": accuracies},
        "tiny_both": {
            **whole, **choices, "test_split": "test", "output_type": "multiple_choice", "metric_list": accuracies,
        },
        "tiny_likelihood": {
            **whole,
            "output_type": "loglikelihood",
            "doc_to_text": "{{q}}",
            "doc_to_target": " {{choices[label]}}",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
        },
        "tiny_text": {
            **whole,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
            ],
        },
        "tiny_written": {
            **whole,
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{choices[label][0]}}",
            "generation_kwargs": {"until": [","], "max_gen_toks": 5},
            "filter_list": [{"name": "first", "filter": [LETTER, {"function": "take_first"}]}],
            "metric_list": [
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
            ],
        },
    }  # fmt: skip
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))
    return folder


def harness_project(folder: Path, family: str = "gpt2", **tasks: dict[str, Any]) -> Project:
    """A project of two experts whose tasks are the harness's, one of its own beside them."""
    project = make_project(folder, family, rows=8)
    tokenizer = FAMILIES[family].tokenizer()
    tokenizer.chat_template = PLAIN_CHAT
    tokenizer.save_pretrained(project.folder / "base")
    write_tasks(folder / "tasks")
    project.spec["tasks"] = {name: {"include_path": "tasks", **task} for name, task in tasks.items()}
    names = list(tasks)
    project.spec["experts"] = {
        "red": {"model": "red", "task": names[0]},
        "blue": {"model": "blue", "task": names[-1]},
    }
    project.write()
    return project


def by_lm_eval(project: Project, model: str, task: str, **options: Any) -> dict[str, float]:
    """What `lm_eval --model hf` says of a model directory."""
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(project.folder / model), "dtype": "float32"},
        tasks=[task],
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(project.folder / "tasks"), include_defaults=False),
        fewshot_as_multiturn=bool(options.get("apply_chat_template")),
        **options,
    )
    assert found is not None
    return {name: value for name, value in found["results"][task].items() if isinstance(value, float)}


CASES = {
    "choices": ({"lm_eval": "tiny_choices"}, {}, "acc,none"),
    "norm": ({"lm_eval": "tiny_choices", "metric": "acc_norm"}, {}, "acc_norm,none"),
    "shots": ({"lm_eval": "tiny_choices", "num_fewshot": 2, "limit": 9}, {"num_fewshot": 2, "limit": 9}, "acc,none"),
    "half": ({"lm_eval": "tiny_choices", "limit": 0.4}, {"limit": 0.4}, "acc,none"),
    "chat": (
        {
            "lm_eval": "tiny_choices",
            "num_fewshot": 1,
            "apply_chat_template": True,
            "system_instruction": "answer",
        },
        {"num_fewshot": 1, "apply_chat_template": True, "system_instruction": "answer"},
        "acc,none",
    ),
    "likelihood": ({"lm_eval": "tiny_likelihood", "metric": "perplexity"}, {}, "perplexity,none"),
    "text": ({"lm_eval": "tiny_text", "metric": "bits_per_byte"}, {}, "bits_per_byte,none"),
    "written": ({"lm_eval": "tiny_written", "metric": "exact_match"}, {}, "exact_match,first"),
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, dict[str, float]]:
    """A study of all cases at once, its winner's scores, and the exported model."""
    folder = tmp_path_factory.mktemp("lm-eval") / "p"
    project = harness_project(folder, **{name: case[0] for name, case in CASES.items()})
    project.write(method="averaging")
    summary = project.json("run", project.file)
    project.cli("export", project.file, "--out", "out")
    return project, summary["best"]["tasks"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_scores_of_a_trial_are_those_of_lm_eval_on_the_exported_directory(
    merged: tuple[Project, dict[str, float]], case: str
) -> None:
    project, scores = merged
    settings, options, key = CASES[case]
    expected = by_lm_eval(project, "out", settings["lm_eval"], **options)[key]
    assert scores[case] == pytest.approx(expected, rel=1e-5)
    assert expected > 0


@pytest.mark.slow
def test_scores_of_a_text_to_text_model_are_those_of_lm_eval(tmp_path: Path) -> None:
    project = harness_project(tmp_path / "p", "t5", choices={"lm_eval": "tiny_choices"}, written=CASES["written"][0])
    found = project.json("evaluate", project.file, "--model", "red")["tasks"]
    for name, task, key in (("choices", "tiny_choices", "acc,none"), ("written", "tiny_written", "exact_match,first")):
        assert found[name]["score"] == pytest.approx(by_lm_eval(project, "red", task)[key])


# --- without the command line ----------------------------------------------------------------------------------------


def loaded(project: Project, **changes: Any) -> Any:
    return load_problem(StudySpec.from_yaml(project.write(**changes)))


def test_the_resident_model_scores_rows_as_lm_eval_does(tmp_path: Path) -> None:
    """On the validation split by default; the test split, which lm_eval scores where there is one, by its name."""
    project = harness_project(tmp_path / "p", both={"lm_eval": "tiny_both", "test_split": "test", "metric": "acc_norm"})
    problem = loaded(project)
    problem.resident.load_scaled_(0, 1.0)
    merger = Merger(problem, METHODS["gta"], None)
    ours = {split: merger.results(split)["both"] for split in ("validation", "test")}
    assert ours["test"].score == by_lm_eval(project, "red", "tiny_both")["acc_norm,none"]
    assert ours["validation"].score == by_lm_eval(project, "red", "tiny_choices")["acc_norm,none"]
    assert ours["test"].score != ours["validation"].score
    for result in ours.values():
        assert result.n == ROWS
        assert result.rows is not None
        assert sum(result.rows) / ROWS == pytest.approx(result.score)


def test_validate_says_where_lm_eval_would_score_another_split(tmp_path: Path) -> None:
    project = harness_project(tmp_path / "p", both={"lm_eval": "tiny_both"}, one={"lm_eval": "tiny_choices"})
    (note,) = project.json("validate", project.file)["notes"]
    assert note["where"].endswith("tasks.both.validation_split")
    assert note["what"].startswith("trials are scored on the split 'validation'; lm_eval scores 'test'")


def test_validate_shows_what_the_harness_asks(tmp_path: Path) -> None:
    project = harness_project(tmp_path / "p", choices=CASES["shots"][0], written=CASES["written"][0])
    project.write(method="gta")
    shown = {task: project.json("validate", project.file, "--show", task)["shown"] for task in ("choices", "written")}
    assert shown["choices"]["prompt"].startswith("the river wa <unk><unk> yes<unk><unk>bread, salt ")  # two examples
    assert [answer["text"] for answer in shown["choices"]["answers"]][:2] == [" yes", " a terrible place"]
    assert [answer["right"] for answer in shown["choices"]["answers"]] == [True, False, False]
    assert shown["written"]["answers"] == []
    assert shown["written"]["wanted"] == " y<|endoftext|>"
    assert shown["written"]["scored"] == "exact_match of tiny_written, as lm-evaluation-harness has it"


def test_limit_takes_the_first_rows_and_leaves_the_others_to_the_choice_of_the_winner(tmp_path: Path) -> None:
    project = harness_project(tmp_path / "p", choices={"lm_eval": "tiny_choices", "limit": 5})
    problem = loaded(project)
    assert [example.index for example in problem.examples("choices", "validation")] == [0, 1, 2, 3, 4]
    problem.hold_out_(1.0)
    held = [example.index for example in problem.examples("choices", "holdout")]
    assert len(held) == 5
    assert min(held) > 4


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", ["tiny_choices", "tiny_both"])
def test_a_task_of_ours_with_the_same_fields_asks_what_the_harness_asks(tmp_path: Path, name: str, chat: bool) -> None:
    """The task with a test split draws examples otherwise in the harness than the one without, and here too."""
    fields = {
        "num_fewshot": 3,
        "apply_chat_template": chat,
        "system_instruction": "Answer. " if chat else None,
    }
    scored = "test" if name == "tiny_both" else None
    project = harness_project(tmp_path / "p", choices={"lm_eval": name, "validation_split": scored, **fields})
    problem = loaded(project)
    files = {split: f"tasks/{split}.jsonl" for split in ("train", "validation", "test")}
    own = ChoiceTask.model_validate(
        {
            "dataset": {"path": "json", "data_files": files},
            "training_split": "train",
            "test_split": scored,
            "doc_to_text": "{{q}}",
            "doc_to_choice": "choices",
            "doc_to_target": "{{label}}",
            **fields,
        }
    )
    rows = load_rows("own", own, scored or "validation", root=project.folder, spec_file="s")
    rows = prompted(rows, own, problem.resident.tokenizer, where="s")
    between = "" if chat else " "
    for row, example in zip(rows, problem.tasks["choices"].validation, strict=True):
        expected = [(row.text, f"{between}{choice}") for choice in row.choices]
        assert [arguments for _, arguments in example.question.requests] == expected
        assert row.label == example.label
    encoded = encode_rows(rows, own, Kind.CAUSAL, problem.resident.tokenizer, longest=10**6, where="s")
    for ours, theirs in zip(encoded, problem.tasks["choices"].validation, strict=True):
        assert ours.choices == theirs.choices
        assert ours.input_ids[-len(theirs.input_ids) :] == theirs.input_ids  # theirs are cut to what the model takes


# --- importance ------------------------------------------------------------------------------------------------------


def test_importance_is_estimated_on_the_tokens_that_the_harness_scores(tmp_path: Path) -> None:
    project = harness_project(tmp_path / "p", choices={"lm_eval": "tiny_choices"}, text=CASES["text"][0])
    problem = loaded(project, method="gta")
    model = problem.resident.model
    for example in problem.tasks["choices"].validation:
        given = given_answers(
            model, problem.spec.tasks["choices"], Kind.CAUSAL, [example], tokenizer=problem.resident.tokenizer, pad_id=0
        )[0]
        losses = choice_losses(model, Kind.CAUSAL, [example], pad_id=0)[0]
        sums = [-loss * len(ids) for loss, ids in zip(losses, example.choices, strict=True)]
        assert sums == pytest.approx([answer[0] for ((answer, *_),) in zip(given)], rel=1e-4)


def test_importance_of_one_answer_follows_the_target_and_only_if_empirical_is_asked_for(tmp_path: Path) -> None:
    project = harness_project(tmp_path / "p", likelihood=CASES["likelihood"][0], text=CASES["text"][0])
    with pytest.raises(InputError, match=r"the estimator exact .* Use empirical"):
        rehearse_(loaded(project), METHODS["df-merge"])
    problem = loaded(project, importance={"estimator": "empirical", "samples": 4})
    rehearse_(problem, METHODS["df-merge"])
    tokenizer, rows = problem.resident.tokenizer, documents(0)
    for example in problem.tasks["likelihood"].validation:
        row = rows[example.index]
        (target,) = example.choices
        assert tokenizer(f"{row['q']} {row['choices'][row['label']]}")["input_ids"] == [*example.input_ids, *target]


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_importance_of_written_answers_is_that_of_our_own_task_of_the_same_fields(
    tmp_path: Path, estimator: str
) -> None:
    project = harness_project(tmp_path / "p", written=CASES["written"][0])
    project.spec["tasks"]["own"] = {
        "type": "generate",
        "dataset": {"path": "json", "data_files": {"validation": "tasks/validation.jsonl"}},
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{choices[label][0]}}",
        "generation_kwargs": {"until": [","], "max_gen_toks": 5},
    }
    project.spec["experts"]["blue"]["task"] = "own"
    problem = loaded(project, importance={"estimator": estimator, "samples": 4})
    found = []
    for task in ("written", "own"):
        names = check_importance(problem, METHODS["df-merge"])
        found.append(
            task_fisher(
                problem.resident.model,
                Kind.CAUSAL,
                problem.tasks[task].validation[:4],
                pad_id=problem.pad_id,
                estimator=names if estimator == "empirical" else "sampled",
                writer=writer_for(problem, task),
                generator=torch.Generator().manual_seed(3),
            ).values
        )
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-4, atol=1e-9), name
    assert any(bool(value.any()) for value in found[0].values())


@pytest.mark.parametrize("ending", ["assistant", "assistant:   ", "assistant:\n\n"])
def test_importance_of_written_answers_reads_the_whole_prompt_that_the_model_answers(
    tmp_path: Path, ending: str
) -> None:
    """Templates of Llama 3 and Qwen end in line feeds, which belong to the prompt and not to what is written."""
    project = harness_project(
        tmp_path / "p", written={"lm_eval": "tiny_written", "metric": "exact_match", "apply_chat_template": True}
    )
    tokenizer = FAMILIES["gpt2"].tokenizer()
    said = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}, {% endfor %}"
    tokenizer.chat_template = f"{said}{{% if add_generation_prompt %}}{ending}{{% endif %}}"
    tokenizer.save_pretrained(project.folder / "base")
    problem = loaded(project)
    for example in problem.tasks["written"].validation[:3]:
        (context, _), *_ = (args for _, args in example.question.requests)
        assert context.endswith(ending.rstrip("\n") if ending not in context else ending)
        assert list(example.input_ids) == tokenizer(context)["input_ids"]
        assert example.choices[0]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "where", "what"),
    [
        ({"lm_eval": "tiny_choises"}, "lm_eval", "no task 'tiny_choises'"),
        ({"lm_eval": "tiny_choices", "metric": "acc_nrm"}, "metric", "no metric 'acc_nrm'. Did you mean 'acc_norm'"),
        ({"lm_eval": "tiny_written", "metric": "exact_match", "filter": "last"}, "filter", "no filter 'last'"),
        ({"lm_eval": "tiny_choices", "validation_split": "dev"}, "", "no split 'dev'. Its splits are"),
        ({"lm_eval": "tiny_choices", "include_path": "taks"}, "include_path", "no such folder"),
        ({"lm_eval": "tiny_sampled", "metric": "exact_match"}, "lm_eval", "samples its answers"),
        ({"lm_eval": "tiny_zero", "num_fewshot": 2}, "num_fewshot", "without examples by its own definition"),
        ({"lm_eval": "tiny_group"}, "lm_eval", "is a group of tasks (tiny_choices, tiny_both). Write a task for each"),
        ({"lm_eval": "tiny_choices", "num_fewshot": 15}, "num_fewshot", "15 examples, but the task has 14 documents"),
        ({"lm_eval": "tiny_broken"}, "", "the task 'tiny_broken' cannot be loaded"),
        ({"lm_eval": "tiny_choices", "fewshot_as_multiturn": True}, "", "needs apply_chat_template"),
        ({"lm_eval": 3}, "lm_eval", "Write it in quotes"),
        ({"lm_eval": "tiny_choices", "doc_to_text": "q"}, "doc_to_text", "unknown key"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_field(
    small: Project, fields: dict[str, Any], where: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfmerge_studies.tasks.harness._defaults", lambda: _only_own(small))
    task = {"include_path": "tasks", **fields}
    done = small.cli(
        "validate", small.write(tasks={"t": task}, experts={"red": {"model": "red", "task": "t"}}), check=2
    )
    assert what in done.stderr
    assert f"tasks.t{'.' if where else ''}{where}: " in done.stderr


def _only_own(project: Project) -> Any:
    """In place of the index of the harness's own task files, which takes seconds to make."""
    return TaskManager(include_path=str(project.folder / "tasks"), include_defaults=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = harness_project(tmp_path_factory.mktemp("small") / "p", t={"lm_eval": "tiny_choices"})
    tasks = project.folder / "tasks"
    for name, like, changes in (
        ("tiny_sampled", "tiny_written", {"generation_kwargs": {"until": [","], "do_sample": True}}),
        ("tiny_zero", "tiny_choices", {"num_fewshot": 0}),
        ("tiny_broken", "tiny_choices", {"dataset_kwargs": {"data_files": {"train": str(tasks / "none.jsonl")}}}),
    ):
        task = {**yaml.safe_load((tasks / f"{like}.yaml").read_text()), "task": name, **changes}
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(task))
    (tasks / "tiny_group.yaml").write_text(
        yaml.safe_dump({"group": "tiny_group", "task": ["tiny_choices", "tiny_both"]})
    )
    return project


def test_a_model_whose_log_likelihoods_are_not_finite_fails_the_trial_and_is_given_no_score(tmp_path: Path) -> None:
    problem = loaded(harness_project(tmp_path / "p", t={"lm_eval": "tiny_choices"}))
    with torch.no_grad():
        next(problem.resident.model.parameters()).fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        Merger(problem, METHODS["gta"], None).results("validation")


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = harness_project(tmp_path / "p", t={"lm_eval": "tiny_choices"})
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "lm_eval")
    with pytest.raises(InputError, match=r"need lm_eval. pip install 'dfmerge-studies\[lm-eval\]'"):
        preflight.check_extras(StudySpec.from_yaml(project.file))


def test_code_of_task_files_runs_only_if_the_user_says_so(tmp_path: Path) -> None:
    project = harness_project(tmp_path / "p", t={"lm_eval": "tiny_choices"})
    folder = project.folder / "tasks"
    (folder / "asking.py").write_text("def ask(doc):\n    return doc['q'].upper()\n")
    file = folder / "tiny_choices.yaml"
    file.write_text(file.read_text().replace("doc_to_text: '{{q}}'", "doc_to_text: !function asking.ask"))
    with pytest.raises(InputError, match="code that would run") as caught:
        loaded(project)
    assert caught.value.where.endswith("tasks.t.include_path")
    spec = StudySpec.from_yaml(project.file, ["trust_remote_code=true"])
    example = load_problem(spec).tasks["t"].validation[0]
    assert example.question.requests[0][1][0] == documents(0)[0]["q"].upper()


def test_another_task_file_makes_another_study(tmp_path: Path) -> None:
    project = harness_project(tmp_path / "p", written={**CASES["written"][0], "limit": 3})
    first = loaded(project).data_digests()
    assert loaded(project).data_digests() == first
    file = project.folder / "tasks" / "tiny_written.yaml"
    file.write_text(file.read_text().replace("max_gen_toks: 5", "max_gen_toks: 6"))
    assert loaded(project).data_digests() != first


@pytest.mark.slow
def test_a_task_of_the_harness_can_be_a_guard(tmp_path: Path) -> None:
    """Written, without any choices: a guard is not weighed, so no estimator minds."""
    guard = {**CASES["written"][0], "guard": True, "max_drop": 100}
    project = harness_project(tmp_path / "p", choices={"lm_eval": "tiny_choices"}, written=guard)
    project.spec["experts"]["blue"]["task"] = "choices"
    summary = project.json("run", project.write(), "--trials", "1")
    assert summary["best"]["tasks"].keys() >= {"choices", "written"}
