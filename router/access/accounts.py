"""What each tenant has taken: requests a minute, requests at one time, tokens and GPU-seconds of this month.

Owns the counts and the file in which a month's survive a restart. Never knows a key; the limits are handed in."""

from __future__ import annotations

import fcntl
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from msgspec import Struct

from router.access.keys import TenantRow
from router.errors import QUOTA, RequestError
from router.telemetry.receipts import Receipt

log = logging.getLogger(__name__)

BUSY_RETRY_S = 1.0  # before anything is known of how long this tenant's requests take
SMOOTHING = 0.1  # of that duration: the last ten requests or so
IDLE_ACCOUNTS_MAX = 20_000  # accounts of tenants that are no more go once there are so many


@dataclass(slots=True)
class Account:
    """One tenant's counts."""

    tokens: float = 0.0  # of this month, by all routers that share the file, as of the last `save`
    gpu_s: float = 0.0
    new_tokens: float = 0.0  # of them, not in the file yet
    new_gpu_s: float = 0.0
    live: int = 0
    refused: int = 0
    request_s: float = BUSY_RETRY_S  # how long its requests take, smoothed
    _room: float = math.inf  # requests that may come now; full again after a quiet minute
    _filled_at: float = 0.0

    def take(self, per_min: float, now: float) -> float:
        """Count a request. 0, or the seconds until the next one may come."""
        burst = max(1.0, per_min)
        self._room = min(burst, self._room + (now - self._filled_at) * per_min / 60.0)
        self._filled_at = now
        if self._room < 1.0:
            return (1.0 - self._room) * 60.0 / per_min
        self._room -= 1.0
        return 0.0


class Used(Struct, frozen=True):
    """What a tenant took of one month."""

    tokens: float
    gpu_s: float


class Month(Struct, frozen=True):
    """The file."""

    month: str  # 2026-11, by UTC
    tenants: dict[str, Used]


@dataclass(slots=True)
class Accounts:
    """All of them. `clock` is monotonic, `wall` Unix seconds: months are of the calendar."""

    path: Path | None
    clock: Callable[[], float]
    wall: Callable[[], float]
    _accounts: dict[str, Account] = field(default_factory=dict)
    _month: str = ""
    _month_ends: float = 0.0  # Unix seconds: naming the month of each request took 3.6 % of its CPU time
    _is_dirty: bool = False

    def load(self) -> None:
        """Go on where the last router stopped. A file that cannot be read counts as empty, and is said."""
        self._begin_month()
        if self.path is None:
            return
        for tenant, used in self._read(self.path).items():
            self._accounts[tenant] = Account(used.tokens, used.gpu_s)

    def save(self) -> None:
        """Add what was taken since to the file, and hear what other routers added. A full disk costs the file, never a
        request."""
        if self.path is None or not self._is_dirty:
            return
        try:
            with self.path.with_name(f"{self.path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._add_to(self.path)
        except OSError as error:
            log.error("this month's use cannot be kept in %s: %s", self.path, error)
        self._is_dirty = False

    def _read(self, path: Path) -> dict[str, Used]:
        try:
            month = msgspec.json.decode(path.read_bytes(), type=Month)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            log.error("%s cannot be read, this month's use counts from zero: %s", path, error)
            return {}
        return month.tenants if month.month == self._month else {}

    def _add_to(self, path: Path) -> None:
        """Under the lock: two routers of one state folder would else write over each other's counts."""
        used = self._read(path)
        for name, account in self._accounts.items():
            before = used.get(name, Used(0.0, 0.0))
            used[name] = Used(before.tokens + account.new_tokens, before.gpu_s + account.new_gpu_s)
        made = path.with_name(f"{path.name}.{os.getpid()}")
        made.write_bytes(msgspec.json.encode(Month(self._month, used)))
        made.replace(path)
        for name, account in self._accounts.items():
            account.tokens, account.gpu_s = used[name].tokens, used[name].gpu_s
            account.new_tokens = account.new_gpu_s = 0.0

    def of(self, tenant: str) -> Account:
        """A tenant's account, as of this month."""
        self._turn_the_month()
        account = self._accounts.get(tenant)
        if account is None:
            self._make_room()
            account = self._accounts[tenant] = Account()
        return account

    def shown(self) -> Mapping[str, Mapping[str, float]]:
        """What each tenant took of this month, for the operator."""
        self._turn_the_month()
        return {
            name: {
                "tokens": account.tokens,
                "gpu_s": account.gpu_s,
                "running": account.live,
                "refused": account.refused,
            }
            for name, account in self._accounts.items()
        }

    # Hot: once per request.
    def enter(self, tenant: str, limits: TenantRow) -> Account:
        """Count a request that begins; `leave` when it ends. Raises RequestError 429, with the time to come back."""
        account = self.of(tenant)
        try:
            self._check(account, limits)
        except RequestError:
            account.refused += 1
            raise
        account.live += 1
        return account

    def leave(self, account: Account, began: float) -> None:
        """A request has ended, however."""
        account.live -= 1
        account.request_s += SMOOTHING * (self.clock() - began - account.request_s)

    def _check(self, account: Account, limits: TenantRow) -> None:
        if limits.concurrency is not None and account.live >= limits.concurrency:
            words = f"This key's tenant has {limits.concurrency} requests running, as many as it may."
            raise _too_many(words, "concurrency", account.request_s / limits.concurrency)
        for name, taken, most in (
            ("tokens", account.tokens, limits.tokens_per_month),
            ("GPU-seconds", account.gpu_s, limits.gpu_s_per_month),
        ):
            if most is not None and taken >= most:
                words = f"This key's tenant has used its {most:.15g} {name} of this month."
                raise _too_many(words, QUOTA, _month_left_s(self.wall()))
        if limits.requests_per_min is not None:
            wait_s = account.take(limits.requests_per_min, self.clock())
            if wait_s:
                words = f"This key's tenant may send {limits.requests_per_min:.15g} requests a minute."
                raise _too_many(words, "rate_limit_exceeded", wait_s)

    def ended(self, receipt: Receipt) -> None:
        """router.delivery.ports.Observer: what a request took, whoever ended it, is charged."""
        account = self.of(receipt.tenant)
        tokens = receipt.prompt_tokens + receipt.output_tokens if receipt.attempts else 0
        account.tokens += tokens
        account.new_tokens += tokens
        account.gpu_s += receipt.gpu_s
        account.new_gpu_s += receipt.gpu_s
        self._is_dirty = True

    def _turn_the_month(self) -> None:
        if self.wall() < self._month_ends:
            return
        self._begin_month()
        self._is_dirty = True
        for account in self._accounts.values():
            account.tokens = account.gpu_s = account.new_tokens = account.new_gpu_s = 0.0

    def _begin_month(self) -> None:
        now = self.wall()
        self._month, self._month_ends = _month(now), now + _month_left_s(now)

    def _make_room(self) -> None:
        if len(self._accounts) >= IDLE_ACCOUNTS_MAX:
            self.save()
            self._accounts = {name: account for name, account in self._accounts.items() if account.live}


def _too_many(words: str, code: str, wait_s: float) -> RequestError:
    return RequestError(429, words, code=code, retry_after_s=max(1.0, math.ceil(wait_s)))


def _month(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m")


def _month_left_s(unix_s: float) -> float:
    now = datetime.fromtimestamp(unix_s, UTC)
    following = now.replace(year=now.year + now.month // 12, month=now.month % 12 + 1, day=1)
    return (following.replace(hour=0, minute=0, second=0, microsecond=0) - now).total_seconds()
