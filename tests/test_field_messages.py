"""What is said of a wrong field: where it stands in the spec, what may stand there, and nothing of how we hold it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from dfmerge_studies import StudySpec
from dfmerge_studies.spec.messages import Wrong, explained
from dfmerge_studies.tasks.settings import AnyTask, GenerateTask
from dfmerge_studies.tasks.strict import Settings, members
from tests.project import Project

ODD: tuple[Any, ...] = (None, 3, -0.5, "zzz", [], ["zzz"], [3], [[]], {}, {"zzz": 1}, {"zzz": "x"}, [{"zzz": []}])
INTERNAL = re.compile(r"instance of|dictionary|tuple|object to extract|function-|NoneType|\bNone\b|Input tag|\[key\]")


def said(project: Project, *overrides: str) -> list[str]:
    """All that is wrong with the spec under some overrides, without the folder."""
    problems = StudySpec.examine(project.file, list(overrides)).problems
    return [str(problem).replace(f"{project.folder}/", "") for problem in problems]


@pytest.mark.parametrize(
    ("override", "where", "words"),
    [
        (
            "search.granularity=layer",
            "search.granularity",
            "found 'layer'; expected model, layers, {blocks: K} or {groups: {NAME: REGEX}}. Did you mean 'layers'?",
        ),
        ("search.granularity=[1]", "search.granularity", "found a list; expected model, layers, {blocks: K} or"),
        ("experts.red=", "experts.red", "found null; expected a model's directory or Hub id, or {model, task}"),
        ("experts.red=3", "experts.red", "found 3; expected a model's directory or Hub id, or {model, task}"),
        ("search.racing={error: 2}", "search.racing.error", "found 2; input should be less than or equal to 0.5"),
        ("search.racing={eror: 0.1}", "search.racing.eror", "unknown key. Did you mean 'error'?"),
        ("search.racing=maybe", "search.racing", "found 'maybe'; expected true, false or {error: NUMBER}"),
        ("search.warm_start=3", "search.warm_start", "found 3; expected a study's name, or {study, storage, points}"),
        (
            "search.enqueue=[x]",
            "search.enqueue.0",
            "found 'x'; expected a number, fisher-trace or a mapping of numbers",
        ),
        ("search.enqueue=[{red: x}]", "search.enqueue.0.red", "found 'x'; input should be a valid number"),
        ("search.bounds=3", "search.bounds", "found 3; expected a list of two numbers"),
        ("search.bounds=[]", "search.bounds", "found a list; expected a list of two numbers"),
        ("search.bounds=[0, 1, 2]", "search.bounds", "found a list; expected a list of two numbers"),
        ("search=3", "search", "found 3; expected a mapping of fields, or paper, per-expert, gradient"),
        ("objective=[1]", "objective", "found a list; expected a kind such as mean, or {kind, weights}"),
        ("protect=3", "protect", "found 3; expected {task, rank, strength}"),
        ("parameters.ties={keep: x}", "parameters.ties.keep", "found 'x'; expected a number or a list of numbers"),
        ("tasks.red=3", "tasks.red", "found 3; expected a mapping of fields"),
        ("tasks.red.type=choise", "tasks.red.type", "found 'choise'; expected one of 'choice', "),
        ("tasks.red.limit=x", "tasks.red.limit", "found 'x'; expected a number"),
        ("tasks.red.limit=-1.5", "tasks.red.limit", "found -1.5; input should be greater than 0"),
        ("tasks.red.apply_chat_template=3", "tasks.red.apply_chat_template", "found 3; expected true, false or a text"),
        ("tasks.red.doc_to_choice=[3]", "tasks.red.doc_to_choice.0", "Write it in quotes: '3'"),
    ],
)
def test_a_wrong_value_is_told_once_at_its_own_place_with_what_may_stand_there(project, override, where, words) -> None:
    (message,) = said(project, override)
    assert message.startswith(f"spec.yaml: {where}: ")
    assert words in message


@pytest.mark.parametrize(
    ("override", "mend"),
    [
        ("trials=5", "It is a field of search."),
        ("search.blocks=5", "It is a field of search.granularity."),
        ("search.study=old", "It is a field of search.warm_start."),
        ("tasks.red.storage=x", "Its place is at the top of the spec."),
        ("tasks.red.filter_list=[]", "It goes with type: generate."),
        ("tasks.red.until=x", "It is a field of generation_kwargs, which goes with type: generate."),
        ("tasks.red.doc_to_txt=x", "Did you mean 'doc_to_text'?"),
        ("objective={kind: mean, weight: 1}", "Did you mean 'weights'?"),
    ],
)
def test_a_key_that_is_not_known_is_sent_to_its_place(project, override, mend) -> None:
    (message,) = said(project, override)
    assert "unknown key" in message
    assert message.endswith(mend)


@pytest.mark.parametrize(
    ("override", "known", "foreign"),
    [
        ("tasks.red.path=3", {"doc_to_choice", "num_fewshot", "dataset"}, {"filter_list", "fallback", "do_sample"}),
        ("search..trials=3", {"trials", "granularity"}, {"study", "points", "storage", "error", "blocks", "each"}),
        ("experts.red.zzz=1", {"model", "task"}, {"base"}),
        ("search.racing={zzz: 1}", {"error"}, {"trials"}),
    ],
)
def test_the_fields_that_are_offered_are_those_of_the_place(project, override, known, foreign) -> None:
    (message,) = said(project, override)
    offered = set(message.partition("Known fields: ")[2].rstrip(".").split(", "))
    assert known <= offered
    assert not foreign & offered


def test_tasks_that_are_named_like_types_and_experts_like_members_of_a_union_keep_their_names(project) -> None:
    project.write(
        experts={"float": {"model": "red", "task": "choice"}},
        tasks={"choice": {**project.spec["tasks"]["red"], "limit": -1}},
        search={"enqueue": [{"float": "x"}]},
    )
    places = [message.split(": ")[1] for message in said(project)]
    assert set(places) == {"tasks.choice.limit", "search.enqueue.0.float"}


def fields_of(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every field below a model, by the names that a spec of the project has."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        for kind in members(field.annotation):
            inner = get_args(kind)[1] if get_origin(kind) is dict else kind
            steps = ("red",) if get_origin(kind) is dict else ()
            for each in members(inner):
                if isinstance(each, type) and issubclass(each, Settings) and not issubclass(each, get_args(AnyTask)):
                    yield from fields_of(each, (*above, name, *steps))


PLACES = [*fields_of(StudySpec), *fields_of(GenerateTask, ("tasks", "red"))]


def test_no_message_of_any_field_names_what_the_spec_does_not_have(project: Project) -> None:
    classes = "|".join(each.__name__ for each in all_settings(Settings))
    looked = 0
    for place in dict.fromkeys(PLACES):
        for value in ODD:
            content = yaml.safe_load(project.file.read_text())
            if place[:2] == ("tasks", "red"):
                content["tasks"]["red"]["type"] = "generate"
                del content["tasks"]["red"]["doc_to_choice"]
            put(content, place, value)
            for each in wrong_in(content):
                looked += 1
                text = str(each.problem)
                assert not INTERNAL.search(text), (place, value, text)
                assert not re.search(rf"\b({classes})\b", text), (place, value, text)
                assert exists(content, each.place), (place, value, text)
    assert looked > 500


def wrong_in(content: dict[str, Any]) -> list[Wrong]:
    """What is wrong with a spec's fields."""
    try:
        StudySpec.model_validate(content)
    except ValidationError as error:
        return explained(error, Path("spec.yaml"), StudySpec)
    return []


def all_settings(model: type[Settings]) -> Iterator[type[Settings]]:
    for each in model.__subclasses__():
        yield each
        yield from all_settings(each)


def put(content: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    """Set a field of a spec, whatever stands above it."""
    target = content
    for name in place[:-1]:
        if not isinstance(target.get(name), dict):
            target[name] = {}
        target = target[name]
    target[place[-1]] = value


def exists(content: Any, place: tuple[str, ...]) -> bool:
    """Whether a spec has a place, or all of it but the last name: a field that is lacking."""
    for depth, name in enumerate(place, 1):
        if isinstance(content, list):
            if int(name) >= len(content):
                return False
            content = content[int(name)]
        elif isinstance(content, dict) and name in content:
            content = content[name]
        else:
            return depth == len(place) and (isinstance(content, dict) or (depth > 1 and name in ("kind", "study")))
    return True
