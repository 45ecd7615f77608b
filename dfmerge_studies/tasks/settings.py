"""What a spec says of a task; the names of the fields are those that lm-evaluation-harness made common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from dfmerge_studies.tasks.strict import Settings


class _Task(Settings):
    dataset: dict[str, Any] = Field(
        description="arguments of datasets.load_dataset; `path` is required, local files are relative to the spec"
    )
    doc_to_text: str = Field(description="the input: a column or a Jinja2 template")
    doc_to_target: str | int | None = Field(
        None,
        description="the right choice, by index or by text: a column or a template; null: no labels",
    )
    training_split: str | None = Field(None, description="split that scripts/finetune.py trains on; no study reads it")
    validation_split: str = Field(
        "validation", description="split that trials are scored on and Fisher inputs come from"
    )
    test_split: str | None = Field(None, description="split that is only ever reported")
    max_length: int | None = Field(
        None,
        gt=0,
        description="tokens of an input; longer texts are cut. null: as many as the model takes, none is cut",
    )
    limit: int | float | None = Field(
        None, gt=0, description="use only so many validation rows (count, or fraction below 1), drawn with the seed"
    )
    metric: Literal["accuracy"] = Field("accuracy", description="what a score is")

    @field_validator("dataset")
    @classmethod
    def _dataset_has_a_path(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("path"), str):
            raise ValueError("'path' is required: json, csv, parquet, a directory or a Hub id")
        for key in ("split", "streaming"):
            if key in value:
                raise ValueError(f"{key!r} cannot be set here; name the splits with validation_split and test_split")
        return value

    @field_validator("limit")
    @classmethod
    def _limit_is_a_count_or_a_fraction(cls, value: float | None) -> float | None:
        if isinstance(value, float) and value > 1:
            raise ValueError("a fraction must lie in (0, 1]; write a count as an integer")
        return value


class ChoiceTask(_Task):
    """A text-to-text or causal model picks the choice whose tokens are likeliest on average."""

    type: Literal["choice"] = "choice"
    doc_to_choice: str | list[str] = Field(description="the choices: a column, a list of templates, or a template")
    target_delimiter: str = Field(" ", description="between prompt and choice, for causal models")


class ClassificationTask(_Task):
    """An encoder with a classification head per task picks a class."""

    type: Literal["classification"]
    doc_to_text_pair: str | None = Field(None, description="second text of a pair: a column or a template")
    doc_to_choice: list[str] | None = Field(None, description="names of the classes, in the order of the head")


TaskSettings = Annotated[ChoiceTask | ClassificationTask, Field(discriminator="type")]
