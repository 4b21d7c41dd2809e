"""The admin listener's answers: dashboard, metrics, workers, receipts, tenants, for the operator on this machine.

Owns what they show. Never reachable but from loopback, never shows a prompt; hints for KV are all that it takes."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Mapping
from importlib import resources
from urllib.parse import parse_qs, urlsplit

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from engine.wire import Load
from router.access.tenants import Tenants
from router.errors import RequestError
from router.listener.exchange import Exchange, Head
from router.telemetry.metrics import Metrics
from router.telemetry.receipts import Receipts
from router.upstreams.fleet import Upstreams
from router.workers import kv_hints
from router.workers.fleet import Fleet, WorkerState
from router.workers.kv_hints import KvHints

Readiness = Callable[[], tuple[bool, Mapping[str, object]]]

RECEIPTS_DEFAULT = 100
HINTS_PATH = "/kv_hints"
JSON_TYPE = b"application/json"
HTML_TYPE = b"text/html; charset=utf-8"
SELF_ONLY = (  # the page asks this listener alone, and nobody may frame it
    b"content-security-policy",
    b"default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    b"frame-ancestors 'none'",
)
NO_SNIFF = (b"x-content-type-options", b"nosniff")


def gate(head: Head) -> int:
    """What a request may send: nothing, but for hints. Refuses what a foreign page could make a browser ask."""
    if not _is_loopback(f"//{head.header(b'host') or ''}"):
        raise RequestError(403, "Only http://127.0.0.1 and http://localhost are served here.", code="foreign_host")
    origin = head.header(b"origin")
    if origin is not None and not _is_loopback(origin):
        raise RequestError(403, "Only pages of this machine may ask here.", code="foreign_origin")
    if head.path == HINTS_PATH:
        return kv_hints.BODY_BYTES_MAX
    if head.method not in ("GET", "HEAD"):
        raise RequestError(405, "The admin listener only shows things: use GET.")
    return 0


class Admin:
    """Answers the routes of the admin listener."""

    def __init__(
        self,
        metrics: Metrics,
        fleet: Fleet,
        receipts: Receipts,
        hints: KvHints,
        *,
        tenants: Tenants,
        readiness: Readiness,
        upstreams: Upstreams | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hints = hints
        self._metrics = metrics
        self._fleet = fleet
        self._receipts = receipts
        self._tenants = tenants
        self._readiness = readiness
        self._upstreams = upstreams
        self._clock = clock
        self._dashboard = resources.files("router.listener").joinpath("dashboard.html").read_bytes()
        self._routes = {
            "/": self._show_dashboard,
            "/metrics": self._show_metrics,
            "/workers": self._show_workers,
            "/receipts": self._show_receipts,
            "/tenants": self._show_tenants,
            "/readyz": self._show_readiness,
        }

    async def answer(self, exchange: Exchange) -> None:
        """Answer one request."""
        try:
            if exchange.head.path == HINTS_PATH:
                content_type, body = JSON_TYPE, await self._obey(exchange)
            else:
                content_type, body = self._show(exchange.head)
        except RequestError as error:
            exchange.respond(error.status, [(b"content-type", JSON_TYPE)], error.body())
        else:
            exchange.respond(200, [(b"content-type", content_type), SELF_ONLY, NO_SNIFF], body)

    def _show(self, head: Head) -> tuple[bytes, bytes]:
        show = self._routes.get(head.path)
        if show is None:
            raise RequestError(404, f"There are {', '.join(self._routes)} and {HINTS_PATH}.")
        return show(head)

    async def _obey(self, exchange: Exchange) -> bytes:
        if exchange.head.method != "POST":
            raise RequestError(405, "Hints are sent by POST.")
        return await self._hints.obey(exchange.body)

    def _show_dashboard(self, _: Head) -> tuple[bytes, bytes]:
        return HTML_TYPE, self._dashboard

    def _show_metrics(self, _: Head) -> tuple[bytes, bytes]:
        return CONTENT_TYPE_LATEST.encode(), self._metrics.exposition()

    def _show_workers(self, _: Head) -> tuple[bytes, bytes]:
        if self._upstreams is not None:
            return JSON_TYPE, msgspec.json.encode(self._upstreams.shown())
        now = self._clock()
        return JSON_TYPE, msgspec.json.encode([_worker(state, now) for state in self._fleet.workers])

    def _show_tenants(self, _: Head) -> tuple[bytes, bytes]:
        return JSON_TYPE, msgspec.json.encode(self._tenants.accounts.shown())

    def _show_readiness(self, _: Head) -> tuple[bytes, bytes]:
        is_ready, state = self._readiness()
        return JSON_TYPE, msgspec.json.encode({"ready": is_ready, **state, "needs_key": self._tenants.needs_keys})

    def _show_receipts(self, head: Head) -> tuple[bytes, bytes]:
        last = parse_qs(head.query.decode("latin-1")).get("last", [str(RECEIPTS_DEFAULT)])[0]
        if not last.isdecimal() or len(last) > 9:
            raise RequestError(400, "`last` must be a whole number.", param="last")
        return JSON_TYPE, msgspec.json.encode(self._receipts.last(int(last)))


def _is_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _load(load: Load) -> dict[str, object]:
    """By names throughout: on the wire its parts are arrays."""
    return msgspec.structs.asdict(load) | {"tiers": msgspec.structs.asdict(load.tiers)}


def _worker(state: WorkerState, now: float) -> dict[str, object]:
    """One worker for a person: where it is, how it is, what it holds."""
    shown: dict[str, object] = {"worker": state.name, "is_up": state.link is not None, "losses": state.losses}
    shown |= {"asleep": state.asleep, "socket": state.address}  # for `python -m engine tell`
    link = state.link
    if link is None or link.hello is None:
        return shown | {"requests": 0, "lost_reason": state.lost_reason}
    hello = link.hello
    return shown | {
        "model": hello.model,
        "device": hello.device,
        "epoch": hello.epoch,
        "blocks_total": hello.blocks_total,
        "block_tokens": hello.block_tokens,
        "context_max": hello.context_max,
        "requests": link.running_count,
        "silent_s": round(link.silent_s(now), 3),
        "load": _load(link.load) if link.load is not None else None,
        "step_model": link.step_model,
    }
