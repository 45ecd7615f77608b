"""`init`: a first spec from what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfmerge_studies.boundary import check_is_text
from dfmerge_studies.cli import common
from dfmerge_studies.errors import InputError, RunError, first_line


def init(
    models: Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders of the experts, and of the base.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="FILE", help="Rows of a task: TASK.validation.jsonl, TASK.test.csv; repeatable."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="DIR", help="Where the experts started from.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The spec to write.")] = Path("spec.yaml"),
    json: common.JsonOption = False,
) -> None:
    """Write a commented spec from model folders and data files; it asks nothing."""
    for flag, names in (("--out", [str(out)]), ("DIR", models), ("--data", data or []), ("--base", [base or ""])):
        for name in names:
            check_is_text(Path(name).absolute(), flag)
    if out.exists():
        raise InputError(f"{out} exists already", where="--out", hint="Choose another file, or move that one away")
    common.quiet_libraries()
    from dfmerge_studies.study.draft import draft_spec

    files = [model for model in models if Path(model).is_file()]  # what a shell makes of `--data data/*.jsonl`
    folders = [model for model in models if model not in files]
    text = draft_spec(folders, [*(data or []), *files], base=base, folder=out.absolute().parent)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"cannot be written: {first_line(error)}", where=str(out), hint="Choose another place"
        ) from error
    if json:
        common.print_json({"out": str(out)})
    else:
        common.output().print(f"{out} written", markup=False, soft_wrap=True)
        common.tell_next(["validate", str(out)], ["run", str(out)])
