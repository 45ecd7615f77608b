"""Tasks whose answer is a text: fields, targets, filters, metrics; and such a task through every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from dfmerge_studies import StudySpec, load_problem
from dfmerge_studies.errors import InputError
from dfmerge_studies.methods import METHODS
from dfmerge_studies.objective.merger import Merger
from dfmerge_studies.study.rows import trial_rows
from dfmerge_studies.study.session import stored_study
from dfmerge_studies.tasks.answers import writer_of
from dfmerge_studies.tasks.data import Row, load_rows
from dfmerge_studies.tasks.encoding import Kind
from dfmerge_studies.tasks.filters import Filter
from dfmerge_studies.tasks.generation import write_texts
from dfmerge_studies.tasks.metrics import METRICS, task_metrics
from dfmerge_studies.tasks.settings import GenerateTask
from dfmerge_studies.tasks.tokenise import encode_rows
from dfmerge_studies.tasks.written import Ignored, Written, numbers_in, token_f1
from tests.models import FAMILIES, TEXTS, save_model_directory
from tests.project import EXPERTS, Project, make_project, perturbed


def task(**fields: Any) -> GenerateTask:
    whole = {"type": "generate", "dataset": {"path": "json"}, "doc_to_text": "q", "doc_to_target": "a", **fields}
    return GenerateTask.model_validate(whole)


# --- what is made of a text, and what it scores ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "text", "expected"),
    [
        ({"function": "regex", "regex_pattern": r"is (\w+)"}, "it is red, or is blue ", "red"),
        ({"function": "regex", "regex_pattern": r"is (\w+)", "group_select": -1}, "it is red, or is blue ", "blue"),
        ({"function": "regex", "regex_pattern": r"(\d+)|no (\w+)"}, "no apples", "apples"),
        ({"function": "regex", "regex_pattern": r"\d+"}, "none", "[invalid]"),
        ({"function": "regex", "regex_pattern": r"\d+", "fallback": ""}, "none", ""),
        ({"function": "regex"}, "so 3 + 4 = 7 #### 7", "7"),
        ({"function": "first_number"}, "about -1,250.5 of 3", "-1250.5"),
        ({"function": "last_number"}, "about -1,250.5 of 3.", "3"),
        ({"function": "first_number"}, "none", "[invalid]"),
        ({"function": "strip"}, " a b \n", "a b"),
        ({"function": "remove_whitespace"}, " a b \n", "a b"),
        ({"function": "lowercase"}, "Ab", "ab"),
        ({"function": "uppercase"}, "Ab", "AB"),
        ({"function": "map", "mapping_dict": {"A": "yes"}}, "A", "yes"),
        ({"function": "map", "mapping_dict": {"A": "yes"}, "default_value": "no"}, "B", "no"),
        ({"function": "take_first"}, " a ", " a "),
    ],
)
def test_a_filter_makes_of_a_text(step: dict[str, Any], text: str, expected: str) -> None:
    assert Filter.model_validate({"filter": [step]})(text) == expected


def test_filters_of_the_harness_give_what_the_harness_gives() -> None:
    filters = pytest.importorskip("lm_eval.api.registry")
    pytest.importorskip("lm_eval.filters")
    texts = ["A: 3 #### 1,024 ", "  Mixed Case\n", "#### -7", "the (B) answer", "no"]
    steps: list[dict[str, Any]] = [
        {"function": "regex"},
        {"function": "regex", "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)", "group_select": -1},
        {"function": "regex", "regex_pattern": r"\((\w)\)", "fallback": "?"},
        {"function": "remove_whitespace"},
        {"function": "lowercase"},
        {"function": "uppercase"},
    ]
    for step in steps:
        options = {name: value for name, value in step.items() if name != "function"}
        theirs = filters.get_filter(step["function"])(**options).apply([[text] for text in texts], [{}] * len(texts))
        ours = Filter.model_validate({"filter": [step]})
        assert [ours(text) for text in texts] == [each for (each,) in theirs]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("-$1,234.50.", ["-1234.50"]),
        ("5-3 is 2", ["5", "3", "2"]),
        ("10,000,000 or 1,23", ["10000000", "1", "23"]),
        ("\u22127 and .5 and 1e-3", ["-7", ".5", "1e-3"]),
        ("1,250, since 50*25=1,250", ["1250", "50", "25", "1250"]),
        ("1,250,000, or so", ["1250000"]),
        ("(1,250,3)", ["1", "250", "3"]),
        ("1,250,000,", ["1250000"]),
        ("1,250.0, then", ["1250.0"]),
        ("nothing", []),
    ],
)
def test_numbers_are_found_as_people_write_them(text: str, numbers: list[str]) -> None:
    assert numbers_in(text) == numbers


def test_metrics_of_texts_are_what_their_definitions_say() -> None:
    given = ["The cat sat.", "on a mat", "42 apples", ""]
    wanted = [("a cat sat down", "the dog"), ("on a mat",), ("42.0",), ("",)]
    texts = Written(given, wanted)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])

    def best(kind: str) -> list[float]:
        return [max(scorer.score(w, g)[kind].fmeasure for w in each) for g, each in zip(given, wanted, strict=True)]

    expected = {
        "exact_match": [0, 1, 0, 1],
        "token_f1": [0.8, 1, 2 / 3, 1],  # cat sat | cat sat down; 42 apples | 420
        "numeric": [0, 0, 1, 0],
        "rouge": best("rougeL"),
        **{kind: best(kind) for kind in ("rouge1", "rouge2", "rougeL", "rougeLsum")},
    }
    expected["token_f1"][2] = 0.0  # SQuAD takes the point away: 42.0 is the word 420
    assert set(expected) == set(task_metrics("generate"))
    for name, scores in expected.items():
        found = METRICS[name].result(texts)
        assert found.rows == pytest.approx(scores), name
        assert found.score == pytest.approx(sum(scores) / 4)


def test_token_f1_counts_words_as_often_as_they_occur() -> None:
    assert token_f1("red red blue", "red blue blue") == pytest.approx(2 / 3)
    assert token_f1("An answer!", "the ANSWER") == 1.0
    assert token_f1("", "answer") == token_f1("answer", "") == 0.0


def test_exact_match_passes_over_what_it_is_told_to_as_the_harness_does() -> None:
    ignored = Ignored((r"\bthe ", "[$]"), case=True, punctuation=True, numbers=True)
    assert ignored("the Cat, $12!") == "cat "
    metrics = pytest.importorskip("lm_eval.api.metrics")
    pairs = [("The cat.", "the cat"), ("a 1 b", "a 2 b"), ("Cat", "cat"), ("$5", "5")]
    for options in ({}, {"ignore_case": True}, {"ignore_punctuation": True}, {"ignore_numbers": True},
                    {"regexes_to_ignore": [r"\$", "The"]}):  # fmt: skip
        settings = task(**options).ignored
        for text, accepted in pairs:
            theirs = metrics.exact_match_hf_evaluate([text], [accepted], **options)["exact_match"]
            assert Written([settings(text)], [(settings(accepted),)]).right == [bool(theirs)]


# --- fields and rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "accuracy"}, "the metrics of type: generate are exact_match, token_f1"),
        ({"generation_kwargs": {"do_sample": True}}, "greedy"),
        ({"generation_kwargs": {"temperature": 0.7}}, "greedy"),
        ({"generation_kwargs": {"num_beams": 4}}, "'num_beams' is not supported"),
        ({"generation_kwargs": {"max_new_tokens": 4}}, "write max_gen_toks"),
        ({"generation_kwargs": {"until": [""]}}, "empty text"),
        ({"generation_kwargs": {"max_gen_toks": 0}}, "greater than 0"),
        ({"filter_list": [{"filter": [{"function": "regexp"}]}]}, "did you mean 'regex'"),
        ({"filter_list": [{"filter": [{"function": "regex", "regex_pattern": "("}]}]}, "no regular expression"),
        ({"filter_list": [{"filter": [{"function": "strip", "fallback": "x"}]}]}, "no use for 'fallback'"),
        ({"filter_list": [{"filter": [{"function": "map"}]}]}, "needs 'mapping_dict'"),
        ({"filter_list": [{"filter": []}, {"filter": []}]}, "at most 1"),
        ({"metric": "rouge", "ignore_case": True}, "ignore_case goes with metric: exact_match"),
        ({"regexes_to_ignore": ["("]}, "no regular expression"),
        ({"positive": 1}, "no use for 'positive'"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**fields)


def test_fields_of_the_harness_that_say_greedy_are_taken() -> None:
    settings = task(generation_kwargs={"until": "\n", "do_sample": False, "temperature": 0.0, "max_gen_toks": 3})
    assert settings.generation_kwargs.ends == ("\n",)
    assert task().generation_kwargs.max_gen_toks == 256
    assert task().generation_kwargs.ends == ("\n\n",)
    assert task().filtered(" red\n") == "red"
    assert task(filter_list=[{"name": "raw", "filter": [{"function": "take_first"}]}]).filtered(" red\n") == " red\n"


def rows_of(folder: Path, lines: list[dict[str, Any]], **fields: Any) -> list[Any]:
    (folder / "v.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = task(dataset={"path": "json", "data_files": {"validation": "v.jsonl"}}, **fields)
    return load_rows("t", settings, "validation", root=folder, spec_file="spec.yaml")


@pytest.mark.parametrize(
    ("value", "source", "targets"),
    [
        ("red", "a", ("red",)),
        (["red", "crimson"], "a", ("red", "crimson")),
        (["red", "crimson"], "{{ a }}", ("red", "crimson")),
        ({"text": ["red", "crimson"]}, "{{ a.text }}", ("red", "crimson")),
        (["red", "crimson"], "{{ a[0] }}", ("red",)),
        ("[red]", "a", ("[red]",)),
        ("['red']", "a", ("['red']",)),
        (7, "a", ("7",)),
        ("", "a", ("",)),
    ],
)
def test_a_target_is_a_text_or_a_list_of_accepted_texts(
    tmp_path: Path, value: Any, source: str, targets: tuple[str, ...]
) -> None:
    (row,) = rows_of(tmp_path, [{"q": "colour?", "a": value}], doc_to_target=source)
    assert row.targets == targets
    assert row.text == "colour?"


@pytest.mark.parametrize(
    ("value", "fields", "message"),
    [
        ([], {}, "list of targets is empty"),
        (None, {}, "there is no target"),
        ({"text": "red"}, {}, "is no text"),
        ("red", {"metric": "numeric"}, "it has no number"),
        ("1 or 2", {"metric": "numeric"}, "it has 2 numbers"),
    ],
)
def test_a_target_that_cannot_be_compared_with_is_refused_with_its_row(
    tmp_path: Path, value: Any, fields: dict[str, Any], message: str
) -> None:
    good = ["1"] if isinstance(value, list) else {"text": "1"} if isinstance(value, dict) else "1"
    with pytest.raises(InputError, match=message) as caught:
        rows_of(
            tmp_path,
            [{"q": "colour?", "a": good if not isinstance(value, dict) else value}, {"q": "?", "a": value}],
            **fields,
        )
    assert "row " in str(caught.value)
    assert "tasks.t.doc_to_target" in str(caught.value.where)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_prompt_leaves_room_for_what_is_written_and_a_target_ends_with_the_end_of_a_sequence(
    tmp_path: Path, family: str
) -> None:
    tokenizer, kind = FAMILIES[family].tokenizer(), FAMILIES[family].kind
    lines = [
        {"q": "we walked home along the old wall " * 9, "a": "rain rain rain"},
        {"q": "she asked ", "a": ["no", "yes"]},
    ]

    def encoded(**fields: Any) -> list[Any]:
        settings = task(**fields)
        rows = rows_of(tmp_path, lines)
        return encode_rows(rows, settings, kind, tokenizer, longest=64, where="spec.yaml: tasks.t")

    cut, short = encoded(max_length=20, generation_kwargs={"max_gen_toks": 4})
    assert len(cut.input_ids) == 20
    assert cut.truncated
    assert len(cut.choices[0]) <= 4
    assert short.choices[0][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(short.choices[0], skip_special_tokens=True).strip() == "no"
    assert short.targets == ("no", "yes")
    if kind is Kind.CAUSAL:
        assert tokenizer.decode(short.input_ids) == "she asked "
        assert tokenizer.decode(cut.input_ids).endswith("old wall ")
        with pytest.raises(InputError, match="the model takes 60 tokens"):
            encoded(max_length=61, generation_kwargs={"max_gen_toks": 4})
        with pytest.raises(InputError, match="max_gen_toks is 256, but the model takes 64"):
            encoded()
    with pytest.raises(InputError, match="row 0 is longer"):
        encoded(generation_kwargs={"max_gen_toks": 4})


@pytest.mark.parametrize(
    ("fields", "where", "hint"),
    [
        ({"doc_to_choice": ["a", "b"]}, "tasks.red.doc_to_choice", "It goes with type: choice, classification"),
        ({"until": "x"}, "tasks.red.until", "It is a field of tasks.red.generation_kwargs"),
        (
            {"filter_list": [{"function": "strip"}]},
            "tasks.red.filter_list.0.function",
            "It is a field of tasks.red.filter_list.0.filter",
        ),
        ({"filter_list": [{"filter": [{"functoin": "strip"}]}]}, "filter.0.functoin", "Did you mean 'function'?"),
    ],
)
def test_a_field_in_the_wrong_place_is_told_where_it_belongs(
    tmp_path: Path, fields: dict[str, Any], where: str, hint: str
) -> None:
    project = make_project(tmp_path / "p", "t5", rows=2)
    name, settings = "red", {k: v for k, v in project.spec["tasks"]["red"].items() if k != "doc_to_choice"}
    project.spec["tasks"][name] = {**settings, "type": "generate", "doc_to_target": "input", **fields}
    project.write()
    told = project.cli("validate", "spec.yaml", check=2).stderr
    assert f"{where}: unknown key. {hint}" in told


# --- a study ---------------------------------------------------------------------------------------------------------


def generating(
    folder: Path, family: str, task_fields: dict[str, Any] | None = None, *, rows: int = 12, **changes: Any
) -> Project:
    """A project whose two tasks ask for what the expert of each writes, on three rows of four."""
    project = make_project(folder, family, rows=rows, samples=3, trials=3)
    tokenizer, kind = FAMILIES[family].tokenizer(), FAMILIES[family].kind
    kwargs = {"max_gen_toks": 6}
    for number, name in enumerate(EXPERTS):
        kept = {k: v for k, v in project.spec["tasks"][name].items() if k not in ("doc_to_choice", "type")}
        fields = {"type": "generate", "doc_to_target": "answers", "generation_kwargs": kwargs, **(task_fields or {})}
        project.spec["tasks"][name] = {**kept, **fields}
        model = perturbed(family, seed=number + 1).eval()
        for split in ("validation", "test"):
            file = folder / f"{name}.{split}.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            asked = task(doc_to_text="input", generation_kwargs=kwargs)
            asking = [Row(i, line["input"], None, (), None) for i, line in enumerate(lines)]
            examples = encode_rows(asking, asked, kind, tokenizer, longest=64, where="s")
            writer = writer_of(asked, tokenizer)
            assert writer is not None
            texts = write_texts(model, kind, examples, writer, pad_id=0)
            for i, (line, text) in enumerate(zip(lines, texts, strict=True)):
                line["answers"] = ["1 more", text.strip()] if i % 4 else ["something else"]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    project.spec.update(changes)
    project.write()
    return project


def scores_of(project: Project, model: str, metric: str = "exact_match") -> dict[str, float]:
    found = project.json("evaluate", "spec.yaml", "--model", model, "--split", "validation")["tasks"]
    assert {score["metric"] for score in found.values()} == {metric}
    return {name: score["score"] for name, score in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_study_of_generated_texts_is_validated_run_resumed_exported_and_scored(tmp_path: Path, family: str) -> None:
    project = generating(tmp_path / "p", family)
    found = project.json("validate", "spec.yaml")
    assert found["ok"], found
    assert any("sampled" in note["what"] for note in found["notes"])
    summary = project.json("run", "spec.yaml")
    assert summary["task_metrics"] == dict.fromkeys(EXPERTS, "exact_match")
    study = stored_study(StudySpec.from_yaml(project.file))
    assert all(set(trial_rows(trial)) == set(EXPERTS) for trial in study.trials)
    assert all(len(rows) == 12 for trial in study.trials for rows in trial_rows(trial).values())
    project.cli("run", "spec.yaml", "--add", "1")
    assert scores_of(project, "red")["red"] == 0.75  # the rows that ask for what it writes
    assert scores_of(project, "red")["blue"] < 0.75
    project.cli("export", "spec.yaml", "--out", "merged")
    assert "exact_match" in (project.folder / "merged" / "README.md").read_text()
    assert scores_of(project, "merged") == project.json("status", "spec.yaml")["best"]["tasks"]
    assert "exact_match" in project.cli("compare", "spec.yaml", "--methods", "averaging", "--split", "test").stdout
    other = {"tasks.red.ignore_case": "true", "tasks.red.generation_kwargs.max_gen_toks": "5"}
    for field, value in other.items():
        refused = project.cli("run", "spec.yaml", "--set", f"{field}={value}", check=2).stderr
        assert "is about something else" in refused


def test_without_targets_merges_are_scored_by_agreement_with_what_the_experts_write(tmp_path: Path) -> None:
    project = generating(tmp_path / "p", "llama", {"doc_to_target": None, "test_split": None}, objective="agreement")
    assert project.json("validate", "spec.yaml")["ok"]
    project.cli("merge", "spec.yaml", "--coefficients", "red=1,blue=0", "--method", "gta", "--out", "m")
    scores = scores_of(project, "m", metric="agreement")
    assert scores["red"] == 1.0
    assert scores["blue"] < 1.0


def test_a_fisher_is_kept_for_the_texts_and_ends_that_it_was_drawn_along(tmp_path: Path) -> None:
    project = generating(tmp_path / "p", "llama")
    keys = []
    for changes in (
        {},
        {"generation_kwargs": {"max_gen_toks": 4}},
        {"generation_kwargs": {"max_gen_toks": 6, "until": "a"}},
    ):
        spec = StudySpec.from_yaml(project.file)
        tasks = {name: {**task.model_dump(), **changes} for name, task in spec.tasks.items()}
        problem = load_problem(spec.derive(tasks=tasks))
        importances = Merger(problem, METHODS["df-merge"], None).importances
        key = importances.key(0, 0.5, list(problem.resident.names))
        assert key.estimator == "sampled"
        assert key.seed == 0
        keys.append(key)
    assert len({key.inputs for key in keys}) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_causal_models_write_what_lm_evaluation_harness_has_them_write(tmp_path: Path, family: str) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    save_model_directory(tmp_path / family, family)
    theirs = huggingface.HFLM(pretrained=str(tmp_path / family), batch_size=3, device="cpu", dtype="float32")
    kwargs = {"until": ["bo", "!"], "max_gen_toks": 8, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, kwargs), i) for i, text in enumerate(TEXTS)]
    settings = task(generation_kwargs=kwargs)
    rows = [Row(i, text, None, (), None) for i, text in enumerate(TEXTS)]
    examples = encode_rows(rows, settings, Kind.CAUSAL, theirs.tokenizer, longest=64, where="s")
    writer = writer_of(settings, theirs.tokenizer)
    assert writer is not None
    texts = write_texts(theirs.model, Kind.CAUSAL, examples, writer, pad_id=0)
    assert texts == theirs.generate_until(asked, disable_tqdm=True)
    assert len(set(texts)) > 2


def test_few_shots_and_chats_stand_before_what_is_asked_and_show_the_first_target(tmp_path: Path) -> None:
    lines = [{"q": f"what is {i}?", "a": [f"number {i}", "?"]} for i in range(4)]
    (row, *_) = rows_of(tmp_path, lines, num_fewshot=2)
    assert {each.answer for each in row.examples} <= {f"number {i}" for i in range(1, 4)}
    assert len(row.examples) == 2


def test_one_input_is_shown_with_its_accepted_texts_and_what_is_scored(tmp_path: Path) -> None:
    project = generating(tmp_path / "p", "t5")
    shown = project.cli("validate", "spec.yaml", "--show", "red").stdout
    assert "something else" in shown
    assert "6 at most" in shown
    assert "by exact_match" in shown
