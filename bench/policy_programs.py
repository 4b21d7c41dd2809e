"""What Headway's memory of agents' programs is worth: each part with and without, on equal requests in the simulator.

`python -m bench.policy_programs tasks`: minutes on one core. Owns its cases and figures; every one is simulated, not
validated, and what does not pay here is not built in."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from bench.policy_runs import GRACE_S, PROFILE, Run, Side, offered
from loadgen.judged import Judged, judge_one
from loadgen.ranks import quantiles
from loadgen.records import Record
from loadgen.sim.world import Setting
from loadgen.simulate import LABEL, judged, simulate
from loadgen.targets import PUBLISHED, target_of
from policies.builtin import headway
from policies.limits import Limits

SEEDS = (61, 62, 63)
DURATION_S, WARMUP_S, WORKERS = 240.0, 40.0, 4
SLACKS_S = (0.0, 15.0, 60.0, 240.0)


class Case(NamedTuple):
    """Times the sessions of the mix."""

    agents: float
    chat: float
    jobs: float

    def run(self, seed: int) -> Run:
        """The requests of one seed."""
        return Run(
            case="mix",
            load=self.agents,
            chat_load=self.chat,
            jobs_load=self.jobs,
            side=Side(),
            seed=seed,
            duration_s=DURATION_S,
        )


CASES = (Case(8.0, 8.0, 8.0), Case(11.3, 11.3, 11.3), Case(24.0, 6.0, 6.0), Case(36.0, 5.0, 5.0))


def setting(seed: int, limits: Limits) -> Setting:
    """Headway with these bounds; classes are declared, so that nothing else differs."""
    return Setting(
        router=headway({}),
        engine=None,
        profiles=(PROFILE,) * WORKERS,
        limits=limits,
        seed=seed,
        duration_s=DURATION_S,
        grace_s=GRACE_S,
        is_oracle=True,
    )


def found(case: Case, limits: Limits) -> list[Judged]:
    """All requests of all seeds, judged."""
    records: list[Record] = []
    for seed in SEEDS:
        trace, _ = offered(case.run(seed), None)
        records += judged(simulate(trace, setting(seed, limits)).records, WARMUP_S)
    return [judge_one(one, target_of(one, PUBLISHED)) for one in records]


def tasks_met(all_found: Iterable[Judged]) -> list[bool]:
    """By session: whether all its turns were answered, and took no longer together than their deadlines together."""
    left_s: dict[str, float] = {}
    for one in all_found:
        if one.record.request_class == "background-agent":
            spent_s = one.target.deadline_s - one.e2e_s if one.e2e_s is not None else float("-inf")
            left_s[one.record.session] = left_s.get(one.record.session, 0.0) + spent_s
    return [seconds >= 0.0 for seconds in left_s.values()]


def row(name: str, all_found: list[Judged]) -> str:
    """One line of a table."""
    chat, agents = (
        [one for one in all_found if one.record.request_class == label] for label in ("chatbot+", "background-agent")
    )
    tasks = tasks_met(all_found)
    ttft = quantiles(one.ttft_s for one in chat)
    figures = (_share(one.is_met for one in chat), _share(one.is_met for one in agents), _share(tasks))
    return f"| {name} | {' | '.join(figures)} | {ttft.p99 or 0.0:.2f} | {len(chat)} | {len(agents)} | {len(tasks)} |"


HEAD = "| {} | chat % | agents' turns % | tasks % | chat TTFT p99 s | chats | turns | tasks |\n" + 8 * "|---" + "|"


def _share(met: Iterable[bool]) -> str:
    seen = list(met)
    return f"{100 * sum(seen) / max(1, len(seen)):.1f}"


def tasks() -> None:
    """Slack that a task's turns hand on, by its bound; 0: each turn is by itself."""
    for case in CASES:
        print(f"\nAgents x{case.agents:g}, chat x{case.chat:g}, jobs x{case.jobs:g}\n\n{HEAD.format('at most, s')}")
        for slack_s in SLACKS_S:
            print(row(f"{slack_s:g}", found(case, replace(Limits(), task_slack_max_s=slack_s))), flush=True)


PARTS = {"tasks": tasks}


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
