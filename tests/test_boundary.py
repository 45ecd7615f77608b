"""What comes from outside, good or bad, meets one boundary: a refusal names the file or the field, never an exception.

Every case spoils one thing of a good project and runs a command, in this process.  What must hold of every refusal
stands in `refusal`; a case adds what the message must name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.templates import renderer
from tests.project import Done, Project, cli_environment

CLASS_NAME = re.compile(r"\b(?:[A-Z]\w*)?(?:Error|Exception|Warning)\b(?!:? [a-z]+ing\b)|\bTraceback\b|\bpanicked\b")


def refusal(project: Project, *command: str, codes: tuple[int, ...] = (2,), **environment: str) -> str:
    """Run a command that must be refused, and return its message.

    The exit code is right, there is one message without the name of an exception, `--json` gives one JSON object with
    the same words, and the folder is as it was.
    """
    before = snapshot(project.folder)
    done = project.cli(*command, "--json", check=None, **environment)
    assert done.returncode in codes, done
    check_told(done)
    problems = json.loads(done.stdout)["problems"]
    assert problems
    assert all(set(problem) == {"where", "what", "mend"} and problem["what"] for problem in problems)
    assert snapshot(project.folder) == before, "something is left behind"
    return done.stderr


def check_told(done: Done) -> None:
    """There is one message, and it shows neither an exception's class nor a traceback nor a control character."""
    assert done.stderr.startswith("error: "), done
    assert not CLASS_NAME.search(done.stderr), done.stderr
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", done.stderr), done.stderr


def snapshot(folder: Path) -> dict[str, Any]:
    """Every path below a folder with what it is; of a file, its content."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_mode, path.read_bytes() if path.is_file() else None)
    return found


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes of its tensors."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


# Weights, by their headers.

NORM = "encoder.final_layer_norm.weight"


def entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[NORM].update(changes)


def gap(header: dict[str, Any]) -> None:
    last = max((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    header.pop(min((n for n in header if n not in ("__metadata__", last)), key=lambda n: header[n]["data_offsets"]))


HEADERS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("a type that is not known", entry(dtype="F3"), NORM),
    ("a type that is no text", entry(dtype=["F32"]), NORM),
    ("a shape with a size below 0", entry(shape=[-16]), NORM),
    ("a shape with half a size", entry(shape=[16.5]), NORM),
    ("a shape of another size than the bytes", entry(shape=[17]), NORM),
    ("a shape beyond all memory", entry(shape=[2**62, 2**62]), NORM),
    ("no shape", lambda h: h[NORM].pop("shape"), NORM),
    ("places that are texts", entry(data_offsets=["0", "64"]), NORM),
    ("three places", entry(data_offsets=[0, 1, 2]), NORM),
    ("an end before the beginning", entry(data_offsets=[64, 0]), NORM),
    ("a place below 0", entry(data_offsets=[-64, 0]), NORM),
    ("bytes of another tensor", entry(data_offsets=[1, 65]), "overlap"),
    ("a place behind the end", entry(data_offsets=[10**9, 10**9 + 64]), "gap"),
    ("bytes that belong to no tensor", gap, "gap"),
    ("an entry that is a number", lambda h: h.update({NORM: 5}), NORM),
    ("metadata that is a list", lambda h: h.update(__metadata__=[1]), "__metadata__"),
    ("metadata with a number", lambda h: h.update(__metadata__={"format": 1}), "__metadata__"),
    ("a name with an escape sequence", lambda h: h.update({"\x1b[31mred": 5}), r"\x1b[31mred"),
]


@pytest.mark.parametrize(("change", "names"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS])
def test_weights_whose_header_is_wrong_are_refused_by_file_and_tensor(
    project: Project, change: Callable[[dict[str, Any]], Any], names: str
) -> None:
    file = project.folder / "red" / "model.safetensors"
    header, data = header_of(file)
    change(header)
    with_header(file, header, data)
    message = refusal(project, "run", "spec.yaml")
    assert str(file) in message
    assert names in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 3) + b"\xff\xfe{",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 45) + b'{"a":{"dtype":"F32"},"a":{"dtype":"F32"}}    ',
        struct.pack("<Q", 10_006) + b'{"a":' + b"1" * 10_000 + b"}",
    ],
    ids=["nothing", "cut", "no length", "a list", "null", "no text", "nested", "twice", "a huge number"],
)
def test_weights_without_a_header_are_refused_by_file(project: Project, content: bytes) -> None:
    file = project.folder / "red" / "model.safetensors"
    file.write_bytes(content)
    assert str(file) in refusal(project, "run", "spec.yaml")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": "../base/x"}}',
        "[" * 99999,
        json.dumps({"weight_map": {"a": "x" * 300}}),
        '{"weight_map": {"a": "gone"}}',
    ],
    ids=range(9),
)
def test_an_index_of_shards_that_is_none_is_refused_by_file(project: Project, content: str) -> None:
    file = project.folder / "red" / "model.safetensors.index.json"
    file.write_text(content)
    whole = project.folder / "red" / "model.safetensors"  # which would be read instead, as transformers does
    whole.rename(whole.with_name("model-00001-of-00001.safetensors"))
    assert str(file) in refusal(project, "run", "spec.yaml")


# Special files.


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


SPECIAL = [
    "spec.yaml",
    "red/model.safetensors",
    "red/config.json",
    "base/tokenizer.json",
    "base/generation_config.json",
    "red.validation.jsonl",
    "rows.json",
    "colours.db",
]


@pytest.mark.parametrize("special", [a_pipe, a_device, a_socket])
@pytest.mark.parametrize("name", SPECIAL)
def test_a_special_file_is_refused_by_name_and_never_opened(
    project: Project, name: str, special: Callable[[Path], None]
) -> None:
    file = project.folder / name
    file.unlink(missing_ok=True)
    special(file)
    more = ["--set", "importance.indices=rows.json"] if name == "rows.json" else []
    message = refusal(project, "run", "spec.yaml", *more)
    assert name in message or "/dev/zero" in message
    assert re.search("is a (pipe|device|socket)", message)


# Specs.

NUMBERS = [
    "search.trials",
    "search.startup_trials",
    "search.seed",
    "search.kappa",
    "search.step",
    "importance.samples",
    "importance.row_budget",
    "importance.floor",
    "token_budget",
    "memory",
    "tasks.red.max_length",
    "tasks.red.limit",
    "tasks.red.doc_to_target",
]


@pytest.mark.parametrize("number", [10**41, -(10**41), 2**4000, 1e300])
@pytest.mark.parametrize("field", NUMBERS)
def test_an_absurd_number_is_refused_by_field(project: Project, field: str, number: float) -> None:
    assert field.rpartition(".")[2] in refusal(project, "run", "spec.yaml", "--set", f"{field}={number:}")


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("run --trials 1" + "0" * 41, "--trials"),
        ("run --add 1" + "0" * 41, "--add"),
        ("run --seed 1" + "0" * 41, "--seed"),
        ("run --workers 1" + "0" * 41, "--workers"),
        ("compare --seeds 1" + "0" * 41, "--seeds"),
        ("status --every 1e41", "--every"),
        ("status --every nan", "--every"),
        ("export --out m --trial 1" + "0" * 41, "--trial"),
        ("run --set search.bounds=[0,1e41]", "search.bounds"),
        ("run --set search.bounds=[0,1] --set search.step=1e-41", "search"),
        ("run --set cache_limit=" + "9" * 400 + "TB", "cache_limit"),
        ("run --device cuda:" + "9" * 41, "device"),
        ("run --set objective={kind: weighted, weights: {red: 1e308, blue: 1e308}}".replace(" ", "~"), "objective"),
    ],
)
def test_an_absurd_number_on_the_command_line_is_refused_by_flag(project: Project, command: str, names: str) -> None:
    name, *options = (part.replace("~", " ") for part in command.split())
    assert names in refusal(project, name, "spec.yaml", *options)


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{former}'] * 9)}]\n" for former, name in zip("abcdefgh", "bcdefghi", strict=True)
)
SPECS = [
    ("an immense alias", ALIASES, "values"),
    ("an alias of itself", "name: &a [*a]\n", "deep"),
    ("nested deeply", "name: " + "[" * 3000, "spec.yaml"),
    ("a date that there is not", "name: 2020-13-45\n", "spec.yaml"),
    ("a date", "name: 2020-01-02\n", "name: found a date"),
    ("bytes", "name: !!binary aGVsbG8=\n", "name: found bytes"),
    ("a set", "name: !!set {a, b}\n", "name: found a set"),
    ("half a character", 'name: "\\ud800"\n', "name"),
    ("no character", 'base: "a\\0b"\n', "base"),
    ("an immense integer", "name: 0x" + "f" * 9000 + "\n", "name"),
    ("an immense decimal", "name: " + "1" * 9000 + "\n", "spec.yaml"),
    ("a key of another kind", "[1, 2]: x\n", "spec.yaml"),
    ("a tag of another kind", "name: !!python/name:os.system x\n", "spec.yaml"),
    ("a key that is a number", "1: x\n", "spec.yaml"),
]


@pytest.mark.parametrize(("text", "names"), [row[1:] for row in SPECS], ids=[row[0] for row in SPECS])
@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_spec_of_odd_yaml_is_refused_by_file_and_field(project: Project, text: str, names: str, command: str) -> None:
    project.file.write_text(text)
    message = refusal(project, command, "spec.yaml")
    assert "spec.yaml" in message
    assert names in message


def test_validate_lists_all_that_is_wrong_with_a_spec_at_once(project: Project) -> None:
    shutil.rmtree(project.folder / "blue")
    (project.folder / "blue.test.jsonl").unlink()
    spec = json.loads(json.dumps(project.spec))
    spec["serach"] = {}
    spec["search"] = {"trials": "many", "bounds": [1, 0], "enqueue": [0.5]}
    spec["importance"] = {"samples": -1, "indices": {"rde": [1]}}
    spec["experts"]["red"]["task"] = "rde"
    del spec["tasks"]["red"]["doc_to_text"]
    spec["tasks"]["red"]["metric"] = "acuracy"
    spec["device"] = "gpu"
    spec["baselines"] = ["df-merge"]
    spec["storage"] = "mysql://host/x"
    project.file.write_text(json.dumps(spec))
    message = refusal(project, "validate", "spec.yaml")
    told = json.loads(project.cli("validate", "spec.yaml", "--json", check=2).stdout)["problems"]
    places = [problem["where"].removeprefix(f"{project.file}: ").removeprefix("spec.yaml: ") for problem in told]
    assert sorted(places) == sorted(
        [
            "serach",
            "search.trials",
            "search.bounds",
            "importance.samples",
            "importance.indices",
            "experts.red",
            "tasks.red.doc_to_text",
            "tasks.red.metric",
            "device",
            "baselines",
            "mysql://host/x",
            "experts.blue",
            "tasks.blue.dataset.data_files.test",
        ]
    )
    assert all(problem["what"] and problem["mend"] for problem in told)
    assert message.count("error: ") == len(told)
    first = refusal(project, "run", "spec.yaml")
    assert first.count("error: ") == 1
    assert "`dfmerge validate` lists all" in first


# Templates.

TEMPLATES = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in ['x'] * 10**9 %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ 10**9 * 'x' }}",
    "{{ [1] * 10**9 }}",
    "{{ 2**(10**9) }}",
    "{% set x = 9**999 %}" + "{% set x = x * x %}" * 40,
    "{% set x = 'x' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "{% set x = 'x' %}" + "{% set x = x + x %}" * 60 + "{{ x }}",
    "{% set x = 'x' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "{% set x = 'x' %}" + "{% set x = '%s%s' % (x, x) %}" * 60,
    "{% set x = 'x' %}" + "{% set x = '{0}{0}'.format(x) %}" * 60,
    "{% set x = 'x' %}" + "{% set x = [x, x]|join %}" * 60,
    "{% set x = 'x' * 99999 %}{{ x.replace('x', x) }}",
    "{% set x = 'x' * 99999 %}{{ x|replace('x', x) }}",
    "{% set x = 'x' * 99999 %}{{ ''.join([x] * 99999) }}",
    "{% set x = 'x' * 99999 %}{{ ([x] * 99999)|join }}",
    "{{ 'x'|center(10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ ('\t' * 99999).expandtabs(9999) }}",
    "{{ ('x\n' * 99999)|indent(9999) }}",
    "{{ ('x ' * 99999)|wordwrap(1, True, 'x' * 9999) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10**9) }}",
    "{{ 'x'.translate({120: 'x' * 9999}) }}",
    "{{ [1]|batch(10**9, 'x')|list }}",
    "{{ 1.5|round(10**9, 'ceil') }}",
    "{{ [1]|tojson(indent=10**9) }}",
    "{{ lipsum(n=10**6) }}",
    "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "{{ 1" + " + 1" * 9000 + " }}",
    "{{ 1" + "0" * 9000 + " }}",
    "{% if 1 %}" * 9000 + "{% endif %}" * 9000,
    "{{ input }}" + "x" * 200_000,
    "{{ input.__class__.__base__.__subclasses__() }}",
    "{{ 2.0**9999 }}",
    "{{ input|nosuch }}",
    "{% include 'x' %}",
    "{{ 1 / 0 }}",
    "{{",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_a_template_that_would_not_end_or_fails_is_refused_by_field(template: str) -> None:
    with pytest.raises(InputError) as refused:
        renderer(template, ["input"], "spec.yaml: tasks.red.doc_to_text")({"input": "words"}, 7)
    assert str(refused.value).startswith("spec.yaml: tasks.red.doc_to_text: ")
    assert not CLASS_NAME.search(str(refused.value))
    assert len(str(refused.value)) < 700


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{% for i in (4, 5) %}{{ loop.index }}:{{ loop.length }}{{ i ~ input }}{{ ';' if loop.first }}{% endfor %}",
            "1:24a b;2:25a b",
        ),
        ("{%- for k, v in {'x': 1}.items() if v %}{{ k }}={{ v }}{% else %}none{% endfor %}", "x=1"),
        ("{% for i in [] %}x{% else %}none{% endfor %}", "none"),
        ("{{ input|upper|replace('A', 'C')|trim }} {{ ['x', 'y']|join(', ') }}", "C B x, y"),
        ("{{ '%s: %5.2f' % (input, 1.5) }} {{ '{:>5}'.format(input) }}", "a b:  1.50   a b"),
        ("{% set n = namespace(x=0) %}{% for c in input %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}", "3"),
        ("{% macro q(x) %}<{{ x }}>{% endmacro %}{{ q(input.split(' ')[0]) }}", "<a>"),
        ("{{ [3, 1]|sort|map('string')|list|join }} {{ 2 * 3 + 2**3 % 5 }} {{ 'ab' * 2 }}", "13 9 abab"),
        ("{{ {'a': 1}|tojson }} {{ range(3)|sum }} {{ ('x' * 9999)|truncate(9) }}", '{"a": 1} 3 xxxxxx...'),
    ],
)
def test_a_template_within_its_budget_renders_as_in_jinja(template: str, text: str) -> None:
    assert renderer(template, ["input"], "spec.yaml")({"input": "a b"}, 0) == text
    assert jinja2.Environment(keep_trailing_newline=True).from_string(template).render(input="a b") == text


# Configurations and tokenizers.


def changed(name: str, *place: str | int, to: Any) -> Callable[[Project], None]:
    """Put a value into a JSON file of base and experts."""

    def spoil(project: Project) -> None:
        for folder in ("base", "red", "blue"):
            file = project.folder / folder / name
            content = json.loads(file.read_text()) if file.exists() else {}
            target = content
            for part in place[:-1]:
                target = target[part]
            target[place[-1]] = to
            file.write_text(json.dumps(content))

    return spoil


def written(name: str, content: bytes) -> Callable[[Project], None]:
    return lambda project: (project.folder / "base" / name).write_bytes(content) and None


MODELS: list[tuple[Callable[[Project], None], str, str]] = [
    (changed("config.json", "d_ff", to="many"), "config.json", "'d_ff' expected int"),
    (changed("config.json", "d_model", to=None), "config.json", "'d_model'"),
    (changed("config.json", "num_layers", to=10**7), "config.json", "num_layers is 10000000"),
    (changed("config.json", "num_layers", to=10**41), "config.json", "num_layers"),
    (changed("config.json", "vocab_size", to=10**30), "config.json", "vocab_size"),
    (changed("config.json", "vocab_size", to=10**9), "config.json", "shared.weight"),
    (changed("config.json", "num_heads", to=-1), "config.json", ""),
    (changed("config.json", "dropout_rate", to=-1), "config.json", "between 0 and 1"),
    (changed("config.json", "model_type", to={}), "config.json", ""),
    (changed("config.json", "model_type", to="t7"), "config.json", "t7"),
    (written("config.json", b'{"a": ' * 9999), "config.json", "nested"),
    (written("config.json", b'{"vocab_size": ' + b"1" * 9999 + b"}"), "config.json", "JSON"),
    (written("generation_config.json", b"["), "generation_config.json", ""),
    (written("tokenizer.json", b"\xff\xfe"), "tokenizer.json", "UTF-8"),
    (written("tokenizer.json", b"[" * 9999), "tokenizer.json", "nested"),
    (written("tokenizer.json", b"{}"), "tokenizer.json", ""),
    (written("tokenizer_config.json", b"{"), "tokenizer_config.json", "JSON"),
    (written("special_tokens_map.json", b"5,"), "special_tokens_map.json", "JSON"),
    (changed("tokenizer.json", "model", "type", to="two"), "tokenizer.json", ""),
    (changed("tokenizer.json", "model", "vocab", "a", to=-1), "tokenizer.json", "-1"),
    (changed("tokenizer.json", "model", "vocab", "a", to=10**6), "tasks.red", "1000000"),
    (changed("tokenizer_config.json", "tokenizer_class", to=[]), "base", ""),
    (changed("tokenizer_config.json", "model_max_length", to="many"), "tokenizer_config.json", "model_max_length"),
    (changed("tokenizer_config.json", "unk_token", to=5), "base", "unk_token"),
]


@pytest.mark.parametrize(("spoil", "file", "names"), MODELS, ids=range(len(MODELS)))
def test_a_damaged_configuration_or_tokenizer_is_refused_by_file(
    project: Project, spoil: Callable[[Project], None], file: str, names: str
) -> None:
    spoil(project)
    message = refusal(project, "validate", "spec.yaml")
    assert file in message
    assert names in message


# Paths.


def loop_of_links(name: str) -> Callable[[Project], None]:
    return lambda project: (project.folder / name).symlink_to(name)


LONG = "x" * 300
PATHS: list[tuple[str, Callable[[Project], None] | None, str]] = [
    (f"run spec.yaml --set base={LONG}", None, "base"),
    (f"run spec.yaml --set base={'d/' * 3000}", None, "base"),
    ("run spec.yaml --set base=round", loop_of_links("round"), "base"),
    ("run spec.yaml --set base=~nobody-of-this-name/x", None, "base"),
    (f"run spec.yaml --set tasks.red.dataset.data_files={LONG}", None, "data_files"),
    ("run spec.yaml --set tasks.red.dataset.data_files=round", loop_of_links("round"), "data_files"),
    ("run spec.yaml --set tasks.red.dataset.data_files=/nowhere/*.jsonl", None, "data_files"),
    ("run spec.yaml --set tasks.red.dataset.data_files=[*", None, "data_files"),
    (f"run spec.yaml --set tasks.red.dataset.path={LONG}", None, "tasks.red.dataset"),
    (f"run spec.yaml --set importance.indices={LONG}", None, "importance.indices"),
    ("run spec.yaml --set importance.indices=round", loop_of_links("round"), "importance.indices"),
    (f"run spec.yaml --cache {LONG}", None, "cache"),
    ("run spec.yaml --cache round", loop_of_links("round"), "cache"),
    (f"run spec.yaml --storage sqlite:///{LONG}.db", None, LONG[:99]),
    ("run spec.yaml --storage sqlite:///round", loop_of_links("round"), "round"),
    (f"run {LONG}", None, LONG[:99]),
    ("run round", loop_of_links("round"), "round"),
    (f"merge spec.yaml --coefficients 1 --out {LONG}", None, "--out"),
    ("merge spec.yaml --coefficients 1 --out round/m", loop_of_links("round"), "--out"),
    (f"fisher spec.yaml --expert red --out {LONG}", None, "--out"),
    ("fisher spec.yaml --expert red --force --out /dev/null", None, "--out"),
    (f"evaluate spec.yaml --model {LONG}", None, "--model"),
    ("evaluate spec.yaml --model round", loop_of_links("round"), "--model"),
    ("run spec.yaml --set base=package:__main__/x", None, "base"),
    ("run spec.yaml --set tasks.red.validation_split=validation[:", None, "tasks.red"),
    ("run spec.yaml --set tasks.red.validation_split=validation[:999%]", None, "tasks.red"),
    ("run spec.yaml --set tasks.red.dataset.field=[1]", None, "tasks.red.dataset"),
    ("run spec.yaml --set tasks.red.dataset.chunksize=x", None, "tasks.red.dataset"),
    ("run spec.yaml --set tasks.red.dataset.name=5", None, "tasks.red.dataset"),
    ("run spec.yaml --set tasks.red.dataset.nosuch=1", None, "tasks.red.dataset"),
]


@pytest.mark.parametrize(("command", "spoil", "names"), PATHS, ids=[row[0][:60] for row in PATHS])
def test_a_path_that_cannot_be_is_refused_by_field(
    project: Project, command: str, spoil: Callable[[Project], None] | None, names: str
) -> None:
    if spoil is not None:
        spoil(project)
    message = refusal(project, *command.split())
    assert names in message
    assert len(message) < 1500


@pytest.mark.parametrize("data_files", ["red.validation.jsonl", "*.validation.jsonl", "ABSOLUTE/red.val*.jsonl"])
def test_data_is_read_from_a_folder_whose_name_is_a_pattern(project: Project, tmp_path: Path, data_files: str) -> None:
    folder = tmp_path / "a[1]* {x}?"
    shutil.move(project.folder, folder)
    moved = Project(folder, project.family, project.spec)
    spec = json.loads(json.dumps(project.spec))
    spec["tasks"]["red"]["dataset"]["data_files"] = {
        "validation": data_files.replace("ABSOLUTE", str(folder).replace("[", "[[]")),
        "test": "red.test.jsonl",
    }
    (folder / "spec.yaml").write_text(json.dumps(spec))
    inputs = moved.json("validate", "spec.yaml")["estimate"]["validation_inputs"]
    assert inputs["red"] == (48 if data_files.startswith("*") else 24)


ROWS = [
    (b'{"input": "x", "choices": ["a", "b"], "label": 0}\n\xff\xfe\n', "tasks.red.dataset"),
    (b'{"input": "\xff\xfe", "choices": ["a", "b"], "label": 0}\n', "tasks.red.dataset"),
    (b'{"input": "x", "choices": ["a", "b"], "label": 1e400}\n', "tasks.red"),
    (b'{"input": "x", "choices": ["a", "b"], "label": Infinity}\n', "tasks.red"),
    (b'{"input": "x", "choices": ["a", "b"], "label": 99999999999999999999}\n', "tasks.red"),
    (b'{"input": "x", "choices": ["a", "b"], "label": [0]}\n', "tasks.red"),
    (b'{"input": "x", "choices": {"a": 1}, "label": 0}\n', "tasks.red"),
    (b'{"input": "x", "choices": "' + b"[" * 9999 + b'", "label": 0}\n', "tasks.red"),
    (b'{"input": ["x"], "choices": ["a", "b"], "label": 0}\n', "tasks.red"),
    (b'{"input": 5, "choices": ["a", "b"], "label": 0}\n', "tasks.red"),
    (b'{"input": "\\ud800", "choices": ["a", "b"], "label": 0}\n', "tasks.red"),
    (b"[" * 99999, "tasks.red"),
    (b"[]\n", "tasks.red"),
    (b"5\n", "tasks.red"),
    (b"\x1f\x8b\x08rubbish", "tasks.red"),
    (b"PK\x03\x04rubbish", "tasks.red"),
    (b"\x00" * 99, "tasks.red"),
]


@pytest.mark.parametrize(("content", "names"), ROWS, ids=range(len(ROWS)))
def test_rows_that_cannot_be_read_are_refused_by_field(project: Project, content: bytes, names: str) -> None:
    (project.folder / "red.validation.jsonl").write_bytes(content)
    assert names in refusal(project, "validate", "spec.yaml")


# The terminal.


def at_a_terminal(folder: Path, command: str, *redirections: str, **environment: str) -> tuple[int, str, str]:
    """Run a command in a process of its own, in a shell that redirects its streams."""
    shell = f'"{sys.executable}" -m dfmerge_studies {command} {" ".join(redirections)}'
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {shell}"],
        cwd=folder,
        env=cli_environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "redirections", "code", "says"),
    [
        ("--version", ">&-", 0, ""),
        ("--version", "2>&-", 0, ""),
        ("--version", "<&- >&- 2>&-", 0, ""),
        ("list gone.yaml", ">&-", 2, "gone.yaml"),
        ("list gone.yaml", "2>&-", 2, ""),
        ("--version", ">/dev/full", 1, "standard output"),
        ("list gone.yaml --json", ">/dev/full", 1, "standard output"),
        ("list gone.yaml", "2>/dev/full", 2, ""),
        ("list gone.yaml", ">/dev/full 2>/dev/full", 2, ""),
    ],
)
def test_a_stream_that_is_closed_or_full_ends_with_a_code_and_one_message(
    tmp_path: Path, command: str, redirections: str, code: int, says: str
) -> None:
    returned, _, message = at_a_terminal(tmp_path, command, redirections)
    assert returned == code
    assert says in message
    if says:
        check_told(Done(returned, "", message))
    else:
        assert not message


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "cache ls -h"])
def test_help_that_cannot_be_written_is_a_failure(tmp_path: Path, command: str, unbuffered: str) -> None:
    returned, _, message = at_a_terminal(tmp_path, command, ">/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert returned == 1
    assert "standard output" in message
    check_told(Done(returned, "", message))


def test_a_reader_that_has_enough_gets_no_message(tmp_path: Path) -> None:
    assert at_a_terminal(tmp_path, "list gone.yaml --json 2>/dev/null", "| true")[0] in (0, 1, 2)
    assert at_a_terminal(tmp_path, "list gone.yaml --json", "2>&1 >/dev/null | head -c 1")[2] == ""


def test_a_working_directory_that_was_deleted_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code, _, message = _in_a_deleted_folder(tmp_path)
    assert code == 2
    assert "working directory" in message
    check_told(Done(code, "", message))


def _in_a_deleted_folder(tmp_path: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        ["bash", "-c", f'cd gone && rmdir "$PWD" && exec "{sys.executable}" -P -m dfmerge_studies list'],
        cwd=tmp_path,
        env=cli_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_home_that_cannot_be_written_is_no_trouble(project: Project) -> None:
    code, output, message = at_a_terminal(
        project.folder, "validate spec.yaml --json", HOME="/dev/null", XDG_CACHE_HOME=""
    )
    assert code == 0, message
    assert json.loads(output)["ok"]
    assert not message


def test_names_that_hold_markup_or_escape_sequences_are_shown_and_not_obeyed(project: Project) -> None:
    cache = project.folder / ".dfmerge" / "fishers"
    cache.mkdir(parents=True)
    hostile = "\x1b]0;owned\x07[bold red]x[/] \u202e\x9b31m"
    header = {"__metadata__": {"expert_name": hostile, "coefficient": "many", "estimator": hostile}}
    with_header(cache / f"{'a' * 64}.safetensors", header, b"")
    with_header(cache / f"{hostile.replace('/', '')}.safetensors", {"__metadata__": {"expert_name": "x"}}, b"")
    for command in ("ls", "verify", "prune"):
        done = project.cli("cache", command, "spec.yaml", check=None)
        assert done.returncode in (0, 1)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", done.stdout + done.stderr)
        if command == "ls":
            assert "[bold red]x[/]" in done.stdout


HOSTILE_ENTRIES: list[bytes | None] = [
    None,
    b"",
    b"\xff" * 99,
    struct.pack("<Q", 4) + b"null",
    struct.pack("<Q", 2**62) + b"{}",
    struct.pack("<Q", 99_999) + b"[" * 99_999,
    struct.pack("<Q", 22) + b'{"__metadata__": "x"}  ',
    struct.pack("<Q", 38) + b'{"__metadata__": {"coefficient": [1]}}',
    struct.pack("<Q", 57) + b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}    x',
]


@pytest.mark.parametrize("content", HOSTILE_ENTRIES, ids=range(len(HOSTILE_ENTRIES)))
def test_a_hostile_entry_of_a_cache_stops_no_command(project: Project, content: bytes | None) -> None:
    cache = project.folder / ".dfmerge" / "fishers"
    cache.mkdir(parents=True)
    file = cache / f"{'a' * 64}.safetensors"
    if content is None:
        os.mkfifo(file)
        (cache / "round.safetensors").symlink_to("round.safetensors")
        (cache / "folder.safetensors").mkdir()
    else:
        file.write_bytes(content)
    listed = json.loads(project.cli("cache", "ls", "spec.yaml", "--json").stdout)
    assert len(listed) == (content is not None)
    checked = project.cli("cache", "verify", "spec.yaml", "--json", check=None)
    assert checked.returncode == (content is not None)
    assert len(json.loads(checked.stdout)["damaged"]) == (content is not None)
    assert not CLASS_NAME.search(checked.stdout + checked.stderr)
