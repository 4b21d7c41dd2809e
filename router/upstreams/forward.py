"""POST to a foreign engine: from a client's body to a relay that passes the reply on.

Owns the way from a body to a request for the mind. Never changes what the client asked for but its model's name."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from policies.request import RequestId
from router.access.tenants import Caller, Tenants
from router.delivery.ports import Outlet
from router.dialects.common import OPENAI_ERRORS
from router.dialects.messages import ANTHROPIC_ERRORS
from router.errors import RequestError
from router.listener.catalogue import Catalogue
from router.listener.exchange import Exchange
from router.settings.config import FORWARDED_ROUTES
from router.upstreams import peek
from router.upstreams.relay import Forwarded, ForwardRelay, ForwardServices


@dataclass(frozen=True, slots=True)
class ForwardDesk:
    """What forwarding needs of the rest of the router."""

    services: ForwardServices
    tenants: Tenants
    catalogue: Catalogue


OPENAI_ENDINGS = (b"\ndata: [DONE]", b"\ndata:[DONE]")
ENDINGS = {  # by path: how a whole stream ends, at the beginning of a line
    "/v1/chat/completions": OPENAI_ENDINGS,
    "/v1/completions": OPENAI_ENDINGS,
    "/v1/responses": tuple(b"\nevent: response." + name for name in (b"completed", b"failed", b"incomplete")),
    "/v1/messages": (b"\nevent: message_stop",),
}


def forwarding(desk: Callable[[Catalogue], ForwardDesk]) -> Callable[[Catalogue], Mapping[str, Forward]]:
    """The routes that upstreams answer, for those that have them."""

    def posts(catalogue: Catalogue) -> Mapping[str, Forward]:
        made = desk(catalogue)
        return {path: Forward(made, path) for path in sorted(FORWARDED_ROUTES)}

    return posts


class Forward:
    """One route."""

    def __init__(self, desk: ForwardDesk, path: str) -> None:
        self._desk, self._path, self._endings = desk, path, ENDINGS.get(path, ())
        self._errors = ANTHROPIC_ERRORS if path.startswith("/v1/messages") else OPENAI_ERRORS

    async def __call__(self, exchange: Exchange) -> None:
        request_id = RequestId(secrets.token_hex(12))
        tenants = self._desk.tenants
        try:
            caller = tenants.caller(exchange.head)
            with tenants.visit(caller):
                work = partial(self._serve, request_id, exchange, caller)
                await self._desk.services.kept.serve(exchange, caller.tenant.organisation, work)
        except RequestError as error:
            status, headers, body = self._errors.refusal(error)
            exchange.respond(status, [*headers, (b"x-headway-request", request_id.encode())], body)

    async def _serve(self, request_id: RequestId, exchange: Exchange, caller: Caller, outlet: Outlet) -> str:
        relay = self._relay(request_id, exchange, caller, outlet)
        relay.begin()
        return await relay.over

    def _relay(self, request_id: RequestId, exchange: Exchange, caller: Caller, outlet: Outlet) -> ForwardRelay:
        desk = self._desk
        seen = peek.look(exchange.body)
        view = desk.catalogue.seen_by(caller.models).find(seen.peek.model or "")
        if not desk.services.upstreams.has_route(view.name, self._path):
            words = f"No upstream of this model has {self._path}; add it to `routes` in [[upstreams]] if one does."
            raise RequestError(501, words, code="route_not_served")
        forwarded = Forwarded(
            request=peek.describe(request_id, exchange, seen, view.name, caller.tenant),
            seen=seen,
            path=self._path,
            salt=caller.salt,
            errors=self._errors,
            endings=self._endings if seen.is_stream else (),
            traceparent=exchange.head.header(b"traceparent") or "",
        )
        return ForwardRelay(forwarded, outlet, desk.services)
