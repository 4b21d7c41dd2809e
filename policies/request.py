"""What a request is to the mind: its class, its promise in seconds, and the facts that tell them.

Owns the vocabulary that router, engine and loadgen share. Never holds text, sockets or token ids."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", int)


class RequestClass(enum.IntEnum):
    """The three kinds of work, most urgent first. The number is the wire value and the heap's first key."""

    CHATBOT = 0
    BACKGROUND_AGENT = 1
    DATA_PROCESSOR = 2

    @property
    def label(self) -> str:
        """The name that people and headers use, such as `chatbot+`."""
        return CLASS_LABELS[self]


CLASS_LABELS = ("chatbot+", "background-agent", "data-processor")
CLASS_NAMES = {
    "chatbot+": RequestClass.CHATBOT,
    "chat": RequestClass.CHATBOT,
    "background-agent": RequestClass.BACKGROUND_AGENT,
    "agent": RequestClass.BACKGROUND_AGENT,
    "data-processor": RequestClass.DATA_PROCESSOR,
    "batch": RequestClass.DATA_PROCESSOR,
}


@dataclass(frozen=True, slots=True)
class Budget:
    """The promise, in seconds from arrival; infinity where a class promises nothing. It drives order, never refusal."""

    ttft_s: float
    tpot_s: float
    deadline_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Line:
    """A budget made absolute on the local clock: when each output token is due."""

    arrived: float
    budget: Budget

    def due(self, token: int) -> float:
        """When output token `token` (counted from 1) is due, in local monotonic seconds."""
        budget = self.budget
        by_pace = budget.ttft_s + (token - 1) * budget.tpot_s if token > 1 else budget.ttft_s
        return self.arrived + min(by_pace, budget.deadline_s)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a request says of itself, taken from headers and body by the router; all of it can be forged.

    An empty string, zero or None means that the client said nothing."""

    declared_class: RequestClass | None = None  # x-headway-class
    service_tier: str = ""
    background: bool = False
    completion_window: str = ""
    user_agent: str = ""
    originator: str = ""  # Codex
    turn_trigger: str = ""  # Codex: user | exec
    is_side_call: bool = False  # title, compaction, memory: the main call does not wait for it
    agent_id: str = ""  # Claude Code: set on subagent calls alone
    stream: bool = False
    message_count: int = 1
    prompt_count: int = 1
    last_role: str = "user"
    tool_count: int = 0
    has_interactive_tools: bool = False  # tools that need a person, such as AskUserQuestion
    has_json_schema: bool = False
    has_session: bool = False  # the client named its session
    template_hash: int = 0  # xxh3-64 of the first 2 KB of the prompt: siblings of one template share it


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who pays. `organisation` is the salt domain's name: its keys share KV, nobody else's do."""

    id: str = "local"
    organisation: str = "local"
    most_urgent: RequestClass = RequestClass.CHATBOT  # a declared class is clamped to this
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the mind first sees it: before anything costly was done for it."""

    id: RequestId
    tenant: Tenant
    session: str  # the client's own key, else a lineage hash made by the router; "" if neither
    model: str
    facts: Facts
    arrived: float  # local monotonic seconds of the last body byte
    body_bytes: int
    estimated_tokens: int
    max_output: int | None = None
    declared_timeout_s: float | None = None  # when the client says that it leaves
    body_hash: int = 0  # xxh3-64 of the body where there is no session: the same question again
