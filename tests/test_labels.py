"""Labels of a split: one reading for all kinds of file, and names of classes that say the same everywhere."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pytest

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.data import Row, load_rows
from dfmerge_studies.tasks.settings import ChoiceTask, ClassificationTask, MultiLabelTask

TEXTS = ("the river", "a train", "bread and salt", "rain", "the old wall")


def write_labels(folder: Path, kind: str, labels: list[Any]) -> dict[str, Any]:
    """A file of texts and labels, as a user writes it; returns the spec's `dataset`."""
    texts = TEXTS[: len(labels)]
    if kind == "csv":
        cells = [str(label) for label in labels]
        content = "text,gold\n" + "".join(f"{text},{cell}\n" for text, cell in zip(texts, cells, strict=True))
    else:
        content = "".join(json.dumps({"text": t, "gold": g}) + "\n" for t, g in zip(texts, labels, strict=True))
    if kind == "parquet":
        datasets.Dataset.from_dict({"text": texts, "gold": labels}).to_parquet(folder / "rows.parquet")
    else:
        (folder / f"rows.{kind}").write_text(content)
    return {"path": kind, "data_files": {"validation": f"rows.{kind}"}}


def write_classes(folder: Path, names: list[str], labels: list[int]) -> dict[str, Any]:
    """A parquet file whose labels are numbers of named classes, as data sets of the Hub have them."""
    features = datasets.Features({"text": datasets.Value("string"), "gold": datasets.ClassLabel(names=names)})
    data = datasets.Dataset.from_dict({"text": TEXTS[: len(labels)], "gold": labels}, features=features)
    data.to_parquet(folder / "rows.parquet")
    return {"path": "parquet", "data_files": {"validation": "rows.parquet"}}


def choice_rows(
    folder: Path, dataset: dict[str, Any], choices: Any, target: Any = "gold", remarks: list[str] | None = None
) -> list[Row]:
    task = ChoiceTask(dataset=dataset, doc_to_text="text", doc_to_choice=choices, doc_to_target=target)
    return load_rows("t", task, "validation", root=folder, spec_file="spec.yaml", remarks=remarks)


def class_rows(folder: Path, dataset: dict[str, Any], names: list[str] | None, head: list[str]) -> list[Row]:
    task = ClassificationTask(
        type="classification", dataset=dataset, doc_to_text="text", doc_to_choice=names, doc_to_target="gold"
    )
    return load_rows("t", task, "validation", root=folder, spec_file="spec.yaml", classes=head)


def labels(rows: list[Row]) -> list[int | None]:
    return [row.label for row in rows]


@pytest.mark.parametrize("target", ["gold", "{{gold}}", "{{ gold }}"])
@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
@pytest.mark.parametrize(
    ("choices", "written", "meant"),
    [
        (["True", "False"], ["True", "False", "False"], ["True", "False", "False"]),
        (["True", "False"], [True, False, False], ["True", "False", "False"]),
        (["true", "false"], [True, False, True], ["true", "false", "true"]),
        (["yes", "no"], [True, False, True], ["yes", "no", "yes"]),
        (["no", "yes"], [True, False, True], ["yes", "no", "yes"]),
        (["1", "2", "3", "4", "5"], ["1", "3", "4", "2"], ["1", "3", "4", "2"]),
        (["1", "2", "3", "4", "5"], [1, 3, 4, 2], ["1", "3", "4", "2"]),
        (["1", "2", "3", "4", "5"], [1.0, 3.0, 4.0, 5.0], ["1", "3", "4", "5"]),
        (["01", "02", "10"], ["01", "02", "01"], ["01", "02", "01"]),
        (["0.5", "1.50"], ["1.50", "0.5"], ["1.50", "0.5"]),
        (["-1", "0", "1"], [-1, 1, 0], ["-1", "1", "0"]),
        (["b", "a", "c"], ["a", "b", "c"], ["a", "b", "c"]),
        (["b", "a", "c"], [0, 2, 1], ["b", "c", "a"]),
        (["b", "a", "c"], [0.0, 2.0, 1.0], ["b", "c", "a"]),
        (["b", "a", "c"], ["0", "2", "1"], ["b", "c", "a"]),
        (["0", "1"], [0, 1, 0], ["0", "1", "0"]),
        (["2", "3"], [0, 1, 0], ["2", "3", "2"]),  # no text of a label is a choice: indices
        (["1", "2", "3"], [0, 1, 2], ["1", "2", "3"]),  # not every text is: indices, all of them
    ],
)
def test_labels_mean_the_same_in_every_kind_of_file(
    tmp_path: Path, kind: str, target: str, choices: list[str], written: list[Any], meant: list[str]
) -> None:
    rows = choice_rows(tmp_path, write_labels(tmp_path, kind, written), choices, target)
    assert [choices[row.label] for row in rows if row.label is not None] == meant


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
@pytest.mark.parametrize("written", [["b", "2", "a"], ["0", "a", "1"]])
def test_labels_of_which_some_are_texts_and_some_indices_are_refused(
    tmp_path: Path, kind: str, written: list[Any]
) -> None:
    with pytest.raises(InputError, match="mixed") as caught:
        choice_rows(tmp_path, write_labels(tmp_path, kind, written), ["b", "a", "c"])
    assert "is the text of a choice and no index" in caught.value.what
    assert "as the text of a choice, or every label as an index" in str(caught.value.hint)
    assert str(caught.value.where).endswith("tasks.t.doc_to_target")


@pytest.mark.parametrize("written", [[0, 1.5], ["a", "d"], [0, 3], [0, -1], ["a", "inf"], [0, None], ["a", None]])
def test_a_label_that_is_neither_is_refused_with_its_row(tmp_path: Path, written: list[Any]) -> None:
    with pytest.raises(InputError, match=r"row 1 of the split 'validation': (label|there is no label)"):
        choice_rows(tmp_path, write_labels(tmp_path, "json", written), ["b", "a", "c"])


def test_decimal_numbers_of_a_parquet_file_are_read_as_others_are(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "gold": datasets.Value("decimal128(4, 1)")})
    data = datasets.Dataset.from_dict({"text": TEXTS[:2], "gold": [Decimal("2.0"), Decimal("0.5")]}, features=features)
    data.to_parquet(tmp_path / "rows.parquet")
    dataset = {"path": "parquet", "data_files": {"validation": "rows.parquet"}}
    assert labels(choice_rows(tmp_path, dataset, ["0.5", "1", "2"])) == [2, 0]


def test_booleans_are_no_indices_of_three_choices(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="label True is not among the choices"):
        choice_rows(tmp_path, write_labels(tmp_path, "json", [True, False]), ["a", "b", "c"])


def test_where_both_readings_fit_and_differ_text_wins_and_it_is_said(tmp_path: Path) -> None:
    remarks: list[str] = []
    rows = choice_rows(tmp_path, write_labels(tmp_path, "csv", [1, 2, 1]), ["1", "2", "3"], remarks=remarks)
    assert labels(rows) == [0, 1, 0]
    assert len(remarks) == 1
    for word in ("1 of row 0", "is the choice '1'", "as an index it would be '2'"):
        assert word in remarks[0]


def test_nothing_is_said_where_only_one_reading_fits_or_both_agree(tmp_path: Path) -> None:
    for written, choices in (
        ([0, 1], ["0", "1"]),
        ([0, 1], ["a", "b"]),
        ([3, 1], ["1", "2", "3"]),
        (["a"], ["a", "b"]),
    ):
        remarks: list[str] = []
        choice_rows(tmp_path, write_labels(tmp_path, "json", written), choices, remarks=remarks)
        assert not remarks


def test_it_is_said_how_booleans_are_read_as_indices(tmp_path: Path) -> None:
    remarks: list[str] = []
    rows = choice_rows(tmp_path, write_labels(tmp_path, "json", [True, False]), ["bad", "good"], remarks=remarks)
    assert labels(rows) == [1, 0]
    assert remarks == ["labels are booleans: false is read as 'bad', true as 'good'"]


def test_a_number_in_the_spec_is_an_index_whatever_the_texts_of_choices(tmp_path: Path) -> None:
    dataset = write_labels(tmp_path, "json", [5, 0])
    assert labels(choice_rows(tmp_path, dataset, ["1", "0"], target=0)) == [0, 0]
    with pytest.raises(InputError, match="label 2 is not among the choices"):
        choice_rows(tmp_path, dataset, ["1", "0"], target=2)


def test_numbers_of_rows_with_choices_of_their_own_are_indices_unless_all_texts_fit(tmp_path: Path) -> None:
    documents = [{"text": "a", "options": ["3", "1", "2"], "gold": 1}, {"text": "b", "options": ["7", "9"], "gold": 0}]
    (tmp_path / "rows.json").write_text("".join(json.dumps(document) + "\n" for document in documents))
    dataset = {"path": "json", "data_files": {"validation": "rows.json"}}
    assert labels(choice_rows(tmp_path, dataset, "options")) == [1, 0]  # "0" is no choice of the second


@pytest.mark.parametrize("target", ["gold", "{{gold}}"])
def test_a_named_class_is_found_among_the_choices_by_its_name(tmp_path: Path, target: str) -> None:
    dataset = write_classes(tmp_path, ["negative", "positive"], [0, 1, 1])
    remarks: list[str] = []
    assert labels(choice_rows(tmp_path, dataset, ["Positive", "Negative"], target, remarks)) == [1, 0, 0]
    assert "0 (negative) of row 0" in remarks[0]
    assert labels(choice_rows(tmp_path, dataset, ["negative", "positive"], target)) == [0, 1, 1]
    assert labels(choice_rows(tmp_path, dataset, ["bad", "good"], target)) == [0, 1, 1]


def test_names_of_classes_of_which_some_are_choices_at_other_places_are_refused(tmp_path: Path) -> None:
    dataset = write_classes(tmp_path, ["negative", "neutral", "positive"], [0, 1, 2])
    with pytest.raises(InputError, match="the data's class 0 is 'negative', which is choice 1"):
        choice_rows(tmp_path, dataset, ["positive", "negative", "mixed"])
    assert labels(choice_rows(tmp_path, dataset, ["negative", "so-so", "positive"])) == [0, 1, 2]


@pytest.mark.parametrize("named", [True, False])
def test_labels_of_a_classifier_are_classes_of_its_head_by_name(tmp_path: Path, named: bool) -> None:
    """Names in another order than the head's: the head's class 2 is neutral, whatever number the data gives it."""
    names, head = ["negative", "neutral", "positive"], ["POSITIVE", "NEGATIVE", "NEUTRAL"]
    dataset = write_classes(tmp_path, names, [0, 1, 2, 1])
    assert labels(class_rows(tmp_path, dataset, names if named else None, head)) == [1, 2, 0, 2]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_texts_are_classes_of_the_head_though_the_spec_names_none(tmp_path: Path, kind: str) -> None:
    dataset = write_labels(tmp_path, kind, ["spam", "ham", "spam"])
    assert labels(class_rows(tmp_path, dataset, None, ["ham", "spam"])) == [1, 0, 1]


def test_names_that_are_mere_numbers_say_nothing(tmp_path: Path) -> None:
    names = ["negative", "positive"]
    dataset = write_classes(tmp_path, names, [0, 1, 1])
    for head in (["LABEL_0", "LABEL_1"], ["0", "1"], []):
        assert labels(class_rows(tmp_path, dataset, None, head)) == [0, 1, 1]
        assert labels(class_rows(tmp_path, dataset, names, head)) == [0, 1, 1]
    assert labels(class_rows(tmp_path, write_labels(tmp_path, "json", [0, 1]), None, ["LABEL_0", "LABEL_1"])) == [0, 1]


@pytest.mark.parametrize(
    ("names", "head", "says"),
    [
        (["bad", "good"], ["negative", "positive"], "are not those of the expert's head"),
        (["negative", "positive"], ["negative", "neutral"], "are not those of the expert's head"),
        (["negative", "positive"], ["negative", "neutral", "positive"], "2 classes .* head has 3"),
        (["negative", "positive"], ["LABEL_0", "LABEL_1", "LABEL_2"], "2 classes .* head has 3"),
    ],
)
def test_names_that_are_not_the_heads_are_refused_with_both_lists(
    tmp_path: Path, names: list[str], head: list[str], says: str
) -> None:
    dataset = write_labels(tmp_path, "json", [0, 1])
    for written in (names, None):
        data = dataset if written else write_classes(tmp_path, names, [0, 1])
        with pytest.raises(InputError, match=says) as caught:
            class_rows(tmp_path, data, written, head)
        assert str(names) in caught.value.what
        assert str(head) in caught.value.what
        assert str(caught.value.where).endswith("tasks.t.doc_to_choice")


# --- one reading for all splits --------------------------------------------------------------------------------------


def write_splits(folder: Path, **splits: list[Any]) -> dict[str, Any]:
    for name, values in splits.items():
        lines = [json.dumps({"text": f"{name} {i}", "gold": value}) for i, value in enumerate(values)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {"path": "json", "data_files": {name: f"{name}.jsonl" for name in splits}}


def read_test(folder: Path, choices: list[str], **splits: list[Any]) -> list[int | None]:
    task = ChoiceTask(
        dataset=write_splits(folder, **splits), doc_to_text="text", doc_to_choice=choices, doc_to_target="gold"
    )
    return labels(load_rows("t", task, "test", root=folder, spec_file="spec.yaml"))


def read_two_labels(folder: Path, **splits: list[Any]) -> list[Any]:
    task = MultiLabelTask(
        type="multi-label-classification",
        dataset=write_splits(folder, **splits),
        doc_to_text="text",
        doc_to_choice=["wet", "cold"],
        doc_to_target="gold",
    )
    return labels(load_rows("t", task, "test", root=folder, spec_file="spec.yaml"))


STARS = ["1", "2", "3"]


def test_a_split_that_could_be_read_in_two_ways_is_read_as_the_validation_split_is(tmp_path: Path) -> None:
    assert read_test(tmp_path, STARS, validation=[0, 1, 2], test=[1, 2, 2]) == [1, 2, 2]
    assert read_test(tmp_path, STARS, validation=[1, 2, 3], test=[1, 2, 2]) == [0, 1, 1]
    assert read_test(tmp_path, STARS, validation=[1, 2, 2], test=[2, 1]) == [1, 0]
    assert read_test(tmp_path, STARS, validation=["0", "1"], test=["2", "1"]) == [2, 1]


@pytest.mark.parametrize(
    ("validation", "test"), [([1, 2, 2], [0, 1]), ([0, 1, 2], [3, 1]), ([1, 2], [0, 0]), ([0, 0], [1, 3])]
)
def test_a_split_that_cannot_be_read_as_the_validation_split_is_refused(
    tmp_path: Path, validation: list[int], test: list[int]
) -> None:
    with pytest.raises(InputError, match=r"labels of the split 'test' can only be .* those of 'validation' are"):
        read_test(tmp_path, STARS, validation=validation, test=test)


def test_splits_may_be_written_in_different_forms_where_no_label_can_be_mistaken(tmp_path: Path) -> None:
    assert read_test(tmp_path, ["bad", "good"], validation=["good", "bad"], test=[0, 1]) == [0, 1]
    assert read_test(tmp_path, ["0", "1"], validation=["0", "1"], test=[1, 0]) == [1, 0]
    assert read_test(tmp_path, STARS, validation=[1, 2, 3], test=["3", "1"]) == [2, 0]


def test_a_test_split_is_read_where_the_validation_split_is_missing_or_has_no_labels(tmp_path: Path) -> None:
    assert read_test(tmp_path, STARS, test=[1, 2]) == [0, 1]
    assert read_test(tmp_path, STARS, validation=[None, None], test=[1, 2]) == [0, 1]


def test_few_shot_examples_have_the_reading_of_the_scored_rows(tmp_path: Path) -> None:
    dataset = write_splits(tmp_path, validation=[0, 1, 2, 0], train=[1, 2, 2])
    task = ChoiceTask(
        dataset=dataset,
        doc_to_text="text",
        doc_to_choice=STARS,
        doc_to_target="gold",
        training_split="train",
        num_fewshot=3,
    )
    for row in load_rows("t", task, "validation", root=tmp_path, spec_file="spec.yaml"):
        assert {example.text: example.answer for example in row.examples} == {
            "train 0": "2",
            "train 1": "3",
            "train 2": "3",
        }


@pytest.mark.parametrize(
    ("validation", "expected"), [([[0], [0, 1], [1]], [(1, 1), (0, 1)]), ([[1, 1], [0, 1]], [(0, 1), (0, 1)])]
)
def test_rows_of_two_labels_are_bits_or_lists_as_the_validation_split_has_them(
    tmp_path: Path, validation: list[list[int]], expected: list[tuple[int, int]]
) -> None:
    test = [[0, 1], [0, 1]] if validation[0] == [1, 1] else [[0, 1], [1]]
    assert read_two_labels(tmp_path, validation=validation, test=test) == expected


def test_two_labels_in_each_row_are_lists_where_the_validation_split_has_lists_and_refused_as_bits_elsewhere(
    tmp_path: Path,
) -> None:
    assert read_two_labels(tmp_path, validation=[[0], [0, 1]], test=[[0, 1], [1, 0]]) == [(1, 1), (1, 1)]
    with pytest.raises(InputError, match="can only be lists of labels, and those of 'validation' are bits"):
        read_two_labels(tmp_path, validation=[[0, 1], [1, 1]], test=[[0], [0, 1]])


def test_booleans_are_no_classes_of_an_unnamed_head_of_three(tmp_path: Path) -> None:
    dataset = write_labels(tmp_path, "jsonl", [True, False]) | {"path": "json"}
    with pytest.raises(InputError, match="label True is not among"):
        class_rows(tmp_path, dataset, None, ["LABEL_0", "LABEL_1", "LABEL_2"])
    assert labels(class_rows(tmp_path, dataset, None, ["LABEL_0", "LABEL_1"])) == [1, 0]
