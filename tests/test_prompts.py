"""Few-shot examples, instructions and chat templates in the prompts of our own tasks."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, AutoTokenizer

from dfmerge_studies.errors import InputError
from dfmerge_studies.objective.loading import load_problem
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.data import Row, load_rows
from dfmerge_studies.tasks.encoding import Encoded, Kind
from dfmerge_studies.tasks.evaluate import choice_losses
from dfmerge_studies.tasks.prompts import Example, turns_of
from dfmerge_studies.tasks.settings import ChoiceTask, GenerateTask, MultiLabelTask
from dfmerge_studies.tasks.shown import shown_input
from dfmerge_studies.tasks.tokenise import encode_rows, prompted
from tests.models import FAMILIES, TEXTS
from tests.project import Project, make_project
from tests.test_tokenise import SPECIAL, trained

# Of signs that the small tokenizers of tests.models know.
PLAIN_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}, {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BOS_CHAT = "{{ bos_token }}" + CHAT
PIRATE = "Speak like a pirate."


def task(**fields: Any) -> ChoiceTask:
    plain = {"dataset": {"path": "json"}, "doc_to_text": "q", "doc_to_choice": ["no", "yes"], "doc_to_target": "a"}
    return ChoiceTask.model_validate({"type": "choice", **plain, **fields})


def prompt(settings: ChoiceTask, row: Row, tokenizer: Any = None) -> str:
    return prompted([row], settings, tokenizer or trained(None), where="spec.yaml: tasks.t")[0].text


def asked(text: str = "Is it?", **more: Any) -> Row:
    return Row(0, text, None, ("no", "yes"), 1, **more)


SHOWN = (Example("Is one?", "yes"), Example("Is two?", "no"))


def chatting(template: str | dict[str, str] = CHAT, around: str | None = None) -> Any:
    tokenizer = trained(around, texts=(*TEXTS, "[user] [assistant]\n I say Is it? Is one? Is two? no yes\n"))
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.chat_template = template
    return tokenizer


# --- the text --------------------------------------------------------------------------------------------------------


def test_a_prompt_without_anything_around_it_is_the_input_alone() -> None:
    assert turns_of(task(), "Is it?") == ()
    assert prompt(task(), asked()) == "Is it?"


@pytest.mark.parametrize(
    ("fields", "row", "expected"),
    [
        ({}, asked(examples=SHOWN), "Is one? yes\n\nIs two? no\n\nIs it?"),
        (
            {"fewshot_delimiter": "\n###\n", "target_delimiter": " -> "},
            asked(examples=SHOWN),
            "Is one? -> yes\n###\nIs two? -> no\n###\nIs it?",
        ),
        ({}, asked(description="Questions:\n"), "Questions:\nIs it?"),
        ({"system_instruction": PIRATE}, asked(description="Now:"), f"{PIRATE}\n\nNow:Is it?"),
        ({}, asked(prefix="I say"), "Is it? I say"),
        (
            {},
            asked(prefix="I say", examples=(Example("Is one?", "yes", "I say"),)),
            "Is one? I say yes\n\nIs it? I say",
        ),
        ({}, asked("Is it?\n", prefix="I say"), "Is it?\nI say"),
    ],
)
def test_without_a_chat_template_a_prompt_is_one_text(fields: dict[str, Any], row: Row, expected: str) -> None:
    assert prompt(task(**fields), row) == expected


@pytest.mark.parametrize(
    ("fields", "row", "expected"),
    [
        ({}, asked(), "[user]Is it?</s>[assistant]"),
        ({"system_instruction": PIRATE}, asked(), f"[system]{PIRATE}</s>[user]Is it?</s>[assistant]"),
        (
            {"system_instruction": PIRATE},
            asked(examples=SHOWN, description="Now:"),
            f"[system]{PIRATE}\n\nNow:</s>[user]Is one?</s>[assistant]yes</s>[user]Is two?</s>[assistant]no</s>"
            "[user]Is it?</s>[assistant]",
        ),
        (
            {"fewshot_as_multiturn": False},
            asked(examples=SHOWN),
            "[user]Is one? yes\n\nIs two? no\n\nIs it?</s>[assistant]",
        ),
        ({}, asked(prefix="I say"), "[user]Is it?</s>[assistant]I say"),
        (
            {"fewshot_as_multiturn": False},
            asked(prefix="I say", examples=(Example("Is one?", "yes", "I say"),)),
            "[user]Is one? I say yes\n\nIs it?</s>[assistant]I say",
        ),
    ],
)
def test_a_chat_template_gets_the_turns(fields: dict[str, Any], row: Row, expected: str) -> None:
    assert prompt(task(apply_chat_template=True, **fields), row, chatting()) == expected


def test_a_template_is_chosen_by_name_and_gets_its_variables() -> None:
    both = {"default": CHAT, "short": "{{ messages[-1].content }}{% if thinking %} Think!{% endif %}"}
    named = task(apply_chat_template="short", chat_template_args={"thinking": True})
    assert prompt(named, asked(), chatting(both)) == "Is it? Think!"
    assert prompt(task(apply_chat_template=True), asked(), chatting(both)) == "[user]Is it?</s>[assistant]"


def test_a_template_that_writes_the_date_writes_the_same_date_every_day() -> None:
    """Or else the study's data would be another one tomorrow, and no run could go on."""
    dated = chatting("{{ strftime_now('%d %b %Y') }}: {{ messages[-1].content }}")
    assert prompt(task(apply_chat_template=True), asked(), dated) == "26 Jul 2024: Is it?"


# --- the tokens ------------------------------------------------------------------------------------------------------


def encoded(settings: ChoiceTask, row: Row, tokenizer: Any, kind: Kind = Kind.CAUSAL, longest: int = 200) -> Encoded:
    rows = prompted([row], settings, tokenizer, where="t")
    return encode_rows(rows, settings, kind, tokenizer, longest=longest, where="t")[0]


@pytest.mark.parametrize("around", [None, "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("template", [CHAT, BOS_CHAT])
def test_a_chat_begins_once_and_is_tokenised_as_the_template_writes_it(around: str | None, template: str) -> None:
    tokenizer = chatting(template, around)
    found = encoded(task(apply_chat_template=True), asked(TEXTS[0]), tokenizer)
    text = f"[user]{TEXTS[0]}</s>[assistant]"
    begin = [SPECIAL.index("<s>")] if template == BOS_CHAT or (around or "").startswith("<s>") else []
    for choice, ids in zip(("no", "yes"), found.choices, strict=True):
        assert [*found.input_ids, *ids] == begin + tokenizer(text + choice, add_special_tokens=False)["input_ids"]


def test_blanks_after_the_generation_prompt_are_scored_with_the_answer() -> None:
    tokenizer = chatting(CHAT.replace("[assistant]{% endif", "[assistant]\n{% endif"))
    found = encoded(task(apply_chat_template=True), asked(), tokenizer)
    assert tokenizer.decode(found.input_ids) == "[user]Is it?</s>[assistant]"
    assert [tokenizer.decode(ids) for ids in found.choices] == ["\nno", "\nyes"]


def test_an_answer_that_has_begun_goes_on_behind_the_target_delimiter() -> None:
    tokenizer = chatting()
    begun = encoded(task(apply_chat_template=True), asked(prefix="I say"), tokenizer)
    assert tokenizer.decode(begun.input_ids).endswith("[assistant]I say")
    assert [tokenizer.decode(ids) for ids in begun.choices] == [" no", " yes"]


@pytest.mark.parametrize("template", [CHAT, BOS_CHAT + "{{ eos_token }}"])
def test_a_text_to_text_model_reads_a_chat_with_its_special_tokens_once(template: str) -> None:
    tokenizer = chatting(template, "$A </s>")
    found = encoded(task(apply_chat_template=True), asked(TEXTS[0]), tokenizer, Kind.TEXT_TO_TEXT)
    text = f"{'<s>' if template != CHAT else ''}[user]{TEXTS[0]}</s>[assistant]</s>"
    assert list(found.input_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_text_to_text_prompt_with_examples_is_cut_at_its_beginning_and_keeps_the_question() -> None:
    tokenizer, row = chatting(around="<s> $A </s>"), asked("where the library was", examples=SHOWN * 4)
    whole = encoded(task(num_fewshot=8), row, tokenizer, Kind.TEXT_TO_TEXT, longest=500)
    cut = encoded(task(num_fewshot=8, max_length=20), row, tokenizer, Kind.TEXT_TO_TEXT)
    assert cut.truncated
    assert len(cut.input_ids) == 20
    assert cut.input_ids == (whole.input_ids[0], *whole.input_ids[-19:])
    assert tokenizer.decode(cut.input_ids).endswith("where the library was</s>")


# --- which examples --------------------------------------------------------------------------------------------------


def data(folder: Path, **splits: list[str]) -> dict[str, Any]:
    for split, questions in splits.items():
        lines = [json.dumps({"q": q, "a": len(q) % 2}) + "\n" for q in questions]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return {"path": "json", "data_files": {split: f"{split}.jsonl" for split in splits}}


def rows_of(folder: Path, settings: ChoiceTask, split: str = "validation") -> list[Row]:
    return load_rows("t", settings, split, root=folder, spec_file="spec.yaml")


def test_examples_are_the_harness_draw_of_the_training_split_with_their_right_answers(tmp_path: Path) -> None:
    train, scored = [f"train {'x' * i}" for i in range(9)], [f"row {i}" for i in range(4)]
    settings = task(dataset=data(tmp_path, train=train, validation=scored), fewshot_split="train", num_fewshot=3)
    rows = rows_of(tmp_path, settings)
    generator = Random(1234)  # lm_eval draws with one generator, row after row
    for row in rows:
        expected = generator.sample(train, 3)
        assert [example.text for example in row.examples] == expected
        assert [example.answer for example in row.examples] == [["no", "yes"][len(q) % 2] for q in expected]
    assert rows == rows_of(tmp_path, settings)
    other = rows_of(tmp_path, settings.model_copy(update={"fewshot_random_seed": 1}))
    assert [row.examples for row in other] != [row.examples for row in rows]


def test_a_row_is_never_an_example_of_its_own(tmp_path: Path) -> None:
    questions = [f"row {i}" for i in range(4)]
    rows = rows_of(tmp_path, task(dataset=data(tmp_path, validation=questions), num_fewshot=3))
    for row in rows:
        assert {row.text, *(example.text for example in row.examples)} == set(questions)


def test_a_row_that_stands_in_the_training_split_too_does_not_give_its_answer_away(tmp_path: Path) -> None:
    files = data(tmp_path, train=["one", "two", "three", "one"], validation=["one", "four"])
    first, second = rows_of(tmp_path, task(dataset=files, fewshot_split="train", num_fewshot=2))
    assert {example.text for example in first.examples} == {"two", "three"}
    assert len(second.examples) == 2
    with pytest.raises(InputError, match=r"3 examples asked for.*has 2 rows that do not ask what a scored row asks"):
        rows_of(tmp_path, task(dataset=files, fewshot_split="train", num_fewshot=3))


def test_what_a_row_asks_is_its_input_and_its_choices_in_any_order(tmp_path: Path) -> None:
    def lines(name: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    other = [{"q": "bread", "c": ["no", "yes"], "l": 0}, {"q": "home", "c": ["no", "yes"], "l": 1}]
    lines("train", [{"q": "rain", "c": ["yes", "no"], "l": 0}, *other])
    lines("validation", [{"q": "rain", "c": ["no", "yes"], "l": 1}])
    dataset = {"path": "json", "data_files": {split: f"{split}.jsonl" for split in ("train", "validation")}}
    common = {"dataset": dataset, "doc_to_text": "q", "fewshot_split": "train", "num_fewshot": 2}
    (row,) = rows_of(tmp_path, ChoiceTask(doc_to_choice="c", doc_to_target="l", **common))
    assert {example.text for example in row.examples} == {"bread", "home"}
    target = "{{ c if q == 'rain' else c[:1] }}"  # other accepted answers in the one split than in the other
    (row,) = load_rows(
        "t",
        GenerateTask(type="generate", doc_to_target=target, **common),
        "validation",
        root=tmp_path,
        spec_file="spec.yaml",
    )
    assert {example.text for example in row.examples} == {"bread", "home"}


def test_more_examples_than_rows_are_refused(tmp_path: Path) -> None:
    files = data(tmp_path, validation=["one", "two", "three"])
    with pytest.raises(InputError, match="3 examples asked for, but the few-shot split has 2 rows besides") as caught:
        rows_of(tmp_path, task(dataset=files, num_fewshot=3))
    assert caught.value.where == "spec.yaml: tasks.t.num_fewshot"


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"num_fewshot": 1, "fewshot_split": "test", "test_split": "test"}, "'test' is the test split"),
        ({"num_fewshot": 1, "doc_to_target": None}, "num_fewshot needs doc_to_target"),
        ({"fewshot_as_multiturn": True}, "needs apply_chat_template"),
        ({"num_fewshot": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        task(**fields)


@pytest.mark.parametrize(
    ("template", "wanted", "what"),
    [
        (None, True, "the tokenizer has no chat template"),
        (CHAT, "short", "no chat template 'short'; it has one template, without a name"),
        ({"default": CHAT, "short": CHAT}, "shrot", "no chat template 'shrot'; its templates are default, short"),
        ({"long": CHAT, "short": CHAT}, True, "several chat templates .long, short. and none is the default"),
        ("{{ raise_exception('no system role here') }}", True, "does not take this prompt: no system role here"),
        ("{{ messages[-1].content }}", True, "leaves out what the system says: 'Speak like a pirate.'"),
    ],
)
def test_a_chat_template_that_is_not_there_or_does_not_fit_is_refused(template: Any, wanted: Any, what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        prompt(task(apply_chat_template=wanted, system_instruction=PIRATE), asked(), chatting(template))
    assert caught.value.where == "spec.yaml: tasks.t.apply_chat_template"


# --- a study ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def chats(tmp_path: Path) -> Project:
    """Two tasks of a causal model: one in chat with two examples, one with examples in plain text."""
    project = make_project(tmp_path / "p", "gpt2", rows=10)
    tokenizer = FAMILIES["gpt2"].tokenizer()
    tokenizer.chat_template = PLAIN_CHAT
    tokenizer.save_pretrained(project.folder / "base")
    for name, fields in (("red", {"apply_chat_template": True, "system_instruction": "answer"}), ("blue", {})):
        project.spec["tasks"][name] |= {"doc_to_text": "{{ input[:7] }}", "num_fewshot": 1, "max_length": 60, **fields}
    project.write()
    return project


def test_a_study_scores_the_answers_after_the_whole_prompt(chats: Project) -> None:
    """Losses of the loaded inputs against transformers' own on the text that its chat template makes."""
    spec = StudySpec.from_yaml(chats.file)
    problem = load_problem(spec)
    tokenizer = AutoTokenizer.from_pretrained(chats.folder / "base")
    model = AutoModelForCausalLM.from_pretrained(chats.folder / "red")
    rows = load_rows("red", spec.tasks["red"], "validation", root=spec.root, spec_file="s")
    problem.resident.load_scaled_(0, 1.0)
    found = choice_losses(problem.resident.model, problem.kinds["red"], problem.examples("red", "validation"), pad_id=0)
    compared = 0
    for row, losses in zip(rows, found, strict=True):
        (shown,) = row.examples
        messages = [
            {"role": "system", "content": "answer"},
            {"role": "user", "content": shown.text},
            {"role": "assistant", "content": shown.answer},
            {"role": "user", "content": row.text},
        ]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        begin = tokenizer(prompt.rstrip(), add_special_tokens=False)["input_ids"]
        for choice, loss in zip(row.choices, losses, strict=True):
            whole = tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
            if len(whole) > 60:
                continue  # cut
            labels = torch.tensor([[-100] * len(begin) + whole[len(begin) :]])
            with torch.no_grad():
                expected = float(model(input_ids=torch.tensor([whole]), labels=labels).loss)
            assert loss == pytest.approx(expected, rel=1e-4)
            compared += 1
    assert compared > 5


@pytest.mark.slow
def test_a_study_with_other_prompts_is_another_study(chats: Project) -> None:
    chats.cli("run", chats.file, "--trials", "1", "--set", "method=averaging")
    chats.cli("run", chats.file, "--trials", "1", "--set", "method=averaging")
    for change in (
        "tasks.red.system_instruction=Shout.",
        "tasks.blue.num_fewshot=2",
        "tasks.red.apply_chat_template=false",
    ):
        done = chats.cli("run", chats.file, "--set", "method=averaging", "--set", change, check=2)
        assert "data digest of" in done.stderr


def test_a_base_without_a_chat_template_is_refused_by_validate(chats: Project) -> None:
    FAMILIES["gpt2"].tokenizer().save_pretrained(chats.folder / "base")
    (chats.folder / "base" / "chat_template.jinja").unlink(missing_ok=True)
    done = chats.cli("validate", chats.file, check=2)
    assert "tasks.red.apply_chat_template: the tokenizer has no chat template" in done.stderr


@pytest.mark.slow
def test_an_exported_model_has_the_template_and_the_same_scores(chats: Project) -> None:
    summary = chats.json("run", chats.file, "--set", "method=averaging")
    chats.cli("export", chats.file, "--set", "method=averaging", "--out", "out")
    found = chats.json("evaluate", chats.file, "--model", "out")
    assert {name: entry["score"] for name, entry in found["tasks"].items()} == summary["best"]["tasks"]


# --- looking at it ---------------------------------------------------------------------------------------------------


def test_validate_shows_a_prompt_with_its_special_tokens_the_choices_and_what_is_scored(chats: Project) -> None:
    found = chats.json("validate", chats.file, "--show", "red")["shown"]
    assert found["prompt"].startswith("<|endoftext|>system: answer, user: ")
    assert found["prompt"].endswith(f", user: {TEXTS[0][:7]}, assistant:")
    assert found["tokens"][0] == "<|endoftext|>"
    assert [answer["right"] for answer in found["answers"]] == [True, False]
    assert [answer["text"] for answer in found["answers"]] == [" yes", " a terrible place"]
    assert all(answer["tokens"] for answer in found["answers"])
    assert "mean log-likelihood" in found["scored"]
    printed = chats.cli("validate", chats.file, "--show", "red").stdout
    assert "  | <|endoftext|>system: answer, user: " in printed
    assert "  * ' yes'  = " in printed
    done = chats.cli("validate", chats.file, "--show", "rde", check=2)
    assert "--show: unknown task 'rde'" in done.stderr


DATA = {"dataset": {"path": "json"}, "doc_to_text": "q", "doc_to_target": "l"}


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("accuracy", "by their mean log-likelihood after"),
        ("acc", "by the sum of their log-likelihoods after"),
        ("acc_norm", "by the sum of their log-likelihoods, divided by the characters of its text, after"),
        ("acc_bytes", "by the sum of their log-likelihoods, divided by the bytes of its text, after"),
    ],
)
def test_what_is_scored_is_said_as_the_metric_takes_it(metric: str, says: str) -> None:
    task = ChoiceTask.model_validate({**DATA, "doc_to_choice": ["a", "b"], "metric": metric})
    example = Encoded(0, (5, 6), ((7,), (8,)), 1, None, False)
    assert says in shown_input("red", task, Kind.CAUSAL, example, FAMILIES["gpt2"].tokenizer()).scored


def test_an_input_without_labels_is_shown_to_have_none() -> None:
    task = MultiLabelTask.model_validate({**DATA, "type": "multi-label-classification"})
    tokenizer = FAMILIES["bert"].tokenizer()
    for bits, wanted in (((0, 0), "none of them"), ((0, 1), None)):
        example = Encoded(0, (5, 6), (), bits, None, False)
        shown = shown_input("red", task, Kind.CLASSIFICATION, example, tokenizer, ["toxic", "threat"])
        assert [answer.right for answer in shown.answers] == [bool(bit) for bit in bits]
        assert shown.wanted == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "begin", "answers"),
    [("t5", "", ["yes</s>", "a terrible place</s>"]), ("bert", "[CLS]", ["LABEL_0", "LABEL_1", "LABEL_2"])],
)
def test_an_input_of_every_kind_of_model_can_be_shown(
    family: str, begin: str, answers: list[str], tmp_path: Path
) -> None:
    project = make_project(tmp_path / "p", family, rows=6)
    found = project.json("validate", project.file, "--show", "red")["shown"]
    assert found["prompt"].startswith(begin)
    assert found["prompt"].endswith("[SEP]" if family == "bert" else "</s>")
    assert [answer["text"] for answer in found["answers"]] == answers
    assert [answer["right"] for answer in found["answers"]].count(True) == 1


def test_a_text_that_is_scored_can_be_shown(tmp_path: Path) -> None:
    project = make_project(tmp_path / "p", "gpt2", rows=6)
    source = {"dataset": project.spec["tasks"]["red"]["dataset"], "max_length": 60}
    project.spec["tasks"]["general"] = {"type": "text", "doc_to_target": "input", **source}
    project.write(method="gta")
    found = project.json("validate", project.file, "--show", "general")["shown"]
    assert found["prompt"] == "<|endoftext|>"
    assert [answer["text"] for answer in found["answers"]] == [f"{TEXTS[0]} <unk>"]
    assert len(found["answers"][0]["tokens"]) > 10
