"""Export: a trace as other tools read it: Mooncake's rows, or those of aiperf's mooncake_trace loader.

Owns what is lost on the way, and says it. Block ids become global: neither knows local ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from loadgen import files, traces
from loadgen.shape import global_ids
from loadgen.texts import is_text
from loadgen.traces import Row, Trace

To = Literal["headway", "mooncake", "aiperf"]


def write(trace: Trace, path: Path, to: To) -> str:
    """Write the file; returns what its reader has to be told."""
    if to == "headway":
        traces.write(trace, path)
        return ""
    rows = list(_mooncake(trace) if to == "mooncake" else _aiperf(trace))
    files.write(msgspec.json.Encoder().encode_lines(rows), path)
    said = [f"blocks of {trace.header.block_size} tokens: tell the reader, the rows do not say it"]
    if to == "aiperf":
        option = f"--custom-dataset-type mooncake_trace --isl-block-size {trace.header.block_size}"
        said = [f"tell aiperf (0.12 or later): {option}"]
        said.append("sub-agents stand at the times that the recording gives them: its rows know no `after`")
    else:
        said.append("later turns have the times that the recording gives them: Mooncake's rows know no sessions")
    return "\n".join(said)


def _mooncake(trace: Trace) -> Iterator[dict[str, object]]:
    """Every row at its nominal start."""
    ids = _ids(trace)
    starts = traces.nominal_starts_s(trace.rows)
    for index in sorted(range(len(starts)), key=lambda index: (starts[index], index)):
        yield {"timestamp": round(starts[index] * 1e3), **_lengths(trace.rows[index], ids[index])}


def _aiperf(trace: Trace) -> Iterator[dict[str, object]]:
    """Sessions as they are: the first turn has a time, later ones a delay."""
    ids = _ids(trace)
    starts, begun = traces.nominal_starts_s(trace.rows), set()
    for index, row in enumerate(trace.rows):
        is_later = bool(row.session_id) and row.session_id in begun
        begun.add(row.session_id)
        when = {"delay": row.delay} if is_later else {"timestamp": round(starts[index] * 1e3, 3)}
        session = {"session_id": row.session_id} if row.session_id else {}
        yield {**session, **when, **(_text(row) if is_text(row) else _lengths(row, ids[index]))}


def _lengths(row: Row, ids: list[int]) -> dict[str, object]:
    lengths: dict[str, object] = {"input_length": row.input_length, "output_length": row.output_length}
    return lengths | ({"hash_ids": ids} if ids else {})


def _text(row: Row) -> dict[str, object]:
    """aiperf takes a prompt's text or its length, never both."""
    named = {"text_input": row.text_input, "messages": row.messages, "tools": row.tools}
    return {"output_length": row.output_length, **{key: value for key, value in named.items() if value}}


def _ids(trace: Trace) -> list[list[int]]:
    return [row.hash_ids for row in trace.rows] if trace.header.hash_scope == "global" else global_ids(trace)
