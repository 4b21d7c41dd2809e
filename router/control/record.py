"""Recordings: one JSON line for each thing that the mind saw, with what it decided and when.

Owns the format, its size and its reading. Never holds prompt text or tokens: the events have none.
The first line of a file is a Header; an event line is [now, kind, event, [[kind, action], ...]]."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import BinaryIO, get_args

import msgspec
from msgspec import Raw, Struct

from policies.actions import Action
from policies.events import (
    Event,
)

log = logging.getLogger(__name__)

FORMAT = 1
EVENTS: dict[str, type] = {kind.__name__: kind for kind in get_args(Event)}
LINE_MAX_BYTES = 64 * 1024 * 1024  # the largest event is a hello's snapshot of chain keys: 16 MiB, 22 MiB as base64


class RecordError(Exception):
    """A recording that cannot be read, with file and line."""


class Header(Struct, frozen=True):
    """Opens every file of a recording: all that the reducer was built from."""

    headway_recording: int
    segment: int  # 0 holds the beginning; the state at the start of any other is what its predecessors lead to
    code_version: str
    seed: int
    config: Raw  # Config.to_json


class Line(Struct, frozen=True, array_like=True):
    """One event and its answer."""

    now: float
    kind: str
    event: Raw
    actions: Raw


_encoder = msgspec.json.Encoder()  # shortest float text: reads back to the same bits. Infinity becomes null, in actions


def encode_actions(actions: Sequence[Action]) -> bytes:
    """Actions as they are compared: equal bytes, equal actions."""
    return _encoder.encode([(type(action).__name__, action) for action in actions])


def segment_path(path: Path, segment: int) -> Path:
    """FILE, FILE.1, FILE.2, ..."""
    return path if segment == 0 else path.with_name(f"{path.name}.{segment}")


class Recorder:
    """Writes a recording, a new file each `segment_bytes`, at most `segments_max` of them.

    At the end of the last one it stops, says so once and counts: a replay needs the beginning, so that is kept."""

    def __init__(self, path: Path, header: Header, *, segment_bytes: int, segments_max: int) -> None:
        self.dropped_events = 0
        self._path = path
        self._header = header
        self._segment_bytes = segment_bytes
        self._segments_max = segments_max
        self._file: FileIO | None = None
        self._left_bytes = 0
        self._open()

    def write(self, now: float, event: Event, actions: Sequence[Action]) -> None:
        """Record one call of the reducer. A full disk ends the recording, never the router."""
        if self._file is None:
            self.dropped_events += 1
            return
        body, answer = Raw(_encoder.encode(event)), Raw(encode_actions(actions))
        self._put(_encoder.encode(Line(now, type(event).__name__, body, answer)))
        if self._left_bytes <= 0:
            self._rotate()

    def close(self) -> None:
        """Nothing more is recorded."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _put(self, line: bytes) -> None:
        assert self._file is not None, "callers look first"
        try:
            if self._file.write(line + b"\n") <= len(line):
                raise OSError("the disk is full")
            self._left_bytes -= len(line) + 1
        except OSError as error:
            log.error("the recording %s ends here: %s", self._path, error)
            self.close()

    def _rotate(self) -> None:
        self.close()
        self._header = msgspec.structs.replace(self._header, segment=self._header.segment + 1)
        if self._header.segment < self._segments_max:
            self._open()
        else:
            log.warning("the recording %s is full: %d files; nothing more is recorded", self._path, self._segments_max)

    def _open(self) -> None:
        # Unbuffered: a killed router leaves whole lines. A write costs about 2 us in the page cache.
        self._file = segment_path(self._path, self._header.segment).open("wb", buffering=0)
        self._left_bytes = self._segment_bytes
        self._put(_encoder.encode(self._header))


def set_aside(path: Path) -> None:
    """Keep one earlier recording as FILE.old: the one that a router left when it died is the one worth replaying."""
    old = path.with_name(path.name + ".old")
    for stale in _segments(old):
        stale.unlink()
    for segment, file in enumerate(_segments(path)):
        file.rename(segment_path(old, segment))


def _segments(path: Path) -> list[Path]:
    numbers = itertools.count()
    return list(itertools.takewhile(Path.exists, (segment_path(path, number) for number in numbers)))


def read_header(path: Path) -> Header:
    """The header of one file. Raises RecordError when it is no recording of this format."""
    with _opened(path) as file:
        return _header(path, file)


def read_events(path: Path) -> Iterator[tuple[str, float, Event, bytes]]:
    """(place, now, event, actions as JSON) of a recording, over all its files. Raises RecordError."""
    first = read_header(path)
    if first.segment != 0:
        raise RecordError(f"{path}: file {first.segment} of a recording; a replay begins with the first")
    for segment, file in enumerate(_segments(path)):
        yield from _read_segment(file, first, segment)


def _read_segment(path: Path, first: Header, segment: int) -> Iterator[tuple[str, float, Event, bytes]]:
    lines = msgspec.json.Decoder(Line)
    decoders: dict[str, msgspec.json.Decoder[Event]] = {
        name: msgspec.json.Decoder(kind) for name, kind in EVENTS.items()
    }
    with _opened(path) as file:
        header = _header(path, file)
        if (header.segment, header.config, header.seed) != (segment, first.config, first.seed):
            raise RecordError(f"{path}: belongs to another recording")
        for number, text in enumerate(iter(lambda: file.readline(LINE_MAX_BYTES), b""), start=2):
            place = f"{path}:{number}"
            if not text.endswith(b"\n"):
                return  # the last line of a router that was killed
            try:
                line = lines.decode(text)
                event = decoders[line.kind].decode(line.event)
            except (msgspec.DecodeError, KeyError) as error:
                raise RecordError(f"{place}: not an event that this version knows: {error}") from error
            yield place, line.now, event, bytes(line.actions)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from error


def _header(path: Path, file: BinaryIO) -> Header:
    try:
        header = msgspec.json.decode(file.readline(LINE_MAX_BYTES), type=Header)
    except msgspec.DecodeError as error:
        raise RecordError(f"{path}: not a recording: {error}") from error
    if header.headway_recording != FORMAT:
        raise RecordError(f"{path}: format {header.headway_recording}; this version reads {FORMAT}")
    return header
