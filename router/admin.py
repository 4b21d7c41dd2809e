"""The admin listener's routes: metrics, workers and receipts, for the operator on this machine.

Owns what they show. Never reachable but from loopback, never changes anything, never shows a prompt."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from router.fleet import Fleet, WorkerState
from router.metrics import Metrics
from router.receipts import Receipts

RECEIPTS_DEFAULT = 100


class LoopbackOnly:
    """Refuses what a foreign web page could send through its visitor's browser: another Host, another Origin."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_ours(dict(scope["headers"])):
            refusal = PlainTextResponse("only http://127.0.0.1 and http://localhost are served here\n", 403)
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)


def admin_app(
    metrics: Metrics, fleet: Fleet, receipts: Receipts, clock: Callable[[], float] = time.monotonic
) -> ASGIApp:
    """The routes, behind the border."""

    async def show_metrics(_: Request) -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def show_workers(_: Request) -> Response:
        return _json([_worker(state, clock()) for state in fleet.workers])

    async def show_receipts(request: Request) -> Response:
        last = request.query_params.get("last", str(RECEIPTS_DEFAULT))
        if not last.isdecimal() or len(last) > 9:
            return PlainTextResponse("`last` must be a whole number\n", 400)
        return _json(receipts.last(int(last)))

    routes = [
        Route("/metrics", show_metrics),
        Route("/workers", show_workers),
        Route("/receipts", show_receipts),
    ]
    return LoopbackOnly(Starlette(routes=routes))


def _is_ours(headers: dict[bytes, bytes]) -> bool:
    if not _is_loopback(f"//{headers.get(b'host', b'').decode('latin-1')}"):
        return False
    origin = headers.get(b"origin")
    return origin is None or _is_loopback(origin.decode("latin-1"))


def _is_loopback(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", media_type="application/json")


def _worker(state: WorkerState, now: float) -> dict[str, object]:
    """One worker for a person: where it is, how it is, what it holds."""
    shown: dict[str, object] = {"worker": state.name, "is_up": state.link is not None, "losses": state.losses}
    link = state.link
    if link is None or link.hello is None:
        return shown | {"lost_reason": state.lost_reason}
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
        "load": msgspec.structs.asdict(link.load) if link.load is not None else None,
        "step_model": link.step_model,
    }
