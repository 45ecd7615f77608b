"""`repair`: show what is stuck in a study, and mend it when asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmerge_studies.cli import common
from dfmerge_studies.errors import InputError

if TYPE_CHECKING:
    from dfmerge_studies.study.repair import Leftover, Report


def repair(
    spec: common.SpecArgument = None,
    apply: Annotated[bool, typer.Option("--apply", help="Mend what is shown; without it, nothing is changed.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --apply: put failed coefficients back in the queue, too.")
    ] = False,
    storage: common.StorageOption = None,
    overrides: common.SetOption = None,
    json: common.JsonOption = False,
) -> None:
    """Show what is stuck: trials of dead workers, results not applied, failures, leftover files.

    `run` mends dead workers' trials and waiting results by itself; --apply does it without a run, deletes leftover
    temporary files that are older than an hour, and deletes studies whose first start was killed.
    """
    if retry_failed and not apply:
        raise InputError("--retry-failed changes the study", hint="Give --apply as well")
    settings = common.load_spec(spec, overrides, storage=storage)
    common.check_early(settings, models=False, storage=True, create=False)
    common.quiet_libraries()
    from dfmerge_studies.storage import load_study, open_storage, safe_url, storage_errors
    from dfmerge_studies.study import repair as repairs
    from dfmerge_studies.study.plan import storage_url
    from dfmerge_studies.study.provenance import reading_study
    from dfmerge_studies.trials.outbox import outbox_folder

    url = storage_url(settings)
    mended = {"applied": 0, "requeued": 0, "retried": 0}
    with storage_errors(url):
        opened = open_storage(url, create=False)
        names = repairs.studies_of(opened, settings.name)
        if not names:
            load_study(opened, settings.name)  # says which studies there are
        studies, reports = [], []
        for name in names:
            try:
                with reading_study(name):
                    study = load_study(opened, name)
                    reports.append(repairs.look(study, outbox_folder(settings.workdir, url, name)))
                    studies.append(study)
            except InputError as error:  # the others are looked after all the same
                common.warn(f"warning: {error}")
        found = repairs.leftovers(settings, [settings.workdir, Path.cwd()])
        others = repairs.other_results(settings, url, [s.study_name for s in studies])
        if apply:
            for study in studies:
                folder = outbox_folder(settings.workdir, url, study.study_name)
                done = repairs.mend(study, folder, failures=retry_failed)
                mended = {what: count + done[what] for what, count in mended.items()}
            deleted = repairs.delete_unfinished(
                [s for s, report in zip(studies, reports, strict=True) if report.unfinished]
            )
            repairs.clear(found)
            mended |= {"deleted_studies": len(deleted), "leftovers": len(found)}
    if json:
        common.print_json(_as_json(safe_url(url), reports, found, others, mended if apply else None))
        return
    for line in _lines(reports, found, others):
        common.say(line)
    if apply:
        common.say("mended: " + ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in mended.items()))
    elif any(_mendable(report) for report in reports) or found:
        common.say("nothing has been changed; `repair --apply` mends what `run` would not, and what it would")


def _mendable(report: Report) -> bool:
    return bool(report.orphans or report.unfinished or any(r["state"] == "ready" for r in report.results))


def _as_json(
    url: str, reports: list[Report], found: list[Leftover], others: list[Path], mended: dict[str, int] | None
) -> dict[str, Any]:
    return {
        "storage": url,
        "studies": [
            {
                "study": report.name,
                "orphans": report.orphans,
                "results": report.results,
                "failures": report.failures,
                "unfinished": report.unfinished,
            }
            for report in reports
        ],
        "leftovers": [
            {"path": str(one.path), "restore": str(one.restore) if one.restore is not None else None} for one in found
        ],
        "other_results": [str(path) for path in others],
        "mended": mended,
    }


def _lines(reports: list[Report], found: list[Leftover], others: list[Path]) -> Iterator[str]:
    """The report in words, one line for each thing that is stuck."""
    for report in reports:
        lines = list(_study_lines(report))
        yield f"{report.name}: {'nothing is stuck' if not lines else ''}".rstrip()
        yield from (f"  {line}" for line in lines)
    for one in found:
        yield f"left over: {one.path} ({f'belongs at {one.restore}' if one.restore else 'to be deleted'})"
    if others:
        yield f"{len(others)} results of other studies or storages wait in {others[0].parent.parent}"


def _study_lines(report: Report) -> Iterator[str]:
    if report.unfinished:
        yield "its first start was killed before anything was stored; `run` starts it anew"
    for trial in report.orphans:
        who = f"process {trial['pid']} on {trial['host']}" if trial["pid"] is not None else "a process unknown"
        yield f"trial {trial['trial']} is running nowhere: {who}, last sign of life {trial['last_sign_of_life']}"
    for result in report.results:
        yield f"result of trial {result['trial']}: {result['state']} ({result['file']})"
    for trial in report.failures:
        yield f"trial {trial['trial']} failed: {trial['error'] or 'its processes died'} (--retry-failed tries it again)"
