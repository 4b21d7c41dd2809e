"""Hints for KV over HTTP: the envelope that vLLM and SGLang agreed on goes in, what each worker did comes out.

Owns the envelope's form and the wait for answers. Never knows where KV lies: every worker is asked, and those that have
not served the session say so."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from engine.wire import Hint, HintAck, HintAction
from router.errors import RequestError
from router.workers.fleet import Fleet
from router.workers.link import LinkLost

ENVELOPE_VERSION = 1
ACTIONS_MAX = 64  # of one envelope
BODY_BYTES_MAX = 64 * 1024
ANSWER_S = 5.0  # prefetches are answered when their copies have ended; whoever says nothing until then is left out
RANKS = ("done", "partial", "nothing", "unsupported", "unknown")  # of several workers' answers the first one speaks

Name = Annotated[str, Meta(min_length=1, max_length=256)]


class Payload(Struct, forbid_unknown_fields=True):
    """What an action speaks of."""

    session: Name  # as the session's requests named it in their header
    ttl_s: Annotated[float, Meta(ge=0, le=3600)] = 30.0  # of retain


class Action(Struct, forbid_unknown_fields=True):
    """KvHintAction."""

    action_id: Name
    action_type: Name
    payload: Payload
    action_version: int = 1


class Envelope(Struct, forbid_unknown_fields=True):
    """KvHintsEnvelope."""

    protocol_version: int
    message_id: Name
    actions: Annotated[list[Action], Meta(min_length=1, max_length=ACTIONS_MAX)]


class KvHints:
    """Hints from an operator, or a tenant's agent framework, each for sessions of its own salt domain."""

    def __init__(self, fleet: Fleet, salt: bytes) -> None:
        self._fleet = fleet
        self._salt = salt
        self._serials = itertools.count()

    async def obey(self, body: bytes, salt: bytes | None = None) -> bytes:
        """The answer, as JSON, to an envelope of whoever has this salt; None is the operator. Raises RequestError."""
        envelope, salt = _read(body), self._salt if salt is None else salt
        actions = [
            HintAction(action.action_id, action.action_type, salt, action.payload.session, action.payload.ttl_s)
            for action in envelope.actions
        ]
        heard = await self._ask(actions)
        shown = [_shown(action, heard) for action in envelope.actions]
        return msgspec.json.encode({"message_id": envelope.message_id, "actions": shown})

    async def _ask(self, actions: list[HintAction]) -> dict[str, list[HintAck]]:
        """What each living worker answered, by its name."""
        message = Hint(f"{next(self._serials)}", actions)  # the client's own id need not be unique
        heard: dict[str, list[HintAck]] = {}
        complete = asyncio.Event()
        links = [(state.name, state.link) for state in self._fleet.workers if state.link is not None]

        def note(name: str, ack: HintAck) -> None:
            heard[name].append(ack)
            if all(len(acks) == len(actions) for acks in heard.values()):
                complete.set()

        for name, link in links:
            heard[name] = []
            try:
                link.hint(message, partial(note, name))
            except LinkLost:
                del heard[name]
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(complete.wait(), ANSWER_S if heard else 0.0)
        finally:
            for _, link in links:
                link.forget_hint(message.message_id)
        return heard


def _read(body: bytes) -> Envelope:
    try:
        envelope = msgspec.json.decode(body, type=Envelope)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(400, f"This is no hints envelope: {error}") from error
    if envelope.protocol_version != ENVELOPE_VERSION:
        raise RequestError(400, f"Envelopes of protocol_version {ENVELOPE_VERSION} are understood.")
    if len({action.action_id for action in envelope.actions}) < len(envelope.actions):
        raise RequestError(400, "Every action needs an action_id of its own.")
    return envelope


def _shown(action: Action, heard: dict[str, list[HintAck]]) -> dict[str, Any]:
    answers = {name: ack for name, acks in heard.items() for ack in acks if ack.action_id == action.action_id}
    best = min((ack.status for ack in answers.values()), key=RANKS.index, default="unanswered")
    return {
        "action_id": action.action_id,
        "status": best,
        "blocks": sum(ack.blocks for ack in answers.values()),
        "workers": {name: {"status": ack.status, "blocks": ack.blocks} for name, ack in answers.items()},
    }
