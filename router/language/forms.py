"""Conversations as strict chat templates take them: the same words under fewer roles, where a template refuses more.

Owns the forms, the gentlest first. Agents say `system` in the middle, say more behind a tool's result, and send back
our ids of 31 characters; Mistral's templates want users and assistants in turn and ids of nine, Gemma's no system."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import xxhash

from router.language.turn import Message

CALL_ID_CHARS = 9  # what Mistral's templates ask for
Messages = tuple[Message, ...]


def forms(messages: Messages) -> Iterator[Messages]:
    """The conversation in each further form that differs from the one before it."""
    for change in CHANGES:
        changed = tuple(change(messages))
        if changed != messages:
            messages = changed
            yield messages


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
        yield message._replace(extra=changed)


def _with_short_id(call: Any) -> Any:
    is_known = isinstance(call, dict) and isinstance(call.get("id"), str)
    return call | {"id": _short(call["id"])} if is_known else call


def _short(call_id: str) -> str:
    if len(call_id) == CALL_ID_CHARS and call_id.isalnum():
        return call_id
    return xxhash.xxh3_64_hexdigest(call_id.encode())[:CALL_ID_CHARS]


def _in_turn(messages: Sequence[Message]) -> list[Message]:
    """What `system` says behind the beginning is said by the user, and a user who speaks twice speaks once."""
    begun = next((at for at, message in enumerate(messages) if message.role != "system"), len(messages))
    turned = list(messages[:begun])
    for message in messages[begun:]:
        spoken = message._replace(role="user") if message.role == "system" else message
        if turned and turned[-1].role == spoken.role == "user":
            turned[-1] = turned[-1]._replace(content=_joined(turned[-1], spoken))
        else:
            turned.append(spoken)
    return turned


def _results_last(messages: Sequence[Message]) -> list[Message]:
    """What a user says behind a tool's result stands in it: there, an assistant must speak."""
    kept: list[Message] = []
    for message in messages:
        if kept and kept[-1].role == "tool" and message.role == "user":
            kept[-1] = kept[-1]._replace(content=_joined(kept[-1], message))
        else:
            kept.append(message)
    return kept


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """What `system` says is the beginning of what the user says."""
    begun = next((at for at, message in enumerate(messages) if message.role != "system"), len(messages))
    words = [message._replace(role="user") for message in messages[:begun]]
    return _in_turn([*words, *messages[begun:]])


def _joined(before: Message, message: Message) -> str:
    return f"{before.content}\n\n{message.content}"


CHANGES: tuple[Callable[[Sequence[Message]], Iterator[Message] | list[Message]], ...] = (
    _short_ids,
    _in_turn,
    _results_last,
    _without_system,
)
