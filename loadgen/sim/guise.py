"""Guises: what the mind is told of a simulated request, as its client would say it; and its token ids.

Owns facts and ids. Never tells the true class unless it is asked to (`oracle`)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

from engine.kv.keys import Ids
from loadgen.prompts import CLAUDE_CODE, CODEX, OPENAI_SDK, STRIPPED, Dresser
from loadgen.traces import Row, Trace
from policies.request import CLASS_NAMES, Facts, Request, RequestId, Tenant

AGENT_TOOLS = 12  # that a coding agent offers with every request
BYTES_A_TOKEN = 4


@dataclass(slots=True)
class Guises:
    """Rows of one trace as requests. `is_oracle`: the class is declared; else it has to be found."""

    trace: Trace
    model: str
    seed: int
    stripped_share: float
    is_oracle: bool
    _dresser: Dresser = field(init=False)

    def __post_init__(self) -> None:
        self._dresser = Dresser(self.stripped_share, self.seed)

    def is_stripped(self, row: Row) -> bool:
        return self._dresser.is_stripped(row)

    def request(self, request_id: RequestId, index: int, turn: int, now: float) -> Request:
        """Row `index` as its client sends it."""
        row = self.trace.rows[index]
        user = row.user or "local"
        return Request(
            id=request_id,
            tenant=Tenant(id=user, organisation="local"),
            session=row.session_id,  # a stripped client's prompts have a lineage all the same
            model=self.model,
            facts=self._facts(row, turn),
            arrived=now,
            body_bytes=row.input_length * BYTES_A_TOKEN,
            estimated_tokens=row.input_length,
            max_output=None,
            declared_timeout_s=row.timeout_s,
            body_hash=0 if row.session_id else index + 1,  # a refused client sends the same again
        )

    def _facts(self, row: Row, turn: int) -> Facts:
        is_job = row.request_class == "data-processor"
        is_named = not self.is_stripped(row)
        headers = STRIPPED
        if is_named:
            headers = OPENAI_SDK if is_job else CODEX if row.request_class == "background-agent" else CLAUDE_CODE
        return Facts(
            declared_class=CLASS_NAMES[row.request_class] if self.is_oracle else None,
            user_agent=headers["user-agent"].lower(),
            originator=headers.get("originator", ""),
            stream=not is_job,
            message_count=2 if is_job else 2 * turn + 2,
            last_role="tool" if row.gap == "tool" else "user",
            tool_count=0 if is_job or not row.session_id else AGENT_TOOLS,
            has_session=is_named and bool(row.session_id),
            template_hash=zlib.crc32(f"{row.user}/{row.hash_ids[:1]}".encode()) if row.hash_ids else 0,
        )


@dataclass(slots=True)
class Names:
    """Token ids that stand for text: a block's tokens are all its own name, what has none is the row's own."""

    trace: Trace
    _known: dict[tuple[str, int], int] = field(default_factory=dict)

    def ids(self, index: int) -> Ids:
        """Exactly `input_length` ids; equal blocks give equal ids."""
        row, size = self.trace.rows[index], self.trace.header.block_size
        scope = row.family if self.trace.header.hash_scope == "local" else ""
        known, own = self._known, self.own(index)
        base = 2 * len(self.trace.rows)  # rows' own names and their answers' come first
        names = [known.setdefault((scope, block), base + len(known)) for block in row.hash_ids]
        ids = np.full(max(row.input_length, len(names) * size), own, dtype=np.int32)
        ids[: len(names) * size] = np.repeat(np.array(names, dtype=np.int32), size)
        return ids[: row.input_length]

    def own(self, index: int) -> int:
        """The name of text that no other row has."""
        return 2 * index

    def answer(self, index: int) -> int:
        """The name of the row's answer."""
        return 2 * index + 1
