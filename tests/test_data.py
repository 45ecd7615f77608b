"""From data files to rows of text to token ids."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from copy import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.data import Row, load_rows
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.sampling import divided_rows, draw_rows, seeded_generator
from dfmerge_studies.tasks.settings import ChoiceTask, ClassificationTask
from dfmerge_studies.tasks.tokenise import encode_rows, longest_input
from tests.models import CHOICES, FAMILIES, TEXTS, make_model

DOCUMENTS = [
    {"text": "the river", "more": "was quiet", "options": ["yes", "no"], "gold": 1, "answer": "no", "a": "x", "b": "y"},
    {
        "text": "a train",
        "more": "left",
        "options": ["no", "good", "bad"],
        "gold": 0,
        "answer": "no",
        "a": "p",
        "b": "q",
    },
]


@cache
def tokenizer_of(family: str) -> Any:
    """One tokenizer per family: training it again may number the same tokens otherwise."""
    tokenizer = FAMILIES[family].tokenizer()
    if family == "bert":
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def write_rows(folder: Path, documents: list[dict[str, Any]] = DOCUMENTS) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder


def choice_task(**changes: Any) -> ChoiceTask:
    fields = {
        "dataset": {"path": "json", "data_files": {"validation": "rows.jsonl"}},
        "doc_to_text": "text",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
    }
    return ChoiceTask(**{**fields, **changes})


def classification_task(**changes: Any) -> ClassificationTask:
    fields = {
        "type": "classification",
        "dataset": {"path": "json", "data_files": {"validation": "rows.jsonl"}},
        "doc_to_text": "text",
        "doc_to_target": "gold",
    }
    return ClassificationTask(**{**fields, **changes})


def rows_of(folder: Path, task: ChoiceTask | ClassificationTask, split: str = "validation") -> list[Row]:
    return load_rows("t", task, split, root=folder, spec_file="spec.yaml")


def test_columns_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = rows_of(write_rows(tmp_path), choice_task())
    assert rows == [
        Row(0, "the river", None, ("yes", "no"), 1),
        Row(1, "a train", None, ("no", "good", "bad"), 0),
    ]


def test_templates_are_rendered_with_all_columns_and_keep_their_last_newline(tmp_path: Path) -> None:
    task = choice_task(doc_to_text="{{text}} {{ more | upper }}{% if gold %}?{% endif %}\n")
    assert [row.text for row in rows_of(write_rows(tmp_path), task)] == ["the river WAS QUIET?\n", "a train LEFT\n"]


def test_text_is_not_escaped_as_html(tmp_path: Path) -> None:
    folder = write_rows(tmp_path, [{**DOCUMENTS[0], "text": "a < b & 'c'"}])
    assert rows_of(folder, choice_task(doc_to_text="{{text}}"))[0].text == "a < b & 'c'"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (["yes", "no"], [("yes", "no")] * 2),
        (["{{a}}!", "{{b}}!"], [("x!", "y!"), ("p!", "q!")]),
        (["{{a}}", "none of them"], [("x", "none of them"), ("p", "none of them")]),
        ("{{[a, b]}}", [("x", "y"), ("p", "q")]),
        ("{{options}}", [("yes", "no"), ("no", "good", "bad")]),
        ("options", [("yes", "no"), ("no", "good", "bad")]),
    ],
)
def test_choices_come_from_a_list_or_templates_or_a_column(tmp_path: Path, source: Any, expected: Any) -> None:
    rows = rows_of(write_rows(tmp_path), choice_task(doc_to_choice=source, doc_to_target=0))
    assert [row.choices for row in rows] == expected


@pytest.mark.parametrize(
    ("target", "labels"),
    [
        ("gold", [1, 0]),  # a column with an index
        ("answer", [1, 0]),  # a column with a choice's text
        (1, [1, 1]),  # the same for all
        ("{{gold}}", [1, 0]),
        ("{{answer}}", [1, 0]),
        ("{{ 1 - gold }}", [0, 1]),
        ("{{options[gold]}}", [1, 0]),
    ],
)
def test_the_right_choice_is_an_index_or_a_text(tmp_path: Path, target: Any, labels: list[int]) -> None:
    assert [row.label for row in rows_of(write_rows(tmp_path), choice_task(doc_to_target=target))] == labels


def test_a_choice_that_reads_like_a_number_is_found_by_its_text_first(tmp_path: Path) -> None:
    folder = write_rows(tmp_path, [{**DOCUMENTS[0], "options": ["1", "0"], "answer": "1"}])
    assert rows_of(folder, choice_task(doc_to_target="answer"))[0].label == 0


def test_class_names_may_be_given_for_a_classifier(tmp_path: Path) -> None:
    task = classification_task(doc_to_choice=["no", "good", "bad"], doc_to_target="answer")
    assert [(row.choices, row.label) for row in rows_of(write_rows(tmp_path), task)] == [(("no", "good", "bad"), 0)] * 2


@pytest.mark.parametrize("value", [-1, 2, 0.5, "maybe", None])
def test_a_label_that_is_none_of_the_choices_is_refused_with_its_row(tmp_path: Path, value: Any) -> None:
    folder = write_rows(tmp_path, [DOCUMENTS[0], {**DOCUMENTS[0], "gold": value}])
    with pytest.raises(InputError, match="row 1 of the split 'validation'"):
        rows_of(folder, choice_task())


def test_a_label_in_a_column_that_misses_some_is_still_an_index(tmp_path: Path) -> None:
    folder = write_rows(tmp_path, [{**DOCUMENTS[0], "gold": 1.0}, DOCUMENTS[0]])
    assert [row.label for row in rows_of(folder, choice_task())] == [1, 1]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_file_formats_give_the_same_rows(tmp_path: Path, kind: str) -> None:
    import datasets

    plain = [{k: v for k, v in document.items() if k != "options"} for document in DOCUMENTS]
    data = datasets.Dataset.from_list(plain)
    {"json": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[kind](tmp_path / "data")
    task = choice_task(
        dataset={"path": kind, "data_files": {"validation": "data"}},
        doc_to_text="{{text}} {{more}}",
        doc_to_choice=["yes", "no", "{{a}}"],
        doc_to_target="answer",
    )
    assert rows_of(tmp_path, task) == [
        Row(0, "the river was quiet", None, ("yes", "no", "x"), 1),
        Row(1, "a train left", None, ("yes", "no", "p"), 1),
    ]


def test_a_split_may_be_several_files_or_a_pattern(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(DOCUMENTS[0]) + "\n")
    several = {"path": "json", "data_files": {"validation": ["part-0.jsonl", "part-2.jsonl"], "test": "part-*.jsonl"}}
    assert len(rows_of(tmp_path, choice_task(dataset=several))) == 2
    assert len(rows_of(tmp_path, choice_task(dataset=several), "test")) == 3


EMPTY = [DOCUMENTS[0], {**DOCUMENTS[0], "more": None, "options": ["yes", None], "a": None, "answer": None}]


@pytest.mark.parametrize(
    "changes",
    [
        {"doc_to_text": "more"},
        {"doc_to_text": "{{text}} {{more}}"},
        {"doc_to_text": "{{ more ~ text }}"},
        {"doc_to_text": "{{ [text, more] | join(' ') }}"},
        {"doc_to_text": "{{ more | trim }}."},
        {"doc_to_text": "{{ more | upper }}."},
        {"doc_to_text": "{{ '%s %s' | format(text, more) }}"},
        {"doc_to_text": "{{ '{}'.format(more) }}"},
        {"doc_to_text": "{% set x = more %}{{ x }}"},
        {"doc_to_text": "{{ {'more': more} }}"},
        {"doc_to_text": "{{ options }}"},
        {"doc_to_text": "{{ options[1] }}"},
        {"doc_to_choice": "options"},
        {"doc_to_choice": "{{options}}"},
        {"doc_to_choice": ["{{a}}", "b"]},
        {"doc_to_choice": "{{[a, b]}}"},
        {"doc_to_choice": ["None", "no"], "doc_to_target": "answer"},
        {"doc_to_choice": ["None", "no"], "doc_to_target": "{{answer}}"},
        {"doc_to_choice": ["None", "no"], "doc_to_target": "{{answer | string}}"},
    ],
    ids=str,
)
def test_an_empty_cell_never_becomes_the_text_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    task = choice_task(**{"doc_to_choice": ["yes", "no"], "doc_to_target": 0, **changes})
    with pytest.raises(InputError, match=r"row 1.*(empty|there is no label)"):
        rows_of(write_rows(tmp_path, EMPTY), task)


def test_a_template_may_say_what_stands_for_an_empty_cell(tmp_path: Path) -> None:
    def second(source: str) -> str:
        return rows_of(write_rows(tmp_path, EMPTY), choice_task(doc_to_text=source, doc_to_choice=["a", "b"]))[1].text

    assert second("{{text}} {{ more or '' }}.") == "the river ."
    assert second("{{text}}{% if more %} {{more}}{% endif %}.") == "the river."
    assert second("{{text}}{% if more is none %}.{% endif %}") == "the river."
    assert second("{{text}}{{ '.' if more == none else more }}") == "the river."
    assert second("{{text}}{{ more | default('.', true) }}") == "the river."
    assert second("{{ options | reject('none') | join(', ') }}") == "yes"
    assert second("{{ {'more': more} | tojson }}") == '{"more": null}'


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_empty_cell_of_a_table_is_refused_by_its_column_whatever_its_type(tmp_path: Path, kind: str) -> None:
    import datasets

    cells = {"word": ["so", None], "number": [0.5, None], "real": [0.5, float("nan")]}
    data = datasets.Dataset.from_dict({"text": ["the river", "a train"], **cells})
    {"csv": data.to_csv, "parquet": data.to_parquet}[kind](tmp_path / "data")
    for column in cells:
        task = choice_task(
            dataset={"path": kind, "data_files": {"validation": "data"}},
            doc_to_text=f"{{{{text}}}}: {{{{{column}}}}}",
            doc_to_choice=["yes", "no"],
            doc_to_target=0,
        )
        with pytest.raises(InputError, match=f"row 1: the cell of the column '{column}' is empty") as caught:
            rows_of(tmp_path, task)
        assert f"{{{{ {column} or '' }}}}" in str(caught.value.hint)


def test_words_that_a_reader_of_csv_takes_for_empty_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,answer\nis it rain,None\nis it,NA\n")
    dataset = {"path": "csv", "data_files": {"validation": "rows.csv"}}
    task = choice_task(dataset=dataset, doc_to_choice=["NA", "None"], doc_to_target="answer")
    with pytest.raises(InputError, match="there is no label"):
        rows_of(tmp_path, task)
    kept = choice_task(
        dataset={**dataset, "keep_default_na": False}, doc_to_choice=["NA", "None"], doc_to_target="answer"
    )
    assert [row.label for row in rows_of(tmp_path, kept)] == [1, 0]


def replace_file(path: Path, content: bytes) -> None:
    """Other bytes under the same name, size and time, as `rsync` without checksums or an archive leaves them."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("kind", ["file", "pattern", "folder", "compressed"])
def test_rows_are_those_of_the_present_file_though_its_size_and_time_are_those_of_another(
    tmp_path: Path, kind: str
) -> None:
    pack = partial(gzip.compress, mtime=0) if kind == "compressed" else bytes
    data = tmp_path / "data" / "validation.jsonl"
    data.parent.mkdir()
    dataset = {
        "file": {"path": "json", "data_files": {"validation": "data/validation.jsonl"}},
        "pattern": {"path": "json", "data_files": {"validation": "data/*.jsonl"}},
        "folder": {"path": "data"},
        "compressed": {"path": "json", "data_files": {"validation": "data/validation.jsonl"}},
    }[kind]
    data.write_bytes(pack(b'{"text": "old text", "gold": 0}\n'))
    first = rows_of(tmp_path, choice_task(dataset=dataset, doc_to_choice=["a", "b"]))
    replace_file(data, pack(b'{"text": "new text", "gold": 1}\n'))
    second = rows_of(tmp_path, choice_task(dataset=dataset, doc_to_choice=["a", "b"]))
    assert [(row.text, row.label) for row in (*first, *second)] == [("old text", 0), ("new text", 1)]


def test_reading_local_files_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows_of(write_rows(tmp_path), choice_task())
    assert not list(scratch.iterdir())
    assert not (tmp_path / "cache").exists()


def test_a_pair_of_texts_is_read_for_a_classifier(tmp_path: Path) -> None:
    rows = rows_of(write_rows(tmp_path), classification_task(doc_to_text_pair="{{more}}."))
    assert [(row.text, row.pair) for row in rows] == [("the river", "was quiet."), ("a train", "left.")]


def test_a_template_can_run_no_code(tmp_path: Path) -> None:
    task = choice_task(doc_to_text="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="unsafe"):
        rows_of(write_rows(tmp_path), task)


@pytest.mark.parametrize("limit", [0, -1, 1.5, "half"])
def test_a_limit_is_a_count_or_a_fraction(limit: Any) -> None:
    with pytest.raises(ValueError, match="limit"):
        choice_task(limit=limit)


def test_a_limit_keeps_a_seeded_part_and_smaller_ones_are_parts_of_larger_ones() -> None:
    def kept(limit: float | None, seed: int = 0) -> list[int]:
        return divided_rows(40, limit, None, seeded_generator(seed, "limit", "t"))[0]

    assert kept(None) == kept(40) == kept(99) == kept(1.0) == list(range(40))
    assert kept(10) == kept(0.25) == sorted(kept(10))
    assert len(kept(10)) == 10
    assert set(kept(3)) < set(kept(10)) < set(kept(0.5))
    assert kept(10) != kept(10, seed=1)
    assert len(kept(0.001)) == 1


def test_a_draw_has_no_row_twice_and_depends_on_seed_and_purpose_only() -> None:
    first = draw_rows(100, 30, seeded_generator(0, "fisher", "t"))
    assert len(set(first)) == 30
    assert first == draw_rows(100, 30, seeded_generator(0, "fisher", "t"))
    assert first[:10] == draw_rows(100, 10, seeded_generator(0, "fisher", "t"))
    assert first != draw_rows(100, 30, seeded_generator(0, "fisher", "u"))
    assert first != draw_rows(100, 30, seeded_generator(1, "fisher", "t"))
    assert sorted(draw_rows(5, 30, seeded_generator(0, "fisher", "t"))) == [0, 1, 2, 3, 4]


def encode(family: str, row: Row, *, longest: int | None = None, **settings: Any) -> Encoded:
    kind = FAMILIES[family].kind
    task = classification_task(**settings) if kind is Kind.CLASSIFICATION else choice_task(**settings)
    return encode_rows([row], task, kind, tokenizer_of(family), longest=longest, where="here")[0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("text", [*TEXTS, "is it? ", "line\n", "tab\t"])
def test_a_causal_prompt_and_choice_are_the_tokens_of_the_whole(family: str, text: str) -> None:
    encoded = encode(family, Row(0, text, None, CHOICES, 0))
    tokenizer = tokenizer_of(family)
    stripped = text.rstrip()
    for choice, ids in zip(CHOICES, encoded.choices, strict=True):
        whole = stripped + (text[len(stripped) :] or " ") + choice
        assert [*encoded.input_ids, *ids] == tokenizer(whole)["input_ids"]


def test_the_delimiter_stands_between_prompt_and_choice() -> None:
    encoded = encode("gpt2", Row(0, "rain", None, ("yes", "no"), 0), target_delimiter=": ")
    tokenizer = tokenizer_of("gpt2")
    assert [tokenizer.decode(ids) for ids in encoded.choices] == [": yes", ": no"]


def test_a_long_causal_prompt_loses_its_beginning_and_the_choices_stay_whole() -> None:
    row = Row(0, TEXTS[0], None, CHOICES, 0)
    whole, cut = encode("gpt2", row), encode("gpt2", row, max_length=16)
    assert cut.truncated
    assert not whole.truncated
    assert cut.choices == whole.choices
    assert cut.input_ids == whole.input_ids[-len(cut.input_ids) :]
    assert len(cut.input_ids) + max(map(len, cut.choices)) == 16


def test_a_text_to_text_choice_that_the_model_cannot_take_is_refused() -> None:
    with pytest.raises(InputError, match="row 0: the choice 'a terrible place' has 4 tokens, the model takes 3"):
        encode("t5", Row(0, "rain", None, ("yes", "a terrible place"), 0), longest=3)


def test_choices_that_leave_no_room_for_a_prompt_are_refused() -> None:
    with pytest.raises(InputError, match="choices alone fill the 3 tokens"):
        encode("gpt2", Row(0, TEXTS[0], None, CHOICES, 0), max_length=3)


def test_text_to_text_inputs_and_choices_end_with_the_end_of_sequence() -> None:
    encoded = encode("t5", Row(0, TEXTS[0], None, CHOICES, 0))
    cut = encode("t5", Row(0, TEXTS[0], None, CHOICES, 0), max_length=6)
    end = tokenizer_of("t5").eos_token_id
    assert all(ids[-1] == end and ids.count(end) == 1 for ids in (encoded.input_ids, cut.input_ids, *encoded.choices))
    assert cut.truncated
    assert cut.input_ids == (*encoded.input_ids[:5], end)


def test_text_to_text_choices_are_not_cut_by_the_length_of_inputs() -> None:
    row = Row(0, "rain", None, ("a terrible place", "a terrible place person"), 0)
    assert encode("t5", row, max_length=4).choices == encode("t5", row).choices


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_cut_classification_text_keeps_its_closing_token(family: str) -> None:
    row = Row(0, TEXTS[0], None, (), 0)
    whole, cut = encode(family, row), encode(family, row, max_length=6)
    assert cut.truncated
    assert len(cut.input_ids) == 6
    assert cut.input_ids == (*whole.input_ids[:5], whole.input_ids[-1])
    assert whole.input_ids[-1] == tokenizer_of(family).sep_token_id


def test_a_pair_has_segments_and_is_cut_at_its_longer_text() -> None:
    row = Row(0, "rain", TEXTS[0], (), 0)
    whole, cut = encode("bert", row), encode("bert", row, max_length=9)
    separator = tokenizer_of("bert").sep_token_id
    assert whole.token_type_ids is not None
    first = whole.input_ids.index(separator) + 1
    assert whole.token_type_ids == (0,) * first + (1,) * (len(whole.input_ids) - first)
    assert cut.input_ids[:first] == whole.input_ids[:first]
    assert cut.input_ids[-1] == separator
    assert cut.token_type_ids is not None
    assert len(cut.input_ids) == len(cut.token_type_ids) == 9


def test_a_text_longer_than_the_model_takes_is_refused_unless_a_length_is_set() -> None:
    row = Row(7, TEXTS[0], None, CHOICES, 0)
    with pytest.raises(InputError, match=r"row 7 is longer than the 8 tokens.*Set max_length: 8"):
        encode("t5", row, longest=8)
    with pytest.raises(InputError, match="max_length is 9 but the model takes 8"):
        encode("t5", row, longest=8, max_length=9)
    assert len(encode("t5", row, longest=8, max_length=8).input_ids) == 8


@pytest.mark.parametrize(
    ("family", "longest"), [("t5", 64), ("gpt2", 64), ("llama", 64), ("bert", 40), ("roberta", 40), ("distilbert", 40)]
)
def test_what_a_model_takes_is_known_from_its_positions_and_its_tokenizer(family: str, longest: int) -> None:
    model, tokenizer = make_model(family), copy(tokenizer_of(family))
    assert longest_input(model.config, tokenizer) == longest
    tokenizer.model_max_length = int(1e30)
    positions = {"t5": None, "roberta": 44 - 2}.get(family, longest)
    assert longest_input(model.config, tokenizer) == positions
