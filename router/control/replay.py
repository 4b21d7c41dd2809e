"""`headway replay-events`: a recording's events through a fresh reducer, its actions compared byte for byte.

Owns the comparison. Never repairs or skips: the first difference ends it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from policies.actions import Action
from policies.events import Event, PolicyFault
from router.control.record import Header, encode_actions, read_events, read_header
from router.control.reducer import build, load_policy, loader
from router.settings.config import Config

CONTEXT_LINES = 5  # events shown before a difference


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replay left its recording."""

    place: str  # file:line
    now: float
    event: Event
    recorded: bytes
    replayed: bytes
    before: Sequence[tuple[str, float, Event]]


@dataclass(frozen=True, slots=True)
class Outcome:
    header: Header
    events: int
    actions: int
    difference: Difference | None


def replay(path: Path) -> Outcome:
    """Replay until the end or the first difference. Raises RecordError, or PolicyError when the policy is not here."""
    header = read_header(path)
    faults = deque[PolicyFault]()  # what the guard sees again is in the recording already, as events
    config = Config.from_json(header.config)
    policy = load_policy(config, faults, is_timed=False)
    reducer = build(config, policy, header.seed, loader(faults, is_timed=False))
    before = deque[tuple[str, float, Event]](maxlen=CONTEXT_LINES)
    events = actions_count = 0
    for place, now, event, recorded in read_events(path):
        faults.clear()
        actions: Sequence[Action] = reducer.handle(event, now)
        replayed = encode_actions(actions)
        events += 1
        actions_count += len(actions)
        if replayed != recorded:
            difference = Difference(place, now, event, recorded, replayed, tuple(before))
            return Outcome(header, events, actions_count, difference)
        before.append((place, now, event))
    return Outcome(header, events, actions_count, None)


def explain(difference: Difference) -> str:
    """The difference for a person: what led to it, then both answers."""
    lines = [f"  {place}  {now:.6f}  {_short(event)}" for place, now, event in difference.before]
    lines += [
        f"> {difference.place}  {difference.now:.6f}  {_short(difference.event)}",
        f"  recorded: {difference.recorded.decode()[:2000]}",
        f"  replayed: {difference.replayed.decode()[:2000]}",
    ]
    return "\n".join(lines)


def _short(event: Event) -> str:
    text = repr(event)
    return text if len(text) <= 200 else text[:197] + "..."
