"""Prompts and choices of causal models under tokenizers of many kinds; real ones, trained on a few sentences.

The right tokens are those of the same tokenizer without the special tokens behind a text; the right losses are those of
transformers' own forward pass on them.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dfmerge_studies.errors import InputError
from dfmerge_studies.tasks.data import Row
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.evaluate import choice_losses
from dfmerge_studies.tasks.settings import ChoiceTask
from dfmerge_studies.tasks.tokenise import encode_rows
from tests.models import CHOICES, FAMILIES, TEXTS, VOCABULARY, make_model
from tests.project import make_project

SPECIAL = ["<unk>", "<s>", "</s>"]
CHINESE = ("今天天气很好", "今天天气不好", "明天天气好", "天下大雨", "天下太平", "气好", "好天气", "很好", "不好") * 4


@cache
def vocabulary(spaces: str, texts: tuple[str, ...]) -> str:
    """A tokenizer as text; trained once, since training again may number the same tokens otherwise."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if spaces in ("bytes", "prefix"):  # the latter as GPT-2 with add_prefix_space
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaces == "prefix")
    elif spaces == "sentencepiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    elif spaces == "stripping":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFKC(), normalizers.Strip()])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def trained(template: str | None, *, spaces: str = "bytes", texts: tuple[str, ...] = TEXTS) -> PreTrainedTokenizerFast:
    """A tokenizer; `template` says which special tokens it puts around a text, `spaces` how it treats blanks."""
    tokenizer = Tokenizer.from_str(vocabulary(spaces, texts))
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, SPECIAL.index(token)) for token in SPECIAL]
        )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def encode(tokenizer: Any, text: str, choices: tuple[str, ...] = CHOICES, **settings: Any) -> Encoded:
    task = ChoiceTask(dataset={"path": "json"}, doc_to_text="t", doc_to_choice="c", doc_to_target="l", **settings)
    rows = [Row(0, text, None, choices, 0)]
    return encode_rows(rows, task, Kind.CAUSAL, tokenizer, longest=64, where="spec.yaml: tasks.t")[0]


def losses_by_transformers(model: Any, whole: list[int], scored_from: int) -> float:
    """Mean negative log-likelihood of the tokens from a place on, by the model's own loss."""
    labels = torch.tensor([[-100] * scored_from + whole[scored_from:]])
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([whole]), labels=labels).loss)


@pytest.mark.parametrize("spaces", ["bytes", "prefix", "sentencepiece", "stripping"])
@pytest.mark.parametrize(
    ("template", "plain"),
    [
        ("$A </s>", None),
        ("<s> $A </s>", "<s> $A"),
        ("<s> <unk> $A </s> </s>", "<s> <unk> $A"),
    ],
)
@pytest.mark.parametrize("text", [TEXTS[0], "is it? "])
def test_what_a_tokenizer_puts_behind_every_text_stands_behind_no_prompt_and_no_choice(
    spaces: str, template: str, plain: str | None, text: str
) -> None:
    ending = trained(template, spaces=spaces)
    other = trained(plain, spaces=spaces)
    encoded = encode(ending, text)
    assert encoded == encode(other, text)
    end = ending.eos_token_id
    assert end not in encoded.input_ids
    for choice, ids in zip(CHOICES, encoded.choices, strict=True):
        assert end not in ids
        whole = text if text.endswith(" ") else f"{text} "
        assert [*encoded.input_ids, *ids] == other(whole + choice)["input_ids"]


def test_choices_of_a_tokenizer_that_ends_every_text_are_scored_as_transformers_does() -> None:
    model, plain = make_model("gpt2"), trained("<s> $A")
    example = encode(trained("<s> $A </s>"), TEXTS[0])
    found = choice_losses(model, Kind.CAUSAL, [example], pad_id=0, token_budget=512)[0]
    prompt = len(plain(TEXTS[0])["input_ids"])
    expected = [losses_by_transformers(model, plain(f"{TEXTS[0]} {choice}")["input_ids"], prompt) for choice in CHOICES]
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == len(CHOICES)


def test_a_bert_tokenizer_on_a_causal_model_begins_prompts_and_ends_none() -> None:
    tokenizer = FAMILIES["bert"].tokenizer()
    encoded = encode(tokenizer, TEXTS[0])
    assert encoded.input_ids[0] == tokenizer.cls_token_id
    assert tokenizer.sep_token_id not in (*encoded.input_ids, *(token for ids in encoded.choices for token in ids))


def test_a_prompt_that_brings_its_own_beginning_has_one() -> None:
    tokenizer = trained("<s> $A </s>")
    assert encode(tokenizer, f"<s>{TEXTS[0]}") == encode(tokenizer, TEXTS[0])
    assert encode(trained(None), f"<s>{TEXTS[0]}") == encode(tokenizer, TEXTS[0])


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", None])
def test_a_prompt_that_is_cut_keeps_the_beginning_of_every_sequence(template: str | None) -> None:
    text = TEXTS[0] if template else f"<s>{TEXTS[0]}"
    whole, cut = encode(trained(template), text), encode(trained(template), text, max_length=12)
    assert cut.truncated
    assert cut.choices == whole.choices
    assert len(cut.input_ids) + max(map(len, cut.choices)) == 12
    assert cut.input_ids[0] == SPECIAL.index("<s>")
    assert cut.input_ids[1:] == whole.input_ids[-len(cut.input_ids) + 1 :]


def test_choices_that_leave_room_for_the_beginning_only_are_refused() -> None:
    longest = max(map(len, encode(trained("<s> $A"), TEXTS[0]).choices))
    with pytest.raises(InputError, match=f"choices alone fill the {longest + 1} tokens") as caught:
        encode(trained("<s> $A"), TEXTS[0], max_length=longest + 1)
    assert caught.value.where == "spec.yaml: tasks.t.max_length"


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>"])
def test_a_token_that_spans_the_join_belongs_to_the_choices(template: str | None) -> None:
    """The prompt ends in 今天天, of which the tokenizer makes 天气 or 天下 with the choices."""
    tokenizer, plain = trained(template, spaces="none", texts=CHINESE), trained(None, spaces="none", texts=CHINESE)
    prompt, choices = "很好明天不好今天天", ("气好", "下大雨")
    tokens = [plain.tokenize(prompt + choice) for choice in choices]
    assert not any(whole[: len(plain.tokenize(prompt))] == plain.tokenize(prompt) for whole in tokens)
    encoded = encode(tokenizer, prompt, choices, target_delimiter="")
    begin = [SPECIAL.index("<s>")] if template else []
    for choice, ids in zip(choices, encoded.choices, strict=True):
        assert [*encoded.input_ids, *ids] == begin + plain(prompt + choice)["input_ids"]
    assert encoded.choices[0][0] != encoded.choices[1][0]
    model = make_model("gpt2")
    found = choice_losses(model, Kind.CAUSAL, [encoded], pad_id=0, token_budget=512)[0]
    wholes = [begin + plain(prompt + choice)["input_ids"] for choice in choices]
    expected = [losses_by_transformers(model, whole, len(encoded.input_ids)) for whole in wholes]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_prompt_of_which_the_choices_leave_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="row 0: the prompt '天' and a choice are one token") as caught:
        encode(trained(None, spaces="none", texts=CHINESE), "天", ("气", "下"), target_delimiter="")
    assert caught.value.where == "spec.yaml: tasks.t.doc_to_text"
    encoded = encode(trained("<s> $A", spaces="none", texts=CHINESE), "天", ("气", "下"), target_delimiter="")
    assert encoded.input_ids == (SPECIAL.index("<s>"),)


@pytest.mark.parametrize(("first", "second"), [("Yes", "yes"), ("no", " no "), ("ﬁne", "fine"), ("天", "地")])
def test_choices_that_a_tokenizer_cannot_tell_apart_are_refused_with_both_texts(first: str, second: str) -> None:
    with pytest.raises(InputError, match="are the same tokens") as caught:
        encode(trained("<s> $A", spaces="stripping"), TEXTS[0], (first, "nobody", second))
    assert f"{first!r} and {second!r}" in caught.value.what
    assert caught.value.where == "spec.yaml: tasks.t.doc_to_choice"


def test_choices_of_a_text_to_text_model_that_are_the_same_tokens_are_refused() -> None:
    tokenizer = trained("$A </s>", spaces="stripping")
    task = ChoiceTask(dataset={"path": "json"}, doc_to_text="t", doc_to_choice="c", doc_to_target="l")
    rows = [Row(3, "rain", None, ("😀", "😃"), 0)]
    with pytest.raises(InputError, match="row 3: the choices '😀' and '😃' are the same tokens"):
        encode_rows(rows, task, Kind.TEXT_TO_TEXT, tokenizer, longest=64, where="spec.yaml: tasks.t")


@pytest.mark.parametrize("kind", [Kind.TEXT_TO_TEXT, Kind.CAUSAL])
def test_a_choice_of_which_a_tokenizer_keeps_nothing_is_refused(kind: Kind) -> None:
    tokenizer = trained("$A </s>", spaces="stripping")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("\u200b", ""), normalizers.Strip()]
    )
    task = ChoiceTask(dataset={"path": "json"}, doc_to_text="t", doc_to_choice="c", doc_to_target="l")
    with pytest.raises(InputError, match=r"row 0: the choice '\\u200b' (has no|adds no) token"):
        encode_rows([Row(0, "rain", None, ("rain", "\u200b"), 0)], task, kind, tokenizer, longest=64, where="t")


def test_a_study_whose_tokenizer_ends_every_text_scores_as_one_whose_does_not(tmp_path: Path) -> None:
    project = make_project(tmp_path / "p", "gpt2", rows=12)
    models_ = [project.folder / name for name in ("base", "red", "blue")]

    def scores(template: str | None) -> list[Any]:
        for model in models_:
            trained(template).save_pretrained(model)
        return [project.json("evaluate", project.file, "--model", model.name)["tasks"] for model in models_]

    plain = scores(None)
    assert scores("$A </s>") == plain
    assert len({json.dumps(each) for each in plain}) > 1
