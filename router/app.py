"""The routes: which path is answered how. Bodies become orders for a relay; everything else is small JSON.

Owns the list of routes and their body limits. Never schedules and never tokenises."""

from __future__ import annotations

import functools
import ipaddress
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from policies.request import RequestId, Tenant
from router import features
from router.asgi import answer, refuse_method
from router.dialects import chat, completions
from router.errors import RequestError
from router.exchange import Exchange, Head
from router.fleet import ModelView
from router.relay import Order, Relay, Services
from router.text import Identity, Text
from router.turn import Encoder, Turn

BODY_BYTES_MAX = {"/v1/chat/completions": 8 * 1024 * 1024, "/v1/completions": 8 * 1024 * 1024}
OTHER_BODY_BYTES_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one route reads a body and writes an answer."""

    read: Callable[[bytes], Any]
    turn: Callable[[Any], Turn]
    encoder: Callable[[str, str, int, bool], Encoder]
    operation: str


def _chat_encoder(request_id: str, model: str, created: int, wants_usage: bool) -> Encoder:
    return chat.ChatEncoder(request_id, model, created, wants_usage=wants_usage)


def _completion_encoder(request_id: str, model: str, created: int, wants_usage: bool) -> Encoder:
    return completions.CompletionEncoder(request_id, model, created, wants_usage=wants_usage)


DIALECTS = {
    "/v1/chat/completions": Dialect(chat.read, chat.turn, _chat_encoder, "chat"),
    "/v1/completions": Dialect(completions.read, completions.turn, _completion_encoder, "text_completion"),
}


@dataclass(frozen=True, slots=True)
class House:
    """What the routes need of the rest of the router."""

    services: Services
    models: Callable[[], Mapping[str, ModelView]]
    text: Text
    model: str  # the one that is served; clients may leave it out
    salt: bytes
    tenant: Tenant
    readiness: Callable[[], tuple[bool, Mapping[str, Any]]]


class App:
    """`gate` and `handle` for a Listener."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._started_at = int(time.time())
        self._generate = {path: _Generate(house, dialect) for path, dialect in DIALECTS.items()}
        self._routes = Router(
            [
                Route("/v1/models", self._list_models, methods=["GET"]),
                Route("/v1/models/{model:path}", self._show_model, methods=["GET"]),
                Route("/livez", self._livez, methods=["GET"]),
                Route("/readyz", self._readyz, methods=["GET"]),
                Route("/health", self._readyz, methods=["GET"]),
            ],
            redirect_slashes=False,
            default=_unknown_route,
        )

    def gate(self, head: Head) -> int:
        """The most body bytes that this head may bring. Raises RequestError 403 on what a foreign page sends."""
        if not _is_local(head.header(b"host")) or not _is_local(_authority(head.header(b"origin"))):
            raise RequestError(403, "This server answers loopback addresses alone, and no foreign web page.")
        return BODY_BYTES_MAX.get(head.path, OTHER_BODY_BYTES_MAX)

    async def handle(self, exchange: Exchange) -> None:
        """Answer one exchange."""
        generate = self._generate.get(exchange.head.path)
        if generate is None:
            await answer(self._routes, exchange)
        elif exchange.head.method == "POST":
            await generate(exchange)
        else:
            refuse_method(exchange, "POST")

    # Small answers ----------------------------------------------------------------------------------------------------

    async def _livez(self, _: HttpRequest) -> Response:
        return _json({"alive": True})

    async def _readyz(self, _: HttpRequest) -> Response:
        is_ready, state = self._house.readiness()
        return _json({"ready": is_ready, **state}, 200 if is_ready else 503)

    async def _list_models(self, _: HttpRequest) -> Response:
        models = [self._model(view) for view in self._house.models().values()]
        ids = [model["id"] for model in models]
        page = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None, "has_more": False}
        return _json({"object": "list", "data": models, **page})

    async def _show_model(self, request: HttpRequest) -> Response:
        view = self._house.models().get(request.path_params["model"])
        if view is None:
            return _error(unknown_model(self._house.models()))
        return _json(self._model(view))

    def _model(self, view: ModelView) -> dict[str, Any]:
        return {
            "id": view.name,
            "object": "model",
            "type": "model",
            "created": self._started_at,
            "owned_by": "headway",
            "display_name": view.name,
            "max_model_len": view.context_max,
        }


class _Generate:
    """POST of a generation: past ASGI, so that no wrapper stands between the socket and the relay."""

    def __init__(self, house: House, dialect: Dialect) -> None:
        self._house = house
        self._dialect = dialect

    async def __call__(self, exchange: Exchange) -> None:
        request_id = RequestId(secrets.token_hex(12))
        try:
            order = self._order(request_id, exchange)
        except RequestError as error:
            named = (b"x-headway-request", request_id.encode())
            exchange.respond(error.status, [*error.headers(), named], error.body())
            return
        relay = Relay(order, exchange, self._house.services)
        relay.begin()
        await relay.over

    # Hot: once per request. Budget 82 / 101 / 414 us for 1 / 16 / 256 kB with everything; bench/router.py.
    def _order(self, request_id: RequestId, exchange: Exchange) -> Order:
        house, dialect = self._house, self._dialect
        body = dialect.read(exchange.body)
        turn = dialect.turn(body)
        view = self._view(turn.model)
        request = features.describe(request_id, exchange, body, turn, model=view.name, tenant=house.tenant)
        return Order(
            request=request,
            turn=turn,
            text=house.text,
            identity=Identity(view.root, house.salt, view.block_tokens),
            context_max=view.context_max,
            encoder=dialect.encoder(request_id, view.name, int(time.time()), turn.wants_usage),
            operation=dialect.operation,
            traceparent=exchange.head.header(b"traceparent") or "",
        )

    def _view(self, name: str) -> ModelView:
        """The model as its workers describe it, or did before they went away: the mind holds what waits for them."""
        models = self._house.models()
        if not models:
            message = "No worker has started yet; try again in a moment."
            raise RequestError(503, message, code="no-worker", retry_after_s=2.0)
        view = models.get(name or self._house.model)
        if view is None:
            raise unknown_model(models)
        return view


def unknown_model(models: Mapping[str, ModelView]) -> RequestError:
    """404 that lists what there is."""
    names = ", ".join(models) or "none yet"
    return RequestError(404, f"There is no such model here. Served: {names}.", param="model", code="model_not_found")


async def _unknown_route(scope: Scope, receive: Receive, send: Send) -> None:
    await _error(RequestError(404, "There is no such route; see the README for those there are."))(scope, receive, send)


def _error(error: RequestError) -> Response:
    return Response(error.body(), error.status, media_type="application/json")


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _authority(origin: str | None) -> str | None:
    """Host and port of an Origin; the literal `null` of sandboxed pages is foreign."""
    return None if origin is None else urlsplit(origin).netloc or "null"


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
