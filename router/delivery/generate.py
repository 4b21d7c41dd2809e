"""POST of a generation: from a body to an order and its relay, past ASGI; and the count of a prompt's tokens.

Owns the way from a dialect to an order. Never schedules."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec

from policies.request import RequestId
from router.access.tenants import Caller, Tenants
from router.control import features
from router.delivery.chorus import Chorus
from router.delivery.kept import FINISHED
from router.delivery.order import Order, Services
from router.delivery.ports import Outlet
from router.delivery.relay import Relay
from router.dialects.common import Dialect
from router.errors import JSON, RequestError
from router.language.text import Identity, Text
from router.language.turn import Encoder
from router.listener.catalogue import Catalogue
from router.listener.exchange import Exchange

COUNTS_MAX = 4  # prompts counted at one time; a count goes past the mind, so it may only take so much


@dataclass(frozen=True, slots=True)
class Desk:
    """What a generation needs of the rest of the router."""

    services: Services
    catalogue: Catalogue
    text: Text
    tenants: Tenants


class Generate:
    """No wrapper stands between the socket and the relay."""

    def __init__(self, desk: Desk, dialect: Dialect) -> None:
        self._desk = desk
        self._dialect = dialect

    async def __call__(self, exchange: Exchange) -> None:
        request_id = RequestId(f"{random.getrandbits(96):024x}")  # it names, it opens nothing: no need of the kernel's
        tenants = self._desk.tenants
        try:
            caller = tenants.caller(exchange.head)
            with tenants.visit(caller):
                work = partial(self._serve, request_id, exchange, caller)
                await self._desk.services.kept.serve(exchange, caller.tenant.organisation, work)
        except RequestError as error:
            status, headers, body = self._dialect.errors.refusal(error)
            exchange.respond(status, [*headers, (b"x-headway-request", request_id.encode())], body)

    async def _serve(self, request_id: RequestId, exchange: Exchange, caller: Caller, outlet: Outlet) -> str:
        """Answer by `outlet`. The outcome: of several answers, one that is not finished."""
        orders = self._orders(request_id, exchange, caller)
        if len(orders) == 1:
            relay = Relay(orders[0], outlet, self._desk.services)
            relay.begin()
            return await relay.over
        relays = []
        for order, voice in zip(orders, Chorus(outlet, request_id, len(orders)).voices, strict=True):
            if voice.has_ended:
                break  # one before it was refused, and that was the response
            relays.append(Relay(order, voice, self._desk.services))
            relays[-1].begin()
        outcomes = [await relay.over for relay in relays]
        return next((outcome for outcome in outcomes if outcome != FINISHED), FINISHED)

    # Hot: once per request. Budget 82 / 101 / 414 us for 1 / 16 / 256 kB with everything; bench/router.py.
    def _orders(self, request_id: RequestId, exchange: Exchange, caller: Caller) -> list[Order]:
        """One; or one each answer, where a body has several prompts or wants several answers to each."""
        dialect = self._dialect
        body = dialect.read(exchange.body)
        bodies = [body] if dialect.prompts is None else dialect.prompts(body)
        orders = [self._order(request_id, exchange, caller, (body, each)) for each in bodies]
        if dialect.voices is None or (len(orders) == 1 and body.n in (None, 1)):
            return orders
        encoders = dialect.voices(request_id, orders[0].request.model, int(time.time()), body)
        each = len(encoders) // len(orders)
        return [_voice(orders[index // each], index, index % each, encoder) for index, encoder in enumerate(encoders)]

    def _order(self, request_id: RequestId, exchange: Exchange, caller: Caller, bodies: tuple[Any, Any]) -> Order:
        """Of a body as it was sent, and as it would be with one of its prompts alone."""
        desk, dialect = self._desk, self._dialect
        body, single = bodies
        turn = desk.text.settled(dialect.turn(single))
        view = desk.catalogue.seen_by(caller.models).find(turn.model)
        request = features.describe(request_id, exchange, body, turn, model=view.name, tenant=caller.tenant)
        return Order(
            request=request,
            turn=turn,
            text=desk.text,
            identity=Identity(view.root, caller.salt, view.block_tokens),
            context_max=view.context_max,
            encoder=dialect.encoder(request_id, view.name, int(time.time()), single),
            errors=dialect.errors,
            notices=desk.text.notices(turn),
            operation=dialect.operation,
            traceparent=exchange.head.header(b"traceparent") or "",
        )


def _voice(order: Order, index: int, answer: int, encoder: Encoder) -> Order:
    """One answer of many. Seeds of answers to one prompt follow one another; a prompt's neighbours change nothing."""
    sampling = msgspec.structs.replace(order.turn.sampling, seed=order.turn.sampling.seed + answer)
    request = replace(order.request, id=RequestId(f"{order.request.id}.{index}"))
    turn = msgspec.structs.replace(order.turn, sampling=sampling)
    return msgspec.structs.replace(order, request=request, turn=turn, encoder=encoder)


class Count:
    """Anthropic's count_tokens: the same way to the same ids, so it equals what message_start will say."""

    def __init__(self, desk: Desk, dialect: Dialect) -> None:
        self._desk = desk
        self._dialect = dialect
        self._room = asyncio.Semaphore(COUNTS_MAX)

    async def __call__(self, exchange: Exchange) -> None:
        try:
            caller = self._desk.tenants.caller(exchange.head)
            with self._desk.tenants.visit(caller):
                async with self._room:
                    tokens = await self._tokens(exchange.body, caller)
        except RequestError as error:
            exchange.respond(*self._dialect.errors.refusal(error))
            return
        exchange.respond(200, JSON, msgspec.json.encode({"input_tokens": tokens}))

    async def _tokens(self, body: bytes, caller: Caller) -> int:
        desk, text = self._desk, self._desk.text
        turn = text.settled(self._dialect.turn(self._dialect.read(body)))
        view = desk.catalogue.seen_by(caller.models).find(turn.model)
        rendered = text.render(turn, Identity(view.root, caller.salt, view.block_tokens))
        tokenised = await asyncio.to_thread(text.tokenise, rendered.cold)
        return len(text.assemble(rendered, tokenised).ids)
