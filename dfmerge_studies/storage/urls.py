"""Storage URLs: parsed, made absolute, shown without passwords."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import exc
from sqlalchemy.engine import URL, make_url

from dfmerge_studies.errors import InputError
from dfmerge_studies.redact import HIDDEN, is_secret, masked_url

_SCHEMES = "sqlite:///FILE, postgresql+psycopg://USER@HOST/NAME, journal:///FILE or grpc://HOST:PORT"


def safe_url(url: str) -> str:
    """Return a URL with its password masked: the only form to print or to store.

    Args:
        url: any text; also one that is no URL.
    """
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        return masked_url(url)
    if _is_misread(parsed):
        return masked_url(url)
    secret = [key for key in parsed.query if is_secret(key)]
    return parsed.update_query_dict(dict.fromkeys(secret, HIDDEN)).render_as_string(hide_password=True)


def _is_misread(parsed: URL) -> bool:
    """Whether a password that is not escaped has been taken for a host or for a database."""
    file = parsed.drivername.split("+")[0] in ("sqlite", "journal")
    return not file and any("@" in str(part) for part in (parsed.username, parsed.host, parsed.database))


def resolve_url(url: str, folder: Path) -> str:
    """Make the path of a sqlite or journal URL absolute, below `folder`; other URLs stay as they are.

    Args:
        url: a storage URL.
        folder: where a relative path starts.
    """
    scheme, separator, path = url.partition(":///")
    if separator and scheme in ("sqlite", "sqlite+pysqlite", "journal") and path and path != ":memory:":
        return f"{scheme}:///{(folder / path).absolute()}"
    return url


def storage_file(url: str) -> Path | None:
    """The file that a sqlite or journal URL names; None for a server.

    Args:
        url: a storage URL, resolved.
    """
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        return None
    local = parsed.drivername in ("sqlite", "sqlite+pysqlite", "journal") and parsed.database not in (None, ":memory:")
    return Path(str(parsed.database)) if local else None


def storage_identity(url: str) -> str:
    """A text that is the same for every way to name one storage, without its password; never to be shown.

    All spellings of Postgres are one storage, and it stays that one after a change of the password.

    Args:
        url: a storage URL, resolved.
    """
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        return url
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    secret = [key for key in parsed.query if "password" in key.lower()]
    return parsed.update_query_dict(dict.fromkeys(secret, HIDDEN)).render_as_string(hide_password=True)


def check_constraints(url: str, number: int, *, where: str | None = None) -> None:
    """Refuse a storage that would mix up several constraints of a trial.

    Args:
        url: a storage URL, resolved.
        number: how many constraints every trial has.
        where: what asks for them, for the message.

    Raises:
        InputError: it is Optuna's proxy, which gives them back in another order than that of their names.
    """
    if number > 1 and url.startswith("grpc://"):
        raise InputError(
            "Optuna's gRPC proxy does not keep several constraints in order, and the sampler would mix them up",
            where=where,
            mend="Name the database itself as the storage, or leave max_drop out",
        )


def unsupported(parsed: URL, url: str) -> InputError:
    """The error for a URL of a kind that no engine here opens.

    Args:
        parsed: the URL's parts.
        url: the URL as it was given; its password is masked in the message.
    """
    return InputError(
        f"storages of kind {parsed.drivername}:// are not supported", where=safe_url(url), mend=f"Use {_SCHEMES}"
    )


def parse_url(url: str) -> URL:
    """The parts of a storage URL.

    Args:
        url: as the user gave it.

    Raises:
        InputError: it is none, or it holds a password among its parameters.
    """
    try:
        parsed = make_url(url)
    except (exc.ArgumentError, ValueError):
        raise InputError("this is not a storage URL", where=safe_url(url), mend=f"Use {_SCHEMES}") from None
    if _is_misread(parsed):
        raise InputError(
            "the user or the password has a character that means something else in a URL",
            where=safe_url(url),
            mend="Write @ as %40, / as %2F, : as %3A and % as %25",
        )
    if any(is_secret(key) and key.lower() != "passfile" for key in parsed.query):
        raise InputError(
            "a password among the URL's parameters would show in logs",
            where=safe_url(url),
            mend="Write it as //user:password@host, or leave it to a password file",
        )
    return parsed


def optuna_url(url: URL) -> str:
    """Render a URL for Optuna, which passes it through `str.format`.

    Args:
        url: the parts of a URL.
    """
    return url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
