"""`dashboard`: optuna-dashboard on a study's storage and artifacts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from dfmerge_studies.cli import common

_SAMPLER = "optuna_dashboard.preferential.samplers.gp"


@contextmanager
def _without_their_sampler() -> Iterator[None]:
    """Imports of optuna-dashboard without its sampler of preferential studies, which imports botorch and so torch.

    It starts without botorch, too, and a server proposes nothing.
    """
    if _SAMPLER in sys.modules:
        yield
        return
    sys.modules[_SAMPLER] = None  # type: ignore[assignment]  # "not installed", to whoever imports it
    try:
        yield
    finally:
        sys.modules.pop(_SAMPLER, None)


def dashboard(
    spec: common.SpecArgument = None,
    storage: common.StorageOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; others than loopback are public.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for any that is free.")] = 8080,
    writable: Annotated[
        bool, typer.Option("--writable", help="Let visitors change and delete studies; there is no password.")
    ] = False,
    overrides: common.SetOption = None,
    json: common.JsonOption = False,
) -> None:
    """Serve optuna-dashboard on the study's storage: trials, notes, figures, model cards. Read-only, on loopback."""
    settings = common.load_spec(spec, overrides, storage=storage)
    common.check_early(settings, models=False, storage=True, create=False)
    common.quiet_libraries()
    with _without_their_sampler():
        from dfmerge_studies.report.notes import artifact_folder
        from dfmerge_studies.report.serving import Publisher, dashboard_server, is_loopback
    from dfmerge_studies.storage import open_storage, storage_errors
    from dfmerge_studies.study.plan import storage_url

    url = storage_url(settings)
    with storage_errors(url):
        opened = open_storage(url, create=False)
    server = dashboard_server(opened, artifact_folder(settings.workdir), host=host, port=port, writable=writable)
    if not is_loopback(host):
        power = "change and delete" if writable else "read"
        common.warn(f"warning: everyone who reaches {host} can {power} the studies of this storage")
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{server.server_port}/dashboard"
    with server, Publisher(opened):
        if json:
            common.print_json({"url": address, "writable": writable})
        else:
            state = "writable" if writable else "read-only"
            common.say(f"dashboard of {settings.name}: {address} ({state}; Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            common.warn("dashboard ended")
