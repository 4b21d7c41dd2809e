"""Which kind of work a request is: declared facts, one table of rows, a few session bits.

Owns the table; its first matching row decides and its name is the reason. Never reads a prompt, and never lets a
client gain more than its tenant may have: everything that it reads can be forged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from policies.api import Classified, SessionView
from policies.request import Facts, Request, RequestClass
from policies.sessions import BURST_COUNT, HUMAN_GAP_S, LONE_STEPS, is_inner

CHATBOT, BACKGROUND, BATCH = RequestClass

DEMOTIONS_NEEDED = 3  # agreeing requests before a session loses urgency; gaining it takes one
SIBLINGS = 20
UNATTENDED_S = 1800.0
UNATTENDED_STEPS = 50
FIRST_MESSAGES = 2  # system and user: anything longer continues a conversation
KIN = 4  # sessions of a template that were left alone, until the next one is taken for such from its first message on
ATTENDED_RATIO = 4  # a template is people's unless its long sessions without a second message are so many times more
SHORT_ANSWER = 1024

HEADLESS_AGENTS = ("codex_exec", "sdk-cli", "sdk-py", "agent-sdk", "openhands", "devin")
INTERACTIVE_AGENTS = ("codex-tui", "(external, cli)", "mozilla/")
PLAIN_CLIENTS = ("python-requests", "openai/python", "anthropic/python", "curl/", "python-httpx", "aiohttp")


class Evidence(NamedTuple):
    """All that a row may look at."""

    request: Request
    facts: Facts
    session: SessionView
    now: float


@dataclass(frozen=True, slots=True)
class Row:
    """`request_class` None: the row's fact names the class itself."""

    name: str
    matches: Callable[[Evidence], bool]
    request_class: RequestClass | None
    is_sticky: bool  # needs DEMOTIONS_NEEDED agreeing requests to take urgency from a known session


def _declares(seen: Evidence) -> bool:
    return seen.facts.declared_class is not None


def _is_batch_api(seen: Evidence) -> bool:
    facts = seen.facts
    return facts.service_tier in ("flex", "batch") or facts.completion_window == "24h" or facts.prompt_count > 1


def _is_background_api(seen: Evidence) -> bool:
    return seen.facts.background or bool(seen.facts.completion_window)


def _is_priority_tier(seen: Evidence) -> bool:
    return seen.facts.service_tier in ("priority", "fast")


def _is_inner_call(seen: Evidence) -> bool:
    return is_inner(seen.request) and seen.session.request_class is not None


def _is_burst(seen: Evidence) -> bool:
    return seen.session.burst >= BURST_COUNT or seen.session.siblings >= SIBLINGS


def _is_headless(seen: Evidence) -> bool:
    facts = seen.facts
    return facts.turn_trigger == "exec" or _names(facts.user_agent, facts.originator, HEADLESS_AGENTS)


def _is_interactive(seen: Evidence) -> bool:
    facts = seen.facts
    return (
        facts.turn_trigger == "user"
        or facts.has_interactive_tools
        or _names(facts.user_agent, facts.originator, INTERACTIVE_AGENTS)
    )


def _is_unattended(seen: Evidence) -> bool:
    if seen.facts.last_role == "user":
        return False  # this very message may be the human's
    alone_s = seen.now - seen.session.human_at if seen.session.human_at is not None else 0.0
    return alone_s > UNATTENDED_S or seen.session.tool_steps > UNATTENDED_STEPS


def _is_answered_by_people(seen: Evidence) -> bool:
    gap_s = seen.session.human_gap_s
    return gap_s is not None and HUMAN_GAP_S[0] <= gap_s <= HUMAN_GAP_S[1]


def _is_lone_loop(seen: Evidence) -> bool:
    """One human message and tool steps ever since. How many it takes is told by sessions that began alike: none where
    nobody came back to them or their clients named themselves agents, LONE_STEPS where nothing is known; where people
    do come back they never suffice. A first message is taken for one more where several sessions tell so."""
    session = seen.session
    is_begun = session.request_class is not None
    if session.human_messages > 1 or (seen.facts.last_role == "user" and is_begun):
        return False
    if session.template_attended * ATTENDED_RATIO > session.template_lone:
        return False
    if not is_begun:
        return seen.facts.message_count <= FIRST_MESSAGES and session.template_lone >= KIN
    return session.tool_steps >= (0 if session.template_lone else LONE_STEPS)


def _is_one_shot_job(seen: Evidence) -> bool:
    facts = seen.facts
    if facts.has_session or facts.tool_count or facts.stream:
        return False
    is_extraction = (
        facts.has_json_schema and seen.request.max_output is not None and seen.request.max_output <= SHORT_ANSWER
    )
    return is_extraction or _names(facts.user_agent, "", PLAIN_CLIENTS)


def _is_tool_loop(seen: Evidence) -> bool:
    facts = seen.facts
    return not facts.stream and (facts.tool_count > 0 or facts.last_role == "tool")


def _always(_: Evidence) -> bool:
    return True


ROWS = (
    Row("declared", _declares, None, is_sticky=False),
    Row("batch-api", _is_batch_api, BATCH, is_sticky=False),
    Row("background-api", _is_background_api, BACKGROUND, is_sticky=False),
    Row("priority-tier", _is_priority_tier, CHATBOT, is_sticky=False),
    Row("root-session", _is_inner_call, None, is_sticky=False),
    Row("burst", _is_burst, BATCH, is_sticky=False),
    Row("headless-agent", _is_headless, BACKGROUND, is_sticky=True),
    Row("interactive-agent", _is_interactive, CHATBOT, is_sticky=False),
    Row("unattended", _is_unattended, BACKGROUND, is_sticky=True),
    Row("human-pace", _is_answered_by_people, CHATBOT, is_sticky=False),
    Row("lone-loop", _is_lone_loop, BACKGROUND, is_sticky=True),
    Row("one-shot-job", _is_one_shot_job, BATCH, is_sticky=True),
    Row("tool-loop", _is_tool_loop, BACKGROUND, is_sticky=True),
    Row("default", _always, CHATBOT, is_sticky=False),
)


def classify(request: Request, session: SessionView, now: float) -> Classified:
    """The class of the first row that matches, clamped to the tenant and slowed by hysteresis."""
    evidence = Evidence(request, request.facts, session, now)
    row = next(row for row in ROWS if row.matches(evidence))
    proposed = _class_of(row, request, session)
    clamped = max(proposed, request.tenant.most_urgent)
    reason = row.name if clamped == proposed else f"{row.name}, clamped to tenant"
    current = session.request_class
    if row.is_sticky and current is not None and clamped > current:
        agreeing = session.agreeing + 1 if session.demotion == clamped else 1
        if agreeing < DEMOTIONS_NEEDED:
            return Classified(current, f"{reason}, not yet", clamped)
    return Classified(clamped, reason, clamped)


def _class_of(row: Row, request: Request, session: SessionView) -> RequestClass:
    """A row without a class says what was declared, or what the root session is."""
    for named in (row.request_class, request.facts.declared_class, session.request_class):
        if named is not None:
            return named
    raise AssertionError(f"row {row.name} matched without a class")


def _names(user_agent: str, originator: str, known: tuple[str, ...]) -> bool:
    said = f"{user_agent} {originator}".lower()
    return any(name in said for name in known)
