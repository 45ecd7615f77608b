"""The documents name only what there is: files, modules, functions, fields of the spec, words of the command line."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml
from pydantic import BaseModel, TypeAdapter

from dfmerge_studies.spec import StudySpec
from dfmerge_studies.spec.fields import ImportanceSettings, SearchSettings
from dfmerge_studies.tasks.settings import ChoiceTask
from tests.models import FAMILIES, make_model

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dfmerge_studies"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "studies" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
OF_A_USER = ("csv", "db", "html", "json", "jsonl", "log", "png", "safetensors", "yaml")  # endings of files made later
MODULES = {"nn": "torch.nn"}  # how other programs' modules are called for short
OF_OTHERS = {"Args", "Raises", "Returns", "torch.py"}  # sections of Google's docstrings; a file that must do no harm

NAME = r"@?[^\W\d]\w*"
ENDINGS = "py|j2|md|sbatch|sh|toml|txt"
A_FILE = re.compile(rf"(?P<path>[\w.*-]*(?:/[\w.*-]+)*\.(?:{ENDINGS})|[\w-]+(?:/[\w-]+)*/)(?:: (?P<name>\w+))?")
A_DOTTED_NAME = re.compile(rf"{NAME}(?:\.(?:\w+|\*))+(?:\(\))?")
A_WORD = re.compile(rf"{NAME}(?:\(\))?")


def spans(document: Path) -> list[tuple[int, list[str]]]:
    """What stands in backticks, by the number of its line; blocks of code are left out."""
    found, fenced = [], False
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            found.append((number, re.findall(r"`([^`]+)`", line)))
    return found


def file_is_there(path: str, document: Path, beside: Path | None) -> Path | None:
    """The file that a document names: from the top, in the package, beside the document or the file named before it."""
    places = [ROOT, PACKAGE, document.parent, *([beside.parent] if beside else [])]
    return next((place / path for place in places if (place / path).exists()), None)


@cache
def sources() -> dict[str, ast.Module]:
    """The parsed code of package, scripts and tests, by the name of the module."""
    files = [file for folder in (PACKAGE, ROOT / "scripts", ROOT / "tests") for file in folder.rglob("*.py")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return {name: ast.parse(file.read_bytes()) for name, file in zip(names, files, strict=True)}


@cache
def words() -> set[str]:
    """Identifiers of the code and words of its texts without docstrings, and what else a document may speak of."""
    found = set(re.findall(r"\w+", (ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    found.update(field.name for field in dataclasses.fields(peft.LoraConfig))
    for family in FAMILIES:
        found.update(part for name, _ in make_model(family).named_modules() for part in name.split("."))
    for module, tree in sources().items():
        nodes = list(ast.walk(tree))
        definitions = [node for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        found.update(node.name for node in definitions)
        found.update(node.arg for node in nodes if isinstance(node, ast.arg))  # of tests, also their fixtures
        if not module.startswith("tests."):
            docstrings = {ast.get_docstring(node, clean=False) for node in (tree, *definitions)}
            for node in nodes:
                found.update(_words_of(node, docstrings))
    return found


def _words_of(node: ast.AST, docstrings: set[str | None]) -> list[str]:
    if isinstance(node, ast.Constant):
        return re.findall(r"\w+", node.value) if isinstance(node.value, str) and node.value not in docstrings else []
    texts = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module", "asname")]
    return [word for text in texts if isinstance(text, str) for word in text.split(".")]


def is_a_field(parts: list[str], model: Any = StudySpec) -> bool:
    """Whether a dotted name is one of a field of the spec; `NAME` and `*` stand for any key of a table."""
    if not parts:
        return True
    if isinstance(model, type) and issubclass(model, BaseModel):
        field = model.model_fields.get(parts[0])
        return field is not None and is_a_field(parts[1:], field.annotation)
    kinds = getattr(model, "__args__", ())
    if getattr(model, "__origin__", None) is dict:
        return kinds[1] is Any or ((parts[0] == "*" or parts[0].isupper()) and is_a_field(parts[1:], kinds[1]))
    return any(is_a_field(parts, kind) for kind in kinds)


@cache
def classes() -> dict[str, set[str]]:
    """By the name of a class in lower case: attributes that it has, of itself or of its instances."""
    found: dict[str, set[str]] = {}
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names = found.setdefault(node.name.casefold(), set())
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef):
                        names.add(inner.name)
                    elif isinstance(inner, ast.Attribute) and getattr(inner.value, "id", None) == "self":
                        names.add(inner.attr)
                    elif isinstance(inner, ast.Name):
                        names.add(inner.id)
    return found


def members(name: str) -> set[str]:
    """Attributes of the classes of this name, which may be written as that of a variable."""
    return classes().get(name.replace("_", "").casefold(), set())


def leads_somewhere(start: str, rest: list[str]) -> bool:
    """Whether a module can be imported, and attributes of it, or modules below it, found one after the other."""
    try:
        here = importlib.import_module(start)
    except ImportError:
        return False
    for number, part in enumerate(rest):
        if hasattr(here, part):
            here = getattr(here, part)
        else:
            return hasattr(here, "__path__") and leads_somewhere(f"{here.__name__}.{part}", rest[number + 1 :])
    return True


def is_known(name: str) -> bool:
    """Whether a dotted name is one of the package, its spec, its classes, Python or a library."""
    first, *rest = name.removesuffix("()").split(".")
    inside = [module for module in sources() if module.startswith("dfmerge_studies.") and module.endswith(f".{first}")]
    return (
        is_a_field([first, *rest])
        or rest[0] in members(first)
        or any(leads_somewhere(module, rest) for module in (f"dfmerge_studies.{first}", *inside))
        or leads_somewhere(MODULES.get(first, first), rest)
        or hasattr(getattr(builtins, first, None), rest[0])
    )


def stale(document: Path) -> list[str]:
    """Lines and names of a document that lead nowhere."""
    found = []
    for number, marked in spans(document):
        beside: Path | None = None
        for span in marked:
            good = True
            if span in OF_OTHERS:
                continue
            if file := A_FILE.fullmatch(span):
                beside = file_is_there(file["path"], document, beside)
                good = beside is not None and (not file["name"] or file["name"] in beside.read_text(encoding="utf-8"))
            elif A_DOTTED_NAME.fullmatch(span):
                placeholder, ending = span.partition(".")[0].isupper(), span.rpartition(".")[2]
                good = placeholder or ending in OF_A_USER or is_known(span)
            elif A_WORD.fullmatch(span):
                good = span.isupper() or span.strip("@()") in words()
            if not good:
                found.append(f"line {number}: {span}")
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_file_and_name_in_backticks_is_there(document: Path) -> None:
    assert stale(document) == []


OF_THE_REPOSITORY = re.compile(
    r"https://(?:github|raw\.githubusercontent)\.com/dfmerge-studies/dfmerge-studies/(?:\w+/)?main/"
)


def broken(document: Path) -> list[str]:
    """Links of a document to files, and to headings of documents, that are not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        inside = OF_THE_REPOSITORY.match(link)
        if link.startswith("http") and not inside:
            continue
        path, _, heading = (link[inside.end() :] if inside else link).partition("#")
        target = (ROOT if inside else document.parent) / path if path else document
        if not target.exists() or (heading and heading not in headings(target)):
            found.append(link)
    return found


def headings(document: Path) -> list[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_to_a_file_or_a_heading_leads_there(document: Path) -> None:
    assert broken(document) == []


GOOD = """
`study/session.py: open_study` `importance/cache/key.py` `file.py` `docs/specs.md` `scripts/` `quickstart.db`
`methods.METHODS` `Merger.merge_` `search.trials` `tasks.NAME.metric` `experts.*.model` `nn.Linear` `float.hex`
`plotly()` `write_into_` `HF_TOKEN`
[specs](docs/specs.md#storage) [same](#here) [site](https://optuna.org)
# Here
```
`nothing.in_a_block` is looked at
```
"""
STALE = (
    *("study/no_such.py", "study/session.py: close_study", "no_such/", "methods.METHODZ", "Merger.merge_everything_"),
    *("search.trails", "tasks.NAME.metrics", "nn.Linearr", "write_onto_", "NoSuchClass", "no_such_function()"),
)


def test_the_whole_spec_has_every_field_with_its_default() -> None:
    text = (ROOT / "docs" / "specs.md").read_text(encoding="utf-8")
    block = re.search(r"## A whole spec\n.*?```yaml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    written = yaml.safe_load(block[1])
    parts = [
        (written, StudySpec, {"storage", "objective"}),  # from the name, and in short form
        (written["importance"], ImportanceSettings, set()),
        (written["search"], SearchSettings, {"granularity"}),  # in short form
        (written["tasks"]["trec"], ChoiceTask, {"doc_to_target", "test_split", "max_length"}),
    ]
    for fields, model, other in parts:
        assert set(fields) == set(model.model_fields)
        for name, field in model.model_fields.items():
            if not field.is_required() and name not in other and not isinstance(fields[name], dict):
                assert TypeAdapter(field.annotation).validate_python(fields[name]) == field.get_default(
                    call_default_factory=True
                ), name


def test_the_layers_in_the_architecture_are_those_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    enforced = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## Layers\n")[2]
    rows = re.findall(r"^\| (`.*?) \| \S", text.replace("\\|", "/"), re.MULTILINE)
    assert [row.replace("`", "").replace(" / ", " | ") for row in rows[: len(enforced)]] == enforced


def test_no_two_classes_of_the_package_have_one_name() -> None:
    names = [
        node.name
        for module, tree in sources().items()
        if module.startswith("dfmerge_studies.")
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    ]
    assert {name for name in names if names.count(name) > 1} == set()


@pytest.mark.slow
def test_a_document_that_names_what_is_not_there_is_found_out(tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text(GOOD.replace("docs/specs.md#", f"{ROOT}/docs/specs.md#"))
    assert stale(document) == broken(document) == []
    document.write_text("".join(f"`{name}`\n" for name in STALE) + "[a](no.md) [b](#no)\n")
    assert stale(document) == [f"line {number}: {name}" for number, name in enumerate(STALE, start=1)]
    assert broken(document) == ["no.md", "#no"]
