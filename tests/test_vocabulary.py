"""Tokenizers of base and experts: what no text of the tasks shows is accepted, what one shows is refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dfmerge_studies.errors import InputError
from dfmerge_studies.objective.problem import Problem, load_problem
from dfmerge_studies.spec import StudySpec
from tests.project import Project

EXTRA = "<|im_start|>"


def load(project: Project) -> Problem:
    return load_problem(StudySpec.from_yaml(project.file), splits=("validation",))


def change(folder: Path, act: Callable[[Any], Any]) -> None:
    """Load a folder's tokenizer, change it and save it again."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    act(tokenizer)
    tokenizer.save_pretrained(folder)


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def append_row(project: Project, file: str, **columns: Any) -> None:
    lines = (project.folder / file).read_text().splitlines()
    row = {**json.loads(lines[0]), **columns}
    (project.folder / file).write_text("\n".join([*lines, json.dumps(row)]) + "\n")


def pad_is_eos(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token


def other_sides(tokenizer: Any) -> None:
    tokenizer.padding_side, tokenizer.truncation_side = "left", "left"
    tokenizer.model_max_length = 24


def another_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<unk>"


def extra_token(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": [EXTRA, "<|im_end|>"]})


def answers(problem: Problem) -> torch.Tensor:
    problem.resident.load_scaled_(0, 1.0)
    problem.resident.use_head_("red")
    with torch.no_grad():
        return problem.resident.model(input_ids=torch.tensor([[2, 30, 31, 40, 3]])).logits


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_expert_whose_padding_is_its_end_of_sequence_is_merged_as_before(
    project_of: Callable[[str], Project], family: str
) -> None:
    project = project_of(family)
    before = load(project)
    for name in ("red", "blue"):
        change(project.folder / name, pad_is_eos)
        configure(project.folder / name, pad_token_id=0)
    after = load(project)
    torch.testing.assert_close(answers(after), answers(before), rtol=0, atol=0)
    assert after.data_digests() == before.data_digests()
    assert project.json("run", project.file, "--method", "averaging")["trials"]["complete"] == 1


@pytest.mark.parametrize("act", [other_sides, pad_is_eos, extra_token, another_end])
def test_what_no_text_shows_is_no_reason_to_refuse_an_expert(
    project_of: Callable[[str], Project], act: Callable[[Any], Any]
) -> None:
    project = project_of("gpt2")
    append_row(project, "red.validation.jsonl", input="a text that is cut " * 12)
    before = load(project).data_digests()
    change(project.folder / "red", act)
    assert load(project).data_digests() == before


def test_a_chat_template_of_an_expert_is_noted(
    project_of: Callable[[str], Project], caplog: pytest.LogCaptureFixture
) -> None:
    project = project_of("gpt2")

    def chat(tokenizer: Any) -> None:
        tokenizer.chat_template = "{% for m in messages %}" + EXTRA + "{{ m.content }}{% endfor %}"

    change(project.folder / "red", chat)
    with caplog.at_level(logging.WARNING):
        load(project)
    (note,) = [record.getMessage() for record in caplog.records if "chat template" in record.getMessage()]
    assert note.startswith(f"{project.folder / 'red'}: ")
    change(project.folder / "base", chat)  # the same on both sides is nothing to note
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(project)
    assert not [record for record in caplog.records if "chat template" in record.getMessage()]


@pytest.mark.parametrize("who", ["red", "base"])
@pytest.mark.parametrize("column", ["input", "choices"])
def test_a_token_that_only_one_side_has_and_a_task_uses_is_refused_by_name(
    project_of: Callable[[str], Project], who: str, column: str
) -> None:
    project = project_of("llama")
    change(project.folder / who, extra_token)
    assert load(project)
    value = f"say {EXTRA} now" if column == "input" else [f"yes {EXTRA}", "no"]
    append_row(project, "blue.validation.jsonl", **{column: value, "label": 0})
    if who == "base":  # which then needs embeddings of its tokens
        with pytest.raises(InputError):
            load(project)
        return
    with pytest.raises(InputError) as refused:
        load(project)
    assert "experts.red: its tokenizer reads row 24 of the task blue otherwise than the base's" in str(refused.value)
    assert repr(EXTRA) in str(refused.value)


def test_rows_of_the_test_split_are_compared_when_they_are_read(project_of: Callable[[str], Project]) -> None:
    project = project_of("gpt2")
    change(project.folder / "red", extra_token)
    append_row(project, "blue.test.jsonl", input=f"say {EXTRA} now")
    problem = load(project)
    with pytest.raises(InputError, match=r"row 24 of the task blue otherwise"):
        problem.examples("blue", "test")


@pytest.mark.parametrize("part", ["pre_tokenizer", "post_processor"])
def test_another_splitting_of_texts_is_refused(project_of: Callable[[str], Project], part: str) -> None:
    project = project_of("t5")
    file = project.folder / "red" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), part: None}))
    with pytest.raises(InputError, match=r"/red: (splits text otherwise|another tokenizer)"):
        load(project)


def test_a_normaliser_that_only_a_tasks_text_shows_is_refused_by_row(project_of: Callable[[str], Project]) -> None:
    project = project_of("gpt2")
    file = project.folder / "red" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "&"}, "content": "and"}
    file.write_text(json.dumps(content))
    assert load(project)
    append_row(project, "red.validation.jsonl", input="rain & wind")
    with pytest.raises(InputError, match=r"experts\.red: its tokenizer reads row 24 of the task red otherwise"):
        load(project)


def test_embeddings_of_tokens_that_no_task_uses_are_left_out_of_a_classifier(
    project_of: Callable[[str], Project], caplog: pytest.LogCaptureFixture
) -> None:
    project = project_of("bert")
    folder = project.folder / "red"
    change(folder, extra_token)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 2)
    model.save_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        problem = load(project)
    assert "word_embeddings.weight has 2 rows more than the base's" in caplog.text
    with torch.no_grad():
        live = model.eval()(input_ids=torch.tensor([[2, 30, 31, 40, 3]])).logits
    torch.testing.assert_close(answers(problem), live, rtol=1e-4, atol=1e-5)


def test_embeddings_of_more_tokens_are_refused_for_a_language_model(project_of: Callable[[str], Project]) -> None:
    from transformers import AutoModelForCausalLM

    project = project_of("llama")
    folder = project.folder / "red"
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 2)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"resize_token_embeddings"):
        load(project)
