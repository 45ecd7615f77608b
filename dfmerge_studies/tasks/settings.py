"""What a spec says of a task; the names of the fields are those that lm-evaluation-harness made common."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from dfmerge_studies import limits
from dfmerge_studies.tasks.filters import Filter, checked_regex
from dfmerge_studies.tasks.metrics import METRICS, Metric, harness_metric, is_own, own_metric, task_metrics
from dfmerge_studies.tasks.strict import Also, Settings, one_of
from dfmerge_studies.tasks.written import Ignored

_PAIR = "second text of a pair: a column or a template"
_SCORE = "what a score is"
OWN = Also("package.module:function", r"-?[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def _metrics_of(type_: str) -> AfterValidator:
    own = OWN if type_ != "text" else None  # whose answers are no predictions
    return one_of(f"metrics of type: {type_}", partial(task_metrics, type_), own)


class _Task(Settings):
    validation_split: str = Field(
        "validation", description="split that trials are scored on and Fisher inputs come from"
    )
    test_split: str | None = Field(None, description="split that is only ever reported")
    limit: int | float | None = Field(
        None,
        gt=0,
        le=limits.COUNT,
        description="use only so many validation rows (count, or fraction below 1), drawn with the seed",
    )
    metric: str = Field("accuracy", description=_SCORE)
    guard: bool = Field(
        False, description="no expert stands for it: it is not in the objective, and must not fall far below the base"
    )
    max_drop: float | None = Field(
        None,
        ge=0,
        description="points that it may lose against its own expert, a guard against the base; null: search.max_drop",
    )

    @field_validator("limit")
    @classmethod
    def _limit_is_a_count_or_a_fraction(cls, value: float | None) -> float | None:
        if isinstance(value, float) and value > 1:
            raise ValueError("a fraction must lie in (0, 1]; write a count as an integer")
        return value

    def stated(self) -> dict[str, Any]:
        """What of the settings decides a score beside the inputs and the metric: part of what a study is about."""
        return {}

    def positive_class(self) -> int | None:
        """Index of the class that the metric counts, None where it has none."""
        return None


class _OwnTask(_Task):
    """A task whose data and prompts the spec describes."""

    dataset: dict[str, Any] = Field(
        description="arguments of datasets.load_dataset; `path` is required, local files are relative to the spec"
    )
    doc_to_text: str = Field(description="the input: a column or a Jinja2 template")
    doc_to_target: str | int | None = Field(
        None,
        description="the right choice, by index or text, or the right number: a column or a template; null: no labels",
    )
    training_split: str | None = Field(None, description="split that scripts/finetune.py trains on; no study reads it")
    max_length: int | None = Field(
        None,
        gt=0,
        le=limits.COUNT,
        description="tokens of an input; longer texts are cut. null: as many as the model takes, none is cut",
    )
    positive: int | str | None = Field(
        None, description="of f1: the class that counts, by index or, where `doc_to_choice` is a list, by text"
    )

    @field_validator("dataset")
    @classmethod
    def _dataset_has_a_path(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("path"), str):
            raise ValueError("'path' is required: json, csv, parquet, a directory or a Hub id")
        if value["path"] == "pandas":
            raise ValueError("a pickle can run any code when it is read; write the table as parquet, csv or json")
        if "trust_remote_code" in value:
            raise ValueError("data sets that are code are not run; write the rows as parquet, csv or json")
        for key in ("split", "streaming"):
            if key in value:
                raise ValueError(f"{key!r} cannot be set here; name the splits with validation_split and test_split")
        return value

    @model_validator(mode="after")
    def _positive_goes_with_its_metric(self) -> Self:
        needed = not is_own(self.metric) and METRICS[self.metric].positive
        if needed and self.positive is None:
            raise ValueError(f"metric: {self.metric} needs 'positive', the class that counts: its index or its text")
        if not needed and self.positive is not None:
            raise ValueError(f"metric: {self.metric} has no use for 'positive'")
        self.positive_class()
        return self

    def positive_class(self) -> int | None:
        """Index of the positive class, None where the metric has none.

        Raises:
            ValueError: there is no such class among the choices of the spec.
        """
        choices = getattr(self, "doc_to_choice", None)
        if isinstance(self.positive, str):
            if not isinstance(choices, list):
                raise ValueError("positive: a text needs 'doc_to_choice' to be a list; give the index of the class")
            if self.positive not in choices:
                raise ValueError(f"positive: {self.positive!r} is not among the choices {', '.join(choices)}")
            return choices.index(self.positive)
        beyond = len(choices) if isinstance(choices, list) else None
        if self.positive is not None and (self.positive < 0 or (beyond is not None and self.positive >= beyond)):
            raise ValueError(f"positive: there is no choice of index {self.positive}")
        return self.positive


class PromptedTask(_OwnTask):
    """A task of a language model: what stands around the input in its prompt, as in lm-evaluation-harness."""

    target_delimiter: str = Field(
        " ", description="between prompt and answer of causal models and of few-shot examples; not in a chat"
    )
    num_fewshot: int = Field(0, ge=0, le=limits.COUNT, description="examples with their answers before the input")
    fewshot_split: str | None = Field(
        None, description="split that they come from; null: training_split, or validation_split where there is none"
    )
    fewshot_delimiter: str = Field("\n\n", description="behind each of them")
    fewshot_random_seed: int = Field(
        1234, ge=0, le=limits.SEED, description="of their draw; the same for all seeds of the search"
    )
    fewshot_as_multiturn: bool | None = Field(
        None, description="each of them as two turns of a chat; null: where a chat template is applied"
    )
    description: str | None = Field(
        None, description="text before everything: a column, a template, or the text itself, with its own line break"
    )
    system_instruction: str | None = Field(
        None, description="the chat's system message; without a template, text before everything"
    )
    apply_chat_template: bool | str = Field(
        False, description="write the prompt as the tokenizer's chat template does: true, or the name of one of several"
    )
    chat_template_args: dict[str, Any] = Field(
        default_factory=dict, description="variables of the chat template, such as enable_thinking: false"
    )
    gen_prefix: str | None = Field(
        None, description="how the answer begins, in the prompt already: a column, a template, or the text itself"
    )

    @property
    def fewshot_source(self) -> str:
        """The split that examples come from."""
        return self.fewshot_split or self.training_split or self.validation_split

    @property
    def chat(self) -> bool:
        """Whether prompts are written by a chat template."""
        return self.apply_chat_template is not False

    @model_validator(mode="after")
    def _examples_have_answers_and_a_place(self) -> Self:
        if self.fewshot_as_multiturn and not self.chat:
            raise ValueError("fewshot_as_multiturn: true needs apply_chat_template: only a chat has turns")
        if self.num_fewshot and self.doc_to_target is None:
            raise ValueError("num_fewshot needs doc_to_target: examples are shown with their answers")
        if self.num_fewshot and self.fewshot_source == self.test_split:
            raise ValueError(
                f"fewshot_split: {self.fewshot_source!r} is the test split, which is only ever reported: the search "
                "would see its answers; name another split, or slices that share no row"
            )
        return self


class ChoiceTask(PromptedTask):
    """A text-to-text or causal model picks the choice whose tokens are likeliest on average."""

    type: Literal["choice"] = "choice"
    metric: Annotated[str, _metrics_of("choice")] = Field("accuracy", description=_SCORE)
    doc_to_choice: str | list[str] = Field(description="the choices: a column, a list of templates, or a template")


class ClassificationTask(_OwnTask):
    """An encoder with a head per task picks a class."""

    type: Literal["classification"]
    metric: Annotated[str, _metrics_of("classification")] = Field("accuracy", description=_SCORE)
    doc_to_text_pair: str | None = Field(None, description=_PAIR)
    doc_to_choice: list[str] | None = Field(None, description="names of the classes, in the order of the head")


class RegressionTask(_OwnTask):
    """An encoder with a head per task gives a number, such as how alike two texts are."""

    type: Literal["regression"]
    doc_to_text_pair: str | None = Field(None, description=_PAIR)
    metric: Annotated[str, _metrics_of("regression")] = Field("pearson", description=_SCORE)


class MultiLabelTask(_OwnTask):
    """An encoder with a head per task says of each of several labels whether an input has it."""

    type: Literal["multi-label-classification"]
    doc_to_text_pair: str | None = Field(None, description=_PAIR)
    doc_to_choice: list[str] | None = Field(None, description="names of the labels, in the order of the head")
    metric: Annotated[str, _metrics_of("multi-label-classification")] = Field("micro_f1", description=_SCORE)


class TokenTask(_OwnTask):
    """An encoder with a head per task picks a tag for each word: named entities, parts of speech."""

    type: Literal["token-classification"]
    doc_to_choice: list[str] | None = Field(None, description="names of the tags, in the order of the head")
    metric: Annotated[str, _metrics_of("token-classification")] = Field("entity_f1", description=_SCORE)


class TextTask(_OwnTask):
    """How likely a language model finds texts, word piece by word piece; there is nothing to choose."""

    type: Literal["text"]
    doc_to_text: str = Field("", description="what stands before the text and is not scored: a column or a template")
    doc_to_target: str = Field(description="the text that is scored: a column or a template")
    target_delimiter: str = Field(" ", description="between what stands before the text and the text, where it does")
    metric: Annotated[str, _metrics_of("text")] = Field(
        "bits_per_byte", description="what a score is; of each, lower is better"
    )


class GenerationKwargs(Settings):
    """How a text is generated: greedily, so that a trial gives the same scores again."""

    max_gen_toks: int = Field(256, gt=0, le=limits.COUNT, description="tokens that are generated at most")
    until: str | list[str] = Field(["\n\n"], description="texts that end the answer, besides the end of sequence")
    do_sample: bool = Field(False, description="nothing is sampled; for files of lm-evaluation-harness")
    temperature: float = Field(0.0, ge=0, le=0, description="nothing is sampled; for files of lm-evaluation-harness")

    @model_validator(mode="before")
    @classmethod
    def _greedy_alone(cls, data: Any) -> Any:
        odd = [str(key) for key in data if key not in cls.model_fields] if isinstance(data, Mapping) else []
        if odd:
            mend = "; write max_gen_toks" if odd[0] in ("max_new_tokens", "max_tokens", "max_length") else ""
            raise ValueError(
                f"{odd[0]!r} is not supported: answers are greedy, up to 'max_gen_toks' tokens or a text of "
                f"'until'{mend}"
            )
        if isinstance(data, Mapping) and (data.get("do_sample") or data.get("temperature")):
            raise ValueError("answers are greedy, so that a trial gives the same scores again: nothing is sampled")
        return data

    @field_validator("until")
    @classmethod
    def _ends_are_texts(cls, value: str | list[str]) -> str | list[str]:
        if "" in ([value] if isinstance(value, str) else value):
            raise ValueError("an empty text would end every answer at once")
        return value

    @property
    def ends(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.until,) if isinstance(self.until, str) else tuple(self.until)


class GenerateTask(PromptedTask):
    """A text-to-text or causal model writes a text."""

    type: Literal["generate"]
    doc_to_target: str | None = Field(
        None, description="the accepted text, or a list of them: a column or a template; null: no targets"
    )
    generation_kwargs: GenerationKwargs = GenerationKwargs.model_validate({})
    filter_list: list[Filter] = Field(
        default_factory=lambda: [Filter.model_validate({"name": "strip", "filter": [{"function": "strip"}]})],
        min_length=1,
        max_length=1,
        description="what is made of an answer before it is scored; one filter, since a task has one score",
    )
    metric: Annotated[str, _metrics_of("generate")] = Field("exact_match", description=_SCORE)
    ignore_case: bool = Field(False, description="of exact_match: capital letters do not matter")
    ignore_punctuation: bool = Field(False, description="of exact_match: ASCII punctuation does not matter")
    ignore_numbers: bool = Field(False, description="of exact_match: digits do not matter")
    regexes_to_ignore: list[Annotated[str, AfterValidator(checked_regex)]] = Field(
        default_factory=list, description="of exact_match: what they match does not matter"
    )

    @model_validator(mode="after")
    def _ignored_by_exact_match_alone(self) -> Self:
        for field in _IGNORED:
            if getattr(self, field) and self.metric != "exact_match":
                raise ValueError(f"{field} goes with metric: exact_match; use filter_list with metric: {self.metric}")
        return self

    def filtered(self, text: str) -> str:
        """What is scored of a text that a model wrote.

        Args:
            text: without its end.
        """
        return self.filter_list[0](text)

    @property
    def ignored(self) -> Ignored:
        """What `exact_match` passes over."""
        return Ignored(tuple(self.regexes_to_ignore), self.ignore_case, self.ignore_punctuation, self.ignore_numbers)

    def stated(self) -> dict[str, Any]:
        """Where an answer ends, and what of it is compared how."""
        return self.model_dump(include={"generation_kwargs", "filter_list", *_IGNORED}, exclude_defaults=True)


class HarnessTask(_Task):
    """A task of lm-evaluation-harness, by its name there; the harness asks, filters and scores."""

    type: Literal["lm_eval"] = "lm_eval"
    lm_eval: str = Field(description="name of the task, as of lm_eval --tasks")
    include_path: str | None = Field(
        None, description="folder with task files of your own, relative to the spec; as --include_path"
    )
    metric: str = Field("acc", description="the one of the task's metrics that is the score")
    filter: str | None = Field(None, description="the one of the task's filters that is scored; null: its first")
    validation_split: str | None = Field(  # type: ignore[assignment]  # here the task has one of its own
        None, description="split that trials are scored on; null: the task's validation split, else the one it has"
    )
    limit: int | float | None = Field(
        None, gt=0, le=limits.COUNT, description="only the first so many rows (count, or fraction below 1), as --limit"
    )
    num_fewshot: int | None = Field(None, ge=0, le=limits.COUNT, description="examples; null: the task's own number")
    fewshot_random_seed: int = Field(1234, ge=0, le=limits.SEED, description="of the draw of examples")
    fewshot_as_multiturn: bool | None = Field(
        None, description="examples as turns of a chat; null: where a chat template is applied"
    )
    system_instruction: str | None = Field(None, description="as --system_instruction")
    apply_chat_template: bool | str = Field(False, description="as --apply_chat_template: true, or a template's name")
    chat_template_args: dict[str, Any] = Field(default_factory=dict, description="variables of the chat template")

    @property
    def doc_to_target(self) -> str:
        """Every task of the harness says what is right."""
        return self.lm_eval

    @model_validator(mode="after")
    def _only_a_chat_has_turns(self) -> Self:
        if self.fewshot_as_multiturn and self.apply_chat_template is False:
            raise ValueError("fewshot_as_multiturn: true needs apply_chat_template: only a chat has turns")
        return self


_IGNORED = ("ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore")
HeadTask = ClassificationTask | RegressionTask | MultiLabelTask | TokenTask  # of encoders with a head per task
ChosenTask = ChoiceTask | ClassificationTask  # whose inputs have choices or classes, one of them right
RenderedTask = ChosenTask | HeadTask | GenerateTask  # whose inputs are texts to answer
OwnTask = RenderedTask | TextTask  # whose data and prompts the spec describes
AnyTask = OwnTask | HarnessTask
TaskSettings = Annotated[AnyTask, Field(discriminator="type")]


def choices_of(task: AnyTask) -> str | list[str] | None:
    """Where the choices or the names of the classes of a task stand, or they themselves; None where it has none.

    Args:
        task: its settings.
    """
    return getattr(task, "doc_to_choice", None)


def metric_of(task: AnyTask) -> Metric:
    """What a task's score is; of code that the spec names, without the code.

    Args:
        task: its settings.
    """
    if isinstance(task, HarnessTask):
        return harness_metric(task.metric)
    return own_metric(task.metric) if is_own(task.metric) else METRICS[task.metric]
