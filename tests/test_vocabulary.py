"""Tokenizers of base and experts: what no text of the tasks shows is accepted, what one shows is refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from dfmerge_studies.errors import InputError
from dfmerge_studies.objective.loading import load_problem
from dfmerge_studies.objective.problem import Problem
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


def save_resized(folder: Path, auto: Any, by: int) -> torch.nn.Module:
    """Give a model's tables more rows, or fewer, as training with another tokenizer leaves them."""
    model = auto.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + by)
    if by > 0:
        with torch.no_grad():
            model.get_input_embeddings().weight[-by:] += 0.5
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-tied", "t5", "t5-v1.1"])
def test_rows_of_tokens_that_no_task_uses_are_left_out_of_a_language_model(
    project_of: Callable[[str], Project], caplog: pytest.LogCaptureFixture, family: str
) -> None:
    project = project_of(family)
    auto = AutoModelForSeq2SeqLM if family.startswith("t5") else AutoModelForCausalLM
    before = load(project)
    change(project.folder / "red", extra_token)
    live = save_resized(project.folder / "red", auto, 2)
    with caplog.at_level(logging.WARNING):
        problem = load(project)
    assert "has 2 rows more than the base's, for tokens of its own; they are left out" in caplog.text
    assert problem.data_digests() == before.data_digests()
    problem.resident.load_scaled_(0, 1.0)
    rows = before.resident.model.get_input_embeddings().weight.shape[0]
    ids = {"input_ids": torch.tensor([[2, 30, 31, 40, 3]])}
    ids |= {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if family.startswith("t5") else {}
    with torch.no_grad():
        found, wanted = problem.resident.model(**ids).logits, live(**ids).logits[..., :rows]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert project.json("run", project.file, "--method", "gta", "--trials", "2")["trials"]["complete"] == 2


def test_padding_of_a_table_that_an_expert_lacks_is_the_bases(
    project_of: Callable[[str], Project], caplog: pytest.LogCaptureFixture
) -> None:
    project = project_of("llama")
    save_resized(project.folder / "base", AutoModelForCausalLM, 56)  # a table of 256 rows for 200 tokens
    for name in ("red", "blue"):
        save_resized(project.folder / name, AutoModelForCausalLM, 0)
    with caplog.at_level(logging.WARNING):
        problem = load(project)
    assert caplog.text.count("has 56 rows fewer than the base's, of no token") == 2
    for vector in problem.resident.task_vectors:
        assert not vector.deltas["model.embed_tokens.weight"][200:].any()


def test_an_expert_that_lacks_rows_of_tokens_is_refused(project_of: Callable[[str], Project]) -> None:
    project = project_of("llama")
    save_resized(project.folder / "red", AutoModelForCausalLM, -5)
    with pytest.raises(InputError, match=r"has 195 rows, and the base's tokenizer has a token of id 195"):
        load(project)


TOKENS = 196  # of the tokenizer of causal models; their tables have 200 rows


def shortened(project: Project) -> None:
    """Tables without padding."""
    for name in ("base", "red", "blue"):
        save_resized(project.folder / name, AutoModelForCausalLM, TOKENS - 200)


def united(project: Project, padded: bool) -> dict[str, torch.nn.Module]:
    """Experts that have added tokens: red two, blue one that red has too and one of its own, in another order."""
    if not padded:
        shortened(project)
    tokens = {"red": [EXTRA, "<tool>"], "blue": ["<think>", EXTRA]}
    models = {}
    for name, added in tokens.items():
        change(project.folder / name, lambda tokenizer, added=added: tokenizer.add_tokens(added, special_tokens=True))
        models[name] = save_resized(project.folder / name, AutoModelForCausalLM, 0 if padded else 2)
    append_row(project, "red.validation.jsonl", input=f"say {EXTRA} now <tool>")
    append_row(project, "blue.validation.jsonl", input=f"a <think> of {EXTRA}")
    project.spec["tokenizer"] = "union"
    project.write()
    return models


@pytest.mark.parametrize("padded", [False, True])
def test_the_union_has_every_experts_added_tokens_with_its_own_rows(
    project_of: Callable[[str], Project], padded: bool
) -> None:
    project = project_of("llama")
    models = united(project, padded)
    problem = load(project)
    resident = problem.resident
    assert resident.union is not None
    assert resident.union.ids == {EXTRA: TOKENS, "<tool>": TOKENS + 1, "<think>": TOKENS + 2}
    at = {"red": {EXTRA: TOKENS, "<tool>": TOKENS + 1}, "blue": {"<think>": TOKENS, EXTRA: TOKENS + 1}}
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = {name: dict(model.named_parameters())[table].detach() for name, model in models.items()}
        for coefficient in (0.0, 0.4, 1.0):
            resident.load_scaled_(0, coefficient)
            found = dict(resident.model.named_parameters())[table]
            assert len(found) == (200 if padded else TOKENS + 3)
            torch.testing.assert_close(found[TOKENS + 1], rows["red"][at["red"]["<tool>"]])
            torch.testing.assert_close(found[TOKENS + 2], rows["blue"][at["blue"]["<think>"]])
            shared = (rows["red"][at["red"][EXTRA]] + rows["blue"][at["blue"][EXTRA]]) / 2
            torch.testing.assert_close(found[TOKENS], shared)
        torch.testing.assert_close(found[:TOKENS], rows["red"][:TOKENS])
    tokens = resident.tokenizer.convert_ids_to_tokens(problem.examples("blue", "validation")[-1].input_ids)
    assert "<think>" in tokens
    assert EXTRA in tokens


def test_a_merge_of_the_union_is_exported_with_its_tokenizer_and_scores_alike(
    project_of: Callable[[str], Project],
) -> None:
    project = project_of("llama")
    united(project, padded=False)
    result = project.json("run", project.file, "--trials", "2")
    project.cli("export", project.file, "--out", "merged")
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "merged")
    model = AutoModelForCausalLM.from_pretrained(project.folder / "merged")
    assert (len(tokenizer), model.config.vocab_size) == (TOKENS + 3, TOKENS + 3)
    assert "<think>" in tokenizer.tokenize("a <think> of")
    scores = project.json("evaluate", project.file, "--model", "merged")["tasks"]
    assert {task: found["score"] for task, found in scores.items()} == pytest.approx(result["best"]["tasks"])
    told = project.cli("run", project.file, "--set", "tokenizer=base", "--set", "name=other", check=2).stderr
    assert "otherwise than the base's" in told
    assert "tokenizer: union" in told
    told = project.cli("export", project.file, "--out", "adapter", "--as-adapter", check=2).stderr
    assert "cannot add tokens" in told


def test_a_study_says_whose_tokens_its_merges_have(project_of: Callable[[str], Project]) -> None:
    project = project_of("llama")
    project.cli("run", project.file, "--trials", "1", "--method", "gta")
    told = project.cli("run", project.file, "--method", "gta", "--set", "tokenizer=union", check=2).stderr
    assert "tokenizer: the study has 'base', this run has 'union'" in told


def test_an_adapter_that_was_trained_with_added_tokens_is_folded_and_its_rows_left_out_or_united(
    project_of: Callable[[str], Project],
) -> None:
    from peft import LoraConfig, get_peft_model

    project = project_of("llama")
    shortened(project)
    base = AutoModelForCausalLM.from_pretrained(project.folder / "base")
    base.resize_token_embeddings(TOKENS + 2)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(project.folder / "adapter", save_embedding_layers=True)
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "base")
    extra_token(tokenizer)
    tokenizer.save_pretrained(project.folder / "adapter")
    project.spec["experts"]["red"] = {"model": "adapter", "task": "red"}
    project.write()
    live, ids = adapted.eval(), torch.tensor([[2, 30, 31, 40, 3]])
    with torch.no_grad():
        wanted = live(input_ids=ids).logits
    for kind, rows in (("base", TOKENS), ("union", TOKENS + 2)):
        project.write(tokenizer=kind)
        torch.testing.assert_close(answers(load(project)), wanted[..., :rows], rtol=1e-4, atol=1e-4)
