"""Azure: the LLM inference traces of 2023, one CSV row a request: when, tokens in, tokens out.

Owns their columns. They carry no session, user or block: nothing is invented for them."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from loadgen import files
from loadgen.traces import Header, Row, Tally, Trace, TraceError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def load(path: Path, strict: bool = False) -> Trace:
    """The rows by time, the first at 0."""
    tally, found = Tally(path, strict), []
    with files.opened(path) as plain:
        reader = csv.DictReader(io.TextIOWrapper(plain, encoding="utf-8-sig", newline=""))
        if missing := set(COLUMNS) - set(reader.fieldnames or ()):
            raise TraceError(f"{path}: line 1: no column {min(missing)!r}: is this an Azure trace?")
        for number, fields in enumerate(reader, 2):
            try:
                found.append((_time_s(fields["TIMESTAMP"]), _row(fields)))
            except (TypeError, ValueError) as error:
                tally.add(number, error)
    found.sort(key=lambda one: one[0])
    rows = [msgspec.structs.replace(row, timestamp=round((at_s - found[0][0]) * 1e3, 3)) for at_s, row in found]
    return tally.trace(Header(source="Azure/AzurePublicDataset", licence="CC-BY-4.0"), rows)


def _time_s(text: str) -> float:
    """Their stamps have seven decimals, of which Python reads six."""
    whole, _, fraction = text.partition(".")
    return datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp() + float(f"0.{fraction or 0}")


def _row(fields: dict[str, str]) -> Row:
    lengths = {"input_length": int(fields["ContextTokens"]), "output_length": int(fields["GeneratedTokens"])}
    return msgspec.convert({"timestamp": 0.0, **lengths}, Row)
