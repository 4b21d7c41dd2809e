"""Hints over HTTP: an envelope reaches every worker, and what each of them did comes back in one answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from engine.wire import Hint, HintAck, HintAction, encode
from router.errors import RequestError
from router.workers import kv_hints
from router.workers.kv_hints import KvHints
from router.workers.link import Link
from tests.router.frames import Pipe, hello, step
from tests.router.workers.test_fleet import fleet_of_two, linked

Workers = list[tuple[Link, Pipe]]


def envelope(*verbs: str, **changes: Any) -> bytes:
    actions = [
        {"action_id": f"a{at}", "action_type": verb, "action_version": 1, "payload": {"session": "s", "ttl_s": 9.0}}
        for at, verb in enumerate(verbs)
    ]
    return json.dumps({"protocol_version": 1, "message_id": "m", "actions": actions} | changes).encode()


def hint_of(pipe: Pipe) -> Hint:
    (found,) = [message for message in pipe.sent if isinstance(message, Hint)]
    return found


def ask(body: bytes, *replies: list[tuple[str, str, int]]) -> tuple[dict[str, Any], Workers]:
    """The answer to an envelope; worker n acknowledges (action, status, blocks) as in `replies[n]`."""

    async def scene() -> tuple[dict[str, Any], Workers]:
        fleet, _ = fleet_of_two()
        workers = [linked(fleet, 0, hello()), linked(fleet, 1, hello(worker="w1"))]
        asked = asyncio.create_task(KvHints(fleet, b"operator").obey(body, b"salt"))
        await asyncio.sleep(0)
        for (link, pipe), acks in zip(workers, replies, strict=False):
            message_id = hint_of(pipe).message_id
            for ack in acks:
                link.data_received(encode(step(acks=[HintAck(message_id, *ack)])))
        return json.loads(await asked), workers

    return asyncio.run(scene())


def test_every_worker_is_asked_and_the_one_that_knows_speaks() -> None:
    answer, workers = ask(
        envelope("retain", "demote"),
        [("a0", "unknown", 0), ("a1", "unknown", 0)],
        [("a1", "partial", 3), ("a0", "done", 7)],
    )

    assert hint_of(workers[0][1]).actions == [
        HintAction("a0", "retain", b"salt", "s", 9.0),
        HintAction("a1", "demote", b"salt", "s", 9.0),
    ]
    assert answer["message_id"] == "m"
    first, second = answer["actions"]
    assert (first["status"], first["blocks"], second["status"], second["blocks"]) == ("done", 7, "partial", 3)
    assert first["workers"]["w0"] == {"status": "unknown", "blocks": 0}
    assert first["workers"]["w1"] == {"status": "done", "blocks": 7}


def test_who_does_not_answer_in_time_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_hints, "ANSWER_S", 0.01)

    answer, workers = ask(envelope("prefetch"), [("a0", "done", 2)])

    assert answer["actions"] == [
        {"action_id": "a0", "status": "done", "blocks": 2, "workers": {"w0": {"status": "done", "blocks": 2}}}
    ]
    link, pipe = workers[1]
    link.data_received(encode(step(acks=[HintAck(hint_of(pipe).message_id, "a0", "done", 1)])))  # late: dropped
    assert not link.down.is_set()


def test_with_no_worker_there_is_nobody_to_answer() -> None:
    answer = json.loads(asyncio.run(KvHints(fleet_of_two()[0], b"salt").obey(envelope("retain"))))

    assert answer["actions"] == [{"action_id": "a0", "status": "unanswered", "blocks": 0, "workers": {}}]


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"\xff",
        envelope("retain", protocol_version=2),
        envelope("retain", extra=1),
        envelope(),
        envelope(*["retain"] * (kv_hints.ACTIONS_MAX + 1)),
        envelope("retain", "retain").replace(b'"a1"', b'"a0"'),
        envelope("retain").replace(b"9.0", b"-1"),
        envelope("retain").replace(b'"session": "s", ', b""),
    ],
)
def test_what_is_no_envelope_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        asyncio.run(KvHints(fleet_of_two()[0], b"salt").obey(body))
    assert refused.value.status == 400
