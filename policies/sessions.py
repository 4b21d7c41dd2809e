"""What is remembered of sessions and of prompt templates: the few bits that later requests are judged by.

Owns two bounded maps, least recently used first out. Never holds text: a template is a hash."""

from __future__ import annotations

from dataclasses import dataclass, field

from policies.api import Classified, SessionView
from policies.request import Request, RequestClass

BURST_WINDOW_S = 10.0
BURST_COUNT = 6  # of a fresh template: the recall of scripts is 85 % from their third request on; 8 gave 76
GAPS_KEPT = 5
REMEMBERED_S = 3600.0  # a session or a template not seen for an hour begins anew
HUMAN_GAP_S = (5.0, 300.0)  # shorter is a program, longer says nothing (TraceLab: median human wait 84 s)
LONE_STEPS = 12  # tool steps on one human message: TraceLab's people send the next one after 7.8 on average
# Rows whose fact a client says of itself; a session of theirs tells at once what else takes a dozen steps to see.
SAID = ("declared", "headless-agent", "interactive-agent")
FADE = 32  # sessions of a template in whose memory old ones fade by half

SessionKey = tuple[str, str]  # salt domain, session: a stranger cannot inherit somebody's class
TemplateKey = tuple[str, int]  # tenant, template hash


@dataclass(slots=True)
class _Session:
    request_class: RequestClass
    seen_at: float
    demotion: RequestClass | None = None
    agreeing: int = 0
    human_at: float | None = None
    tool_steps: int = 0
    answered_at: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    answers: int = 0
    human_messages: int = 0
    is_lone: bool = False  # has done LONE_STEPS on its first human message
    is_said: bool = False  # its client said what it is
    messages: int = 0  # how long the conversation was in its last request
    template: int = 0  # of its first request


@dataclass(slots=True)
class _Template:
    times: list[float] = field(default_factory=list)  # the last BURST_COUNT
    siblings: int = 0
    lone: int = 0  # sessions, each counted here or ...
    attended: int = 0  # ... here, or in neither yet


NO_TEMPLATE = _Template()


class Sessions:
    """Remembers; `view` tells what a decision may know, `note` counts the request afterwards."""

    def __init__(self, sessions_max: int, templates_max: int) -> None:
        self._sessions_max, self._templates_max = sessions_max, templates_max
        self._sessions: dict[SessionKey, _Session] = {}
        self._templates: dict[TemplateKey, _Template] = {}

    def view(self, request: Request, now: float) -> SessionView:
        """What is known of this request's session and siblings. Counts the request as a sibling, nothing else."""
        burst, siblings = self._count_sibling(request, now)
        session = self._find(request, now)
        name = session.template if session is not None else request.facts.template_hash
        template = self._templates.get((request.tenant.id, name), NO_TEMPLATE)
        if session is None:
            return SessionView(
                burst=burst,
                siblings=siblings,
                template_lone=template.lone,
                template_attended=template.attended,
            )
        gaps_s = _gaps_s(session, request)
        return SessionView(
            request_class=session.request_class,
            demotion=session.demotion,
            agreeing=session.agreeing,
            human_at=session.human_at,
            tool_steps=session.tool_steps,
            human_gap_s=sorted(gaps_s)[len(gaps_s) // 2] if gaps_s else None,
            burst=burst,
            siblings=siblings,
            human_messages=session.human_messages,
            template_lone=template.lone,
            template_attended=template.attended,
        )

    def note(self, request: Request, classified: Classified, now: float) -> None:
        """The request was classified. Side calls and subagents say nothing of their root."""
        if not request.session or is_inner(request):
            return
        session = self._find(request, now)
        if session is None:
            session = _Session(classified.request_class, now, template=request.facts.template_hash)
            self._count_said(request.tenant.id, session, classified)
        key = _key(request)
        self._sessions.pop(key, None)
        self._sessions[key] = session
        while len(self._sessions) > self._sessions_max:
            del self._sessions[next(iter(self._sessions))]
        session.seen_at = now
        was_attended, was_lone = session.human_messages > 1, session.is_lone
        _count_turn(session, request, now)
        _count_votes(session, classified)
        self._count_fate(request.tenant.id, session, was_attended=was_attended, was_lone=was_lone)

    def answered(self, request: Request, now: float) -> None:
        """An answer ended by itself."""
        session = self._find(request, now)
        if session is not None and not is_inner(request):
            session.answered_at = now
            session.answers += 1

    def left_early(self, request: Request, now: float) -> None:
        """The client left before the first token: people do that."""
        session = self._find(request, now)
        if session is not None and request.facts.last_role == "user" and not is_inner(request):
            session.gaps_s = [*session.gaps_s, 10.0][-GAPS_KEPT:]

    def is_continuing(self, request: Request, now: float) -> bool:
        """Whether this session has had an answer already."""
        session = self._find(request, now)
        return session is not None and session.answers > 0

    def _count_said(self, tenant: str, session: _Session, classified: Classified) -> None:
        """A new session whose client names itself counts at once, and never again."""
        template = self._templates.get((tenant, session.template))
        session.is_said = classified.reason.partition(",")[0] in SAID
        if template is not None and session.is_said:
            is_alone = classified.proposed != RequestClass.CHATBOT
            template.lone += is_alone
            template.attended += not is_alone
            _fade(template)

    def _count_fate(self, tenant: str, session: _Session, *, was_attended: bool, was_lone: bool) -> None:
        """Whether people come back to sessions of this template: each session counts once, as what it has become."""
        template = self._templates.get((tenant, session.template))
        if template is None or session.is_said:
            return
        if session.human_messages > 1 and not was_attended:
            template.attended += 1
            template.lone = max(0, template.lone - was_lone)
        elif session.human_messages <= 1 and session.tool_steps == LONE_STEPS:
            session.is_lone = True
            template.lone += 1
        _fade(template)

    def _find(self, request: Request, now: float) -> _Session | None:
        session = self._sessions.get(_key(request)) if request.session else None
        return session if session is not None and now - session.seen_at <= REMEMBERED_S else None

    def _count_sibling(self, request: Request, now: float) -> tuple[int, int]:
        facts = request.facts
        if not facts.template_hash:
            return 0, 0
        key = (request.tenant.id, facts.template_hash)
        template = self._templates.pop(key, None) or _Template()
        self._templates[key] = template
        while len(self._templates) > self._templates_max:
            del self._templates[next(iter(self._templates))]
        if facts.message_count > 2:  # system and user: anything longer continues a conversation
            template.siblings, template.times = 0, []
            return 0, 0
        if facts.stream:
            return 0, template.siblings
        if template.times and now - template.times[-1] > REMEMBERED_S:
            template.siblings = 0
        template.siblings += 1
        template.times = [time for time in (*template.times, now)[-BURST_COUNT:] if now - time <= BURST_WINDOW_S]
        return len(template.times), template.siblings


def _fade(template: _Template) -> None:
    if template.lone + template.attended > FADE:
        template.lone, template.attended = template.lone // 2, template.attended // 2


def is_inner(request: Request) -> bool:
    """A subagent's or a side call: part of a session that somebody else leads."""
    return bool(request.facts.agent_id) or request.facts.is_side_call


def _key(request: Request) -> SessionKey:
    return request.tenant.organisation, request.session


def _gaps_s(session: _Session, request: Request) -> list[float]:
    """How long people took to answer, this request's own wait included."""
    if request.facts.last_role != "user" or session.answered_at is None:
        return session.gaps_s
    return [*session.gaps_s, request.arrived - session.answered_at][-GAPS_KEPT:]


def _count_turn(session: _Session, request: Request, now: float) -> None:
    session.human_messages += _is_human_message(session, request)
    session.messages = request.facts.message_count
    if request.facts.last_role == "user":
        session.gaps_s = _gaps_s(session, request)
        session.human_at, session.tool_steps = now, 0
    else:
        session.tool_steps += 1
    session.answered_at = None


def _is_human_message(session: _Session, request: Request) -> bool:
    """A first message, or one that continues the conversation. A repeated request does not, nor does a side call that
    says nothing of being one; and what follows an answer within seconds was written by a program."""
    if request.facts.last_role != "user" or request.facts.message_count <= session.messages:
        return False
    return session.answered_at is None or request.arrived - session.answered_at >= HUMAN_GAP_S[0]


def _count_votes(session: _Session, classified: Classified) -> None:
    proposed, current = classified.proposed, classified.request_class
    session.agreeing = session.agreeing + 1 if proposed == session.demotion else 1
    session.demotion = proposed
    if proposed <= current:
        session.demotion, session.agreeing = None, 0
    session.request_class = current
