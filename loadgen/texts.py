"""Texts: rows that carry real words instead of block ids, as aiperf's do: `text_input`, or `messages` and `tools`.

Owns what length and blocks such a row is taken to have, and which dialect can send it. Never tokenises: the report
says how many tokens the server counted for those that were taken."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

BYTES_A_TOKEN = 4  # of English and of code, in the vocabularies of 32k to 256k that are served today
ID_BYTES = 6  # of a block's name: every JSON reader keeps 48 bits


class Spoken(Protocol):
    """What matters of a row here."""

    @property
    def text_input(self) -> str: ...
    @property
    def messages(self) -> Sequence[Mapping[str, Any]]: ...


def is_text(row: Spoken) -> bool:
    """Whether it has words of its own."""
    return bool(row.text_input or row.messages)


def sized(fields: dict[str, Any], block_size: int) -> dict[str, Any]:
    """A row's fields; where they carry text, with the length and the blocks of that, whatever else they say.

    Raises ValueError for text that nobody could send."""
    text, messages, tools = (fields.get(key) for key in ("text_input", "messages", "tools"))
    if text and messages:
        raise ValueError("text_input and messages: a prompt is one of them")
    if tools and not messages:
        raise ValueError("tools without messages to go with")
    if not text and not messages:
        return fields
    if text and not isinstance(text, str):
        raise ValueError("text_input is not a string")
    for name, parts in (("messages", messages), ("tools", tools)):
        if parts and not (isinstance(parts, list) and all(isinstance(part, dict) for part in parts)):
            raise ValueError(f"{name} is not a list of objects")
    said = text.encode() if text else b"".join(map(_canonical, [*(tools or []), *(messages or [])]))
    return fields | {"input_length": max(1, len(said) // BYTES_A_TOKEN), "hash_ids": blocks(said, block_size)}


def _canonical(part: object) -> bytes:
    return msgspec.json.encode(part, order="deterministic")


def blocks(said: bytes, block_size: int) -> list[int]:
    """A name for each whole block, from all that stands before it: prompts that begin alike share their first ones."""
    step, chain, named = block_size * BYTES_A_TOKEN, hashlib.blake2b(digest_size=ID_BYTES), []
    for end in range(step, len(said) + 1, step):
        chain.update(said[end - step : end])
        named.append(int.from_bytes(chain.digest(), "little"))
    return named


def check(rows: Sequence[Spoken], dialect: str) -> None:
    """Raises ValueError for rows that a dialect has no way to send: messages are in the form of OpenAI's chat."""
    if dialect != "chat" and any(row.messages for row in rows):
        raise ValueError(f"rows with messages are chat's: replay them with --dialect chat, not {dialect}")
