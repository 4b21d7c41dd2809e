"""What the model said, to be known again when a client sends it back: then its own ids are used, and the cache holds.

Owns the answers kept, under a bound of bytes, by salt domain. Text that is tokenised again may become other ids than
those that were sampled, and a call's JSON is written anew by the template: both would miss what the engine holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import xxhash

from engine.kv.keys import Ids
from router.language.turn import Message, Part, PartKind

HEAD_BYTES = 200  # of an entry, beside its ids and text


class Echo(msgspec.Struct, frozen=True):
    """One answer as the model wrote it."""

    ids: Ids  # without what ended it
    text: str  # of all of them, marks too
    is_plain: bool  # the text is what its client was given: no call, no thought
    has_thoughts: bool
    name: bytes  # of these very ids

    @property
    def size(self) -> int:
        """Bytes held."""
        return self.ids.nbytes + len(self.text) + HEAD_BYTES


class Echoes:
    """Answers of one model, least recently used out first."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._echoes: OrderedDict[bytes, Echo] = OrderedDict()
        self.bytes_held = 0

    def keep(self, salt: bytes, parts: Sequence[Part], text: str, ids: Ids, lead: tuple[str, Ids]) -> None:
        """Remember an answer by what its client was given of it. `lead`: what the prompt's end wrote of it already."""
        said = "".join([part.text for part in parts if part.kind is PartKind.TEXT])
        calls = [(part.name, part.text) for part in parts if part.kind is PartKind.CALL]
        has_thoughts = bool(lead[0]) or any(part.kind is PartKind.REASONING for part in parts)
        if is_plain := said == text and not calls:
            lead = ("", ids[:0])
        whole = np.concatenate((lead[1], ids))
        echo = Echo(whole, lead[0] + text, is_plain, has_thoughts, xxhash.xxh3_128_digest(whole.tobytes()))
        self._put(_name(salt, said, calls), echo)

    def _put(self, name: bytes, echo: Echo) -> None:
        old = self._echoes.pop(name, None)
        self.bytes_held += echo.size - (old.size if old is not None else 0)
        self._echoes[name] = echo
        while self.bytes_held > self._bytes_max:
            self.bytes_held -= self._echoes.popitem(last=False)[1].size

    # Hot: once per request; 1 us an assistant's message.
    def recalled(self, salt: bytes, messages: Sequence[Message]) -> dict[int, Echo]:
        """The messages that are answers kept here, by their place. Thoughts count until a user speaks again: behind
        that, templates drop them."""
        if not self._echoes:
            return {}
        found = {
            number: echo
            for number, message in enumerate(messages)
            if message.role == "assistant" and (echo := self._find(salt, message)) is not None
        }
        last = len(messages) - 1
        spoke = next((last - back for back, message in enumerate(reversed(messages)) if message.role == "user"), -1)
        return {
            number: echo for number, echo in found.items() if number > spoke or not echo.has_thoughts or echo.is_plain
        }

    def _find(self, salt: bytes, message: Message) -> Echo | None:
        calls = message.extra.get("tool_calls", ()) if message.extra else ()
        name = _name(salt, message.content, [_called(call) for call in calls])
        echo = self._echoes.get(name)
        if echo is not None:
            self._echoes.move_to_end(name)
        return echo


def _called(call: Any) -> tuple[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    return (str(function.get("name")), function.get("arguments")) if isinstance(function, dict) else ("", None)


def _name(salt: bytes, text: str, calls: Sequence[tuple[str, Any]]) -> bytes:
    """Of what a client was given, whatever white space or order of keys it sends a call's arguments back with."""
    data = text.encode()
    if not calls:
        return xxhash.xxh3_128_digest(b"%b%d:%b" % (salt, len(data), data))
    digest = xxhash.xxh3_128(b"%b%d:%b" % (salt, len(data), data))
    for name, arguments in calls:
        value = _value(arguments) if isinstance(arguments, str) else arguments
        digest.update(msgspec.json.encode((name, value), order="sorted"))
    return digest.digest()


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
