"""Tasks of type text: word pieces scored by a language model, as lm-evaluation-harness scores rolling texts."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from dfmerge_studies import StudySpec, load_problem
from dfmerge_studies.errors import InputError
from dfmerge_studies.importance.task_fisher import task_fisher
from dfmerge_studies.objective.importances import check_importance
from dfmerge_studies.tasks.data import Row, load_rows
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.evaluate import choice_losses, length_batches
from dfmerge_studies.tasks.metrics import METRICS
from dfmerge_studies.tasks.settings import TextTask
from dfmerge_studies.tasks.texts import Texts, TextSize
from dfmerge_studies.tasks.tokenise import encode_rows
from dfmerge_studies.tasks.uncertainty import standard_error
from tests.models import FAMILIES, TEXTS, make_model
from tests.project import Project, make_project

PLAIN = ("a longer text about the river and the boats", "rain", "Ünïcode, and a wall", "we walked home")
NATS = (31.0, 4.5, 22.0, 9.0)


def answers(nats: tuple[float, ...] = NATS, texts: tuple[str, ...] = PLAIN) -> Texts:
    """Losses are means over the tokens, of which each text has one per word here."""
    sizes = [TextSize.of(text, len(text.split())) for text in texts]
    return Texts([[x / size.tokens] for x, size in zip(nats, sizes, strict=True)], sizes)


def text_task(**fields: Any) -> TextTask:
    return TextTask(**{"type": "text", "dataset": {"path": "json"}, "doc_to_target": "t", **fields})


def encode(family: str, text: str, before: str = "", **fields: Any) -> Encoded:
    kind, tokenizer = FAMILIES[family].kind, FAMILIES[family].tokenizer()
    rows = [Row(0, before, None, (text,), 0)]
    return encode_rows(rows, text_task(**fields), kind, tokenizer, longest=64, where="spec.yaml: tasks.t")[0]


def nats_by_transformers(model: Any, ids: list[int], scored_from: int, **inputs: Any) -> float:
    """Summed negative log-likelihood of the tokens from a place on, token by token, from transformers' own logits."""
    with torch.no_grad():
        logits = model(**inputs).logits[0].double().log_softmax(-1)
    return -sum(float(logits[place - 1, ids[place]]) for place in range(scored_from, len(ids)))


def test_the_metrics_of_texts_are_those_of_lm_evaluation_harness():
    nats, size = sum(NATS), sum(len(text.encode()) for text in PLAIN)
    words = sum(len(re.split(r"\s+", text)) for text in PLAIN)
    assert METRICS["bits_per_byte"].score(answers()) == pytest.approx(nats / size / math.log(2))
    assert METRICS["byte_perplexity"].score(answers()) == pytest.approx(math.exp(nats / size))
    assert METRICS["word_perplexity"].score(answers()) == pytest.approx(math.exp(nats / words))
    assert not any(METRICS[name].higher_is_better for name in ("bits_per_byte", "byte_perplexity", "word_perplexity"))


@pytest.mark.parametrize("metric", ["bits_per_byte", "byte_perplexity", "word_perplexity"])
def test_the_standard_error_of_a_ratio_is_near_that_of_the_jackknife(metric):
    generator = torch.Generator().manual_seed(0)
    sizes = [TextSize(0, int(n), int(n) // 5 + 1) for n in torch.randint(20, 400, (300,), generator=generator)]
    noise = torch.rand(300, generator=generator)
    nats = [size.bytes * (0.5 + 0.4 * float(x)) for size, x in zip(sizes, noise, strict=True)]
    whole = Texts([[x] for x in nats], [TextSize(1, size.bytes, size.words) for size in sizes])
    without = []
    for left_out in range(300):
        kept = [i for i in range(300) if i != left_out]
        part = Texts([whole.losses[i] for i in kept], [whole.wanted[i] for i in kept])
        without.append(METRICS[metric].score(part))
    spread = sum((each - fmean(without)) ** 2 for each in without)
    found = standard_error(METRICS[metric].result(whole), METRICS[metric])
    assert found == pytest.approx(math.sqrt(299 / 300 * spread), rel=0.02)


def test_a_model_of_no_use_has_a_perplexity_that_is_a_number():
    hopeless = Texts([[5000.0]], [TextSize(4, 9, 2)])
    assert math.isfinite(METRICS["word_perplexity"].score(hopeless))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("before", ["", "she asked where it was"])
def test_a_causal_model_scores_every_word_piece_of_a_text_behind_what_stands_before_it(family, before):
    model, tokenizer = make_model(family), FAMILIES[family].tokenizer()
    example = encode(family, TEXTS[0], before)
    joined = f"{before} {TEXTS[0]}" if before else TEXTS[0]
    whole = tokenizer(joined)["input_ids"]
    start = len(tokenizer(before)["input_ids"]) if before else 0
    if not before:  # the token that begins a sequence, by which the first word piece has a probability
        whole, start = [tokenizer.bos_token_id, *whole], 1
    assert [*example.input_ids, *example.choices[0]] == whole
    assert len(example.input_ids) == start
    found = choice_losses(model, Kind.CAUSAL, [example], pad_id=0)[0][0] * example.text.tokens
    expected = nats_by_transformers(model, whole, start, input_ids=torch.tensor([whole]))
    assert found == pytest.approx(expected, rel=1e-4)
    assert (example.text.bytes, example.text.words) == (len(TEXTS[0].encode()), len(TEXTS[0].split()))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_numbers_are_those_of_lm_evaluation_harness_on_the_same_texts(family):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = make_model(family), FAMILIES[family].tokenizer()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", max_length=64)
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)]
    theirs = harness.loglikelihood_rolling(asked, disable_tqdm=True)
    examples = [encode(family, text) for text in TEXTS]
    ours = Texts(choice_losses(model, Kind.CAUSAL, examples, pad_id=0), [example.text for example in examples])
    words = [len(re.split(r"\s+", text)) for text in TEXTS]
    lengths = [len(text.encode()) for text in TEXTS]
    wanted = {
        "bits_per_byte": bits_per_byte(list(zip(theirs, lengths, strict=True))),
        "byte_perplexity": weighted_perplexity(list(zip(theirs, lengths, strict=True))),
        "word_perplexity": weighted_perplexity(list(zip(theirs, words, strict=True))),
    }
    assert {name: METRICS[name].score(ours) for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_an_encoder_decoder_model_writes_the_text_after_reading_what_stands_before_it():
    model, tokenizer = make_model("t5"), FAMILIES["t5"].tokenizer()
    for before in ("", "tell me"):
        example = encode("t5", TEXTS[2], before)
        read, target = tokenizer(before)["input_ids"], tokenizer(TEXTS[2])["input_ids"]
        assert (list(example.input_ids), list(example.choices[0])) == (read, target)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([read]), labels=torch.tensor([target])).loss
        found = choice_losses(model, Kind.TEXT_TO_TEXT, [example], pad_id=0)[0][0]
        assert found == pytest.approx(float(loss), rel=1e-4)


def test_a_text_that_is_too_long_loses_its_end_and_counts_what_is_left():
    whole, cut = encode("gpt2", TEXTS[0]), encode("gpt2", TEXTS[0], max_length=8)
    assert cut.truncated
    assert not whole.truncated
    assert cut.choices[0] == whole.choices[0][:7]
    assert cut.input_ids == whole.input_ids
    left = FAMILIES["gpt2"].tokenizer().decode(list(cut.choices[0]))
    assert TEXTS[0].startswith(left)
    assert cut.text == TextSize.of(left, 7)
    with pytest.raises(InputError, match="fills the 3 tokens"):
        encode("gpt2", TEXTS[0], "she asked where it was", max_length=3)
    with pytest.raises(InputError, match="longer than the 64 tokens"):
        encode("gpt2", " ".join([TEXTS[0]] * 5))


def test_texts_take_the_memory_of_a_batch_that_their_vocabulary_needs():
    examples = [encode("gpt2", text) for text in TEXTS]
    budget = 4 * (examples[0].text.tokens + 1)
    batches = length_batches(examples, Kind.CAUSAL, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(TEXTS)))
    assert all(
        len(batch) == 1 or len(batch) * max(examples[i].text.tokens for i in batch) <= budget / 4 for batch in batches
    )


def write_texts(folder: Path, name: str = "plain", rows: int = 6) -> dict[str, Any]:
    """Texts as a data file, and the fields of a task of them."""
    for split, shift in (("validation", 0), ("test", 3)):
        lines = [json.dumps({"t": f"{TEXTS[(i + shift) % len(TEXTS)]}, {i}"}) for i in range(rows)]
        (folder / f"{name}.{split}.jsonl").write_text("\n".join(lines))
    files = {split: f"{name}.{split}.jsonl" for split in ("validation", "test")}
    dataset = {"path": "json", "data_files": files}
    return {"type": "text", "dataset": dataset, "doc_to_target": "t", "test_split": "test"}


def test_rows_are_texts_with_what_stands_before_them(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"t": "one", "p": "before"}\n{"t": "two", "p": ""}\n')
    dataset = {"path": "json", "data_files": {"validation": "x.jsonl"}}
    places: dict[str, Any] = {"root": tmp_path, "spec_file": "spec.yaml"}
    rows = load_rows("x", text_task(dataset=dataset, doc_to_text="p"), "validation", **places)
    assert [(row.text, row.choices, row.label) for row in rows] == [("before", ("one",), 0), ("", ("two",), 0)]
    assert [row.text for row in load_rows("x", text_task(dataset=dataset), "validation", **places)] == ["", ""]
    (tmp_path / "x.jsonl").write_text('{"t": "one", "p": "before"}\n{"t": " ", "p": ""}\n')
    with pytest.raises(InputError, match=r"row 1.*no text"):
        load_rows("x", text_task(dataset=dataset), "validation", **places)


@pytest.fixture
def project(tmp_path) -> Project:
    """Two experts of a causal model on texts, where one of them has a task of its own."""
    found = make_project(tmp_path / "p", "llama", rows=6, samples=3, trials=3)
    found.spec["tasks"]["red"] = write_texts(found.folder)
    found.spec["importance"] = {"samples": 3, "estimator": "empirical"}
    found.write()
    return found


def test_a_study_of_texts_and_choices_runs_and_shows_each_by_its_metric(project):
    result = project.json("run", "spec.yaml")
    assert result["task_metrics"] == {"red": "bits_per_byte", "blue": "accuracy"}
    expert = next(row for row in result["rows"] if row["name"] == "each task's own expert")
    base = next(row for row in result["rows"] if row["name"] == "base, unmerged")
    assert expert["validation"]["tasks"]["red"] != base["validation"]["tasks"]["red"]
    evaluated = project.json("evaluate", "spec.yaml", "--model", "red")
    assert evaluated["tasks"]["red"]["score"] == pytest.approx(expert["validation"]["tasks"]["red"], rel=1e-5)


def test_the_importance_of_texts_is_the_mean_of_squared_gradients_of_their_mean_loss(project):
    problem = load_problem(StudySpec.from_yaml(project.file))
    model, examples = problem.resident.model.double(), problem.tasks["red"].fisher
    names = ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
    found = task_fisher(model, Kind.CAUSAL, examples, pad_id=0, names=names, estimator="empirical").values
    parameters = dict(model.named_parameters())
    expected = {name: torch.zeros_like(parameters[name]) for name in names}
    for name in names:
        parameters[name].requires_grad_(True)
    for example in examples:
        whole = [*example.input_ids, *example.choices[0]]
        labels = torch.tensor([[-100] * len(example.input_ids) + list(example.choices[0])])
        loss = model(input_ids=torch.tensor([whole]), labels=labels).loss
        gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            expected[name] += gradient**2 / len(examples)
    for name in names:
        assert torch.allclose(found[name].double(), expected[name], rtol=1e-4, atol=1e-12)


def test_an_expectation_over_the_choices_of_a_text_is_refused(project):
    project.write(importance={"samples": 3})
    told = project.cli("run", "spec.yaml", check=2).stderr
    assert "importance.estimator" in told
    assert "texts of red" in told
    assert "empirical" in told
    assert project.cli("validate", "spec.yaml", check=2).stderr.count("importance.estimator") == 1
    project.write(importance={"samples": 3}, method="gta")  # which has no importance
    problem = load_problem(StudySpec.from_yaml(project.file))
    check_importance(problem, problem.spec.row)
    assert all(example.text is not None for example in problem.examples("red", "validation"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tasks.red.metric": "accuracy"}, ("tasks.red", "the metrics of type: text are bits_per_byte")),
        ({"tasks.blue.metric": "bits_per_byte"}, ("tasks.blue", "the metrics of type: choice are accuracy")),
        ({"tasks.red.doc_to_target": None}, ("tasks.red.doc_to_target",)),
        ({"tasks.red.doc_to_choice": ["a", "b"]}, ("tasks.red.doc_to_choice", "unknown key")),
        ({"objective": "agreement"}, ("tasks.red.type", "task of type text has none")),
    ],
)
def test_what_a_task_of_texts_cannot_have_is_refused_by_field(project, fields, words):
    overrides = [part for field, value in fields.items() for part in ("--set", f"{field}={json.dumps(value)}")]
    told = project.cli("run", "spec.yaml", *overrides, check=2).stderr
    assert all(word in told for word in words), told


def test_texts_need_a_language_model(tmp_path):
    project = make_project(tmp_path / "p", "bert", rows=6, samples=3, trials=2)
    project.spec["tasks"]["red"] = write_texts(project.folder)
    project.write()
    told = project.cli("run", "spec.yaml", check=2).stderr
    assert "text and classification cannot be mixed" in told
