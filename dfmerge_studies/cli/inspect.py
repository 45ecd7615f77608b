"""`status`, `list`, `validate`: look without working (`status` puts trials of dead workers back in the queue)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from math import isnan
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmerge_studies import limits
from dfmerge_studies.cli import common
from dfmerge_studies.cli.terminal import problems_json
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from dfmerge_studies.spec import StudySpec
    from dfmerge_studies.study.validate import Estimate
    from dfmerge_studies.tasks.shown import Shown


def status(
    spec: common.SpecArgument = None,
    storage: common.StorageOption = None,
    overrides: common.SetOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow until the study has its total, or Ctrl-C.")] = False,
    every: Annotated[
        float, typer.Option("--every", min=0.1, max=limits.SECONDS, help="Seconds between two looks of --watch.")
    ] = 2.0,
    json: common.JsonOption = False,
) -> None:
    """Trials by state, the best so far, per-task scores, workers alive, speed and time left."""
    if isnan(every):
        raise InputError("nan is no number of seconds", where="--every", hint="Give a number")
    settings = common.load_spec(spec, overrides, storage=storage)
    common.check_early(settings, models=False, storage=True, create=False)
    common.quiet_libraries()
    from dfmerge_studies.report.summary import study_summary
    from dfmerge_studies.report.tables import status_table
    from dfmerge_studies.storage import is_read_only, storage_errors, storage_of
    from dfmerge_studies.study.plan import Plan
    from dfmerge_studies.trials.recovery import recover

    plan = Plan.of(settings)
    study = plan.study()

    def look(former: Mapping[str, Any] | None = None) -> dict[str, Any]:
        with storage_errors(plan.url):
            if not is_read_only(storage_of(study)):
                recover(study)
            return study_summary(study, plan, former)

    if watch:
        _watch(look, every, as_json=json)
    elif json:
        common.print_json(look())
    else:
        common.output().print(status_table(look()))


def _watch(look: Callable[[Mapping[str, Any] | None], dict[str, Any]], every: float, *, as_json: bool) -> None:
    """Show a study until it has its total: a table that is redrawn; to a file or pipe, a line for every change."""
    from rich.live import Live

    from dfmerge_studies.report.tables import status_line, status_table

    out, former = common.output(), None
    summary: dict[str, Any] | None = None
    drawn = sys.stdout.isatty() and not as_json
    with Live(console=out, auto_refresh=False) if drawn else nullcontext() as live:
        while True:
            summary = look(summary)
            trials = summary["trials"]
            state = (trials, summary["best"], [(w["host"], w["pid"]) for w in summary["workers_alive"]])
            if live is not None:
                live.update(status_table(summary), refresh=True)
            elif state != former:
                if as_json:
                    common.print_json(summary, indent=None)
                else:
                    common.say(status_line(summary))
            if trials["complete"] >= trials["target"] and not trials["running"]:
                return
            former = state
            time.sleep(every)


def list_studies(
    spec: common.SpecArgument = None,
    storage: common.StorageOption = None,
    json: common.JsonOption = False,
) -> None:
    """All studies of a storage: the spec's, or the one that --storage names."""
    settings = common.load_spec(spec, storage=storage)
    common.check_early(settings, models=False, storage=True, create=False)
    common.quiet_libraries()
    from dfmerge_studies.report.summary import storage_summary
    from dfmerge_studies.report.tables import studies_table
    from dfmerge_studies.storage import open_storage, storage_errors
    from dfmerge_studies.study.plan import storage_url

    url = storage_url(settings)
    with storage_errors(url):
        entries = storage_summary(open_storage(url, create=False))
    for entry in entries:
        if "problem" in entry:
            common.warn(f"warning: {entry['problem']}")
    if json:
        common.print_json(entries)
    else:
        common.output().print(studies_table(entries))


def validate(
    spec: common.SpecArgument = None,
    storage: common.StorageOption = None,
    overrides: common.SetOption = None,
    show: Annotated[
        str | None,
        typer.Option(
            "--show", metavar="TASK", help="Print one input of a task as the model reads it, and its answers."
        ),
    ] = None,
    trust: common.TrustOption = False,
    json: common.JsonOption = False,
) -> None:
    """Check everything that can be checked before spending: files, shapes, tokenizers, data, memory."""
    found = common.examine_spec(spec, common.trusting(overrides, trust), storage=storage)
    with common.progress_bar() as progress:
        common.load_libraries()
        from dfmerge_studies.study.validate import validate_examined

        result = validate_examined(found, show=show, progress=progress)
    if json:
        estimate = asdict(result.estimate) if result.estimate is not None else {}
        problems = problems_json(result.problems)
        found_out = {"notes": result.notes, "estimate": estimate, "search": result.search}
        if show is not None:
            found_out["shown"] = asdict(result.shown) if result.shown is not None else None
        common.print_json({"ok": result.ok, "problems": problems, **found_out})
    for problem in result.problems:
        common.warn(f"error: {problem}")
    for note in result.notes:
        common.warn(f"note: {note['where']}: {note['what']}")
    if found.spec is not None and result.estimate is not None and not json:
        _show_estimate(found.spec, result.estimate, result.search)
    if result.shown is not None and not json:
        _show_input(result.shown)
    if not result.ok:
        raise typer.Exit(2)


def _show_input(shown: Shown) -> None:
    """A prompt, its answers and what is scored; as plain text, since a prompt may hold anything."""
    cut = ", cut" if shown.truncated else ""
    common.say(f"\n{shown.task} ({shown.type}), row {shown.row}: the model reads {len(shown.tokens)} tokens{cut}")
    common.say("".join(f"  | {line}\n" for line in shown.prompt.split("\n")).rstrip("\n"))
    for answer in shown.answers:
        mark, tokens = ("*" if answer.right else " "), "  ".join(answer.tokens)
        common.say(f"  {mark} {answer.text!r}" + (f"  = {len(answer.tokens)} tokens: {tokens}" if tokens else ""))
    if any(answer.right for answer in shown.answers):
        common.say("  * is right")
    if shown.wanted is not None:
        common.say(f"  right: {shown.wanted}")
    common.say(f"  scored: {shown.scored}")


def _show_estimate(spec: StudySpec, estimate: Estimate, search: Mapping[str, Any] | None) -> None:
    from dfmerge_studies.report.tables import search_text

    out = common.output()
    out.print(f"{spec.file.name} is valid")
    out.print(
        f"  {estimate.parameters:,} parameters, {estimate.changed_parameters:,} changed by {estimate.experts} experts"
    )
    if estimate.groups:
        parts = ", ".join(f"{group} {count:,}" for group, count in estimate.groups.items())
        out.print(f"  a coefficient per expert for each of {len(estimate.groups)} groups: {parts}", markup=False)
    for task, count in estimate.validation_inputs.items():
        cut = estimate.truncated_inputs[task]
        use = f"{estimate.fisher_inputs[task]} for Fisher"
        if spec.tasks[task].guard:
            use = f"a guard, which may lose {spec.allowed[task]:g} points against the base"
        out.print(f"  {task}: {count} validation inputs{f', {cut} cut' if cut else ''}, {use}", markup=False)
    if search is not None:
        out.print(f"  search: {search_text(search)}")
    peak, free = estimate.peak_bytes / 1e9, estimate.available_bytes / 1e9
    parts = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in estimate.memory["device"].items() if size)
    out.print(f"  memory: about {peak:.2f} GB ({parts}); {free:.1f} GB available")
    if estimate.host_bytes:
        parts = ", ".join(f"{what} {size / 1e9:.2f}" for what, size in estimate.memory["host"].items() if size)
        out.print(f"  beside it, of the host's: {estimate.host_bytes / 1e9:.2f} GB ({parts})")
    if (count := estimate.memory["parts"]) > 1:
        out.print(f"  parameters are merged in {count} parts, each with passes of its own for its importance")
    cache = estimate.cache
    limit = "" if cache["limit"] is None else f"; at most {cache['limit'] / 1e9:.1f} GB stay"
    if cache["all_bytes"]:
        out.print(
            f"  Fisher cache ({cache['policy']}): a whole study writes about {cache['fishers']} Fishers,"
            f" {cache['bytes'] / 1e9:.2f} GB (with all: {cache['all_bytes'] / 1e9:.2f} GB){limit}"
        )
    if peak > free:
        out.print("  warning: that is more than there is")
