"""Texts that other people may read: without passwords, tokens and keys.

Every error passes through here, and so does everything that is stored or exported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_LOCAL = ("sqlite", "journal", "file", "local", "memory")  # what follows these is a path, in which @ means nothing
_USERS = ("postgres", "grpc", "ssh", "sftp")  # whose user name without a password is no secret
_NAMES = (
    r"[\w-]*(?:password|passwd|passphrase|pwd|secret|signature|credentials?|api[_-]?key|access[_-]?key)[\w-]*"
    r"|pass|passfile|pgpass|sig|key|token|[\w-]+[_-]token|use_auth_token|authorization|cookies?"
)
_SECRET = re.compile(rf"(?:{_NAMES}|auth|headers|storage_options|download_config|client_kwargs)", re.IGNORECASE)
_IN_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]+)(?P<slashes>:/{1,3})(?P<user>[^\s'\"<>]*)@")
_WHOLE_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]+)(?P<slashes>:/{1,3})(?P<user>.*)@", re.DOTALL)
_NO_SCHEME = re.compile(r"^(?P<slashes>/*)[^/@]*:(?!/).*@", re.DOTALL)  # of a URL whose scheme was forgotten
# `key` is a word of every message, and a secret only in a query.
_IN_QUERY = re.compile(rf"(?P<name>[?&;](?:{_NAMES}))=[^&\s'\"#]+", re.IGNORECASE)
_IN_TEXT = re.compile(
    r"(?<![\w.?&;-])(?P<name>[\w-]*(?:password|passwd|pwd|secret|api_?key|access_?key)[\w-]*|passfile|use_auth_token|token)"
    r"=(?:'[^']*'|\"[^\"]*\"|[^\s'\"&,;)]+)",
    re.IGNORECASE,
)
_IN_MAPPING = re.compile(rf"(?P<name>(?P<q>['\"])(?:{_NAMES})(?P=q)\s*:\s*)(?P<v>['\"]).*?(?P=v)", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def is_secret(name: str) -> bool:
    """Tell whether what stands under a name is nobody else's business.

    Args:
        name: a key of a mapping or of a URL's query.

    >>> is_secret("sslpassword"), is_secret("token"), is_secret("storage_options"), is_secret("tokenizer")
    (True, True, True, False)
    """
    return _SECRET.fullmatch(name) is not None


def masked_text(text: str) -> str:
    """A text that may hold URLs and settings, without what is secret in them.

    >>> masked_text("cannot reach https://me:hush/hush@host/x?sig=abc&v=1 at once")
    'cannot reach https://***@host/x?sig=***&v=1 at once'
    >>> masked_text("host=db user=me password=hush"), masked_text("org/name@main"), masked_text("sqlite:////a@b/c.db")
    ('host=db user=me password=***', 'org/name@main', 'sqlite:////a@b/c.db')
    """
    text = _IN_URL.sub(_without_user, text)
    text = _IN_QUERY.sub(rf"\g<name>={HIDDEN}", text)
    text = _IN_TEXT.sub(rf"\g<name>={HIDDEN}", text)
    text = _IN_MAPPING.sub(rf"\g<name>\g<v>{HIDDEN}\g<v>", text)
    return _HUB_TOKEN.sub(f"hf_{HIDDEN}", text)


def masked_url(url: str) -> str:
    """A text that is a URL and nothing else, whatever characters its password has.

    Args:
        url: as it was given; also one that is no URL.

    >>> masked_url("postgresql://me:pass word's@x@host/db")
    'postgresql://***@host/db'
    """
    return masked_text(_NO_SCHEME.sub(rf"\g<slashes>{HIDDEN}@", _WHOLE_URL.sub(_without_user, url)))


def _without_user(found: re.Match[str]) -> str:
    scheme, user = found["scheme"].lower(), found["user"]
    if scheme.split("+")[0] in _LOCAL or user.endswith(f":{HIDDEN}"):
        return found[0]
    if ":" not in user and "@" not in user and ("/" in user or scheme.startswith(_USERS)):
        return found[0]  # a path with @ in it, or a user alone
    return f"{found['scheme']}{found['slashes']}{HIDDEN}@"


def public(value: Any) -> Any:
    """A value as it may be stored and exported: secret fields are left out, URLs lose their passwords.

    >>> public({"path": "json", "token": "hush", "data_files": {"token": "https://me:hush@host/x"}})
    {'path': 'json', 'data_files': {'token': 'https://***@host/x'}}
    """
    if isinstance(value, str):
        return masked_url(value)
    if isinstance(value, Mapping):
        return {
            key: _texts(inner) if key == "data_files" else public(inner)  # whose keys are names of splits
            for key, inner in value.items()
            if not is_secret(str(key))
        }
    if isinstance(value, (list, tuple)):
        return [public(inner) for inner in value]
    return value


def _texts(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _texts(inner) for key, inner in value.items()}
    return public(value)


def masked_override(override: str) -> str:
    """A `dotted.key=value` text as it may be shown.

    >>> masked_override("tasks.a.dataset.token=hush"), masked_override("search.trials=3")
    ('tasks.a.dataset.token=***', 'search.trials=3')
    """
    key, sign, text = override.partition("=")
    if not sign:
        return masked_url(override)
    if any(is_secret(part) for part in key.strip().split(".")):
        return f"{key}={HIDDEN}"
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return f"{key}={masked_url(text)}"
    shown = public(value)
    return override if shown == value else f"{key}={shown if isinstance(shown, str) else json.dumps(shown)}"
