"""Conversations as strict chat templates take them: the same words under fewer roles, where a template refuses more.

Owns the forms, the gentlest first. Agents say `system` in the middle, say more behind a tool's result, and send back
our ids of 31 characters; Mistral's templates want users and assistants in turn and ids of nine, Llama's one call at a
time, Gemma's no system. Every form is made in time linear in what was sent."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import xxhash
from msgspec.structs import replace

from router.language.turn import Message

CALL_ID_CHARS = 9  # what Mistral's templates ask for
Messages = tuple[Message, ...]


def forms(messages: Messages) -> Iterator[Messages]:
    """The conversation with each change alone, then with more and more of them; what changes nothing is left out."""
    alone = [changed for change in CHANGES if (changed := tuple(change(messages))) != messages]
    yield from alone
    for change in CHANGES:
        changed = tuple(change(messages))
        if changed != messages and changed not in alone:
            yield changed
        messages = changed


def _short_ids(messages: Sequence[Message]) -> Iterator[Message]:
    """Ids of calls as nine letters and digits: who called and what came back still belong together."""
    for message in messages:
        extra = message.extra
        if not extra:
            yield message
            continue
        changed = dict(extra)
        if isinstance(said := extra.get("tool_call_id"), str):
            changed["tool_call_id"] = _short(said)
        if calls := extra.get("tool_calls"):
            changed["tool_calls"] = [_with_short_id(call) for call in calls]
        yield replace(message, extra=changed)


def _with_short_id(call: Any) -> Any:
    is_known = isinstance(call, dict) and isinstance(call.get("id"), str)
    return call | {"id": _short(call["id"])} if is_known else call


def _short(call_id: str) -> str:
    if len(call_id) == CALL_ID_CHARS and call_id.isalnum():
        return call_id
    return xxhash.xxh3_64_hexdigest(call_id.encode())[:CALL_ID_CHARS]


# Hot: once per request of two dialects. 0.2 us a message.
def joined(messages: Sequence[Message], role: str) -> list[Message]:
    """Neighbours of this role as one. A client may send 65,000 of them, so their text is put together once."""
    merged: list[Message] = []
    run: list[Message] = []
    for message in messages:
        if message.role == role:
            run.append(message)
        elif run:
            merged += _one(run)
            merged.append(message)
            run = []
        else:
            merged.append(message)
    return merged + _one(run)


def _one(run: list[Message]) -> list[Message]:
    return run if len(run) < 2 else [replace(run[0], content="\n\n".join([message.content for message in run]))]


def _in_turn(messages: Sequence[Message]) -> list[Message]:
    """What `system` says behind the beginning is said by the user, and a user who speaks twice speaks once."""
    begun = _begun(messages)
    return joined([*messages[:begun], *map(_as_user, messages[begun:])], "user")


def _begun(messages: Sequence[Message]) -> int:
    """How many messages of `system` stand at the beginning."""
    return next((at for at, message in enumerate(messages) if message.role != "system"), len(messages))


def _as_user(message: Message) -> Message:
    return replace(message, role="user") if message.role == "system" else message


def _results_last(messages: Sequence[Message]) -> list[Message]:
    """What a user says behind a tool's result stands in it: there, an assistant must speak."""
    kept: list[Message] = []
    for message in joined(messages, "user"):
        if kept and kept[-1].role == "tool" and message.role == "user":
            kept[-1] = replace(kept[-1], content=f"{kept[-1].content}\n\n{message.content}")
        else:
            kept.append(message)
    return kept


def _one_call_each(messages: Sequence[Message]) -> Iterator[Message]:
    """Who called several tools at once called one, heard from it, and called the next: Llama's know no other way."""
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = (message.extra or {}).get("tool_calls") or ()
        if len(calls) < 2:
            yield message
            continue
        results: dict[Any, list[Message]] = {}
        while at < len(messages) and messages[at].role == "tool":
            results.setdefault((messages[at].extra or {}).get("tool_call_id"), []).append(messages[at])
            at += 1
        for number, call in enumerate(calls):
            extra = {"tool_calls": [call]} if number else (message.extra or {}) | {"tool_calls": [call]}
            yield replace(message, content="" if number else message.content, extra=extra)
            yield from results.pop(_id(call), ())
        yield from itertools.chain.from_iterable(results.values())


def _id(call: Any) -> str | None:
    found = call.get("id") if isinstance(call, dict) else None
    return found if isinstance(found, str) else None


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """What `system` says is the beginning of what the user says."""
    return joined([_as_user(message) for message in messages], "user")


CHANGES: tuple[Callable[[Sequence[Message]], Iterator[Message] | list[Message]], ...] = (
    _short_ids,
    _in_turn,
    _results_last,
    _one_call_each,
    _without_system,
)
