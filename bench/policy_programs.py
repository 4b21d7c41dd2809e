"""What Headway's memory of agents' programs is worth: each part with and without, on equal requests in the simulator.

`python -m bench.policy_programs tasks`: minutes on one core. Owns its cases and figures; every one is simulated, not
validated, and what does not pay here is not built in."""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from bench.policy_runs import GRACE_S, PROFILE, Run, Side, missing, offered
from loadgen.judged import Judged, judge_one
from loadgen.ranks import quantiles
from loadgen.sim.profiles import Profile
from loadgen.sim.world import Setting, World
from loadgen.simulate import LABEL, judged
from loadgen.targets import PUBLISHED, target_of
from policies.actions import Action, Dispatch, Reject
from policies.api import EnginePolicy
from policies.builtin import headway, headway_engine
from policies.events import Event, Offered
from policies.limits import Limits
from policies.retention import Band, KeepLimits, SpanView, keep

SEEDS = (61, 62, 63)
WARMUP_S, WORKERS = 40.0, 4
SLACKS_S = (0.0, 15.0, 60.0, 240.0)


class Case(NamedTuple):
    """Times the sessions of the mix."""

    agents: float
    chat: float
    jobs: float
    duration_s: float = 240.0
    name: Literal["mix", "weka"] = "mix"

    @property
    def workers(self) -> int:
        """Half as many for Weka's sessions."""
        return WORKERS if self.name == "mix" else WORKERS // 2

    def run(self, seed: int) -> Run:
        """The requests of one seed."""
        return Run(
            case=self.name,
            load=self.agents,
            chat_load=self.chat,
            jobs_load=self.jobs,
            side=Side(),
            seed=seed,
            duration_s=self.duration_s,
        )


CROWDS = (Case(20.0, 20.0, 20.0, 120.0), Case(30.0, 30.0, 30.0, 120.0))
SHARES = (0.0, 0.05)
SMALL_ROOM_S = (3.0, 10.0, 20.0)  # a tenth and less of the real ones, where clients lose patience before they are full
LEASE_CASES = (
    (Case(4.0, 4.0, 4.0, 180.0, "weka"), 1.0),
    (Case(4.0, 4.0, 4.0, 180.0, "weka"), 0.6),
    (Case(8.0, 8.0, 8.0), 0.5),
)
TRACES = Path(os.environ["HEADWAY_TRACES"]) if "HEADWAY_TRACES" in os.environ else None
CASES = (Case(8.0, 8.0, 8.0), Case(11.3, 11.3, 11.3), Case(24.0, 6.0, 6.0), Case(36.0, 5.0, 5.0))


@dataclass(slots=True)
class Found:
    """All requests of all seeds, judged, and what became of those that came back from a refusal."""

    judged: list[Judged] = field(default_factory=list)
    returns: int = 0
    admitted: int = 0  # of the returns
    made: int = 0  # reservations
    kept: int = 0  # that their clients came to, and were placed by

    def write(self, now: float, event: Event, actions: Sequence[Action]) -> None:
        """Recorder of a world: its clients obey, so every return is in time."""
        del now
        self.returns += isinstance(event, Offered) and _is_return(event.request.id)
        for action in actions:
            if isinstance(action, Dispatch):
                self.admitted += _is_return(action.request_id)
                self.kept += action.is_reserved
            elif isinstance(action, Reject):
                self.made += action.is_reserved


def _is_return(request_id: str) -> bool:
    return not request_id.endswith(".1")


def found(case: Case, limits: Limits, *, profile: Profile = PROFILE, engine: EnginePolicy | None = None) -> Found:
    """Headway with these bounds on these workers; classes are declared, so that nothing else differs."""
    seen = Found()
    for seed in SEEDS:
        trace, _ = offered(case.run(seed), TRACES)
        setting = Setting(
            router=headway({}),
            engine=engine,
            profiles=(profile,) * case.workers,
            limits=limits,
            seed=seed,
            duration_s=case.duration_s,
            grace_s=GRACE_S,
            is_oracle=True,
        )
        records = judged(World(trace, setting, seen).run(), WARMUP_S)
        seen.judged += [judge_one(one, target_of(one, PUBLISHED)) for one in records]
    return seen


def tasks_met(turns: Iterable[Judged]) -> list[bool]:
    """By session: whether all its turns were answered, and took no longer together than their deadlines together."""
    left_s: dict[str, float] = {}
    for one in turns:
        spared_s = one.target.deadline_s - one.e2e_s if one.e2e_s is not None else -math.inf
        left_s[one.record.session] = left_s.get(one.record.session, 0.0) + spared_s
    return [seconds >= 0.0 for seconds in left_s.values()]


def tasks() -> None:
    """Slack that a task's turns hand on, by its bound; 0: each turn is by itself."""
    for case in CASES:
        _head(case, "at most, s", "chat %", "turns %", "tasks %", "chat TTFT p99 s", "chats", "turns", "tasks")
        for slack_s in SLACKS_S:
            seen = found(case, replace(Limits(), task_slack_max_s=slack_s))
            chat, agents = _of(seen, "chatbot+"), _of(seen, "background-agent")
            met, p99_s = tasks_met(agents), quantiles(one.ttft_s for one in chat).p99 or 0.0
            _row(
                f"{slack_s:g}", _met(chat), _met(agents), _share(met), f"{p99_s:.2f}", len(chat), len(agents), len(met)
            )


def reservations() -> None:
    """Room kept by a refusal, by a tenant's share of the waiting room; 0: who comes back is a newcomer."""
    for case in CROWDS:
        _head(case, "share", "chat %", "returns", "admitted %", "made", "kept", "refused", "abandoned", "attempts")
        for share in SHARES:
            seen = found(case, replace(Limits(), room_s=SMALL_ROOM_S, reservation_share=share))
            chat = _of(seen, "chatbot+")
            ends = Counter(one.record.outcome for one in chat)
            tries = [one.record.attempts for one in chat if one.record.attempts]
            back = f"{100 * seen.admitted / max(1, seen.returns):.1f}"
            told = (seen.made, seen.kept, ends["refused"], ends["abandoned"], f"{sum(tries) / len(tries):.3f}")
            _row(f"{share:g}", _met(chat), seen.returns, back, *told)


def leases() -> None:
    """How long a session's KV goes before what no lease keeps: by its state, or after every turn alike."""
    for case, memory in LEASE_CASES:
        if why := missing(case.name, TRACES):
            print(f"\n{case.name} is left out: {why}")
            continue
        profile = msgspec.structs.replace(PROFILE, blocks_total=round(memory * PROFILE.blocks_total))
        _head(case, "leases", "memory", "chat %", "turns %", "hits %", "chat TTFT p99 s")
        for name, engine in LEASES.items():
            seen = found(case, Limits(), profile=profile, engine=engine)
            chat, agents = _of(seen, "chatbot+"), _of(seen, "background-agent")
            done = [one.record for one in seen.judged if one.record.outcome == "done"]
            hits = sum(one.cached_tokens or 0 for one in done) / sum(one.input_tokens for one in done)
            p99_s = quantiles(one.ttft_s for one in chat).p99 or 0.0
            _row(name, memory, _met(chat), _met(agents), f"{100 * hits:.2f}", f"{p99_s:.2f}")


PARTS = {"tasks": tasks, "reservations": reservations, "leases": leases}


def _blind(span: SpanView, now: float) -> tuple[Band, float]:
    return keep(replace(span, has_called=None), now)


def _leased(seconds: float) -> EnginePolicy:
    """After a call of a tool so long, and not at all behind an answer."""
    limits = KeepLimits(session_s=(seconds, seconds, 0.0))
    return replace(headway_engine(), keep=partial(keep, limits=limits))


LEASES = {
    "none": _leased(0.0),
    "30 s or 15 s behind every turn": replace(headway_engine(), keep=_blind),
    **{f"{seconds:g} s behind a call": _leased(seconds) for seconds in (5.0, 15.0, 30.0)},
}


def _of(seen: Found, name: str) -> list[Judged]:
    return [one for one in seen.judged if one.record.request_class == name]


def _met(some: Iterable[Judged]) -> str:
    return _share(one.is_met for one in some)


def _head(case: Case, *columns: str) -> None:
    load = f"agents x{case.agents:g}, chat x{case.chat:g}, jobs x{case.jobs:g}" if case.name == "mix" else case.chat
    print(f"\n{case.name}: {load}, {case.duration_s:g} s, seeds {SEEDS}\n")
    _row(*columns)
    _row(*("---" for _ in columns))


def _row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _share(met: Iterable[bool]) -> str:
    seen = list(met)
    return f"{100 * sum(seen) / max(1, len(seen)):.1f}"


def main() -> None:
    """Print the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parts = parser.parse_args().parts
    print(LABEL)
    for name in parts:
        PARTS[name]()


if __name__ == "__main__":
    main()
