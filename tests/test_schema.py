"""`dfmerge schema`: a JSON schema that takes every spec that we take, and refuses the slips that an editor can see."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dfmerge_studies.cli.app import main
from dfmerge_studies.errors import InputError
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.spec.fields import ExpertSettings, ImportanceSettings, ObjectiveSettings, SearchSettings
from dfmerge_studies.spec.reading import read_yaml
from dfmerge_studies.spec.schema import spec_schema
from dfmerge_studies.tasks.settings import ChoiceTask, ClassificationTask
from tests.models import FAMILIES
from tests.project import make_project

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs/spec.schema.json"
URL = "https://raw.githubusercontent.com/dfmerge-studies/dfmerge-studies/main/docs/spec.schema.json"
SHIPPED = sorted([*ROOT.glob("studies/**/*.yaml"), ROOT / "dfmerge_studies/quickstart/quickstart.yaml"])
WHOLE: dict[str, Any] = {
    "name": "s",
    "base": "b",
    "experts": {"a": "models/a", "c": {"model": "models/c", "task": None}, "d": {"model": "models/d"}},
    "tasks": {
        "a": {"dataset": {"path": "json"}, "doc_to_text": "t", "doc_to_choice": ["x", "y"], "doc_to_target": 0},
        "d": {"type": "choice", "dataset": {"path": "csv"}, "doc_to_text": "t", "doc_to_choice": "o"},
    },
}  # fmt: skip
WHOLE["tasks"]["d"]["doc_to_target"] = "label"


@pytest.fixture(scope="module")
def schema() -> jsonschema.protocols.Validator:
    kind = jsonschema.validators.validator_for(spec_schema())
    kind.check_schema(spec_schema())
    return kind(spec_schema())


def in_documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every whole spec, and every part of one, in the blocks of YAML of the documents."""
    for document in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("studies/*.md")]):
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", document.read_text(), re.DOTALL)):
            # A block may show one field in several ways.
            for part in [block] if "experts:" in block else block.splitlines():
                content = yaml.safe_load(part)
                if isinstance(content, dict):
                    yield f"{document.name}:{number}", content


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_every_shipped_spec_is_valid_and_names_the_schema_for_editors(schema, file: Path):
    schema.validate(read_yaml(file))
    named = re.search(r"^# yaml-language-server: \$schema=(\S+)$", file.read_text(), re.MULTILINE)
    assert named is not None
    place = named.group(1)
    assert place == URL if place.startswith("https") else (file.parent / place).resolve() == FILE


def test_every_spec_of_the_documents_is_valid(schema):
    found = list(in_documents())
    assert len(found) > 4
    for where, content in found:
        whole = content if "experts" in content else {**WHOLE, **content}
        errors = [error.message for error in schema.iter_errors(whole)]
        assert not errors, (where, errors)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_specs_of_projects_are_valid(schema, tmp_path, family):
    schema.validate(read_yaml(make_project(tmp_path / family, family, rows=2).file))


SHORT = {
    "objective by its kind": {"objective": "min"},
    "a search by one word": {"search": "paper"},
    "points as one number": {"search": {"enqueue": [0.5, {"a": 1.0, "c": 0.0, "d": 1.0}]}},
    "another study by its name": {"search": {"warm_start": "former"}},
    "no groups": {"search": {"granularity": "model"}},
    "groups": {"search": {"granularity": {"groups": {"attention": "attn"}}, "holdout": 0.2}},
    "rows in a file": {"importance": {"indices": "rows.json"}},
    "no cache": {"cache": None},
    "parameters": {"parameters": {"ties": {"density": [0.1, 0.2]}}},
    "weights": {"objective": {"kind": "weighted", "weights": {"a": 1, "d": 2}}},
    "whole bounds": {"search": {"bounds": [0, 2], "max_drop": 3}},
}


@pytest.mark.parametrize("name", SHORT)
def test_short_forms_that_a_spec_may_have_are_valid(schema, tmp_path, name):
    content = {**WHOLE, **SHORT[name]}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(content))
    StudySpec.from_yaml(tmp_path / "spec.yaml")
    schema.validate(content)


def test_every_field_with_a_short_form_is_among_those_that_the_schema_knows():
    """A validator that runs before the type is checked may take a form that pydantic's own schema does not have."""
    models = [StudySpec, ExpertSettings, ImportanceSettings, SearchSettings, ObjectiveSettings]
    models += [ChoiceTask, ClassificationTask]
    fields = {
        name
        for model in models
        for each in model.__pydantic_decorators__.field_validators.values()
        if each.info.mode == "before"
        for name in each.info.fields
    }
    known = {"experts", "tasks", "objective", "search", "warm_start", "granularity"}
    assert fields == known, "teach spec/schema.py the new form"


def slips() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, value in (
        (("methud",), "gta"), (("method",), "gtaa"), (("baselines",), ["average"]), (("search", "sampler"), "tpe"),
        (("search", "trails"), 3), (("search",), "papper"), (("objective",), "median"), (("experts", "a"), 3),
        (("experts", "a"), {"task": "a"}), (("tasks", "a", "metric"), "acuracy"), (("tasks", "a", "type"), "chioce"),
        (("tasks", "a", "doc_to_text"), None), (("importance", "estimator"), "exakt"), (("parameters", "tie"), {}),
        (("search", "trials"), 0), (("base",), True),
    ):  # fmt: skip
        content: dict[str, Any] = copy.deepcopy(WHOLE)
        target = content
        for name in path[:-1]:
            target = target.setdefault(name, {})
        target[path[-1]] = value
        yield f"{'.'.join(path)}={value}", content


@pytest.mark.parametrize(("name", "content"), list(slips()), ids=lambda each: each if isinstance(each, str) else "")
def test_slips_that_an_editor_can_see_are_none(schema, tmp_path, name, content):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError):
        StudySpec.from_yaml(tmp_path / "spec.yaml")
    assert not schema.is_valid(content)


def test_the_command_prints_it_and_the_file_of_editors_is_the_same(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["schema"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out) == spec_schema()
    assert json.loads(FILE.read_text()) == spec_schema(), "make it again: dfmerge schema > docs/spec.schema.json"
