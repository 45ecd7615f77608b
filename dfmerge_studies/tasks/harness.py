"""Tasks of lm-evaluation-harness: it loads, asks, filters and scores; the model that answers is the one in memory.

    question   one document of a task with the requests that the harness makes of it
    request    (kind, arguments), as `lm_eval.api.instance.Instance` has them

Here are its tasks: found, checked, and their answers judged.  Prompts and answers are in `harness_model`.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from dfmerge_studies.errors import DFMergeError, InputError, RunError, did_you_mean, first_line, out_of_memory
from dfmerge_studies.tasks.data import Row
from dfmerge_studies.tasks.metrics import HarnessScore, harness_metric
from dfmerge_studies.tasks.settings import HarnessTask

Request = tuple[str, tuple[Any, ...]]
CHOICES, TEXT, WRITTEN = "multiple_choice", "loglikelihood_rolling", "generate_until"  # output types of tasks


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """A task as the harness has loaded it.

    Attributes:
        task: the harness's own object.
        settings: what the spec says of it.
        where: file and task, for messages.
        split: that is scored here.
        usual: the split that lm_eval would score.
    """

    task: Any
    settings: HarnessTask
    where: str
    split: str
    usual: str


@dataclass(frozen=True)
class Question:
    """A document of a task.

    Attributes:
        loaded: the task.
        index: of the document in its split.
        document: what the harness calls doc.
        requests: what is asked of a model; nothing before a tokenizer is known.
    """

    loaded: LoadedTask = field(compare=False)
    index: int
    document: Any = field(compare=False)
    requests: tuple[Request, ...] = ()

    @property
    def about(self) -> tuple[Any, int, int]:
        """Task, document and number of repetitions, as the harness notes them on a request."""
        return self.loaded.task.get_config("task"), self.index, self.loaded.task.get_config("repeats") or 1

    def instances(self, answers: Sequence[Sequence[Any]] = ()) -> list[Any]:
        """The requests as the harness has them.

        Args:
            answers: to each request; none where there are none yet.
        """
        from lm_eval.api.instance import Instance

        given = answers or [()] * len(self.requests)
        return [
            Instance(
                kind, self.document, copy.deepcopy(arguments), number, metadata=self.about, resps=list(given[number])
            )
            for number, (kind, arguments) in enumerate(self.requests)
        ]

    @property
    def identity(self) -> str:
        """A digest of what is asked and of the version of the task."""
        version = getattr(self.loaded.task, "VERSION", None)
        return hashlib.sha256(repr((version, self.loaded.settings.filter, self.requests)).encode()).hexdigest()


def read_questions(settings: HarnessTask, split: str | None, *, root: Path, where: str, trusted: bool) -> list[Row]:
    """The documents of a split of a task, with what is asked of each as far as no tokenizer is needed for that.

    Args:
        settings: of the task.
        split: its name; None for the validation split, or the only one that is scored.
        root: folder that `include_path` is relative to.
        where: file and task, for messages.
        trusted: whether code of task files in `include_path` may run.

    Raises:
        InputError: the harness is not installed, has no such task, or cannot load it.
    """
    import datasets

    datasets.disable_progress_bars()
    task = _loaded(settings, root, where, trusted=trusted)
    usual = task.get_config("test_split") or task.get_config("validation_split")
    wanted = split or task.get_config("validation_split") or usual
    if wanted != usual:
        _choose_split_(task, wanted, where)
    loaded = LoadedTask(task, settings, where, wanted, usual)
    with calling_harness(where, "the documents cannot be read"):
        return [
            Row(index, str(_asked(loaded.task, document)), None, (), None, question=Question(loaded, index, document))
            for index, document in enumerate(loaded.task.eval_docs)
        ]


def _asked(task: Any, document: Any) -> Any:
    return "" if task.OUTPUT_TYPE == TEXT else task.doc_to_text(document)


def _own(folder: str) -> Any:
    """The task files of a folder, read anew: a file may have changed."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=False)


@lru_cache(maxsize=1)
def _defaults() -> Any:
    """The index of the harness's own task files, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _loaded(settings: HarnessTask, root: Path, where: str, *, trusted: bool) -> Any:
    name, folder = settings.lm_eval, None
    if settings.include_path is not None:
        folder = _own_files(root / Path(settings.include_path).expanduser(), f"{where}.include_path", trusted=trusted)
    with calling_harness(where, f"the task {name!r} cannot be loaded"):
        manager = _own(folder) if folder is not None else _defaults()
        if name not in manager.all_tasks:
            manager = _defaults()
        if name not in manager.all_tasks:
            raise InputError(
                f"lm-evaluation-harness has no task {name!r}",
                where=f"{where}.lm_eval",
                hint=did_you_mean(name, manager.all_tasks) or "`lm_eval ls tasks` lists all; include_path adds others",
            )
        if name not in manager.all_subtasks:
            entry = manager.task_index[name]  # loading a group would fetch the data of all of its members
            members = sorted(entry.tags) or [
                each for each in (entry.cfg or {}).get("task", ()) if isinstance(each, str)
            ]
            some = f" ({', '.join(members[:5])}{', …' if len(members) > 5 else ''})" if members else ""
            raise InputError(
                f"{name!r} is a group of tasks{some}",
                where=f"{where}.lm_eval",
                hint="Write a task for each of its members, so that each has a score of its own",
            )
        task = manager.load(name)["tasks"][name]
        _check(task, settings, where)
    return task


def _own_files(folder: Path, where: str, *, trusted: bool) -> str:
    """A folder with task files, whose Python code runs only if the user says so: a spec may be somebody else's."""
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}", where=where, hint="Correct the path; it is relative to the spec")
    code = next((file for file in sorted(folder.rglob("*.yaml")) if "!function" in file.read_text("utf-8")), None)
    if code is not None and not trusted:
        raise InputError(
            f"{code} names functions, which are code that would run",
            where=where,
            hint="Read them, then allow it with --trust-remote-code and trust_remote_code: true",
        )
    return str(folder.resolve())


def _check(task: Any, settings: HarnessTask, where: str) -> None:
    """Refuse what cannot be scored here, and settings that do not fit the task."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        what = "runs code that models write" if getattr(task, "UNSAFE_CODE", False) else "asks about images or sounds"
        raise InputError(f"the task {what}", where=f"{where}.lm_eval", hint="Use another task")
    own = task.get_config("num_fewshot")
    if settings.num_fewshot and own == 0:
        raise InputError(
            "the task is one without examples by its own definition (num_fewshot: 0), which lm_eval does not override",
            where=f"{where}.num_fewshot",
            hint="Leave it out",
        )
    written = task.get_config("generation_kwargs") if task.OUTPUT_TYPE == WRITTEN else None
    if written and (written.get("do_sample") or written.get("temperature")):
        raise InputError(
            "the task samples its answers: a trial would not give the same scores again",
            where=f"{where}.lm_eval",
            hint="Use a task with greedy answers, or copy its file into include_path and set do_sample: false",
        )
    known = list(task.aggregation())
    if settings.metric not in known and task.get_config("process_results") is None:
        raise InputError(
            f"the task has no metric {settings.metric!r}",
            where=f"{where}.metric",
            hint=did_you_mean(settings.metric, known) or f"Its metrics are {', '.join(known)}",
        )
    theirs = task.higher_is_better().get(settings.metric, True)
    if theirs is not None and bool(theirs) != harness_metric(settings.metric).higher_is_better:
        raise InputError(
            f"of the task's {settings.metric!r} {'more' if theirs else 'less'} is better, which is not what that name "
            "says elsewhere",
            where=f"{where}.metric",
            hint="Use another of its metrics",
        )
    filters = [each.name for each in task._filters]
    if settings.filter is not None and settings.filter not in filters:
        raise InputError(
            f"the task has no filter {settings.filter!r}",
            where=f"{where}.filter",
            hint=f"Its filters are {', '.join(filters)}",
        )
    if settings.num_fewshot is not None or own is None:
        task.set_config("num_fewshot", settings.num_fewshot or 0)


def _choose_split_(task: Any, wanted: str, where: str) -> None:
    """Let the harness score another split than it would."""
    known = getattr(task, "dataset", None) or {}
    if wanted not in known or not hasattr(task, "fewshot_cfg"):  # a task written in Python knows its splits alone
        raise InputError(
            f"the task's data has no split {wanted!r}",
            where=where,
            hint=f"Its splits are {', '.join(known)}" if known else "Leave the split out",
        )
    # Of examples that come from the split that is scored, the harness leaves the scored document out; where the task
    # does not say which they come from, they are its training documents, or else its validation documents.
    if task.fewshot_cfg.split is None and not task.has_training_docs():
        task.fewshot_cfg.split = task.get_config("validation_split") or task.get_config("test_split")
    task.set_config("test_split", wanted)


def judge(settings: HarnessTask, given: Sequence[list[list[Any]]], questions: Sequence[Question]) -> HarnessScore:
    """What the harness makes of the answers to one task.

    Args:
        settings: of the task.
        given: of `answer_questions`.
        questions: what was asked, in the same order.

    Raises:
        InputError: the harness cannot judge them, or has no such number.
        RunError: the number is not finite.
    """
    from lm_eval.api.metrics import mean

    loaded = questions[0].loaded
    task = loaded.task
    with calling_harness(loaded.where, "the answers cannot be judged"):
        asked = [question.instances(found) for question, found in zip(questions, given, strict=True)]
        task._instances = [instance for each in asked for instance in each]
        task.apply_filters()
        name = settings.filter or next(iter(asked[0][0].filtered_resps))
        values = []
        for question, instances in zip(questions, asked, strict=True):
            judged = task.process_results(question.document, [each.filtered_resps[name] for each in instances])
            if settings.metric not in judged:
                raise InputError(
                    f"the task has no metric {settings.metric!r}",
                    where=f"{loaded.where}.metric",
                    hint=f"Its metrics are {', '.join(judged)}",
                )
            values.append(judged[settings.metric])
        aggregate = task.aggregation().get(settings.metric, mean)
        score = float(aggregate(values))
    if not math.isfinite(score):
        raise RunError(f"{settings.metric} is {score}", where=loaded.where, hint="Use another of the task's metrics")
    rows = [float(value) for value in values] if aggregate is mean else None
    return HarnessScore(given, questions, score, rows)


@contextmanager
def calling_harness(where: str, what: str) -> Iterator[None]:
    """Around calls of the harness: its warnings are not shown, and what it raises says which task it was."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (DFMergeError, KeyboardInterrupt):
        raise
    except ModuleNotFoundError as error:
        raise InputError(
            f"it needs the package {error.name}", where=where, hint="pip install 'dfmerge-studies[lm-eval]'"
        ) from error
    except Exception as error:
        lacking = out_of_memory(error)
        if lacking is not None:
            raise lacking from error
        raise InputError(
            f"{what}: {first_line(error)}",
            where=where,
            hint="Try the task with `lm_eval` itself; a data set of the Hub must be reachable or downloaded",
        ) from error
    finally:
        logger.setLevel(level)
