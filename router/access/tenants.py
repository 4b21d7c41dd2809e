"""Who is calling: from a request's headers to its tenant, by key, or without keys to whoever is on this machine.

Owns the keys in force, read again when their file changes. Never keeps, logs or forwards what a client presented."""

from __future__ import annotations

import asyncio
import functools
import hmac
import ipaddress
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from policies.request import CLASS_NAMES, Tenant
from router.access import keys
from router.access.accounts import Accounts
from router.access.keys import KeyFile, KeysError, TenantRow
from router.access.salts import Salts
from router.errors import RequestError
from router.listener.exchange import Head

log = logging.getLogger(__name__)

POLL_S = 1.0  # a revoked key works for no longer than this
SAVE_EVERY = 5  # polls: a router that is killed forgets so much of what was taken


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what they may have."""

    tenant: Tenant
    salt: bytes
    limits: TenantRow
    models: tuple[str, ...] = ()  # patterns; empty: all


class Tenants:
    """All who may call. While there is no keys file, `local` may, from this machine alone."""

    def __init__(self, path: Path | None, salts: Salts, local: Tenant, accounts: Accounts) -> None:
        self.accounts = accounts
        self._path = path
        self._salts = salts
        self.local = Caller(local, salts.of(local.organisation), TenantRow(organisation=local.organisation))
        self._callers: Mapping[str, Caller] | None = None  # by digest
        self._stamp: tuple[int, int, int] | None = None  # of the file that was read
        self._told = ""  # the last error

    @property
    def needs_keys(self) -> bool:
        """Whether callers must show a key. Once a keys file was seen they must for good."""
        return self._callers is not None

    @property
    def key_count(self) -> int:
        return len(self._callers or ())

    # Hot: twice per request, at its head and at its body.
    def caller(self, head: Head) -> Caller:
        """Who sent this. Raises RequestError: 401 for a missing or wrong key, 403 for what a foreign page sends."""
        if self._callers is None:
            _refuse_foreign(head)
            return self.local
        digest = keys.digest(_presented(head))
        caller = self._callers.get(digest)
        if caller is None:
            raise RequestError(401, "The key is not known here.", code="invalid_api_key")
        return caller

    @contextmanager
    def visit(self, caller: Caller) -> Iterator[None]:
        """Around one request. Raises RequestError 429 for what is beyond the tenant's own limits."""
        began = self.accounts.clock()
        account = self.accounts.enter(caller.tenant.id, caller.limits)
        try:
            yield
        finally:
            self.accounts.leave(account, began)

    # The file ---------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Read the keys if their file has changed. Raises KeysError; then the keys before stay in force."""
        if self._path is None:
            return
        try:
            status = self._path.stat()
        except FileNotFoundError:
            if self._callers is not None:
                raise KeysError(f"{self._path} is gone") from None
            return
        except OSError as error:
            raise KeysError(f"{self._path} cannot be read: {error.strerror}") from error
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp == self._stamp:
            return
        file = keys.read(self._path)
        if file is not None:
            self._callers = {row.digest: self._caller(file, row) for row in file.keys}
            self._stamp = stamp

    def _caller(self, file: KeyFile, row: keys.KeyRow) -> Caller:
        limits = file.tenants[row.tenant]
        tenant = Tenant(row.tenant, limits.organisation, CLASS_NAMES[limits.most_urgent], limits.weight)
        return Caller(tenant, self._salts.of(limits.salt_domain or limits.organisation), limits, row.models)

    async def run(self) -> None:
        """Follow the keys file, and keep what was taken on disk, until cancelled."""
        polls = 0
        try:
            while True:
                await asyncio.sleep(POLL_S)
                self.reload()
                polls += 1
                if polls % SAVE_EVERY == 0:
                    await asyncio.to_thread(self.accounts.save)
        finally:
            self.accounts.save()

    def reload(self) -> None:
        """`load`, for a router that runs: what is wrong is said, and nothing changes."""
        before = self.key_count
        try:
            self.load()
        except KeysError as error:
            if str(error) != self._told:  # once, not each second
                log.error("the keys before stay in force: %s", error)
            self._told = str(error)
            return
        self._told = ""
        if self.key_count != before:
            log.info("%d keys are in force", self.key_count)


# Hot: at each request's head.
def _presented(head: Head) -> str:
    """The key that a client shows, in OpenAI's or Anthropic's way."""
    scheme, _, bearer = (head.header(b"authorization") or "").partition(" ")
    bearer = bearer.strip() if scheme.lower() == "bearer" else ""
    plain = head.header(b"x-api-key") or ""
    if bearer and plain and not hmac.compare_digest(bearer.encode(), plain.encode()):
        raise RequestError(401, "Two different keys were sent: by Authorization and by x-api-key.")
    if not bearer and not plain:
        words = "A key is needed: send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`."
        raise RequestError(401, words, code="missing_api_key")
    return bearer or plain


def _refuse_foreign(head: Head) -> None:
    """A keyless server trusts its machine, so no web page may speak for it: neither across origins nor by a name of its
    own that resolves to this address."""
    if not _is_local(head.header(b"host")) or not _is_local(_authority(head.header(b"origin"))):
        raise RequestError(403, "This server answers loopback addresses alone, and no foreign web page.")


def _authority(origin: str | None) -> str | None:
    """Host and port of an Origin; the literal `null` of sandboxed pages is foreign."""
    if origin is None:
        return None
    try:
        return urlsplit(origin).netloc or "null"
    except ValueError:  # brackets without an address in them
        return "null"


@functools.lru_cache(maxsize=256)
def _is_local(authority: str | None) -> bool:
    """Whether a Host or Origin names this machine's loopback; a missing one says nothing against it."""
    if authority is None:
        return True
    host = authority.rsplit(":", 1)[0] if not authority.endswith("]") else authority
    host = host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
