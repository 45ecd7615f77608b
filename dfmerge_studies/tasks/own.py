"""Metrics of one's own: a function that a spec names as `package.module:function`, or that Python hands over.

The function gets what the model answers and what is right, both a list with an entry per input, as `predictions` and
`references` (or `y_pred` and `y_true`, as scikit-learn calls them), and returns one number, or one for each input.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from dfmerge_studies.boundary import reading
from dfmerge_studies.errors import InputError, RunError, did_you_mean
from dfmerge_studies.tasks.choices import Answers
from dfmerge_studies.tasks.label_sets import LabelSets
from dfmerge_studies.tasks.metrics import METRICS, Metric, own_metric
from dfmerge_studies.tasks.numbers import Numbers
from dfmerge_studies.tasks.tags import IGNORED, Tags
from dfmerge_studies.tasks.written import Written

Function = Callable[..., Any]


@dataclass(frozen=True)
class _Scored:
    """The score of a function that is imported when it is first needed."""

    name: str
    root: str
    trusted: bool
    where: str

    def __call__(self, answers: Any) -> float | list[float]:
        return _score(self.function(), answers, self.name, self.where)

    def function(self) -> Function:
        """The function.

        Raises:
            InputError: it may not run, cannot be imported, or is none.
        """
        if not self.trusted:
            raise InputError(
                f"{self.name!r} names code, which is not run unless you say so",
                where=self.where,
                hint="Read that code; if you trust it, add --trust-remote-code",
            )
        return _imported(self.name, self.root, self.where)


def named_metric(name: str, root: str, *, trusted: bool, where: str) -> Metric:
    """The metric that a spec names as code; nothing is imported before `check_function` or the first score.

    Args:
        name: `package.module:function`; with a minus before it, lower is better.
        root: folder of the spec, whose modules can be named after those that are installed.
        trusted: whether code that the spec names may run.
        where: file and field, for messages.
    """
    return own_metric(name, _Scored(name, root, trusted, where))


def check_function(metric: Metric) -> None:
    """Import the function of a metric, if it is one that a spec names.

    Args:
        metric: any.

    Raises:
        InputError: it may not run, cannot be imported, or is none.
    """
    if isinstance(metric.of_all, _Scored):
        metric.of_all.function()


def add_metric(name: str, function: Function) -> None:
    """Let specs of this process name a function as `metric`; other processes (workers, ranks) do not know it.

    >>> from dfmerge_studies import add_metric
    >>> add_metric("share_of_firsts", lambda predictions, references: [prediction == 0 for prediction in predictions])

    Args:
        name: that no metric has yet; a study knows the metric by it. A minus before it says that lower is better.
        function: from `predictions` and `references`, lists with an entry per input, to a number, or to one for each
            input, whose mean is the score then. Entries are indices of choices or classes, numbers, bits, names of tags
            or texts, by the type of the task.

    Raises:
        InputError: the name is taken or no name, or the function is none.
    """
    if name in METRICS or not name.removeprefix("-").isidentifier():
        raise InputError(f"{name!r} is no free name of a metric", where="name", hint="Use letters, digits and '_'")
    if not callable(function):
        raise InputError(f"{type(function).__name__}, not a function", where="function")

    def score(answers: Any) -> float | list[float]:
        return _score(function, answers, name, "metric")

    table = cast("dict[str, Metric]", METRICS)
    table[name] = own_metric(name, score)


@lru_cache
def _imported(name: str, root: str, where: str) -> Function:
    module, _, path = name.removeprefix("-").partition(":")
    hint = "Write package.module:function, of an installed package or of a file beside the spec"
    with _running(where, f"the module {module!r} cannot be imported", hint), _importing_from(root):
        found: Any = importlib.import_module(module)
    _check_place(found, module, Path(root), where)
    for part in path.split("."):
        if not hasattr(found, part):
            raise InputError(
                f"{getattr(found, '__name__', module)} has no {part!r}",
                where=where,
                hint=did_you_mean(part, [each for each in dir(found) if not each.startswith("_")]) or hint,
            )
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{name!r} is {type(found).__name__}, not a function", where=where, hint=hint)
    return cast("Function", found)


@contextmanager
def _running(where: str, what: str, hint: str) -> Iterator[None]:
    """As `reading`, of code that may also end the program, as scripts do that read their arguments when imported."""
    with reading(where, what, hint):
        try:
            yield
        except SystemExit as error:
            raise RuntimeError(f"it ends the program (SystemExit: {error.code})") from error


def _check_place(module: Any, name: str, root: Path, where: str) -> None:
    """Refuse a module of the name of a file beside the spec that is not that file, which is what a reader expects."""
    top, place = name.partition(".")[0], getattr(module, "__file__", None)
    beside = next((each for each in (root / f"{top}.py", root / top / "__init__.py") if each.is_file()), None)
    if beside is not None and place is not None and not Path(place).resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"the module {name!r} is {place}, not {beside.relative_to(root)} beside the spec",
            where=where,
            hint="Rename the one beside the spec: what is installed or imported already goes first",
        )


@contextmanager
def _importing_from(root: str) -> Iterator[None]:
    """Modules of a folder can be imported, after those that are installed."""
    sys.path.append(root)
    try:
        yield
    finally:
        sys.path.remove(root)


def _sides(answers: Any) -> tuple[list[Any], list[Any]]:
    """Predictions and references, an entry per input."""
    if isinstance(answers, (Answers, LabelSets)):
        return list(answers.taken), list(answers.wanted)
    if isinstance(answers, Tags):
        pairs = [zip(*each, strict=True) for each in zip(answers.taken, answers.wanted, strict=True)]
        named = [[_named(pair, answers.names) for pair in words if pair[1] != IGNORED] for words in pairs]
        return [[one for one, _ in words] for words in named], [[other for _, other in words] for words in named]
    assert isinstance(answers, (Numbers, Written))  # the metric is for no other tasks
    return list(answers.given), list(answers.wanted)


def _named(tags: tuple[int, int], names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(names[tag] if tag < len(names) else tag for tag in tags)


def _arguments(function: Function, predictions: list[Any], references: list[Any]) -> Mapping[str, list[Any]]:
    """By the names that the function has for them."""
    try:
        names = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of some that are written in C
        names = set()
    if {"y_true", "y_pred"} <= names:
        return {"y_true": references, "y_pred": predictions}
    return {"predictions": predictions, "references": references}


def _score(function: Function, answers: Any, name: str, where: str) -> float | list[float]:
    predictions, references = _sides(answers)
    hint = "It is called as function(predictions=[...], references=[...]) and returns a number, or one for each input"
    with _running(where, f"the metric {name} fails", hint):
        found = function(**_arguments(function, predictions, references))
    several = (
        hasattr(found, "__len__") and getattr(found, "ndim", 1) > 0 and not isinstance(found, (str, bytes, Mapping))
    )
    try:
        numbers = [float(each) for each in (found if several else [found])]
    except (TypeError, ValueError):
        raise InputError(
            f"the metric {name} returned {type(found).__name__}, not a number", where=where, hint=hint
        ) from None
    if several and len(numbers) != len(references):
        raise InputError(
            f"the metric {name} returned {len(numbers)} numbers for {len(references)} inputs", where=where, hint=hint
        )
    if not all(map(math.isfinite, numbers)):
        odd = next(number for number in numbers if not math.isfinite(number))
        raise RunError(f"the metric {name} returned {odd}, not a finite number", where=where, hint=hint)
    return numbers if several else numbers[0]
