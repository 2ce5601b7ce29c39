"""Who sends a request: API keys, from a TOML file or the environment, and what each of them may ask for.

Only SHA-256 digests stay in memory. That is enough for keys drawn at random, which cannot be guessed, and it is quick
enough to do for every request.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import stat
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from server.errors import AuthenticationError, first_complaint
from server.settings import Settings
from vd_plugin.schedule import FULL, Budget, parse_budget

_log = logging.getLogger("visiondrop")

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECRET: Final = re.compile(r"[!-~]+")
"""Printable ASCII without spaces: what every HTTP client can send in a header as it is."""
_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")


class KeyFileError(ValueError):
    """Keys that cannot be used. The message is a sentence that names file and entry, and never holds a secret."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key besides its secret.

    Args:
        name: for logs.
        max_budget: the largest visual token budget of its images; the server's own maximum applies as well.
        requests_per_minute: None for the server's rate.
        images_per_minute: None for the server's rate.
        weight: how many times the share of a key with weight 1 it gets where keys compete.
        max_parallel_requests: of its requests, how many engines work on at a time; None for no limit.
    """

    name: str
    max_budget: Budget = FULL
    requests_per_minute: int | None = None
    images_per_minute: int | None = None
    weight: int = 1
    max_parallel_requests: int | None = None


ANONYMOUS: Final = ApiKey("anonymous")
"""Everybody, where there are no keys."""


class ApiKeys:
    """All the keys of a server.

    Args:
        entries: SHA-256 digests of secrets with their keys. Empty: the server is open to everybody.
    """

    def __init__(self, entries: Sequence[tuple[bytes, ApiKey]] = ()) -> None:
        self._entries = tuple(entries)

    @classmethod
    def from_settings(cls, settings: Settings) -> ApiKeys:
        """The keys of the file and of the environment, together.

        Raises:
            KeyFileError: one of them cannot be used.
        """
        entries: list[tuple[bytes, ApiKey]] = []
        if settings.api_key is not None:
            digest = _digest_of_secret(settings.api_key, "the setting api_key")
            entries.append((digest, ApiKey("default")))
        if settings.api_keys_file is not None:
            entries += _read_file(settings.api_keys_file)
        _check_distinct(entries)
        return cls(entries)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key.name for _, key in self._entries))

    @property
    def is_open(self) -> bool:
        """Nobody needs a key."""
        return not self._entries

    def authenticate(self, authorization: str | None) -> ApiKey:
        """The key behind an `Authorization: Bearer KEY` header; ANONYMOUS for whatever is sent to an open server.

        Raises:
            AuthenticationError: there is none ("missing_api_key"), or it is not known ("invalid_api_key").
        """
        if self.is_open:
            return ANONYMOUS
        scheme, _, sent = (authorization or "").strip(" \t").partition(" ")
        sent = sent.strip(" \t")
        if scheme.lower() != "bearer" or not sent:
            raise AuthenticationError(
                "this server needs an API key: send it in the header 'Authorization: Bearer YOUR_KEY'",
                code="missing_api_key",
            )
        digest = sha256(sent.encode("utf-8", "surrogatepass")).digest()
        found: ApiKey | None = None
        # All of them, without leaving early, so that the time taken reveals nothing.
        for known, key in self._entries:
            if hmac.compare_digest(known, digest):
                found = key
        if found is None:
            raise AuthenticationError(
                "Incorrect API key provided: this server does not know it; check it, or ask the operator for one",
                code="invalid_api_key",
            )
        return found


def _parse_rate(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError("a rate must be a whole number above 0; leave it out for the server's own rate")


_Rate = Annotated[int | None, BeforeValidator(_parse_rate)]

_MAX_WEIGHT: Final = 1000


def _parse_weight(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_WEIGHT:
        return value
    raise ValueError(f"a weight must be a whole number from 1 to {_MAX_WEIGHT}")


def _parse_parallel(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError("a limit of parallel requests must be a whole number above 0; leave it out for none")


class _Entry(BaseModel):
    """A [keys.NAME] table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    secret: SecretStr | None = None
    secret_sha256: SecretStr | None = None  # not a secret in itself, but nothing to print either
    max_budget: Annotated[Budget, BeforeValidator(parse_budget)] = FULL
    requests_per_minute: _Rate = None
    images_per_minute: _Rate = None
    weight: Annotated[int, BeforeValidator(_parse_weight)] = 1
    max_parallel_requests: Annotated[int | None, BeforeValidator(_parse_parallel)] = None


class _File(BaseModel):
    """The whole file; the entries are read one by one, so that a complaint can name its entry."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    keys: dict[str, dict[str, Any]] = Field(min_length=1)


def _read_file(path: Path) -> list[tuple[bytes, ApiKey]]:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                _log.warning("the key file %s can be read by every user of this machine: chmod o-r %s", path, path)
            content = tomllib.load(file)
    except OSError as error:
        raise KeyFileError(f"the key file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise KeyFileError(f"the key file {path} is not TOML: {error}") from None
    try:
        tables = _File.model_validate(content).keys
    except ValidationError as error:
        raise KeyFileError(
            f"the key file {path} must hold one table [keys.NAME] or more, and nothing else: {_complaint(error)}"
        ) from None
    return [_read_entry(name, table, f"the key file {path}, entry {name!r}") for name, table in tables.items()]


def _read_entry(name: str, table: dict[str, Any], place: str) -> tuple[bytes, ApiKey]:
    if not _NAME.fullmatch(name):
        raise KeyFileError(f"{place}: a name must be 1 to 64 of the letters A-Z, a-z, digits, '.', '_' and '-'")
    try:
        entry = _Entry.model_validate(table)
    except ValidationError as error:
        raise KeyFileError(f"{place}: {_complaint(error)}") from None
    key = ApiKey(
        name,
        entry.max_budget,
        entry.requests_per_minute,
        entry.images_per_minute,
        entry.weight,
        entry.max_parallel_requests,
    )
    if (entry.secret is None) == (entry.secret_sha256 is None):
        raise KeyFileError(f"{place}: give either secret or secret_sha256")
    if entry.secret is not None:
        return _digest_of_secret(entry.secret, place), key
    assert entry.secret_sha256 is not None
    digest = entry.secret_sha256.get_secret_value()
    if not _DIGEST.fullmatch(digest):
        raise KeyFileError(f"{place}: secret_sha256 must be 64 hexadecimal digits")
    if bytes.fromhex(digest) == sha256(b"").digest():
        raise KeyFileError(f"{place}: the secret behind secret_sha256 is empty")
    return bytes.fromhex(digest), key


def _digest_of_secret(secret: SecretStr, place: str) -> bytes:
    text = secret.get_secret_value()
    if not text:
        raise KeyFileError(f"{place}: the secret is empty")
    if not _SECRET.fullmatch(text):
        raise KeyFileError(f"{place}: a secret must be printable ASCII without spaces")
    return sha256(text.encode()).digest()


def _check_distinct(entries: Sequence[tuple[bytes, ApiKey]]) -> None:
    # Within the file, TOML itself refuses a name that comes twice.
    names: set[str] = set()
    owners: dict[bytes, str] = {}
    for digest, key in entries:
        if key.name in names:
            raise KeyFileError(f"the key file: the name {key.name!r} is taken by the key of the setting api_key")
        if digest in owners:
            raise KeyFileError(f"the API keys {owners[digest]!r} and {key.name!r} have the same secret")
        names.add(key.name)
        owners[digest] = key.name


def _complaint(error: ValidationError) -> str:
    complaint = first_complaint(error)
    field = ".".join(str(step) for step in complaint.location)
    if complaint.kind == "extra_forbidden":
        return f"{field} is an unknown field"
    return f"{field}: {complaint.reason}" if field else complaint.reason
