"""The keys file: which tenants there are, what each may take, and by which keys they are known.

Owns the file's form and every change to it. Holds digests alone: a key itself is shown once, when it is made, and is
never written, logged or sent on."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct, field

from policies.request import CLASS_NAMES
from router.host.plan import state_folder
from router.settings.config import Config, is_loopback

FILE_MAX_BYTES = 4 * 1024 * 1024  # about 10,000 keys
KEYS_MAX = 10_000
KEY_PREFIX = "hw-"
SECRET_BYTES = 32  # nobody guesses 256 bits, so a plain digest of them is enough
ID_CHARS = 12  # of the digest: how people name a key

NAME = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"  # it goes into headers, logs and metrics
Name = Annotated[str, Meta(pattern=NAME)]
Amount = Annotated[float, Meta(gt=0)]


class TenantRow(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One who pays. A bound that is not set is none."""

    organisation: Name  # its tenants share KV, unless a salt domain says otherwise
    salt_domain: str = ""  # who share KV; empty: the organisation
    most_urgent: str = "chatbot+"  # a declared or inferred class is clamped to this
    weight: Amount = 1.0  # of fair shares inside a class
    requests_per_min: Amount | None = None
    concurrency: Annotated[int, Meta(ge=1)] | None = None
    tokens_per_month: Amount | None = None  # prompt, cached or not, and output
    gpu_s_per_month: Amount | None = None


class KeyRow(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One key."""

    digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]  # SHA-256 of the key
    tenant: Name
    models: tuple[str, ...] = ()  # patterns of models that it may use; empty: all
    created: str = ""  # day, for people

    @property
    def id(self) -> str:
        """How people name this key."""
        return self.digest[:ID_CHARS]


class KeyFile(Struct, frozen=True, forbid_unknown_fields=True):
    """All of it."""

    tenants: dict[Name, TenantRow] = field(default_factory=dict)
    keys: tuple[KeyRow, ...] = ()


class KeysError(Exception):
    """The keys file cannot be used, or the change that was asked for cannot be made. Says why, for a person."""


def keys_path(config: Config) -> Path:
    """Where the keys are."""
    if config.server.keys_file:
        return Path(config.server.keys_file).expanduser()
    return state_folder(config, os.environ) / "keys.json"


def check_reach(config: Config) -> None:
    """Raises KeysError when others could come and need no key, or the keys cannot be read."""
    path = keys_path(config)
    file = read(path)
    if (file is None or not file.keys) and not is_loopback(config.server.host):
        raise KeysError(
            f"server.host: {config.server.host} can be reached by others, and there are no keys in {path}: "
            "make one with `headway keys add NAME`, or listen on 127.0.0.1"
        )


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read(path: Path) -> KeyFile | None:
    """The keys; None when there is no such file. Raises KeysError."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KeysError(f"{path} cannot be read: {error.strerror}") from error
    return parse(path, data)


def parse(path: Path, data: bytes) -> KeyFile:
    """What a keys file says. Raises KeysError."""
    if len(data) > FILE_MAX_BYTES:
        raise KeysError(f"{path} holds more than the {FILE_MAX_BYTES} bytes that are read")
    try:
        file = msgspec.json.decode(data, type=KeyFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KeysError(f"{path} is no keys file: {error}") from error
    if why := next(_contradictions(file), ""):
        raise KeysError(f"{path}: {why}")
    return file


def _contradictions(file: KeyFile) -> Iterator[str]:
    if len(file.keys) > KEYS_MAX:
        yield f"{len(file.keys)} keys, more than the {KEYS_MAX} that are kept"
    if len({row.digest for row in file.keys}) < len(file.keys):
        yield "the same digest stands there twice"
    for row in file.keys:
        if row.tenant not in file.tenants:
            yield f"key {row.id} is of tenant {row.tenant}, who is not there"
    for name, tenant in file.tenants.items():
        if tenant.most_urgent not in CLASS_NAMES:
            yield f"tenant {name}: most_urgent must be one of {', '.join(CLASS_NAMES)}"


# Changes --------------------------------------------------------------------------------------------------------------


def add(path: Path, name: str, changes: dict[str, object], models: tuple[str, ...], today: str) -> str:
    """Make a key for a tenant, who is made or changed with it, and return the key. Raises KeysError."""
    for what, given in (("a tenant", name), ("an organisation", changes.get("organisation", name))):
        if not re.fullmatch(NAME, str(given)):
            raise KeysError(f"{what}'s name is 1 to 64 letters, digits and ._@- and begins with a letter or digit")
    key = KEY_PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    with _changing(path) as file:
        known = msgspec.to_builtins(file.tenants[name]) if name in file.tenants else {"organisation": name}
        try:
            tenant = msgspec.convert(known | changes, TenantRow)
        except msgspec.ValidationError as error:
            raise KeysError(f"tenant {name}: {error}") from error
        row = KeyRow(digest(key), name, models, today)
        _write(path, KeyFile(file.tenants | {name: tenant}, (*file.keys, row)))
    return key


def revoke(path: Path, key_id: str) -> KeyRow:
    """Forget a key by its id, or enough of it. Its tenant stays. Raises KeysError."""
    with _changing(path) as file:
        found = [row for row in file.keys if key_id and row.digest.startswith(key_id)]
        if len(found) != 1:
            raise KeysError(f"{len(found) or 'no'} keys begin with {key_id}; `headway keys list` shows them")
        _write(path, KeyFile(file.tenants, tuple(row for row in file.keys if row is not found[0])))
    return found[0]


@contextmanager
def _changing(path: Path) -> Iterator[KeyFile]:
    """The file as it is, while nobody else changes it."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield read(path) or KeyFile()
    finally:
        os.close(descriptor)


def _write(path: Path, file: KeyFile) -> None:
    """Whole or not at all: a router that reads meanwhile sees the old file or the new one. Raises KeysError."""
    data = msgspec.json.format(msgspec.json.encode(file)) + b"\n"
    parse(path, data)  # what we write, we can read
    made = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as new:
        new.write(data)
        new.flush()
        os.fsync(descriptor)
    made.replace(path)
