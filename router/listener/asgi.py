"""Small answers by starlette: an ASGI app that takes no body as it comes and gives its response whole.

Owns the bridge between an exchange and ASGI. Streams do not pass here: they are written to the transport."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Scope

from router.dialects.common import OPENAI_ERRORS
from router.errors import Headers, RequestError
from router.language.turn import ErrorShape
from router.listener.exchange import Exchange


async def answer(app: ASGIApp, exchange: Exchange, state: dict[str, Any]) -> None:
    """Let `app` answer one exchange; its routes find `state` at their request. A route that it refuses by exception
    gets JSON in OpenAI's error shape."""
    head = exchange.head
    scope: Scope = {
        "type": "http",
        "method": head.method,
        "path": head.path,
        "raw_path": head.path.encode(),
        "query_string": head.query,
        "headers": list(head.fields.items()),
        "root_path": "",
        "scheme": "http",
        "state": state,
        "app": app,  # with it starlette raises its 405 instead of answering in plain text
    }
    try:
        await app(scope, _Receive(exchange), _Send(exchange))
    except HTTPException as refused:
        refuse_method(exchange, (refused.headers or {}).get("Allow", ""))


def refuse_method(exchange: Exchange, allowed: str, shape: ErrorShape = OPENAI_ERRORS) -> None:
    """405 with the methods that the route takes."""
    status, headers, body = shape.refusal(RequestError(405, f"This route takes only {allowed}."))
    exchange.respond(status, [*headers, (b"allow", allowed.encode())], body)


class _Receive:
    """ASGI's receive: the body is there already."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def __call__(self) -> Message:
        return {"type": "http.request", "body": self._exchange.body, "more_body": False}


class _Send:
    """ASGI's send: collects one response and gives it to the exchange whole."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._status = 500
        self._headers: Headers = []
        self._body: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = [pair for pair in message["headers"] if pair[0] != b"content-length"]
            return
        self._body.append(message.get("body", b""))
        if not message.get("more_body"):
            self._exchange.respond(self._status, self._headers, b"".join(self._body))
