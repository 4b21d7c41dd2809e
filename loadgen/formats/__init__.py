"""Formats: whatever public traces come as, in; a Trace, or what another tool reads, out.

Owns which reader a file gets: by its name's ending and its first line, never by trying. Never guesses a block size."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Literal

import msgspec

from loadgen import files, traces
from loadgen.formats import azure, receipts, tracelab, weka
from loadgen.traces import ClassName, Trace, TraceError

Format = Literal["mooncake", "weka", "azure", "receipts", "tracelab"]
READERS = {
    "mooncake": traces.read,
    "weka": weka.load,
    "azure": azure.load,
    "receipts": receipts.load,
    "tracelab": tracelab.load,
}


def load(path: Path, strict: bool = False, request_class: ClassName | None = None) -> Trace:
    """The trace in a file of any known format; `request_class` is the truth label of rows that do not carry one."""
    name = format_of(path)
    trace = READERS[name](path, strict)
    if request_class is None or name == "receipts":  # a receipt says its class
        return trace
    rows = (
        msgspec.structs.replace(row, request_class=request_class) if row.request_class == "chatbot+" else row
        for row in trace.rows
    )
    return Trace(trace.header, tuple(rows), trace.bad, trace.bad_count)


def format_of(path: Path) -> Format:
    """From the suffixes and the first line. Raises TraceError for what is none of them."""
    if ".tar" in path.suffixes:
        return "weka"
    first = next(itertools.chain(files.lines(path), (b"",))).strip()
    if first.startswith(b"{"):
        if b'"newly_append_tokens"' in first:
            return "tracelab"
        return "receipts" if b'"arrived_unix_s"' in first else "mooncake"
    columns = set(first.decode("utf-8", "replace").lstrip("\ufeff").split(","))
    if columns >= set(weka.COLUMNS):
        return "weka"
    if columns >= set(azure.COLUMNS):
        return "azure"
    if ".csv" in path.suffixes:
        raise TraceError(
            f"{path}: line 1: neither Azure's columns nor weka_requests.csv's: {', '.join(sorted(columns))}"
        )
    return "mooncake"
