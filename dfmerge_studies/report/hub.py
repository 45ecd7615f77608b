"""An exported directory on the Hugging Face Hub, through huggingface_hub, which finds the token by its own rules."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dfmerge_studies.checkpoints.reference import ADAPTER_CONFIG
from dfmerge_studies.checkpoints.write import PROVENANCE
from dfmerge_studies.errors import InputError, RunError, first_line
from dfmerge_studies.redact import HIDDEN

_WHERE = "--push-to-hub"


def check_push(repository: str) -> None:
    """Refuse, before anything is computed, what cannot be pushed.

    Args:
        repository: `NAME`, or `OWNER/NAME`.

    Raises:
        InputError: it is no name of a repository, the Hub may not be asked, or there is no token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public by its documentation

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(
            f"{repository!r} is no name of a repository on the Hub", where=_WHERE, hint="Write it as OWNER/NAME"
        ) from error
    if constants.is_offline_mode():
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be pushed", where=_WHERE, hint="Unset it")
    with _hub_errors(repository, None):
        token = get_token()
    if token is None:
        raise InputError("there is no token for the Hub", where=_WHERE, hint="Run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Make a repository where there is none, and put all files of an exported directory into it in one commit.

    Files of the repository that the directory does not have stay.  Absolute paths of this machine are left out of the
    provenance that is pushed.

    Args:
        folder: that `export_merge` wrote; it is only read.
        repository: `NAME`, or `OWNER/NAME`.
        private: whether a new repository is private, and an old one must be.

    Returns:
        The repository's address.

    Raises:
        RunError: the Hub cannot be reached or refuses; says that the directory is kept.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars  # type: ignore[attr-defined]  # likewise

    api = HfApi(library_name="dfmerge-studies")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        with _hub_errors(repository, folder):
            url = api.create_repo(repository, private=private or None, exist_ok=True)
            if private and not api.model_info(url.repo_id).private:
                raise RunError(
                    f"the repository {url.repo_id} exists and is public; the model is kept in {folder}",
                    where=_WHERE,
                    hint="Make it private, name another, or leave --private out",
                )
            operations = [CommitOperationAdd(file.relative_to(folder).as_posix(), _content(file)) for file in files]
            api.create_commit(url.repo_id, operations, commit_message="A merge by dfmerge-studies")
    finally:
        enable_progress_bars()
    return str(url)


def _content(file: Path) -> Path | bytes:
    """What is pushed of a file: provenance and an adapter's base without folders of this machine, else as it is."""
    if file.name not in (PROVENANCE, ADAPTER_CONFIG):
        return file
    content = _without_folders(json.loads(file.read_text(encoding="utf-8")))
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_folders(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and "\n" not in value:
        scheme, slashes, path = value.rpartition("://")
        if Path(path).is_absolute() or path.startswith("~"):
            return f"{scheme}{slashes}{Path(path).name}"
    return value


@contextmanager
def _hub_errors(repository: str, kept: Path | None) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one message without the token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError

    # The root of what its client raises without an answer; newer releases have another client.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (http_error, OSError, ValueError) as error:
        response = getattr(error, "response", None)
        said = str(getattr(error, "server_message", None) or "")
        reason = f"{response.status_code} {response.reason_phrase}" if response is not None else first_line(error)
        text = ": ".join([reason, *([said.splitlines()[0][:300]] if said else [])])
        if kept is not None and (token := get_token()):
            text = text.replace(token, HIDDEN)
        where = f"; the model is kept in {kept}" if kept is not None else ""
        raise RunError(
            f"cannot be pushed to {repository} ({text}){where}",
            where=_WHERE,
            hint="Check the name, the connection, and that the token may write there; then push again with --force, or "
            "with `hf upload`",
        ) from error
