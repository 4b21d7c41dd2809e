"""The routes: which path is answered how. Bodies become orders for a relay; everything else is small JSON.

Owns the list of routes and their body limits. Never schedules and never tokenises."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from router.access.tenants import Caller, Tenants
from router.delivery.generate import Count, Desk, Generate
from router.delivery.order import Services
from router.dialects.chat import CHAT
from router.dialects.common import OPENAI_ERRORS
from router.dialects.completions import COMPLETIONS
from router.dialects.messages import ANTHROPIC_ERRORS, MESSAGES
from router.dialects.responses import RESPONSES
from router.errors import JSON, RequestError
from router.language.text import Text
from router.language.turn import ErrorShape
from router.listener.asgi import answer, refuse_method
from router.listener.catalogue import Catalogue
from router.listener.exchange import Exchange, Head
from router.listener.openapi import document
from router.workers.fleet import ModelView

MIB = 1024 * 1024
MESSAGES_BODY_BYTES_MAX = 32 * MIB  # histories of agents, images in them
BODY_BYTES_MAX = {
    "/v1/chat/completions": 8 * MIB,
    "/v1/completions": 8 * MIB,
    "/v1/responses": MESSAGES_BODY_BYTES_MAX,
    "/v1/messages": MESSAGES_BODY_BYTES_MAX,
    "/v1/messages/count_tokens": MESSAGES_BODY_BYTES_MAX,
    "/v1/embeddings": 8 * MIB,
    "/v1/rerank": 8 * MIB,
    "/v1/score": 8 * MIB,
}
OTHER_BODY_BYTES_MAX = 64 * 1024
OPEN_PATHS = frozenset(("/", "/livez", "/readyz", "/health"))  # for who has no key: probes, and whether we are there


Post = Callable[[Exchange], Awaitable[None]]
Posts = Callable[[Catalogue], Mapping[str, Post]]  # what generates, by path


@dataclass(frozen=True, slots=True)
class House:
    """What the routes need of the rest of the router."""

    models: Callable[[], Mapping[str, ModelView]]
    model: str  # the one that is served; clients may leave it out. Empty: the first that there is
    posts: Posts
    tenants: Tenants
    readiness: Callable[[], tuple[bool, Mapping[str, Any]]]
    aliases: Mapping[str, str] = field(default_factory=dict)


class Hints(Protocol):
    """Who carries out hints for KV."""

    async def obey(self, body: bytes, salt: bytes | None = None) -> bytes:
        """An envelope's answer. Raises RequestError."""


class HintPost:
    """Hints of a tenant: they reach the sessions of its own salt domain alone."""

    def __init__(self, hints: Hints, tenants: Tenants) -> None:
        self._hints = hints
        self._tenants = tenants

    async def __call__(self, exchange: Exchange) -> None:
        try:
            caller = self._tenants.caller(exchange.head)
            with self._tenants.visit(caller):
                done = await self._hints.obey(exchange.body, caller.salt)
        except RequestError as error:
            exchange.respond(*OPENAI_ERRORS.refusal(error))
            return
        exchange.respond(200, JSON, done)


def generation(services: Services, text: Text, tenants: Tenants, hints: Hints) -> Posts:
    """The routes that our own workers answer."""

    def posts(catalogue: Catalogue) -> Mapping[str, Post]:
        desk = Desk(services, catalogue, text, tenants)
        return {
            "/v1/chat/completions": Generate(desk, CHAT),
            "/v1/completions": Generate(desk, COMPLETIONS),
            "/v1/responses": Generate(desk, RESPONSES),
            "/v1/messages": Generate(desk, MESSAGES),
            "/v1/messages/count_tokens": Count(desk, MESSAGES),
            "/v1/kv_hints": HintPost(hints, tenants),
        }

    return posts


class App:
    """`gate` and `handle` for a Listener."""

    def __init__(self, house: House) -> None:
        self._house = house
        catalogue = self._catalogue = Catalogue(house.models, house.model, house.aliases, int(time.time()))
        self._posts = house.posts(catalogue)
        self._routes = Router(
            [
                Route("/", self._root, methods=["GET"]),
                Route("/openapi.json", self._openapi, methods=["GET"]),
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
        """The most body bytes that this head may bring. Raises RequestError 401 or 403: nobody's body is read for who
        may not send it."""
        tenants = self._house.tenants
        if not tenants.needs_keys or head.path not in OPEN_PATHS:
            tenants.caller(head)
        return BODY_BYTES_MAX.get(head.path, OTHER_BODY_BYTES_MAX)

    async def handle(self, exchange: Exchange) -> None:
        """Answer one exchange."""
        post = self._posts.get(exchange.head.path)
        if post is None:
            await answer(self._routes, exchange, {"caller": self._caller(exchange.head)})
        elif exchange.head.method == "POST":
            await post(exchange)
        else:
            refuse_method(exchange, "POST", shape_of(exchange.head.path))

    # Small answers ----------------------------------------------------------------------------------------------------

    def _caller(self, head: Head) -> Caller | None:
        """Who asks; None for who shows no good key, and `gate` let them come here all the same."""
        try:
            return self._house.tenants.caller(head)
        except RequestError:
            return None

    async def _livez(self, _: HttpRequest) -> Response:
        return _json({"alive": True})

    async def _readyz(self, request: HttpRequest) -> Response:
        is_ready, state = self._house.readiness()
        shown = state if request.state.caller is not None else {}
        return _json({"ready": is_ready, **shown}, 200 if is_ready else 503)

    async def _root(self, _: HttpRequest) -> Response:
        return _json({"name": "headway"})  # Claude Code asks HEAD / whether anybody is there

    async def _openapi(self, _: HttpRequest) -> Response:
        return Response(document(), media_type="application/json")

    async def _list_models(self, request: HttpRequest) -> Response:
        return _json(self._seen_by(request).page(request.query_params))

    async def _show_model(self, request: HttpRequest) -> Response:
        try:
            # SDKs spell the slash of org/name as %2F. Which route it is was settled by the path as it came.
            return _json(self._seen_by(request).entry(unquote(request.path_params["model"])))
        except RequestError as error:
            return _error(error, shape_of(request.url.path, is_anthropic="anthropic-version" in request.headers))

    def _seen_by(self, request: HttpRequest) -> Catalogue:
        caller: Caller | None = request.state.caller
        if caller is None:  # revoked since the gate
            return self._catalogue.seen_by(("",))
        return self._catalogue.seen_by(caller.models)


def shape_of(path: str, *, is_anthropic: bool = False) -> ErrorShape:
    """In which dialect an error is told where no dialect has read the body."""
    return ANTHROPIC_ERRORS if is_anthropic or path.startswith("/v1/messages") else OPENAI_ERRORS


async def _unknown_route(scope: Scope, receive: Receive, send: Send) -> None:
    error = RequestError(404, "There is no such route; /openapi.json lists those there are.")
    is_anthropic = any(name == b"anthropic-version" for name, _ in scope["headers"])
    await _error(error, shape_of(scope["path"], is_anthropic=is_anthropic))(scope, receive, send)


def _error(error: RequestError, shape: ErrorShape) -> Response:
    status, headers, body = shape.refusal(error)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
