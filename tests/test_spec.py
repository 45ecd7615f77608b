"""The spec: what may be written, in which forms, and what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dfmerge_studies.errors import InputError
from dfmerge_studies.spec import StudySpec, parse_size

# The whole spec of the design, with all of its three tasks.
WHOLE = """
name: three-tasks
base: models/base
experts:
  trec: {model: models/trec, task: trec}
  subj: models/subj
  cr: models/cr
tasks:
  trec: &task
    type: choice
    dataset: {path: json, data_files: {validation: trec.validation.jsonl, test: trec.test.jsonl}}
    doc_to_text: input
    doc_to_choice: choices
    doc_to_target: label
    validation_split: validation
    test_split: test
    max_length: 128
    limit: null
    metric: accuracy
  subj:
    <<: *task
    dataset: {path: json, data_files: {validation: subj.validation.jsonl, test: subj.test.jsonl}}
  cr:
    <<: *task
    dataset: {path: json, data_files: {validation: cr.validation.jsonl, test: cr.test.jsonl}}
method: df-merge
importance: {estimator: exact, samples: 30, indices: null, floor: 1.0e-12, dtype: float32}
search: {sampler: gp, acquisition: ei, trials: 60, startup_trials: 10, bounds: [0, 1], step: null, seed: 0}
storage: sqlite:///three-tasks.db
cache: .dfmerge/fishers
device: auto
"""

SHORT: dict[str, Any] = {
    "name": "colours",
    "base": "base",
    "experts": {"red": "red", "blue": {"model": "blue"}},
    "tasks": {
        name: {
            "dataset": {"path": "json", "data_files": {"validation": f"{name}.jsonl"}},
            "doc_to_text": "input",
            "doc_to_choice": ["yes", "no"],
            "doc_to_target": "label",
        }
        for name in ("red", "blue")
    },
}


def read(folder: Path, content: Any, *overrides: str, name: str = "spec.yaml") -> StudySpec:
    file = folder / name
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return StudySpec.from_yaml(file, overrides)


def problem(folder: Path, content: Any) -> str:
    """What is wrong with a spec; empty where nothing is."""
    try:
        read(folder, content)
    except InputError as error:
        return error.what
    return ""


def refused(folder: Path, content: Any, *overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        read(folder, content, *overrides)
    return caught.value


def test_the_whole_example_of_the_design_is_read(tmp_path: Path) -> None:
    spec = read(tmp_path, WHOLE)
    assert list(spec.experts) == ["trec", "subj", "cr"]
    assert list(spec.tasks) == ["trec", "subj", "cr"]
    assert spec.search.bounds == (0, 1)
    assert spec.importance.floor == 1e-12
    assert spec.storage == "sqlite:///three-tasks.db"


def test_merge_keys_share_fields_between_tasks_and_own_fields_win(tmp_path: Path) -> None:
    spec = read(tmp_path, WHOLE)
    assert spec.tasks["subj"].max_length == 128
    assert spec.tasks["subj"].dataset["data_files"]["test"] == "subj.test.jsonl"
    assert spec.tasks["trec"].dataset["data_files"]["test"] == "trec.test.jsonl"


def test_short_and_long_forms_mean_the_same(tmp_path: Path) -> None:
    long = {
        **SHORT,
        "experts": {name: {"model": name, "task": name} for name in ("red", "blue")},
        "tasks": {name: {"type": "choice", **task} for name, task in SHORT["tasks"].items()},
        "objective": {"kind": "mean"},
    }
    short = {**SHORT, "objective": "mean"}
    assert read(tmp_path, short).model_dump() == read(tmp_path, long).model_dump()


def test_a_search_may_be_named_instead_of_written_out(tmp_path: Path) -> None:
    paper = {"sampler": "gp", "acquisition": "ei", "trials": 60, "startup_trials": 10, "bounds": [0, 1]}
    long = read(tmp_path, {**SHORT, "search": paper})
    assert read(tmp_path, {**SHORT, "search": "paper"}).model_dump() == long.model_dump()
    assert read(tmp_path, SHORT, "search=paper").search == long.search


def test_fields_of_a_named_search_can_be_overridden_one_by_one(tmp_path: Path) -> None:
    search = read(tmp_path, {**SHORT, "search": "paper"}, "search.trials=5", "search.acquisition=ucb").search
    assert (search.sampler, search.acquisition, search.trials) == ("gp", "ucb", 5)
    assert read(tmp_path, {**SHORT, "search": "paper"}).search.trials == 60  # the name means what it did


def test_a_search_of_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    assert "paper" in refused(tmp_path, {**SHORT, "search": "papre"}).what
    assert "paper" in refused(tmp_path, {**SHORT, "search": "quick"}).what


def test_confidence_bounds_need_no_word_on_the_sampler(tmp_path: Path) -> None:
    assert read(tmp_path, SHORT, "search.acquisition=ucb").search.stated_sampler == "gp"
    assert "needs sampler: gp" in str(refused(tmp_path, SHORT, "search.acquisition=ucb", "search.sampler=auto"))


def test_an_expert_may_have_no_task_when_the_spec_says_so(tmp_path: Path) -> None:
    spec = read(tmp_path, {**SHORT, "experts": {**SHORT["experts"], "grey": {"model": "grey", "task": None}}})
    assert spec.experts["grey"].task is None
    assert spec.experts["blue"].task == "blue"


def test_an_expert_in_short_form_needs_a_task_of_its_name(tmp_path: Path) -> None:
    error = refused(tmp_path, {**SHORT, "experts": {"grey": "grey"}})
    assert "experts.grey" in str(error.where)
    assert "red, blue" in error.what
    assert "task: null" in str(error.hint)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("name=other", ("name",), "other"),
        ("search.trials=7", ("search", "trials"), 7),
        ("search.bounds=[0.1, 0.9]", ("search", "bounds"), (0.1, 0.9)),
        ("search.enqueue=[0.5, {red: 0, blue: 1}]", ("search", "enqueue"), [0.5, {"red": 0, "blue": 1}]),
        ("tasks.red.max_length=12", ("tasks", "red", "max_length"), 12),
        (
            "tasks.red.dataset.data_files.validation=x.csv",
            ("tasks", "red", "dataset", "data_files", "validation"),
            "x.csv",
        ),
        ("experts.red.task=null", ("experts", "red", "task"), None),
        ("experts.red.task=blue", ("experts", "red", "model"), "red"),
        ("experts.red=elsewhere", ("experts", "red", "model"), "elsewhere"),
        ("cache=null", ("cache",), None),
        ("importance.indices={red: [3, 1]}", ("importance", "indices"), {"red": [3, 1]}),
        (" search.seed = 5", ("search", "seed"), 5),
    ],
)
def test_an_override_reaches_any_field_and_is_typed_as_yaml(
    tmp_path: Path, override: str, field: tuple[str, ...], value: Any
) -> None:
    found: Any = read(tmp_path, SHORT, override).model_dump()
    for part in field:
        found = found[part]
    assert found == value


def test_later_overrides_win(tmp_path: Path) -> None:
    assert read(tmp_path, SHORT, "search.trials=3", "search.trials=4").search.trials == 4


@pytest.mark.parametrize("override", ["search", "=3", "name.x=1", "search.trials.x=1", "search.bounds=[0,"])
def test_an_override_that_fits_nothing_is_refused(tmp_path: Path, override: str) -> None:
    error = refused(tmp_path, {**SHORT, "search": {"trials": 3}}, override)
    assert error.where == "--set"
    assert error.hint


def test_an_override_of_one_spec_does_not_reach_a_field_that_a_merge_key_shares(tmp_path: Path) -> None:
    spec = read(tmp_path, WHOLE, "tasks.subj.max_length=64")
    assert (spec.tasks["trec"].max_length, spec.tasks["subj"].max_length) == (128, 64)


def test_an_override_does_not_reach_another_task_through_an_alias(tmp_path: Path) -> None:
    shared = WHOLE.replace(
        "dataset: {path: json, data_files: {validation: subj.validation.jsonl, test: subj.test.jsonl}}", ""
    )
    spec = read(tmp_path, shared, "tasks.subj.dataset.path=csv")
    assert (spec.tasks["trec"].dataset["path"], spec.tasks["subj"].dataset["path"]) == ("json", "csv")


def test_folders_start_where_the_spec_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "one.yaml").write_text(yaml.safe_dump(SHORT))
    monkeypatch.chdir(tmp_path)
    spec = StudySpec.from_yaml("studies/one.yaml")
    assert spec.root == spec.workdir == tmp_path / "studies"
    elsewhere = StudySpec.from_yaml("studies/one.yaml", workdir=tmp_path)
    assert (elsewhere.root, elsewhere.workdir) == (tmp_path / "studies", tmp_path)


def test_a_derived_spec_is_validated_and_keeps_its_folders(tmp_path: Path) -> None:
    spec = read(tmp_path, SHORT)
    derived = spec.derive(name="colours.gta", method="gta")
    assert (derived.file, derived.root, derived.method) == (spec.file, spec.root, "gta")
    assert derived.experts == spec.experts


def test_settings_cannot_be_changed_after_reading(tmp_path: Path) -> None:
    spec = read(tmp_path, SHORT)
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "override",
    [
        "storage={url: 'postgresql://me:hush@host/db'}",
        "storage=['postgresql://me:hush@host/db']",
        "storages=postgresql://me:hush@host/db",
        "search.storage=postgresql://me:hush@host/db",
        "storage: postgresql://me:hush@host/db",
    ],
)
def test_a_password_never_appears_in_a_message(tmp_path: Path, override: str) -> None:
    assert "hush" not in str(refused(tmp_path, SHORT, override))


def test_a_password_does_not_appear_when_the_yaml_around_it_is_broken(tmp_path: Path) -> None:
    assert "hush" not in str(refused(tmp_path, "storage: postgresql://me:hush@host/db\n name: [\n"))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("12", 12),
        ("500MB", 500_000_000),
        ("500 MB", 500_000_000),
        ("1.5GB", 1_500_000_000),
        ("2GiB", 2 * 1024**3),
        ("3k", 3000),
        ("1T", 10**12),
    ],
)
def test_sizes_are_read_in_powers_of_1000_and_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1GB", "GB", "1 GB 2", "1e9", "1iB"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ({"kind": "weighted"}, "go together"),
        ({"kind": "mean", "weights": {"red": 1}}, "go together"),
        ({"kind": "weighted", "weights": {"red": 0}}, "not all zero"),
        ({"kind": "weighted", "weights": {"red": -1}}, "not be negative"),
        ({"kind": "weighted", "weights": {"rde": 1}}, "unknown task 'rde'"),
        ("median", "median"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused(tmp_path: Path, objective: Any, says: str) -> None:
    error = refused(tmp_path, {**SHORT, "objective": objective})
    assert says in error.what
    assert "objective" in str(error.where)


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "_x", "-x", "x" * 100])
def test_harmless_names_are_taken(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, SHORT, f"name='{name}'").name == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a\\b", "ä", "x" * 101, "a\n", "a:b"])
def test_names_that_could_become_other_paths_are_refused(tmp_path: Path, name: str) -> None:
    assert "name" in str(refused(tmp_path, {**SHORT, "name": name}).where)
    renamed = {**SHORT, "tasks": {**SHORT["tasks"], name: SHORT["tasks"]["red"]}}
    assert "tasks" in str(refused(tmp_path, renamed).where)


def fields_of(content: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Dotted places of a dumped spec that hold no mapping, and those of the mappings themselves."""
    if not isinstance(content, dict) or path[-1:] == ("dataset",):
        return [path]
    inner = [place for key, value in content.items() for place in fields_of(value, (*path, key))]
    return [path, *inner] if path else inner


def with_value(content: Any, place: tuple[str, ...], value: Any) -> Any:
    if not place:
        return value
    return {**content, place[0]: with_value(content[place[0]], place[1:], value)}


def dumped(tmp_path: Path) -> dict[str, Any]:
    content = {**SHORT, "baselines": ["gta"]}
    content["search"] = {"enqueue": [0.5, {"red": 0.1, "blue": 0.2}]}
    content["importance"] = {"indices": {"red": [1, 2]}}
    content["objective"] = {"kind": "weighted", "weights": {"red": 1, "blue": 2}}
    return read(tmp_path, content).model_dump(mode="json")


@pytest.mark.parametrize("word", ["yes", "no", "on", "off"])
def test_a_boolean_is_refused_in_every_field_but_those_that_are_one(tmp_path: Path, word: str) -> None:
    content = dumped(tmp_path)
    value = yaml.safe_load(word)
    places = fields_of(content)
    assert len(places) > 40
    for place in places:
        changed = with_value(content, place, value)
        if place[-1] in ("trust_remote_code", "guard", "apply_chat_template", "fewshot_as_multiturn", "racing"):
            assert "YAML reads" not in problem(tmp_path, changed)  # but perhaps that an expert stands for the guard
            continue
        error = refused(tmp_path, changed)
        if place[-1] == "type":
            assert "'choice', 'classification'" in error.what
            continue
        assert ".".join(place) in str(error.where), place
        assert f"found {str(value).lower()}" in error.what, place
        assert "YAML reads yes, no, on and off" in error.what, place


@pytest.mark.parametrize(
    ("override", "field", "hint"),
    [
        ("search.enqueue=[true]", "search.enqueue.0", "number"),
        ("search.enqueue=[{red: 0.5, blue: yes}]", "search.enqueue.0.blue", "number"),
        ("search.bounds=[no, yes]", "search.bounds.0", "number"),
        ("importance.indices={red: [3, on]}", "importance.indices.red.1", "number"),
        ("objective={kind: weighted, weights: {red: yes, blue: 1}}", "objective.weights.red", "number"),
        ("tasks.red.doc_to_choice=[yes, no]", "tasks.red.doc_to_choice.0", "quotes"),
        ("tasks.red.doc_to_target=yes", "tasks.red.doc_to_target", "quotes"),
        ("tasks.red.limit=on", "tasks.red.limit", "number"),
        ("importance.samples=yes", "importance.samples", "number"),
        ("search.max_drop=off", "search.max_drop", "null"),
        ("cache=no", "cache", "null"),
        ("experts={on: red}", "experts.True", "quotes"),
        ("tasks.red.doc_to_choice=[1, 2]", "tasks.red.doc_to_choice", "quotes: '1'"),
        ("experts={7: red}", "experts", "quotes: '7'"),
    ],
)
def test_what_yaml_reads_otherwise_than_it_is_written_is_refused_with_its_place(
    tmp_path: Path, override: str, field: str, hint: str
) -> None:
    error = refused(tmp_path, SHORT, override)
    assert field in str(error.where)
    assert hint in str(error.hint)


def test_numbers_may_be_written_as_yaml_reads_them(tmp_path: Path) -> None:
    spec = read(tmp_path, SHORT, "importance.floor=1e-12", "search.step=1", "search.trials=20.0", "tasks.red.limit='7'")
    assert (spec.importance.floor, spec.search.step, spec.search.trials) == (1e-12, 1, 20)  # 1e-12 is a text in YAML
    assert spec.tasks["red"].limit == 7
