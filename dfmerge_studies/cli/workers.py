"""`run --workers`: local worker processes under one progress display; and the hidden command that each of them is."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import typer

from dfmerge_studies.cli import common
from dfmerge_studies.cli.bars import TrialBars
from dfmerge_studies.errors import DFMergeError
from dfmerge_studies.tasks.splits import Split

if TYPE_CHECKING:
    from dfmerge_studies.report.tracking import Tracking
    from dfmerge_studies.spec import StudySpec
    from dfmerge_studies.study.plan import Plan
    from dfmerge_studies.study.pool import Notice

_COMMAND = "worker"


def worker() -> None:
    """Work under the orders of `run --workers`, which come on standard input."""
    from dfmerge_studies.study.worker import obey_parent, read_orders, reporting, serve

    orders = read_orders(sys.stdin.readline())
    leave = obey_parent()
    common.load_libraries()
    with reporting() as say:
        try:
            done = serve(orders, say, leave)
        except DFMergeError as error:
            say("error", what=error.what, where=error.where, hint=error.hint, exit_code=error.exit_code)
            raise typer.Exit(error.exit_code) from None
    if not done:
        raise typer.Exit(130)


@dataclass(frozen=True)
class Wanted:
    """What a command line asks for, so that all its workers mean the same.

    Attributes:
        total: of trials; None: what the study has, or the spec.
        owed: results that are wanted whatever `search.patience` and `search.stop` say.
    """

    total: int | None
    owed: int = 0

    @classmethod
    def of(cls, plan: Plan, trials: int | None, add: int | None) -> Wanted:
        """What is asked for; a study that is there is told."""
        from dfmerge_studies.study.totals import add_trials, owe, state_total

        if not plan.method.searches or (trials is None and add is None):
            return cls(None)
        study = plan.study_if_any()
        if study is None:
            return cls(trials, trials) if trials is not None else cls(plan.total() + (add or 0), add or 0)
        if trials is not None:
            state_total(study, trials)
            owe(study, trials)
        if add is not None:
            add_trials(study, add, at_least=plan.trials)
        return cls(plan.goal(study, trials))

    def is_reached(self, plan: Plan) -> bool:
        """Whether a study and its baselines have all their trials, so that no worker is needed."""
        from dfmerge_studies.study.plan import Plan
        from dfmerge_studies.study.variants import baseline_specs
        from dfmerge_studies.trials.reading import counts, ended

        for each in (plan, *map(Plan.of, baseline_specs(plan.spec))):
            study = each.study_if_any()
            if study is None or not each.is_settled(study):
                return False
            if ended(counts(study)) < each.goal(study, self.total if each is plan else None):
                return False
        return True


def run_pool(spec: StudySpec, count: int, wanted: Wanted, splits: list[Split], tracking: Tracking | None) -> bool:
    """Run a study and its baselines with several local processes.

    Args:
        spec: what to study.
        count: of workers.
        wanted: what is asked for.
        splits: what will be scored when they are done.
        tracking: told of completed trials.

    Returns:
        Whether the work was not interrupted.

    Raises:
        InputError: a worker was refused.
        RunError: all workers failed.
    """
    from dfmerge_studies.study.pool import Orders, Pool

    common.quiet_libraries()
    with TrialBars(tracking) as bars:
        workdir = str(spec.workdir)
        orders = [
            Orders(
                spec.model_dump(mode="json"),
                str(spec.file),
                workdir,
                wanted.total,
                splits,
                index,
                count,
                bars.watched,
                wanted.owed,
            )
            for index in range(count)
        ]
        show = _Display(bars, spec)
        # -P: the working directory may be a spec's folder, which may hold a torch.py
        command = [sys.executable, "-P", "-m", "dfmerge_studies", _COMMAND]
        return Pool(command, orders, on_notice=show.notice, on_death=show.put_back).run()


class _Display:
    """What the workers say, as bars and lines."""

    def __init__(self, bars: TrialBars, spec: StudySpec) -> None:
        self._bars = bars
        from dfmerge_studies.study.variants import baseline_specs

        self._specs = {each.name: each for each in (spec, *baseline_specs(spec))}

    def notice(self, notice: Notice) -> None:
        """Show one notice."""
        from dfmerge_studies.trials.results import Event

        who, content = f"worker {notice.worker}", notice.content
        if notice.kind == "joined":
            threads = f"{content['threads']} thread{'s' if content['threads'] > 1 else ''}"
            self._bars.message(f"process {notice.pid} on {content['device']}, {threads}", who)
        elif notice.kind == "study":
            self._follow(content["name"], content["total"])
        elif notice.kind == "trial":
            values = tuple(content["values"]) if content["values"] is not None else None
            event = Event(
                content["event"], content["number"], content["place"], values=values, message=content["message"]
            )
            self._bars.event(content["study"], event, who)
        elif notice.kind == "phase":
            self._bars.phase(content["what"], content["done"], content["total"], who)
        elif notice.kind == "memory":
            self._bars.message(content["text"])
        elif notice.kind == "log":
            self._bars.message(content["text"], who)
        elif notice.kind == "died":
            text = f"process {notice.pid} died ({content['how']}); its trial goes back in the queue"
            self._bars.message(f"{text}, the worker is started again ({content['restart']})", who)
        elif notice.kind == "given up":
            self._bars.message(f"process {notice.pid} died ({content['how']}) and is not started again", who)
        elif notice.kind == "stopped":
            self._bars.message(f"process {notice.pid} was stopped by somebody else", who)

    def put_back(self) -> None:
        """Put the trials of workers that have died back in the queue."""
        from dfmerge_studies.storage import storage_errors
        from dfmerge_studies.trials.recovery import recover

        for study in self._bars.studies:
            try:
                with storage_errors():
                    recover(study, on_event=partial(self._bars.event, study.study_name))
            except DFMergeError as error:  # the other workers will find the trial before their next one
                self._bars.message(str(error))

    def _follow(self, name: str, total: int) -> None:
        from dfmerge_studies.storage import watch_of
        from dfmerge_studies.study.session import stored_study

        followed = next((study for study in self._bars.studies if study.study_name == name), None)
        watch = watch_of(followed) if followed is not None else None
        if followed is None or (watch is not None and watch.lost(name, ()) is not None):
            self._bars.follow(stored_study(self._specs[name]), self._specs[name], total)
