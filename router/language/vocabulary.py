"""A model's tokenizer: text to ids and ids back to text, never half a character.

Owns the two readings of text: as data, where nothing is special, and as the template's own, where its marks are."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Tables(NamedTuple):
    """What each id adds to an answer: as bytes, and as text where these are whole characters."""

    spelt: list[bytes]
    texts: list[str | None]

    def text(self, ids: Sequence[int]) -> str:
        """Of a whole answer: what a Detokeniser makes of it piece by piece."""
        known = len(self.spelt)
        return b"".join([self.spelt[token] for token in ids if 0 <= token < known]).decode(errors="replace")


class Vocabulary:
    """Tokens of one model, from the tokenizer.json of a Hugging Face folder."""

    def __init__(self, definition: dict[str, Any]) -> None:
        marked = definition | {"post_processor": None, "truncation": None, "padding": None}
        self._marked = Tokenizer.from_str(json.dumps(marked))
        # Without its added tokens nothing in a text is special: client text that spells a mark stays text.
        self._plain = Tokenizer.from_str(json.dumps(marked | {"added_tokens": []}))
        self.token_bytes = _token_bytes(self._marked, definition)
        # A mark adds nothing to an answer; in a template it is its own spelling.
        marks = (len(added["content"]) for added in definition.get("added_tokens", ()))
        self.token_chars_max = max(1, *map(len, self.token_bytes), *marks)  # a character is a byte or more
        self.tables = Tables(self.token_bytes, [_whole_text(token) for token in self.token_bytes])

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """From the folder of a model. Raises OSError or ValueError when it has no readable tokenizer.json."""
        return cls(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))

    def tables_showing(self, marks: Collection[str]) -> Tables:
        """Tables in which these special tokens are text, for who reads an answer's marks."""
        shown = {number: mark for mark in marks if (number := self._marked.token_to_id(mark)) is not None}
        spelt, texts = list(self.token_bytes), list(self.tables.texts)
        for number, mark in shown.items():
            spelt[number], texts[number] = mark.encode(), mark
        return Tables(spelt, texts)

    def mark_id(self, mark: str) -> int | None:
        """Of a special token, which no text spells; None where there is none of this name."""
        number = self._marked.token_to_id(mark)
        return number if number is not None and not self.token_bytes[number] else None

    def token_id(self, mark: str) -> int | None:
        """Of a mark that is one token, special or not."""
        number: int | None = self._marked.token_to_id(mark)
        return number

    def __len__(self) -> int:
        return len(self.token_bytes)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of template text: its marks become their special ids."""
        ids: list[int] = self._marked.encode(text, add_special_tokens=False).ids
        return ids

    def encode_data(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each client text; nothing in it is special. Lets other threads run meanwhile."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]


class Detokeniser:
    """Ids of one answer back to text, as they come. A character split over tokens waits until it is whole."""

    def __init__(self, tables: Tables) -> None:
        self._bytes, self._texts = tables
        self._decoder = _utf8_decoder(errors="replace")
        self._is_between = True  # no half character waits

    # Hot: once per token. A table look-up; the decoder runs for split characters alone. bench/router.py.
    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; it may be empty. Ids outside the vocabulary are nothing."""
        if self._is_between and len(ids) == 1 and 0 <= ids[0] < len(self._texts):
            text = self._texts[ids[0]]
            if text is not None:
                return text
        known = len(self._bytes)
        text = self._decoder.decode(b"".join([self._bytes[token] for token in ids if 0 <= token < known]))
        self._is_between = not self._decoder.getstate()[0]
        return text

    def flush(self) -> str:
        """What is left at the end: a replacement character if the answer ended inside a character."""
        return self._decoder.decode(b"", True)


def _whole_text(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def _token_bytes(tokenizer: Tokenizer, definition: dict[str, Any]) -> list[bytes]:
    """What each id adds to the text. Special tokens add nothing."""
    spell = _byte_level if "ByteLevel" in json.dumps(definition.get("decoder")) else _sentence_piece
    table = [b""] * (max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1)
    for token, number in tokenizer.get_vocab(with_added_tokens=False).items():
        table[number] = spell(token)
    for added in definition.get("added_tokens", []):
        table[added["id"]] = b"" if added["special"] else added["content"].encode()
    return table


def _byte_level(token: str) -> bytes:
    """GPT-2's alphabet: each of its characters is one byte."""
    return bytes(_BYTE_OF.get(character, 0x3F) for character in token)


def _sentence_piece(token: str) -> bytes:
    """A byte as <0xNN>, a space as U+2581."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
