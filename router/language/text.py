"""From a Turn to token ids and their chain keys; what was tokenised before is not tokenised again.

Owns two caches. Segments: ids of one piece of text. Prefixes: ids and chain of everything up to a piece, so that an
agent that resends 100k tokens pays for the new ones alone. Pieces are tokenised apart: no token crosses from the
template's text into a client's, whatever the client wrote."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from msgspec import Struct
from msgspec.structs import replace

from engine.kv import keys
from engine.kv.keys import KEY_BYTES, ChainKey, Ids
from router.dialects.media import cannot_see
from router.errors import RequestError
from router.language.canonical import Rule, canonical
from router.language.echoes import Echoes
from router.language.forms import forms
from router.language.lineage import Lineages
from router.language.speech import Parser, Speech
from router.language.template import ChatTemplate, Piece, Rendering
from router.language.turn import Message, Part, PartKind, Turn, parts_of
from router.language.vocabulary import Detokeniser, Vocabulary
from router.parsers.voice import NONE, SHOWN, Voice

CHARS_PER_TOKEN = 4  # of English and code: what a refusal says of a prompt that nobody tokenised
OPENING_MESSAGES, OPENING_CHARS = 4, 256  # up to the first user's: they tell conversations of one session apart


@dataclass(frozen=True, slots=True)
class TextLimits:
    """Bounds of the text layer."""

    segment_bytes_max: int = 64 * 1024 * 1024  # ids of pieces; 4 bytes a token
    prefix_bytes_max: int = 128 * 1024 * 1024  # ids and chains of whole prompts: 200 conversations of 150k tokens
    echo_bytes_max: int = 64 * 1024 * 1024  # answers as the model wrote them: 10,000 of 1000 tokens
    lineage_bytes_max: int = 32 * 1024 * 1024  # last turns, for the figure of what was lost: 50 of 150k tokens
    inline_chars_max: int = 32 * 1024  # more cold text than this (about 10 ms) is tokenised in a thread


class Identity(Struct, frozen=True):
    """What gives KV its name: model and salt domain."""

    root: ChainKey
    salt: bytes
    block_tokens: int


class Prompt(Struct, frozen=True):
    """A tokenised prompt and the chain keys of its full blocks."""

    ids: Ids
    chain: bytes


class Segment(Struct, frozen=True):
    """A piece of a prompt and its names: `key` of its own text, `upto` of the prompt up to and including it."""

    piece: Piece
    key: bytes
    upto: bytes


class Rendered(Struct, frozen=True):
    """A prompt on its way: what is known of it, and the pieces that must be tokenised first."""

    identity: Identity
    known: Prompt | None  # of the longest prefix seen before
    rest: tuple[Segment, ...]  # behind that prefix
    cold: tuple[Segment, ...]  # of the rest, what no cache holds

    @property
    def cold_chars(self) -> int:
        """How much must be tokenised."""
        return sum(len(segment.piece.text) for segment in self.cold)

    @property
    def known_tokens(self) -> int:
        """How many are tokens already."""
        return len(self.known.ids) if self.known is not None else 0


class ByteCache:
    """Least recently used values under a bound of bytes."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._values: OrderedDict[bytes, Prompt] = OrderedDict()
        self.bytes_held = 0

    def get(self, key: bytes) -> Prompt | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: bytes, value: Prompt) -> None:
        """Keep a value; one that is larger than the whole bound is not kept."""
        old = self._values.pop(key, None)
        self.bytes_held += _size(value) - (_size(old) if old is not None else 0)
        self._values[key] = value
        while self.bytes_held > self._bytes_max:
            self.bytes_held -= _size(self._values.popitem(last=False)[1])


class Text:
    """The text side of one model."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        template: ChatTemplate | None,
        limits: TextLimits | None = None,
        voice: Voice | None = None,
        rules: Sequence[Rule] = (),
        *,
        refuses_media: bool = False,
    ) -> None:
        self._vocabulary = vocabulary
        self._template = template
        self._rules = rules
        self._refuses_media = refuses_media
        self._voice = voice or Voice.of(template.source if template is not None else "")
        self._shown = vocabulary.tables_showing(SHOWN)
        self.limits = limits or TextLimits()
        self._segments = ByteCache(self.limits.segment_bytes_max)
        self._prefixes = ByteCache(self.limits.prefix_bytes_max)
        self._echoes = Echoes(self.limits.echo_bytes_max)
        self._lineages = Lineages(self.limits.lineage_bytes_max)

    def speech(self, turn: Turn) -> Speech:
        """For the answer to one turn."""
        if (parser := self._parser(turn)) is None:
            return Speech(Detokeniser(self._vocabulary.tables), turn.stop)
        bounds = {"is_forced": turn.must_call is not None, "is_one_call": turn.is_one_call}
        return Speech(Detokeniser(self._shown), turn.stop, parser, **bounds)

    def settled(self, turn: Turn) -> Turn:
        """The turn without what is volatile, and with what the model's own form decides. Raises RequestError 400."""
        if turn.media and self._refuses_media:
            raise cannot_see(turn.media)
        messages = canonical(turn.messages, self._rules)
        if messages is not turn.messages:
            turn = replace(turn, messages=messages)
        return self._voice.settled(turn, self._vocabulary.mark_id)

    def call_ids(self, turn: Turn) -> list[int] | None:
        """Ids of which one begins any call of a tool in the answer; None: that is not told by single tokens."""
        return self._voice.call_ids(turn, self._vocabulary.token_id)

    def notices(self, turn: Turn) -> tuple[str, ...]:
        """What a client should know of how its turn was read, for x-headway-notice."""
        is_deaf = turn.may_call and turn.must_call is None and self._voice.calls == NONE
        omitted = (f"{kind} omitted: {count}" for kind, count in turn.media)
        return (*omitted, *turn.notices, *(("tools not offered: this model has no form for calls",) if is_deaf else ()))

    def _parser(self, turn: Turn) -> Parser | None:
        if self._template is None or not turn.messages:
            return None
        return self._voice.parser(turn, self._template.prompt_end(turn.is_thinking))

    def spell(self, token: int) -> bytes:
        """What a token adds to a text; a mark adds nothing."""
        return self._vocabulary.token_bytes[token] if token < len(self._vocabulary) else b""

    def read_back(self, turn: Turn, prompt: Prompt) -> str:
        """The text of a prompt that was given as text or ids."""
        if turn.text is not None:
            return turn.text
        return b"".join(map(self.spell, prompt.ids.tolist())).decode(errors="replace")

    # Hot: once per request. Budget 2 us a message when its conversation is known; bench/router.py.
    def render(self, turn: Turn, identity: Identity) -> Rendered:
        """What must be tokenised. Raises RequestError 400 for a prompt that the model cannot have."""
        if turn.ids is not None:
            return Rendered(identity, self._named(turn.ids, identity), (), ())
        rendering = self._rendering(turn, identity.salt)
        names = _prefix_names(rendering, identity)
        known, at = None, len(names)
        while at and (known := self._prefixes.get(names[at - 1]) if names[at - 1] else None) is None:
            at -= 1
        rest = tuple(
            [
                Segment(piece, _key(piece, identity.salt), upto)
                for piece, upto in zip(rendering.pieces(at), names[at:], strict=True)
            ]
        )
        cold = [part for part in rest if part.piece.echo is None and self._segments.get(part.key) is None]
        return Rendered(identity, known, rest, tuple(cold))

    def hopeless_tokens(self, rendered: Rendered, context_max: int) -> int | None:
        """About how many tokens a prompt has that cannot fit, however its text falls into tokens; None if it may.

        No token spells more than the vocabulary's longest, so what is refused by this need not be tokenised."""
        room, chars = context_max - rendered.known_tokens, rendered.cold_chars
        if chars <= room * self._vocabulary.token_chars_max:
            return None
        return rendered.known_tokens + max(room + 1, chars // CHARS_PER_TOKEN)

    def tokenise(self, cold: Sequence[Segment]) -> list[Ids]:
        """Ids of each segment. Touches no cache, so any thread may run it."""
        pieces = [segment.piece for segment in cold]
        encoded = iter(self._vocabulary.encode_data([piece.text for piece in pieces if piece.is_client]))
        lists = (next(encoded) if piece.is_client else self._vocabulary.encode_marked(piece.text) for piece in pieces)
        return [np.array(ids, dtype=np.int32) for ids in lists]

    def assemble(self, rendered: Rendered, tokenised: Sequence[Ids]) -> Prompt:
        """The prompt, from what was known and what was just tokenised."""
        fresh = {segment.key: ids for segment, ids in zip(rendered.cold, tokenised, strict=True)}
        for key, segment_ids in fresh.items():
            self._segments.put(key, Prompt(segment_ids, b""))
        if not rendered.rest:
            assert rendered.known is not None, "an empty prompt is refused before"
            return rendered.known
        parts = [rendered.known.ids] if rendered.known is not None else []
        parts += [self._ids(part, fresh) for part in rendered.rest]
        ids = np.concatenate(parts)
        prompt = Prompt(ids, _extended_chain(rendered, ids))
        self._prefixes.put(rendered.rest[-1].upto, prompt)
        self._remember_history(rendered, prompt, parts)
        return prompt

    def _remember_history(self, rendered: Rendered, prompt: Prompt, parts: Sequence[Ids]) -> None:
        """The prompt before its last client text, too: a client that asks again asks something else there."""
        last = max((at for at, part in enumerate(rendered.rest) if part.piece.is_client), default=0)
        if last == 0:
            return
        tokens = len(prompt.ids) - sum(len(ids) for ids in parts[len(parts) - len(rendered.rest) + last :])
        blocks = tokens // rendered.identity.block_tokens
        history = Prompt(prompt.ids[:tokens], prompt.chain[: KEY_BYTES * blocks])
        self._prefixes.put(rendered.rest[last - 1].upto, history)

    def heard(self, turn: Turn, identity: Identity, prompt: Prompt, emitted: Sequence[int], lineage: bytes) -> None:
        """An answer is whole: when the client sends it back, its ids are known. One cut at a stop string is none."""
        ids = np.array(emitted, dtype=np.int32)
        while len(ids) and not self.spell(int(ids[-1])):
            ids = ids[:-1]  # what ended it
        if lineage:
            self._lineages.keep(lineage, prompt, ids)
        if self._template is None or not turn.messages or not len(ids):
            return
        parser = self._parser(turn)
        text = (self._vocabulary.tables if parser is None else self._shown).text(ids.tolist())
        parts = [Part(PartKind.TEXT, text)] if parser is None else parts_of([*parser.feed(text), *parser.flush()])
        lead = self._voice.lead(self._template.prompt_end(turn.is_thinking))
        lead_ids = np.array(self._vocabulary.encode_marked(lead), dtype=np.int32)
        self._echoes.keep(identity.salt, parts, text, ids, (lead, lead_ids))

    def lost_tokens(self, lineage: bytes, identity: Identity, prompt: Prompt) -> int | None:
        """How many tokens of this conversation's last turn stand behind the first that differs now."""
        return self._lineages.lost_tokens(lineage, prompt, identity.block_tokens) if lineage else None

    def _ids(self, segment: Segment, fresh: Mapping[bytes, Ids]) -> Ids:
        if segment.piece.echo is not None:
            return segment.piece.echo.ids
        return fresh[segment.key] if segment.key in fresh else self._held(segment)

    def _held(self, segment: Segment) -> Ids:
        held = self._segments.get(segment.key)
        # Another request may have pushed it out while a thread worked on this one.
        return held.ids if held is not None else self.tokenise([segment])[0]

    def _rendering(self, turn: Turn, salt: bytes) -> Rendering:
        if turn.text is not None:
            rendering = Rendering((0,), (turn.text,))
        elif self._template is None:
            raise RequestError(400, "This model has no chat template; use /v1/completions.", param="messages")
        else:
            rendering = self._templated(self._template, turn, salt)
        if len(rendering.frame) < 2 and not any(piece.text for piece in rendering.pieces()):
            raise RequestError(400, "The prompt is empty.", param="prompt", code="invalid_value")
        return rendering

    def _templated(self, template: ChatTemplate, turn: Turn, salt: bytes) -> Rendering:
        """As it was sent; else in the first form that the template takes. Raises RequestError 400 if that is none."""
        try:
            return self._given(template, turn, turn.messages, salt)
        except RequestError as refused:
            for messages in forms(turn.messages):
                with contextlib.suppress(RequestError):
                    return self._given(template, turn, messages, salt)
            raise refused

    def _given(self, template: ChatTemplate, turn: Turn, messages: tuple[Message, ...], salt: bytes) -> Rendering:
        try:
            echoes = self._echoes.recalled(salt, messages)
            return template.render(messages, turn.tools, turn.is_thinking, echoes)
        except RecursionError:
            # JSON's own reader takes 1000 levels, a walk in Python half of them; schemas of tools have ten.
            raise RequestError(400, "The body is nested too deeply.", code="invalid_json") from None

    def _named(self, ids: Ids, identity: Identity) -> Prompt:
        if int(ids.max()) >= len(self._vocabulary):
            message = f"Token ids must be below the vocabulary's size of {len(self._vocabulary)}."
            raise RequestError(400, message, param="prompt", code="invalid_value")
        return Prompt(ids, keys.chain(identity.root, ids, identity.block_tokens, identity.salt))


def _size(prompt: Prompt) -> int:
    return prompt.ids.nbytes + len(prompt.chain)


def _key(piece: Piece, salt: bytes) -> bytes:
    """A client's text is cached in its own salt domain: how soon it is tokenised tells no other what was sent."""
    return xxhash.xxh3_128_digest((b"c" + salt if piece.is_client else b"t") + piece.text.encode())


def _prefix_names(rendering: Rendering, identity: Identity) -> list[bytes]:
    """A name for the prompt up to and including each part; empty but where a client's text follows, or nothing: no
    prompt ends elsewhere. Salt domains have names of their own."""
    names: list[bytes] = []
    texts, echoes = rendering.texts, rendering.echoes
    running = xxhash.xxh3_128(identity.root + identity.salt)
    update, digest = running.update, running.digest
    for part in rendering.frame:
        # Kind and length part "ab", "c" from "a", "bc", and a template's words from a client's.
        if isinstance(part, str):
            data = part.encode()
            update(b"t%d:%b" % (len(data), data))
        else:
            if names:
                names[-1] = digest()
            if echoes and part in echoes:
                update(b"e" + echoes[part].name)
            else:
                data = texts[part].encode()
                update(b"c%d:" % len(data))
                update(data)
        names.append(b"")
    names[-1] = digest()
    return names


def _extended_chain(rendered: Rendered, ids: Ids) -> bytes:
    """The chain of `ids`; keys of the known prefix are not computed again."""
    identity, known = rendered.identity, rendered.known
    if known is None or not known.chain:
        return keys.chain(identity.root, ids, identity.block_tokens, identity.salt)
    behind = ids[len(known.chain) // KEY_BYTES * identity.block_tokens :]
    return known.chain + keys.chain(ChainKey(known.chain[-KEY_BYTES:]), behind, identity.block_tokens)


def lineage_of(turn: Turn, identity: Identity, session: str) -> bytes:
    """A name for a conversation: side calls of one session begin otherwise than its main one. Empty: it is none."""
    if not session or not turn.messages:
        return b""
    spoke = next((at for at, message in enumerate(turn.messages[:OPENING_MESSAGES]) if message.role == "user"), 0)
    opening = [message.content[:OPENING_CHARS] for message in turn.messages[: spoke + 1]]
    return xxhash.xxh3_128_digest(identity.salt + chr(0).join([session, *opening]).encode())
