"""Turns: which rows of a trace wait for which, so that each is offered its delay after the last that it waits for.

Owns the edges: a session's own turn before, and what `after` names: sub-agents and their callers. Keeps no clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from loadgen.traces import Trace, turn_names

NEVER = 1 << 30  # more than a row can wait for


@dataclass(slots=True)
class Turns:
    """One run's view of a trace; `ended` and `lost` are told once a row."""

    trace: Trace
    number: list[int] = field(init=False)  # of each row in its session
    _followers: dict[int, list[int]] = field(init=False)
    _missing: list[int] = field(init=False)
    calls_tool: list[bool] = field(init=False)  # whether the session's next row comes back from a tool

    def __post_init__(self) -> None:
        places = {name: index for index, name in enumerate(turn_names(self.trace.rows)) if name}
        seen: dict[str, int] = {}
        self.number, self._followers, self._missing = [], {}, []
        self.calls_tool = [False] * len(self.trace.rows)
        for index, row in enumerate(self.trace.rows):
            number = seen.get(row.session_id, 0) if row.session_id else 0
            seen[row.session_id] = number + 1
            before = [places[f"{row.session_id}#{number - 1}"]] if number else []
            for earlier in before:
                self.calls_tool[earlier] = row.gap == "tool"
            before += [places[name] for name in row.after if name in places]
            self.number.append(number)
            self._missing.append(len(before))
            for earlier in before:
                self._followers.setdefault(earlier, []).append(index)

    def roots(self, load: float) -> list[tuple[float, int]]:
        """When each row that waits for nothing is offered, by that time: session starts come `load` times as fast."""
        starts = [(row.timestamp or 0.0) / 1e3 / load for row in self.trace.rows]
        found = [(starts[index], index) for index, missing in enumerate(self._missing) if not missing]
        return sorted(found, key=lambda one: one[0])

    def delay_s(self, index: int) -> float:
        return (self.trace.rows[index].delay or 0.0) / 1e3

    def ended(self, index: int) -> Iterator[int]:
        """Rows that waited for this one last."""
        for follower in self._followers.get(index, ()):
            self._missing[follower] -= 1
            if not self._missing[follower]:
                yield follower

    def lost(self, index: int, at_s: float, until_s: float) -> Iterator[int]:
        """Rows that a failure costs: those that an ideal server would have been asked before `until_s`."""
        open_at = [(index, at_s)]
        while open_at:
            failed, failed_s = open_at.pop(0)
            for follower in self._followers.get(failed, ()):
                due_s = failed_s + self.delay_s(follower)
                if due_s <= until_s and self._missing[follower] < NEVER // 2:
                    self._missing[follower] = NEVER  # whatever else it waits for, it is not offered any more
                    open_at.append((follower, due_s))
                    yield follower
