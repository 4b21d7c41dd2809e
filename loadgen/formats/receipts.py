"""Receipts: the lines that a Headway router writes for each request that ended, as a trace of its real traffic.

Owns which of their fields say when and how much. They hold no text and no blocks: lengths alone come back."""

from __future__ import annotations

from pathlib import Path

import msgspec

from loadgen import files
from loadgen.traces import ClassName, Header, Row, Tally, Trace


class Line(msgspec.Struct, frozen=True):
    """What is read of a receipt."""

    request_class: ClassName
    arrived_unix_s: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    duration_s: float = 0.0


def load(path: Path, strict: bool = False) -> Trace:
    """Requests that reached a worker, by arrival; others have no lengths and are counted as bad rows."""
    tally, decoder, found = Tally(path, strict), msgspec.json.Decoder(Line), []
    for number, text in enumerate(files.lines(path), 1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
            found.append((line.arrived_unix_s, _row(line)))
        except ValueError as error:
            tally.add(number, error)
    found.sort(key=lambda one: one[0])
    rows = [msgspec.structs.replace(row, timestamp=round((at_s - found[0][0]) * 1e3, 3)) for at_s, row in found]
    return tally.trace(Header(source="receipts of a Headway router"), rows)


def _row(line: Line) -> Row:
    if line.prompt_tokens < 1 or line.output_tokens < 1:
        raise ValueError("a request without a prompt or an answer: it was refused or failed before its first token")
    return Row(
        timestamp=0.0,
        request_class=line.request_class,
        user=line.tenant,
        input_length=line.prompt_tokens,
        output_length=line.output_tokens,
        recorded_ms=round(max(0.0, line.duration_s) * 1e3, 3),
    )
