"""Tasks of type token-classification: a tag for each word, through the whole program."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertForTokenClassification, pipeline

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.data import Row
from dfmerge_studies.tasks.metrics import METRICS, task_metrics
from dfmerge_studies.tasks.tags import IGNORED, Tags, read_tags, read_words
from dfmerge_studies.tasks.words import encode_words
from tests.models import FAMILIES, TEXTS
from tests.project import Project, perturbed

NAMES = ["O", "B-PER", "I-PER", "B-LOC"]

# Metrics


def losses(taken: list[int], tags: int = 4) -> list[list[float]]:
    """Per word, losses that are lowest at what is taken."""
    return [[0.1 if c == tag else 2.0 for c in range(tags)] for tag in taken]


def entities(names: list[str]) -> set[tuple[str, int, int]]:
    """Type, first and last word of every entity, by hand."""
    found, begun = set(), None
    for i, name in enumerate([*names, "O"]):
        goes_on = begun is not None and name == f"I-{begun[0]}"
        if begun is not None and not goes_on:
            found.add((begun[0], begun[1], i - 1))
            begun = None
        if name.startswith("B-"):
            begun = (name[2:], i)
    return found


def test_f1_of_entities_counts_type_and_extent_over_all_inputs() -> None:
    wanted = [[1, 2, 0, 3], [0, 1, 1, IGNORED], [1, 2, 2]]
    taken = [[1, 2, 0, 1], [0, 1, 1, 3], [1, 2, 0]]
    answers = Tags([losses(each) for each in taken], wanted, NAMES)
    sides = []
    for side in (wanted, taken):
        rows = [
            [NAMES[t] for t, w in zip(*each, strict=True) if w != IGNORED] for each in zip(side, wanted, strict=True)
        ]
        sides.append({(i, *entity) for i, row in enumerate(rows) for entity in entities(row)})
    assert (len(sides[0]), len(sides[1]), len(sides[0] & sides[1])) == (5, 5, 3)
    assert METRICS["entity_f1"].score(answers) == pytest.approx(2 * 3 / (5 + 5))
    assert METRICS["word_accuracy"].score(answers) == pytest.approx(8 / 10)
    result = METRICS["log_likelihood"].result(answers)
    assert result.rows == pytest.approx([-(0.1 * 3 + 2.0) / 4, -0.1, -(0.1 * 2 + 2.0) / 3])
    assert METRICS["agreement"].result(answers).rows == pytest.approx([3 / 4, 1, 2 / 3])
    assert set(task_metrics("token-classification")) == {"entity_f1", "word_accuracy", "log_likelihood"}


def test_without_an_entity_all_models_have_the_same_f1() -> None:
    assert METRICS["entity_f1"].pointless(Tags([], [(0, 0), (0, IGNORED)], NAMES)) == "no row has an entity"
    assert METRICS["entity_f1"].pointless(Tags([], [(0, 3)], NAMES)) is None
    none = Tags([losses([0, 0])], [(0, 3)], NAMES)
    assert METRICS["entity_f1"].score(none) == 0.0


# Words and tags


def test_words_and_tags_are_read_from_lists_and_from_texts_of_lists() -> None:
    assert read_words("['the', 'river']", 0, "w") == ("the", "river")
    words = [("the", "river"), ("rain",)]
    for values in ([["O", "B-LOC"], ["O"]], [[0, 3], [0]], ["['O', 'B-LOC']", ["O"]]):
        assert read_tags(values, words, NAMES, names=(), where="w", split="s")[0] == [(0, 3), (0,)]
    found, _ = read_tags([[2, -100], [0]], words, NAMES, names=["B-LOC", "O", "I-PER", "B-PER"], where="w", split="s")
    assert found == [(2, IGNORED), (3,)]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([["O", "B-ORG"], ["O"]], "row 0, word 1 of the split 's': label 'B-ORG' is not among the choices"),
        ([["O", 7], ["O"]], "row 0, word 1 of the split 's': label 7 is not among the choices"),
        ([["O", "O"], ["O", "O"]], "row 1 of the split 's': 2 labels for 1 words"),
        ([["O", "O"], None], "row 1 of the split 's': None is no list of labels"),
        ([["O", None], ["O"]], "row 0, word 1 of the split 's': there is no label"),
        ([["O", 1], ["O"]], "labels of the split 's' are mixed: 'O' of row 0, word 0"),
    ],
)
def test_tags_that_do_not_fit_their_words_are_refused_by_row_and_word(values: list[Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        read_tags(values, [("the", "river"), ("rain",)], NAMES, names=(), where="w", split="s")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("the river", "is no list of words"),
        ([], "there are no words"),
        (["the", 3], "3 is no word"),
        (None, "is empty"),
    ],
)
def test_what_is_no_list_of_words_is_refused(value: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_words(value, 4, "w")


def row(words: list[str], tags: list[int] | None = None) -> Row:
    return Row(0, " ".join(words), None, (), tuple(tags) if tags is not None else None, words=tuple(words))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_each_word_is_judged_by_its_first_piece_as_inside_a_text(family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    words = ["nobody", "asked", "terribly", "where", "the", "library", "was"]
    (encoded,) = encode_words([row(words, list(range(7)))], tokenizer, None, "w")
    assert encoded.label == tuple(range(7))
    inside = tokenizer((" " if family == "roberta" else "") + " ".join(words), return_offsets_mapping=True)
    assert list(encoded.input_ids) == inside["input_ids"]
    starts, place = [], 0
    for word in words:
        starts.append(place + (family == "roberta"))
        place += len(word) + 1
    offsets = inside["offset_mapping"]
    firsts = [next(i for i, (a, b) in enumerate(offsets) if b > a and a <= start < b) for start in starts]
    assert list(encoded.words) == firsts


def test_words_that_are_cut_off_lose_their_tags_and_a_row_without_any_is_refused() -> None:
    tokenizer = FAMILIES["bert"].tokenizer()
    words = ["we", "walked", "home", "along", "the", "old", "wall"]
    (encoded,) = encode_words([row(words, list(range(7)))], tokenizer, 6, "w")
    assert encoded.truncated
    assert len(encoded.input_ids) == 6
    assert encoded.label == tuple(range(len(encoded.words)))
    assert 0 < len(encoded.words) < 7
    with pytest.raises(InputError, match="no word with a tag is left within 6 tokens"):
        encode_words([row(words, [IGNORED] * 6 + [1])], tokenizer, 6, "w")


# Through the command line


def expert(seed: int, names: list[str]) -> BertForTokenClassification:
    """The project's base with small changes and a head for tags."""
    whole = perturbed("bert", seed=seed, labels=len(names))
    config = copy.deepcopy(whole.config)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForTokenClassification(config)
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if k.startswith("bert.")}, strict=False)
    with torch.no_grad():
        model.classifier.weight.normal_(0, 1, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def own_tags(model: Any, tokenizer: Any, words: list[str]) -> list[str]:
    """What a model says of each word's first piece, by transformers alone."""
    encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        best = model(**encoded).logits[0].argmax(-1).tolist()
    ids = encoded.word_ids()
    return [model.config.id2label[best[ids.index(word)]] for word in range(len(words))]


@pytest.fixture
def tagged(project_of) -> Project:
    """Two tasks of tags, whose labels are what their experts say; blue has no entities but parts of speech."""
    project: Project = project_of("bert")
    project.spec = copy.deepcopy(project.spec)
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "base")
    for seed, (name, names) in enumerate((("red", NAMES), ("blue", ["NOUN", "VERB", "OTHER"])), 1):
        model = expert(seed, names)
        model.save_pretrained(project.folder / name)
        for split, shift in (("validation", 0), ("test", 3)):
            lines = []
            for i in range(16):
                words = [*TEXTS[(i + shift) % len(TEXTS)].split(), str(i)]
                lines.append(json.dumps({"tokens": words, "tags": own_tags(model, tokenizer, words)}))
            (project.folder / f"{name}.{split}.jsonl").write_text("\n".join(lines))
        task = project.spec["tasks"][name]
        task |= {"type": "token-classification", "doc_to_text": "tokens", "doc_to_target": "tags", "max_length": 40}
    project.spec["tasks"]["blue"]["metric"] = "word_accuracy"
    project.spec["importance"] = {"samples": 2, "estimator": "sampled"}
    project.write()
    return project


def with_red(project: Project, **fields: Any) -> None:
    red = {**project.spec["tasks"]["red"], **fields}
    project.write(tasks={**project.spec["tasks"], "red": {k: v for k, v in red.items() if v is not None}})


def test_each_expert_has_all_words_right_that_it_tagged_itself(tagged: Project) -> None:
    for model, task in (("red", "red"), ("blue", "blue")):
        scored = tagged.json("evaluate", "spec.yaml", "--model", model, "--split", "test")["tasks"][task]
        assert (scored["score"], scored["n"]) == (1.0, 16)
    shown = tagged.cli("validate", "spec.yaml", "--show", "red").stdout
    assert "what the head makes of the first token of each word" in shown
    first = json.loads((tagged.folder / "red.validation.jsonl").read_text().splitlines()[0])
    assert f"{first['tokens'][0]} {first['tags'][0]}" in shown


@pytest.mark.slow
def test_a_study_of_tags_finds_a_merge_and_exports_classifiers_that_transformers_opens(tagged: Project) -> None:
    printed = tagged.json("run", "spec.yaml", "--set", "method=df-merge")
    assert printed["task_metrics"] == {"red": "entity_f1", "blue": "word_accuracy"}
    rows = {each["name"]: each["validation"]["tasks"] for each in printed["rows"]}
    assert rows["each task's own expert"] == {"red": 1.0, "blue": 1.0}
    assert rows["base, unmerged"]["red"] < 1.0
    tagged.cli("export", "spec.yaml", "--out", "merged", "--split-heads")
    again = tagged.json("evaluate", "spec.yaml", "--model", "merged")["tasks"]
    assert {task: entry["score"] for task, entry in again.items()} == pytest.approx(printed["best"]["tasks"])

    folder = tagged.folder / "merged/red"
    model = AutoModelForTokenClassification.from_pretrained(folder)
    assert [model.config.id2label[i] for i in range(4)] == NAMES
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [json.loads(line) for line in (tagged.folder / "red.validation.jsonl").read_text().splitlines()]
    taken = [[NAMES.index(tag) for tag in own_tags(model, tokenizer, line["tokens"])] for line in lines]
    wanted = [[NAMES.index(tag) for tag in line["tags"]] for line in lines]
    found = METRICS["entity_f1"].score(Tags([losses(each) for each in taken], wanted, NAMES))
    assert found == pytest.approx(printed["best"]["tasks"]["red"])
    assert pipeline("token-classification", str(folder))("the river was quiet")
    for place in (folder, tagged.folder / "merged"):
        card = ModelCard.load(place / "README.md")
        assert card.data.pipeline_tag == "token-classification"
        code = card.text.split("```python")[1].split("```")[0].replace("TASK", "red").replace("DIR", str(place))
        exec(code, {})


def test_tags_of_the_data_are_those_of_the_head_by_name(tagged: Project) -> None:
    lines = [json.loads(line) for line in (tagged.folder / "red.validation.jsonl").read_text().splitlines()]
    names = ["B-LOC", "I-PER", "B-PER", "O"]
    feature = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = {"tokens": [line["tokens"] for line in lines], "tags": [line["tags"] for line in lines]}
    datasets.Dataset.from_dict(rows, features=feature).to_parquet(tagged.folder / "red.parquet")
    dataset = {"path": "parquet", "data_files": {"validation": "red.parquet", "test": "red.parquet"}}
    for choices in (None, names, NAMES):
        with_red(tagged, dataset=dataset, doc_to_choice=choices)
        assert tagged.json("evaluate", "spec.yaml", "--model", "red")["tasks"]["red"]["score"] == 1.0


def test_agreement_is_the_share_of_words_that_the_expert_tags_alike(tagged: Project) -> None:
    printed = tagged.json("run", "spec.yaml", "--set", "objective=agreement", "--set", "method=gta", "--no-test")
    rows = {each["name"]: each["validation"]["tasks"] for each in printed["rows"]}
    assert rows["each task's own expert"] == {"red": 1.0, "blue": 1.0}
    assert 0 < rows["base, unmerged"]["red"] < 1.0


@pytest.mark.slow
def test_an_adapter_with_a_head_of_tags_is_an_expert(tagged: Project) -> None:
    base = AutoModelForTokenClassification.from_pretrained(tagged.folder / "base", num_labels=4)
    base.config.id2label, base.config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    config = LoraConfig(task_type="TOKEN_CLS", target_modules=["query"], init_lora_weights=False)
    wrapped = get_peft_model(base, config)
    for file in (tagged.folder / "red").iterdir():
        file.unlink()
    wrapped.save_pretrained(tagged.folder / "red")
    base.config.save_pretrained(tagged.folder / "red")
    scored = tagged.json("evaluate", "spec.yaml", "--model", "red")["tasks"]["red"]
    assert math.isfinite(scored["score"])
    tagged.cli("merge", "spec.yaml", "--coefficients", "red=0.5,blue=0.5", "--method", "df-merge", "--out", "merged")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"doc_to_text_pair": "tokens"}, "tasks.red.doc_to_text_pair: unknown key"),
        ({"metric": "f1"}, "the metrics of type: token-classification are log_likelihood, entity_f1"),
        ({"doc_to_text": "{{ tokens[0] }}"}, "is no list of words"),
        ({"doc_to_choice": ["O", "B-PER", "I-PER", "B-ORG"]}, "are not those of the expert's head"),
        ({"doc_to_target": "tokens"}, "is not among the choices"),
    ],
)
def test_what_does_not_fit_a_task_of_tags_is_refused(tagged: Project, fields: dict[str, Any], says: str) -> None:
    with_red(tagged, **fields)
    assert says in tagged.cli("validate", "spec.yaml", check=2).stderr


def test_entities_need_tags_with_names_of_their_scheme(tagged: Project) -> None:
    tasks = copy.deepcopy(tagged.spec["tasks"])
    tasks["blue"]["metric"] = "entity_f1"
    tagged.write(tasks=tasks)
    said = tagged.cli("validate", "spec.yaml", check=2).stderr
    assert "entity_f1 cannot read the names of the classes: 'NOUN' is not O, B-TYPE, I-TYPE" in said


def test_a_head_on_whole_texts_tags_no_words_nor_the_reverse(tagged: Project) -> None:
    perturbed("bert", seed=1, labels=4).save_pretrained(tagged.folder / "red")
    said = tagged.cli("validate", "spec.yaml", check=2).stderr
    assert "a BertForSequenceClassification; tasks of type token-classification have a head that tags" in said
    tasks = {
        name: {**task, "type": "classification", "metric": "accuracy"} for name, task in tagged.spec["tasks"].items()
    }
    tagged.write(tasks=tasks)
    said = tagged.cli("validate", "spec.yaml", check=2).stderr
    assert "a BertForTokenClassification; tasks of type classification pick one of several classes" in said
    tasks["red"] = tagged.spec["tasks"]["red"]
    tagged.write(tasks=tasks)
    assert "cannot be mixed" in tagged.cli("validate", "spec.yaml", check=2).stderr


def test_templates_make_words_of_a_text(tagged: Project, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (tagged.folder / "red.validation.jsonl").read_text().splitlines()]
    texts = [{"text": " ".join(line["tokens"]), "spelt": " ".join(line["tags"])} for line in lines]
    (tagged.folder / "red.validation.jsonl").write_text("\n".join(map(json.dumps, texts)))
    with_red(tagged, doc_to_text="{{ text.split() }}", doc_to_target="{{ spelt.split() }}")
    assert tagged.json("evaluate", "spec.yaml", "--model", "red")["tasks"]["red"]["score"] == 1.0


def test_init_writes_such_tasks_from_the_heads_of_the_experts(tagged: Project) -> None:
    files = ["--data", "red.validation.jsonl", "--data", "blue.validation.jsonl"]
    tagged.cli("init", "base", "red", "blue", *files, "--out", "made.yaml")
    text = (tagged.folder / "made.yaml").read_text()
    assert text.count("    type: token-classification\n") == 2
    assert "    doc_to_text: tokens" in text
    assert "    metric: entity_f1\n" in text
    assert "    metric: word_accuracy\n" in text
    assert tagged.json("validate", "made.yaml")["ok"]
