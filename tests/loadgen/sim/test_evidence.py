"""bench.policies on a tiny budget: all tables are made, kept runs are not made again, absent traces are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace as changed

from bench import policies, policy_sides, policy_tables
from bench.policies import MAIN, SCALES, run
from bench.policy_lab import Lab, Scale, Slice, crossings, margin
from bench.policy_runs import Run, Side, Tallies, joined, measure
from bench.policy_sides import GRIDS, OURS
from loadgen.traces import CLASSES
from policies.builtin import BUILTINS
from policies.dispatcher import Dispatcher
from policies.step_plan import BatchView, plan
from tests.policies.scenes import LIMITS, STEP_MODEL, dispatched, load, offer, report, request, up

TINY = Scale(
    "tiny",
    (Slice("mix", 12.0, 2.0, 1, 1.0, workers=1), Slice("mooncake", 12.0, 2.0, 1, 1.0)),
    points_max=2,
    contest=MAIN,
    tuning_loads=(0.5,),
    overload=(1.0, 2.0),
)
TITLES = ("Tuning", "Capacity", "Attainment", "Router x engine", "Ablations", "Who says", "Classifier", "Overload")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evidence") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_tables, "BATCH", {"workers": 1, "duration_s": 8.0, "warmup_s": 2.0})
        patch.setattr(policy_tables, "BATCH_LOAD", 20.0)
        lab = Lab(TINY, out.parent, out.with_suffix(".runs.jsonl"))
        run(lab, out)
        assert lab.made == lab.runs > 30
        again = Lab(TINY, out.parent, out.with_suffix(".runs.jsonl"))
        run(again, out)
        assert again.made == 0, "a kept run was made again"
    return out


def test_the_command_makes_every_table_and_the_three_files(made: Path) -> None:
    tables = json.loads(made.with_suffix(".json").read_text())["tables"]
    titles = [table["title"] for table in tables]
    assert all(any(title.startswith(wanted) for title in titles) for wanted in (*TITLES, "Batch", "Goals"))
    assert all(len(row) == len(table["rows"][0]) for table in tables for row in table["rows"])
    tuning = next(table["rows"] for table in tables if table["title"].startswith("Tuning"))
    assert len(tuning) == 1 + sum(map(len, GRIDS.values()))
    assert [row[-1] for row in tuning].count("yes") == len(GRIDS), "one winner a grid"
    for suffix in (".html", ".md"):
        assert "simulated, not validated" in made.with_suffix(suffix).read_text()


def test_a_workload_that_is_not_there_is_skipped_with_the_reason(made: Path) -> None:
    assert "conversation_trace.jsonl.zst is not in" in made.with_suffix(".md").read_text()


def test_runs_of_other_code_are_not_taken(made: Path) -> None:
    assert Lab(TINY, None, made.with_suffix(".runs.jsonl")).runs > 0
    assert Lab(TINY, None, made.with_suffix(".runs.jsonl"), code="other").runs == 0


def tallies(met: int, offered: int, sessions: int = 200) -> Tallies:
    groups: dict[str, list[tuple[int, int, int]]] = {name: [] for name in CLASSES}
    groups["chatbot+"] = [(who, met, offered) for who in range(sessions)]
    zero = dict.fromkeys(CLASSES, 0)
    return Tallies(
        groups=groups,
        users={"u": (met, offered)},
        on_line=zero,
        smooth=zero,
        seen={name: dict(zero) for name in CLASSES},
        tokens_per_s=dict.fromkeys(CLASSES, 0.0),
        ttft_p99_s=1.0,
        refused=0,
        requests=offered,
        hit=0.5,
        busy=0.5,
        measured_s=10.0,
        cpu_s=1.0,
    )


def test_a_capacity_lies_between_the_loads_where_the_margin_changes_its_sign() -> None:
    curve = [(1.0, tallies(100, 100)), (2.0, tallies(98, 100)), (4.0, tallies(50, 100))]
    found = crossings(curve)
    assert margin(curve[0][1]) == pytest.approx(0.01)
    assert np.all((found > 1.0) & (found < 2.0))
    assert np.all(crossings([curve[0]]) == 1.0)


def test_seeds_add_up() -> None:
    both = joined([tallies(9, 10), changed(tallies(10, 10), refused=3)])
    assert (both.users["u"], both.refused, both.measured_s) == ((19, 20), 3, 20.0)
    assert len(both.groups["chatbot+"]) == 400


def test_tuning_and_test_runs_see_different_requests() -> None:
    run_of = Run(case="mix", load=1.0, side=Side(), workers=1, duration_s=10.0, warmup_s=0.0)
    assert measure(run_of, None).groups != measure(changed(run_of, seed=101), None).groups
    assert changed(run_of, seed=101).is_tuning


def test_the_ladder_finds_the_edge_and_stops_at_what_a_trace_has(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(replace(TINY, points_max=12, slices=(replace(TINY.slices[0], most=3.0),)), None, Path("unused"))
    monkeypatch.setattr(Lab, "point", lambda _, __, load, *___, **____: tallies(100 if load < 1.9 else 90, 100))
    curve = lab.curve("mix", Side(), 1.0)
    passing, failing = (max(x for x, f in curve if margin(f) >= 0), min(x for x, f in curve if margin(f) < 0))
    assert failing / passing == pytest.approx(2**0.25)
    assert passing < 1.9 <= failing
    monkeypatch.setattr(Lab, "point", lambda *_, **__: tallies(100, 100))
    assert max(load for load, _ in lab.curve("mix", Side(), 1.0)) <= 3.0


def test_every_scale_names_its_slices_once() -> None:
    for scale in SCALES.values():
        assert len(set(scale.cases)) == len(scale.slices)
        assert OURS in (scale.contest or MAIN)


def test_the_command_runs_what_its_words_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Lab] = []
    monkeypatch.setattr(policies, "run", lambda lab, _: asked.append(lab))
    out = tmp_path / "new" / "report"
    assert policies.main(["--quick", "--jobs", "1", "--out", str(out)]) == 0
    assert policies.main(["--scale", "part", "--seeds", "5", "--jobs", "1", "--traces", "t", "--out", str(out)]) == 0
    assert [(lab.scale.name, lab.scale.slices[0].seeds, lab.folder) for lab in asked] == [
        ("quick", 1, None),
        ("part", 5, Path("t")),
    ]


def test_curves_may_have_more_seeds_than_other_points_and_tuning_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def one(_: Lab, run: Run) -> Tallies:
        seeds.append(run.seed)
        return tallies(100, 100)

    monkeypatch.setattr(Lab, "one", one)
    lab = Lab(replace(TINY, slices=(replace(TINY.slices[0], seeds=3, table_seeds=1),)), None, Path("unused"))
    lab.point("mix", 1.0, Side())
    lab.point("mix", 1.0, Side(), is_curve=True)
    lab.point("mix", 1.0, Side(), is_curve=True, is_tuning=True)
    assert seeds == [51, 51, 52, 53, 101]


def test_a_term_that_is_left_out_is_left_out() -> None:
    """Each ablation does what its row says, where the real policy does something else."""
    long, short = request(0), request(1, arrived=0.1)
    held = {}
    for name, policy in (("ours", BUILTINS["headway"]({})), ("no passing", policy_sides.no_passing({}))):
        mind = Dispatcher(policy, LIMITS, np.random.default_rng(0))
        mind.handle(up(), 0.0)
        mind.handle(report(load=load(running=4, blocks_free=60)), 0.0)
        offer(mind, long, tokens=20_000)
        held[name] = dispatched(offer(mind, short)) == []
    assert held == {"ours": False, "no passing": True}


def test_without_yielding_agents_decode_beside_chat_prompts() -> None:
    view = BatchView(
        request_class=np.array([0, 1, 1, 0]),
        due=np.array([9.0, 9.0, 9.0, 9.0]),
        pace_s=np.full(4, 0.04),
        context=np.full(4, 100),
        pending=np.array([1, 1, 1, 500]),
        arrived=np.zeros(4),
        deadline=np.array([np.inf, 100.0, 0.5, np.inf]),
        is_decoding=np.array([True, True, True, False]),
        is_blocked=np.zeros(4, dtype=bool),
    )
    assert plan(view, STEP_MODEL, 1.0).paused.tolist() == [1, 2]
    assert policy_sides.no_yielding().plan(view, STEP_MODEL, 1.0).paused.tolist() == []
