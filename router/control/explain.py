"""`headway explain-class`: why a recorded request is of its class: what it said, what was known, which row matched.

Owns the words. Decides nothing: the recording is replayed up to that request, and the policy's own answer is shown."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from policies.api import Classified, RouterPolicy, SessionView
from policies.classify import ROWS, Evidence
from policies.events import Offered, PolicyFault
from policies.request import Request
from router.control.record import RecordError, read_events, read_header
from router.control.reducer import build, load_policy, loader
from router.settings.config import Config


@dataclass(frozen=True, slots=True)
class Asked:
    """One call of the policy's classify, and its answer."""

    request: Request
    session: SessionView
    now: float
    answer: Classified


def ask(path: Path, request_id: str) -> Asked:
    """The call that classified `request_id`; an unambiguous beginning of it will do. Raises RecordError."""
    header = read_header(path)
    config = Config.from_json(header.config)
    faults, found = deque[PolicyFault](), list[Asked]()
    load = loader(faults, is_timed=False)

    def listened(policy: RouterPolicy) -> RouterPolicy:
        def listening(request: Request, session: SessionView, now: float) -> Classified:
            answer = policy.classify(request, session, now)
            if request.id.startswith(request_id):
                found.append(Asked(request, session, now, answer))
            return answer

        return dataclasses.replace(policy, classify=listening)

    policy = listened(load_policy(config, faults, is_timed=False))
    reducer = build(config, policy, header.seed, lambda text: listened(load(text)))
    for _, now, event, _ in read_events(path):
        reducer.handle(event, now)
        if isinstance(event, Offered) and event.request.id == request_id:
            break
    if len(found) != 1:
        what = "no request" if not found else f"{len(found)} requests"
        raise RecordError(f"{path}: {what} begin with {request_id!r}")
    return found[0]


def words(asked: Asked) -> str:
    """For a person: the answer, what was said, what was remembered, and the table of rows up to the match."""
    request, answer = asked.request, asked.answer
    lines = [
        f"request {request.id} of tenant {request.tenant.id}: {answer.request_class.label}, by {answer.reason}",
        "",
        "it said:",
        *(f"  {name} = {value!r}" for name, value in _told(request.facts)),
        f"  session = {request.session or 'none'!r}",
        "remembered of its session and template:",
        *([f"  {name} = {value!r}" for name, value in _told(asked.session)] or ["  nothing"]),
        "rows, the first that matches decides:",
    ]
    evidence = Evidence(request, request.facts, asked.session, asked.now)
    for row in ROWS:
        is_match = row.matches(evidence)
        lines.append(f"  {'->' if is_match else '  '} {row.name}")
        if is_match:
            break
    if answer.proposed != answer.request_class:
        lines.append(
            f"the row says {answer.proposed.label}; a known session loses urgency only after three of them agree"
        )
    if not answer.reason.startswith(row.name):
        lines.append("the configured policy has rules of its own: these rows are Headway's")
    return "\n".join(lines)


def _told(facts: object) -> list[tuple[str, object]]:
    """Fields that differ from their default."""
    fields = dataclasses.fields(facts)  # type: ignore[arg-type]
    values = ((field.name, getattr(facts, field.name), field.default) for field in fields)
    return [(name, value) for name, value, default in values if value != default]
