"""One simulated run of bench/policies.py: what is offered, who decides, and the tallies that all tables are made of.

Owns the workloads at any load and the two halves of each: constants are tuned on one, capacities measured on the other.
Knows no policy by name and keeps nothing."""

from __future__ import annotations

import functools
import hashlib
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from loadgen import compose, formats
from loadgen.formats import weka
from loadgen.judged import Judged, judge_one
from loadgen.ranks import quantiles
from loadgen.records import Record
from loadgen.sim.profiles import H100_8B
from loadgen.sim.world import Setting, World
from loadgen.simulate import judged, simulate
from loadgen.targets import PUBLISHED, target_of
from loadgen.traces import CLASSES, Row, Tally, Trace
from policies import plugins
from policies.api import PolicySpec

PROFILE = msgspec.structs.replace(H100_8B, block_tokens=256, blocks_total=432_000 // 256)
GRACE_S = 300.0  # the longest answers take four minutes
JITTER_S = 3.0  # Mooncake's own recorder batches arrivals in steps of 3 s
TEST_SEED = 50  # seeds beyond it were not looked at when constants were chosen
TUNING_SEED = 100  # seeds beyond it draw what constants may be tuned on
WEKA_DIVISOR = 8  # real sessions are made for contexts eight times as long as the 8B shape's
WEKA_SESSIONS_PER_S = 0.1  # at load 1
USERS = 24

FILES = {
    "mooncake": ("conversation_trace.jsonl.zst",),
    "azure": ("AzureLLMInferenceTrace_conv.csv.zst", "AzureLLMInferenceTrace_code.csv.zst"),
    "weka": ("weka_requests.csv.zst",),
}
TITLES = {
    "mix": "T5, the composed mix of all classes",
    "mooncake": "T1, Mooncake conversation",
    "azure": "T3, Azure conversation and code with its bursts",
    "weka": "T4, Weka agents, closed loop",
}
LOADS = {
    "mix": "times the sessions of the mix (0.08 chats, 0.015 agents and 0.015 job bursts a second)",
    "mooncake": "times the recorded rate of 3.4 requests a second",
    "azure": "times the recorded rate of 8.1 requests a second",
    "weka": "times 0.1 session starts a second",
}


class Side(msgspec.Struct, frozen=True):
    """Who decides, as data: a router policy with its parameters, and a step policy."""

    router: str = "headway"
    engine: str = "headway"
    params: dict[str, Any] = {}


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a run depends on, the code and the files of traces aside."""

    case: str
    load: float
    side: Side
    seed: int = 1
    workers: int = 4
    duration_s: float = 150.0
    warmup_s: float = 30.0
    labels: Literal["declared", "inferred"] = "inferred"
    stripped: float = 0.2  # share of sessions without headers that name their client
    chat_load: float | None = None  # mix: chat alone at another load
    jobs_load: float | None = None  # mix: jobs alone at another load

    @property
    def is_tuning(self) -> bool:
        return self.seed > TUNING_SEED


class Tallies(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a run, or of several with other seeds."""

    groups: dict[str, list[tuple[int, int, int]]]  # by true class: (who shares one fate, met, offered)
    users: dict[str, tuple[int, int]]  # met and offered chat requests
    on_line: dict[str, int]
    smooth: dict[str, int]
    seen: dict[str, dict[str, int]]  # true class -> assigned one, from a session's third request on
    tokens_per_s: dict[str, float]  # prompt and answer, of answers that ended in the measured time
    ttft_p99_s: float | None  # of chat; the mean over seeds
    refused: int
    requests: int
    hit: float
    busy: float
    measured_s: float
    cpu_s: float


# What is offered ------------------------------------------------------------------------------------------------------


def missing(case: str, folder: Path | None) -> str:
    """Why a workload cannot be run here; empty if it can."""
    if case not in FILES:
        return ""
    if folder is None:
        return "no folder of public traces was named (--traces, or HEADWAY_TRACES)"
    absent = [name for name in FILES[case] if not (folder / name).is_file()]
    return f"{absent[0]} is not in {folder.name}" if absent else ""


def offered(run: Run, folder: Path | None) -> tuple[Trace, Sequence[str]]:
    """The trace, and for each row the name of those with whom it shares its fate: its session, its burst, itself."""
    if run.case == "mix":
        return _mix(run)
    assert folder is not None, missing(run.case, folder)
    paths = tuple(folder / name for name in FILES[run.case])
    return _weka(run, paths[0]) if run.case == "weka" else _dense(run, paths)


def _mix(run: Run) -> tuple[Trace, Sequence[str]]:
    mix = compose.Mix(users=USERS)
    chat = run.load if run.chat_load is None else run.chat_load
    jobs = run.load if run.jobs_load is None else run.jobs_load
    mix = replace(
        mix,
        chat=replace(mix.chat, sessions_per_s=mix.chat.sessions_per_s * chat),
        background=replace(mix.background, sessions_per_s=mix.background.sessions_per_s * run.load),
        jobs=replace(mix.jobs, bursts_per_s=mix.jobs.bursts_per_s * jobs),
    )
    trace = compose.drop_over_context(compose.compose(mix, run.seed, run.duration_s), PROFILE.context_max)
    return trace, [f"{run.seed}/{row.family or row.hash_ids[:1]}" for row in trace.rows]


def _dense(run: Run, paths: tuple[Path, ...]) -> tuple[Trace, Sequence[str]]:
    """A half of the recorded time, its arrivals in less time, cut to the duration; each seed begins elsewhere."""
    trace, rng = _loaded(paths), np.random.default_rng(run.seed)
    half_s = max(row.timestamp or 0.0 for row in trace.rows) / 2e3
    if run.duration_s * run.load > half_s:
        raise ValueError(
            f"{run.case} at {run.load:g} for {run.duration_s:g} s is more than the {half_s:.0f} s of a half"
        )
    begin_s = 0.0 if run.is_tuning else half_s
    begin_s += float(rng.uniform(0.0, max(0.0, half_s - run.duration_s * run.load)))
    found: list[tuple[float, int, Row]] = []
    for number, row in enumerate(trace.rows):
        at_s = ((row.timestamp or 0.0) / 1e3 - begin_s + float(rng.uniform(0.0, JITTER_S))) / run.load
        is_other_half = ((row.timestamp or 0.0) / 1e3 < half_s) != run.is_tuning
        if 0.0 <= at_s <= run.duration_s and not is_other_half:
            found.append((at_s, number, msgspec.structs.replace(row, timestamp=1e3 * at_s)))
    found = [one for one in sorted(found) if one[2].input_length + one[2].output_length <= PROFILE.context_max]
    return replace(trace, rows=tuple(row for _, _, row in found)), [f"#{number}" for _, number, _ in found]


def _weka(run: Run, path: Path) -> tuple[Trace, Sequence[str]]:
    """Whole sessions of one half by the hash of their names."""
    sessions = [one for one in _sessions(path) if (zlib.crc32(one.name.encode()) % 2 == 0) == run.is_tuning]
    count = max(2, round(run.load * WEKA_SESSIONS_PER_S * run.duration_s))
    if count > len(sessions):
        raise ValueError(f"{count} sessions are wanted, {len(sessions)} of this half fit the context")
    trace = compose.scale(weka.slice_of(sessions, count, run.seed, run.duration_s), WEKA_DIVISOR)
    return trace, [row.family for row in trace.rows]


@functools.cache
def _loaded(paths: tuple[Path, ...]) -> Trace:
    """Recordings of one time, together."""
    found = [formats.load(path) for path in paths]
    return replace(found[0], rows=tuple(row for one in found for row in one.rows))


@functools.cache
def _sessions(path: Path) -> list[weka.Session]:
    return weka.fitting(weka.sessions_of(path, Tally(path, strict=False)), WEKA_DIVISOR, PROFILE.context_max)


# What became of it ----------------------------------------------------------------------------------------------------


def measure(run: Run, folder: Path | None) -> Tallies:
    """Simulate and judge."""
    begun = time.process_time()
    trace, names = offered(run, folder)
    setting = Setting(
        router=plugins.load(PolicySpec(run.side.router, run.side.params)),
        engine=plugins.load_engine(run.side.engine),
        profiles=(PROFILE,) * run.workers,
        seed=run.seed,
        duration_s=run.duration_s,
        grace_s=GRACE_S,
        is_oracle=run.labels == "declared",
        stripped_share=run.stripped,
    )
    world = simulate(trace, setting)
    records = judged(world.records, run.warmup_s)
    return _tallied(run, world, [judge_one(one, target_of(one, PUBLISHED)) for one in records], names, begun)


def _tallied(run: Run, world: World, found: Sequence[Judged], names: Sequence[str], begun: float) -> Tallies:
    groups: dict[str, dict[int, list[int]]] = {name: {} for name in CLASSES}
    users: dict[str, list[int]] = {}
    for one in found:
        _count(groups[one.record.request_class], zlib.crc32(names[one.record.row].encode()), one.is_met)
        if one.record.request_class == "chatbot+" and one.record.user:
            _count(users, one.record.user, one.is_met)
    done = [one.record for one in found if one.record.outcome == "done"]
    ended = [r for r in world.records if r.outcome == "done" and run.warmup_s <= (r.end_s or 0.0) <= run.duration_s]
    measured_s = run.duration_s - run.warmup_s
    return Tallies(
        groups={name: [(who, *pair) for who, pair in sorted(pairs.items())] for name, pairs in groups.items()},  # type: ignore[misc]
        users={user: (pair[0], pair[1]) for user, pair in sorted(users.items())},
        on_line=_by_class(one.record.request_class for one in found if one.is_on_line),
        smooth=_by_class(one.record.request_class for one in found if one.is_smooth),
        seen=_seen([one.record for one in found]),
        tokens_per_s={
            name: sum(r.input_tokens + len(r.token_s) for r in ended if r.request_class == name) / measured_s
            for name in CLASSES
        },
        ttft_p99_s=quantiles(one.ttft_s for one in found if one.record.request_class == "chatbot+").p99,
        refused=sum(one.record.outcome == "refused" for one in found),
        requests=len(world.records),
        hit=sum(r.cached_tokens or 0 for r in done) / max(1, sum(r.input_tokens for r in done)),
        busy=sum(worker.busy_s for worker in world.workers) / len(world.workers) / max(world.now, 1e-9),
        measured_s=measured_s,
        cpu_s=time.process_time() - begun,
    )


def _count(tally: dict[Any, list[int]], key: Any, is_met: bool) -> None:
    pair = tally.setdefault(key, [0, 0])
    pair[0] += is_met
    pair[1] += 1


def _by_class(found: Any) -> dict[str, int]:
    counted = dict.fromkeys(CLASSES, 0)
    for name in found:
        counted[name] += 1
    return dict(counted)


def _seen(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """What each class was taken for, once there was something to go by."""
    seen: dict[str, dict[str, int]] = {name: dict.fromkeys(CLASSES, 0) for name in CLASSES}
    for record in records:
        if record.assigned_class and (record.turn >= 2 or not record.session):
            seen[record.request_class][record.assigned_class] += 1
    return seen


def joined(parts: Sequence[Tallies]) -> Tallies:
    """Several seeds as one. Who appears in two of them stays one when intervals are drawn."""
    return Tallies(
        groups={name: [one for part in parts for one in part.groups[name]] for name in CLASSES},
        users=_added_pairs([part.users for part in parts]),
        on_line={name: sum(part.on_line[name] for part in parts) for name in CLASSES},
        smooth={name: sum(part.smooth[name] for part in parts) for name in CLASSES},
        seen={name: {to: sum(part.seen[name][to] for part in parts) for to in CLASSES} for name in CLASSES},
        tokens_per_s={name: _mean(part.tokens_per_s[name] for part in parts) for name in CLASSES},
        ttft_p99_s=_mean(part.ttft_p99_s for part in parts if part.ttft_p99_s is not None),
        refused=sum(part.refused for part in parts),
        requests=sum(part.requests for part in parts),
        hit=_mean(part.hit for part in parts),
        busy=_mean(part.busy for part in parts),
        measured_s=sum(part.measured_s for part in parts),
        cpu_s=sum(part.cpu_s for part in parts),
    )


def _added_pairs(parts: Sequence[Mapping[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    added: dict[str, tuple[int, int]] = {}
    for part in parts:
        for user, (met, offered) in part.items():
            before = added.get(user, (0, 0))
            added[user] = (before[0] + met, before[1] + offered)
    return added


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def code_digest() -> str:
    """Of all code that a run depends on: what was found with other code is not taken for this one's."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(
        [Path(__file__), *(path for part in ("engine", "loadgen", "policies") for path in (root / part).rglob("*.py"))]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
