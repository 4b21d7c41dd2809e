"""A model's chat template: messages become pieces of text, the client's and the template's own kept apart.

Owns the sandbox. A client's string never enters the rendered text: a numbered stand-in does, so that no wording of a
client can become a mark of the template, and a long message costs the template nothing. A template that asked nothing
of the contents wrote around them what it would write around any others: that frame is kept, by the roles."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, cast

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec import Struct, field
from msgspec.structs import replace

from router.errors import RequestError
from router.language.echoes import Echo
from router.language.turn import Message

OPEN, CLOSE = "\ue000", "\ue001"  # private use: a template has no such characters, a client's never get in
_STAND_IN = re.compile(f"{OPEN}([0-9]+){CLOSE}")


FRAMES_MAX = 256  # kept frames; one of a long conversation has a few thousand parts, so some tens of MB at the most
FRAME_PARTS_MAX = 4096  # a longer one is rendered each time


NO_ECHOES: Mapping[int, Echo] = {}
FrameName = tuple[bool | str | None, ...]  # is_thinking, then roles
Part = str | int  # the template's own text, or the number of a client's string


class Piece(NamedTuple):
    """A run of prompt text. Marks are special only where the template wrote them."""

    text: str
    is_client: bool
    echo: Echo | None = None  # the ids that the model itself gave for it


class Rendering(Struct, frozen=True):
    """A prompt up to where the assistant speaks: the parts of its frame, and what the client's numbers stand for."""

    frame: tuple[Part, ...]
    texts: Sequence[str]
    echoes: Mapping[int, Echo] = field(default_factory=dict)  # by number: what the model said, to be read as its ids

    def pieces(self, begin: int = 0) -> list[Piece]:
        """The runs from part `begin` on."""
        texts, echoes = self.texts, self.echoes
        return [
            Piece(texts[part], True, echoes.get(part)) if isinstance(part, int) else Piece(part, False)
            for part in self.frame[begin:]
        ]


class Book:
    """The client's strings of one prompt, by the numbers of their stand-ins. Contents of messages come first."""

    __slots__ = ("is_asked", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.is_asked = False  # the template looked at what a string says


class ClientText(str):
    """Stands for a client's string in a template: prints as a stand-in, but answers questions as the real text.

    What is not overridden here sees the stand-in: at worst a wrong rendering, never a client's text as a mark."""

    __slots__ = ("_text", "book")
    book: Book
    _text: str

    def __new__(cls, text: str, book: Book) -> ClientText:
        stand_in = super().__new__(cls, f"{OPEN}{len(book.texts)}{CLOSE}")
        stand_in._text, stand_in.book = text, book
        book.texts.append(text)
        return stand_in

    @property
    def text(self) -> str:
        """The real text; whoever reads it may write something else for another one."""
        self.book.is_asked = True
        return self._text

    def _like(self, text: str) -> ClientText:
        return self if text == self._text else ClientText(text, self.book)

    def __len__(self) -> int:
        return len(self.text)

    def __eq__(self, other: object) -> bool:
        return self.text == (other.text if isinstance(other, ClientText) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.text)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key in self.text

    def __getitem__(self, key: SupportsIndex | slice) -> ClientText:
        return self._like(self.text[key])

    def strip(self, chars: str | None = None, /) -> ClientText:
        return self._like(self.text.strip(chars))

    def lstrip(self, chars: str | None = None, /) -> ClientText:
        return self._like(self.text.lstrip(chars))

    def rstrip(self, chars: str | None = None, /) -> ClientText:
        return self._like(self.text.rstrip(chars))

    def startswith(self, *args: Any) -> bool:
        return self.text.startswith(*args)

    def endswith(self, *args: Any) -> bool:
        return self.text.endswith(*args)

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return [self._like(part) for part in self.text.split(sep, maxsplit)]


class Said(ClientText):
    """Stands for an answer as the model wrote it, marks and all: a template must take it as it is, not look into it."""

    __slots__ = ()

    def __new__(cls, text: str, book: Book) -> Said:
        book.is_asked = True  # what a template writes around this one it may not write around others
        return cast(Said, super().__new__(cls, text, book))

    def __contains__(self, key: object) -> bool:
        return False

    def _like(self, text: str) -> ClientText:
        del text
        return self

    def startswith(self, *args: Any) -> bool:
        del args
        return False

    def endswith(self, *args: Any) -> bool:
        del args
        return False

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        del sep, maxsplit
        return [self]


class ChatTemplate:
    """The compiled template of one model."""

    def __init__(self, source: str, marks: dict[str, Any], clock: Callable[[], datetime] = datetime.now) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        self.source = source
        self._template = environment.from_string(source)
        self._marks = marks
        self._clock = clock  # of the wall: some templates tell the model what day it is
        self._frames: OrderedDict[FrameName, tuple[Part, ...]] = OrderedDict()
        self._ends: dict[bool | None, str] = {}  # of a prompt, by `is_thinking`

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """From the folder of a model; None when it has no chat template."""
        settings_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        settings = json.loads(settings_path.read_text(encoding="utf-8")) if settings_path.is_file() else {}
        source = settings.get("chat_template")
        if template_path.is_file():
            source = template_path.read_text(encoding="utf-8")
        if not isinstance(source, str):
            return None
        marks = {name: _mark(settings.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        return cls(source, marks)

    # Hot: once per request; a few hundred ns a message when its frame is known. bench/router.py.
    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        is_thinking: bool | None = None,
        echoes: Mapping[int, Echo] = NO_ECHOES,
    ) -> Rendering:
        """The prompt up to where the assistant speaks. Raises RequestError 400 when the template refuses.

        `echoes`: messages that the model wrote itself, by their place."""
        if echoes and (rendering := self._with_said(messages, tools, is_thinking, echoes)) is not None:
            return rendering
        rendering = self._plainly(messages, tools, is_thinking)
        plain = {number: echo for number, echo in echoes.items() if echo.is_plain}
        return replace(rendering, echoes=plain) if plain else rendering

    def _with_said(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        is_thinking: bool | None,
        echoes: Mapping[int, Echo],
    ) -> Rendering | None:
        """With answers as they were written in place of calls and thoughts; None if the template will not have it."""
        said = [number for number, echo in echoes.items() if not echo.is_plain]
        if not said:
            return None
        whole = list(messages)
        for number in said:
            whole[number] = Message(messages[number].role, echoes[number].text)
        try:
            frame, book = self._framed(whole, tools, is_thinking, frozenset(said))
        except RequestError:
            return None
        if any(frame.count(number) != 1 for number in said):
            return None
        return Rendering(frame, book.texts, echoes)

    def _plainly(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], is_thinking: bool | None
    ) -> Rendering:
        if tools or not all([message.extra is None for message in messages]):  # noqa: C419 -- a list is twice as fast
            frame, book = self._framed(messages, tools, is_thinking)
            return Rendering(frame, book.texts)
        roles = (is_thinking, *[message.role for message in messages])
        known = self._frames.get(roles)
        if known is not None:
            self._frames.move_to_end(roles)
            return Rendering(known, [message.content for message in messages])
        frame, book = self._framed(messages, (), is_thinking)
        if not book.is_asked and len(frame) <= FRAME_PARTS_MAX:
            self._keep(roles, frame)
        return Rendering(frame, book.texts)

    def prompt_end(self, is_thinking: bool | None) -> str:
        """What the template writes behind the last message: there, some models begin to think."""
        if is_thinking not in self._ends:
            frame = self.render((Message("user", "?"),), (), is_thinking).frame
            self._ends[is_thinking] = frame[-1] if isinstance(frame[-1], str) else ""
        return self._ends[is_thinking]

    def _framed(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        is_thinking: bool | None,
        said: Collection[int] = (),
    ) -> tuple[tuple[Part, ...], Book]:
        """What the template writes, with numbers where a client's strings stand."""
        switches = self._marks if is_thinking is None else self._marks | {"enable_thinking": is_thinking}
        book = Book()
        contents = [
            (Said if number in said else ClientText)(message.content, book) for number, message in enumerate(messages)
        ]
        views = [
            {"role": message.role, "content": content, **_hidden(message.extra or {}, book)}
            for message, content in zip(messages, contents, strict=True)
        ]

        def strftime_now(form: str) -> str:
            book.is_asked = True  # tomorrow the frame is another one
            return self._clock().strftime(form)

        given = {"messages": views, "tools": _hidden(list(tools), book) or None, "strftime_now": strftime_now}
        try:
            text = self._template.render(**given, add_generation_prompt=True, **switches)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = str(error)[:200] if isinstance(error, TemplateRefusal) else "its roles or order do not fit"
            raise RequestError(400, f"The model's chat template refuses these messages: {reason}.") from None
        parts = _STAND_IN.split(text)
        return tuple([int(part) if at % 2 else part for at, part in enumerate(parts) if part]), book

    def _keep(self, roles: FrameName, frame: tuple[Part, ...]) -> None:
        self._frames[roles] = frame
        if len(self._frames) > FRAMES_MAX:
            self._frames.popitem(last=False)


class TemplateRefusal(jinja2.TemplateError):
    """The template called raise_exception: its author's words, safe to repeat."""


def _hidden(value: Any, book: Book) -> Any:
    """The same structure with every string behind a stand-in. Keys too: they are the client's as well."""
    if isinstance(value, str):
        return ClientText(value, book)
    if isinstance(value, dict):
        return {_key(key, book): _hidden(inner, book) for key, inner in value.items()}
    if isinstance(value, list):
        return [_hidden(inner, book) for inner in value]
    return value


def _key(key: str, book: Book) -> str:
    return key if key.isidentifier() else ClientText(key, book)


def _shown(value: Any) -> Any:
    if isinstance(value, ClientText):
        return value.text
    if isinstance(value, dict):
        return {_shown(key): _shown(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(inner) for inner in value]
    return value


def _book_of(value: Any) -> Book | None:
    if isinstance(value, ClientText):
        return value.book
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((book for part in inner if (book := _book_of(part)) is not None), None)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face's templates expect it: no HTML escapes. What holds a client's text is a client's text."""
    form: dict[str, Any] = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
    text, book = json.dumps(_shown(value), sort_keys=sort_keys, **form), _book_of(value)
    return text if book is None else ClientText(text, book)


def _raise(message: str) -> None:
    raise TemplateRefusal(message)


def _mark(setting: Any) -> str:
    """Older configs hold a string, newer ones an object."""
    return setting["content"] if isinstance(setting, dict) else setting or ""
