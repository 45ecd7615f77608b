"""Bad input that nobody thought of: mutations of good specs, headers, configurations, rows and command lines.

Whatever comes out ends with exit code 0, 1 or 2.  A refusal is one message that names a file or a field and no
exception, `--json` is one JSON value, and nothing is left behind.  The draws are the same in every run.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.project import Project, make_project
from tests.test_boundary import check_told, header_of, snapshot, with_header

pytestmark = pytest.mark.slow  # what each kind of input must give stands, case by case, in test_boundary.py


def bounded(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


# What stands where something else should.

TEXTS = st.one_of(
    st.sampled_from(["", " ", "None", "true", "..", "~", "{{", "{{ input }}", "[*", "\x1b[31m", "\ud800", "a" * 5000]),
    st.text(max_size=8),
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([10**9, -(10**9), 2**31, 2**63, 10**41, -(10**41)]),
    st.floats(width=64, allow_nan=False),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)
GONE = object()
CHANGES = st.one_of(VALUES, st.just(GONE))


@st.composite
def mutated(draw: st.DrawFn, good: Any, times: int = 2) -> Any:
    """A JSON value with one or two places changed, removed or added."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, times))):
        target, place = value, None
        while isinstance(target, (dict, list)) and target and (place is None or draw(st.booleans())):
            keys = sorted(target) if isinstance(target, dict) else list(range(len(target)))
            place = (target, draw(st.sampled_from(keys)))
            target = place[0][place[1]]
        if place is None:
            continue
        holder, key = place
        change = draw(CHANGES)
        if change is GONE:
            del holder[key]
        else:
            holder[key] = change
        if isinstance(holder, dict) and draw(st.integers(0, 4)) == 0:
            holder[draw(st.text(max_size=6))] = draw(VALUES)
    return value


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("fuzz") / "project", rows=8, samples=2, layers=1)


@contextmanager
def copied(original: Project) -> Iterator[Project]:
    """A copy of a project, and beside it a folder of its own for temporary files."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        shutil.copytree(original.folder, Path(folder) / "p")
        (Path(folder) / "tmp").mkdir()
        patch.setattr(tempfile, "tempdir", f"{folder}/tmp")
        yield Project(Path(folder) / "p", original.family, original.spec)


def check(project: Project, *command: str) -> None:
    """Run a command, and check what must hold whatever it is given."""
    before = snapshot(project.folder.parent)
    done = project.cli(*command, "--json", check=None)
    assert done.returncode in (0, 1, 2), done
    printed = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    if done.returncode and isinstance(printed, dict) and "problems" in printed:
        check_told(done)
        assert done.stderr.count("error: ") >= 1
        for problem in printed["problems"]:
            assert problem["where"] or re.search(r"'|--\w", problem["what"]), f"names nothing: {problem}"
            assert "foreseen" not in problem["what"], problem
    assert snapshot(project.folder.parent) == before, "something is left behind"


# What is mutated.


@bounded(100)
@given(data=st.data())
def test_any_spec_is_read_or_refused(original: Project, data: st.DataObject) -> None:
    spec = data.draw(mutated(original.spec, 3))
    with copied(original) as project:
        project.file.write_text(json.dumps(spec))
        check(project, "status", "spec.yaml")


@bounded(60)
@given(text=st.one_of(st.text(max_size=40), st.lists(st.sampled_from("{}[]:-&*!|>%@`'\"#,? \n\tab1~"), max_size=30)))
@example(text="&a [*a]")
@example(text="? [a]")
def test_any_text_is_read_or_refused_as_a_spec(original: Project, text: Any) -> None:
    with copied(original) as project:
        project.file.write_text("".join(text), errors="surrogatepass", newline="")
        check(project, "list", "spec.yaml")


@bounded(40)
@given(data=st.data())
def test_any_header_of_weights_is_read_or_refused(original: Project, data: st.DataObject) -> None:
    with copied(original) as project:
        file = project.folder / "red" / "model.safetensors"
        header, tensors = header_of(file)
        with_header(file, data.draw(mutated(header)), tensors[: data.draw(st.sampled_from([None, 0, -1]))])
        check(project, "validate", "spec.yaml")


@bounded(12)
@given(data=st.data(), name=st.sampled_from(["config.json", "tokenizer_config.json", "generation_config.json"]))
def test_any_configuration_is_read_or_refused(original: Project, data: st.DataObject, name: str) -> None:
    with copied(original) as project:
        file = project.folder / "base" / name
        good = json.loads(file.read_text()) if file.exists() else {"pad_token_id": 0}
        file.write_text(json.dumps(data.draw(mutated(good))))
        check(project, "validate", "spec.yaml")


@bounded(50)
@given(data=st.data())
def test_any_row_is_read_or_refused(original: Project, data: st.DataObject) -> None:
    with copied(original) as project:
        file = project.folder / "red.validation.jsonl"
        good = json.loads(file.read_text().splitlines()[0])
        rows = data.draw(st.lists(mutated(good), min_size=1, max_size=3))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        check(project, "validate", "spec.yaml")


OPTIONS = [
    *("--storage", "--set", "--device", "--cache", "--trials", "--add", "--seed", "--method", "--acquisition"),
    *("--workers", "--out", "--coefficients", "--drop-rate", "--expert", "--coefficient", "--model", "--split"),
    *(
        "--shard-size",
        "--trial",
        "--methods",
        "--seeds",
        "--keep",
        "--to",
        "--from",
        "--every",
        "--figures",
        "--nosuch",
    ),
]
COMMANDS = [
    *("run", "status", "list", "merge", "fisher", "evaluate", "export", "compare", "repair", "report", "validate"),
    *("cache ls", "cache verify", "cache prune"),
]
WORDS = st.one_of(TEXTS, NUMBERS.map(str), st.sampled_from(["red=1,blue=1", "name=x", "a=b=c", "sqlite:///x.db"]))


@bounded(100)
@given(
    command=st.sampled_from(COMMANDS),
    options=st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS.filter(lambda word: "\0" not in word)), max_size=3),
)
def test_any_command_line_is_run_or_refused(original: Project, command: str, options: list[tuple[str, str]]) -> None:
    with copied(original) as project:
        shutil.rmtree(project.folder / "base")  # so that nothing is worked on
        check(project, *command.split(), "spec.yaml", *(part for option in options for part in option))
