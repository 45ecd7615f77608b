"""Storage URLs: parsed, made absolute, shown without passwords."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote

from sqlalchemy import exc
from sqlalchemy.engine import URL, make_url

from dfmerge_studies.errors import InputError
from dfmerge_studies.redact import HIDDEN, is_secret, masked_url

_FILES = ("sqlite", "sqlite+pysqlite", "journal")
_SQLITE_PARAMETERS = ("timeout", "check_same_thread", "cached_statements", "isolation_level", "detect_types")
_PARAMETER = re.compile(r"\w+=[^/?]*")
_SCHEMES = "sqlite:///FILE, postgresql+psycopg://USER@HOST/NAME, journal:///FILE or grpc://HOST:PORT"


def safe_url(url: str) -> str:
    """Return a URL with its password masked: the only form to print or to store.

    Args:
        url: any text; also one that is no URL.
    """
    try:
        parsed = read_url(url)
    except (exc.ArgumentError, ValueError):
        return masked_url(url)
    if _is_misread(parsed):
        return masked_url(url)
    secret = [key for key in parsed.query if is_secret(key)]
    return _masked(parsed, secret)


def _masked(url: URL, secret: Iterable[str]) -> str:
    """A URL as text, with nothing in the place of its password and of some parameters."""
    shown = url.update_query_dict(dict.fromkeys(secret, HIDDEN))
    return write_url(shown) if is_file(shown) else shown.render_as_string(hide_password=True)


def _is_misread(parsed: URL) -> bool:
    """Whether a password that is not escaped has been taken for a host or for a database."""
    return parsed.drivername not in _FILES and any(
        "@" in str(part) for part in (parsed.username, parsed.host, parsed.database)
    )


def resolve_url(url: str, folder: Path) -> str:
    """Make the path of a sqlite or journal URL absolute, below `folder`; other URLs stay as they are.

    Args:
        url: a storage URL.
        folder: where a relative path starts.
    """
    try:
        parsed = read_url(url)
    except (exc.ArgumentError, ValueError):
        return url
    if not is_file(parsed):
        return url
    return write_url(parsed.set(database=str((folder / str(parsed.database)).absolute())))


def storage_file(url: str) -> Path | None:
    """The file that a sqlite or journal URL names; None for a server."""
    try:
        parsed = read_url(url)
    except (exc.ArgumentError, ValueError):
        return None
    return Path(str(parsed.database)) if is_file(parsed) else None


def read_url(url: str) -> URL:
    """The parts of a URL; `database` is the path of a file as the file system has it, whatever characters it has.

    SQLAlchemy ends the path at the first `?`, which a folder's name may hold.

    Args:
        url: as a user or `write_url` gave it; in it `%3F` and `?` are the same, unless parameters follow.

    Raises:
        sqlalchemy.exc.ArgumentError: it is none.
    """
    scheme, separator, rest = url.partition(":///")
    if not separator or scheme not in _FILES:
        return make_url(url)
    path, mark, tail = rest.rpartition("?")
    parameters = tail.split("&")
    if not mark or not all(map(_PARAMETER.fullmatch, parameters)):
        return URL.create(scheme, database=unquote(rest) or None)
    query = dict(part.split("=", 1) for part in parameters)
    return URL.create(scheme, database=unquote(path) or None, query=query)


def write_url(url: URL) -> str:
    """A URL as text, its password included.

    Args:
        url: from `read_url`.
    """
    if not is_file(url):
        return url.render_as_string(hide_password=False)
    query = "&".join(f"{name}={value}" for name, value in sorted(url.query.items()))
    return f"{url.drivername}:///{quote(str(url.database), safe=' +/')}{'?' if query else ''}{query}"


def is_file(url: URL) -> bool:
    """Tell whether a URL names a file.

    Args:
        url: from `read_url`.
    """
    return url.drivername in _FILES and url.database not in (None, ":memory:")


def storage_identity(url: str) -> str:
    """A text that is the same for every way to name one storage, without its password; never to be shown.

    All spellings of Postgres are one storage, and it stays that one after a change of the password.
    """
    try:
        parsed = read_url(url)
    except (exc.ArgumentError, ValueError):
        return url
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    secret = [key for key in parsed.query if "password" in key.lower()]
    return _masked(parsed, secret)


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
            hint="Name the database itself as the storage, or leave max_drop out",
        )


def unsupported(parsed: URL, url: str) -> InputError:
    """The error for a URL of a kind that no engine here opens.

    Args:
        parsed: the URL's parts.
        url: the URL as it was given; its password is masked in the message.
    """
    return InputError(
        f"storages of kind {parsed.drivername}:// are not supported", where=safe_url(url), hint=f"Use {_SCHEMES}"
    )


def parse_url(url: str) -> URL:
    """The parts of a storage URL.

    Raises:
        InputError: it is none, or it holds a password or something unknown among its parameters.
    """
    try:
        parsed = read_url(url)
    except (exc.ArgumentError, ValueError):
        raise InputError("this is not a storage URL", where=safe_url(url), hint=f"Use {_SCHEMES}") from None
    if _is_misread(parsed):
        raise InputError(
            "the user or the password has a character that means something else in a URL",
            where=safe_url(url),
            hint="Write @ as %40, / as %2F, : as %3A and % as %25",
        )
    if any(is_secret(key) and key.lower() != "passfile" for key in parsed.query):
        raise InputError(
            "a password among the URL's parameters would show in logs",
            where=safe_url(url),
            hint="Write it as //user:password@host, or leave it to a password file",
        )
    odd = [key for key in parsed.query if parsed.drivername in _FILES and key not in _SQLITE_PARAMETERS]
    if odd:
        raise InputError(f"unknown parameter {odd[0]!r}", where=safe_url(url), hint="Write a ? in a path as %3F")
    return parsed


def optuna_url(url: URL) -> str:
    """Render a URL for Optuna, which passes it through `str.format`."""
    text = url.render_as_string(hide_password=False)
    if is_file(url) and make_url(text).database != url.database:  # SQLAlchemy before 2.1 escapes no path: SQLite does
        path = f"file:{quote(str(url.database))}"
        text = url.set(database=path).update_query_dict({"uri": "true"}).render_as_string()
    return text.replace("{", "{{").replace("}", "}}")
