"""A plan follows from its workload and its step times: by hand where that can be done, by its direction elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from loadgen.cli import main
from loadgen.plan import REPLICAS_MAX, Planned, asked, plan, prefill_s
from loadgen.plan_cli import read_mix
from loadgen.sim.profiles import H100_8B, Profile, Theta
from loadgen.targets import BudgetLine, Budgets
from loadgen.traces import ClassName, Header, Row, Trace

LOOSE: Budgets = {
    "chatbot+": BudgetLine(ttft_s=10.0, tpot_s=1.0),
    "background-agent": BudgetLine(deadline_s=600.0),
    "data-processor": BudgetLine(deadline_s=900.0),
}
# 1 ms a prompt token and 10 ms a decode step, whatever the batch: figures that a head can follow.
PLAIN = Profile(
    name="plain",
    theta=Theta(0.010, 0.001, 0.0, 0.0, 0.0, 0.0),
    block_tokens=64,
    blocks_total=10_000,
    context_max=100_000,
    sequences_max=10,
)


def workload(
    per_s: float, input_length: int = 1000, output: int = 100, name: ClassName = "chatbot+", *, seconds: int = 100
) -> Trace:
    rows = tuple(
        Row(timestamp=1000 * number / per_s, request_class=name, input_length=input_length, output_length=output)
        for number in range(round(per_s * seconds))
    )
    return Trace(Header(notes={"duration_s": seconds}), rows)


def planned(trace: Trace, profile: Profile = PLAIN, budgets: Budgets = LOOSE, spare: int = 0) -> Planned:
    return plan(asked(trace, profile.blocks_total * profile.block_tokens), profile, budgets, spare, 3.6)


def test_the_work_of_a_request_is_that_of_its_prompt_and_its_share_of_the_steps() -> None:
    found = planned(workload(2.0)).classes["chatbot+"]
    assert found.prefill_s == pytest.approx(1.0)  # 1,000 tokens of 1 ms
    assert found.decode_s == pytest.approx(100 * 0.010 / 10)  # a step of 10 ms is shared by ten
    assert (found.per_s, found.busy) == (2.0, pytest.approx(2.2))
    assert (found.output_per_s, found.tokens_per_s, found.hit) == (200, 2200, 0.0)


def test_replicas_are_the_work_over_what_a_replica_bears_and_the_spare_ones() -> None:
    found = planned(workload(2.0))
    demand = found.classes["chatbot+"]
    assert found.bounds.compute == pytest.approx(demand.busy / demand.load_max)
    assert found.bounds.compute <= found.replicas < found.bounds.compute + 1
    assert found.bounds.binding == "compute"
    assert planned(workload(2.0), spare=2).replicas == found.replicas + 2


def test_tighter_promises_and_burstier_arrivals_bear_less() -> None:
    tight = {**LOOSE, "chatbot+": BudgetLine(ttft_s=1.5, tpot_s=1.0)}
    calm = workload(2.0)
    bursts = Trace(
        calm.header,
        tuple(
            Row(timestamp=20_000.0 * (number // 40), input_length=1000, output_length=100)
            for number in range(len(calm.rows))
        ),
    )
    assert planned(bursts, budgets=tight).bounds.compute > planned(bursts).bounds.compute
    assert planned(bursts).bounds.compute > planned(calm).bounds.compute


def test_long_answers_are_bound_by_the_pace() -> None:
    paced = {**LOOSE, "chatbot+": BudgetLine(ttft_s=60.0, tpot_s=0.012)}
    found = planned(workload(5.0, input_length=1, output=1000), budgets=paced)
    assert found.batch == 10
    assert found.bounds.pace == pytest.approx(5 * 1000 * 0.010 / 10)


def test_long_prompts_that_wait_for_tools_are_bound_by_memory() -> None:
    rows = []
    for number in range(50):
        first = Row(timestamp=2000.0 * number, session_id=f"s{number}", input_length=60_000, output_length=1)
        later = Row(delay=200_000.0, session_id=f"s{number}", input_length=60_001, output_length=1)
        rows += [first, later]
    quick = Profile(
        name="quick", theta=Theta(1e-4, 1e-7, 0, 0, 0, 0), block_tokens=64, blocks_total=10_000, context_max=100_000
    )
    found = planned(Trace(Header(notes={"duration_s": 100}), tuple(rows)), quick)
    assert found.bounds.binding == "KV memory"
    # 50 sessions keep 60,001 tokens for 200 s of each 100: 6.0M tokens, over 85 % of 640,000 a replica
    assert found.bounds.kv == pytest.approx(50 * 60_001 * 2 / (0.85 * 640_000), rel=0.01)


def test_what_sessions_share_lies_in_memory_once() -> None:
    def talks(preamble: list[int]) -> Trace:
        rows = [
            Row(timestamp=100.0 * n, session_id=f"s{n}", input_length=64_000, output_length=64, hash_ids=[*preamble, n])
            for n in range(1, 1001)
        ]
        return Trace(Header(block_size=64, notes={"duration_s": 100}), tuple(rows))

    common = list(range(10_000, 10_999))
    quick = msgspec.structs.replace(PLAIN, theta=Theta(0.010, 1e-7, 0.0, 0.0, 0.0, 0.0))
    apart, shared = planned(talks([]), quick), planned(talks(common), quick)
    assert (apart.batch, shared.batch) == (
        8,
        10,
    )  # 640,000 tokens hold 8 of 64,032; those that share all but a block: all
    assert shared.bounds.kv < apart.bounds.kv / 100


def test_the_price_is_paid_by_the_classes_and_by_nobody_else() -> None:
    both = Trace(Header(notes={"duration_s": 100}), workload(2.0).rows + workload(3.0, name="data-processor").rows)
    found = planned(both, spare=1)
    paid = sum(one.cost_per_million * one.tokens_per_s / 1e6 for one in found.classes.values())
    assert paid == pytest.approx(found.replicas * 3.6 / 3600)


def test_a_prompt_is_paid_by_its_rows_and_never_by_the_weights_that_decoding_reads_anyway() -> None:
    model = H100_8B.model
    assert prefill_s(model, 4096, 0) == pytest.approx(model.prefill_s(4096, 0), rel=0.02)
    assert prefill_s(model, 500, 100_000) > prefill_s(model, 500, 0)


def test_more_replicas_hold_more_of_what_is_asked_again() -> None:
    prompts = [list(range(100 * number, 100 * number + 100)) for number in range(300)]
    rows = tuple(
        Row(timestamp=100.0 * number, input_length=6400, output_length=1, hash_ids=prompts[number % 300])
        for number in range(900)
    )
    trace = Trace(Header(block_size=64, notes={"duration_s": 90}), rows)
    found = planned(trace)  # 300 prompts of 6,400 tokens are three replicas' memory
    assert found.replicas > 3
    assert found.classes["chatbot+"].hit == pytest.approx(2 / 3, abs=0.05)
    assert found.if_hit_10_more <= found.bounds.most < found.if_load_10_more


def test_a_workload_beyond_every_fleet_is_refused_with_what_it_asks_for() -> None:
    with pytest.raises(ValueError, match=f"over {REPLICAS_MAX} replicas would be needed: compute"):
        planned(workload(1000.0, seconds=1))


def test_a_workload_file_changes_the_mix_by_its_own_names() -> None:
    mix = read_mix({"users": 3, "chat": {"sessions_per_s": 2.0, "append": {"p50": 10, "p90": 20}}})
    assert (mix.users, mix.chat.sessions_per_s, mix.chat.append.p50, mix.jobs.bursts_per_s) == (3, 2.0, 10, 0.015)
    with pytest.raises(ValueError, match=r"no chat\.sessions; there are"):
        read_mix({"chat": {"sessions": 1}})
    with pytest.raises(ValueError, match="chat is a table"):
        read_mix({"chat": 1})


def test_the_command_plans_and_asks_the_simulator_until_the_edge_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "workload.toml", tmp_path / "plan.json"
    path.write_text("[chat]\nsessions_per_s = 0.5\n[background]\nsessions_per_s = 0.1\n[jobs]\nbursts_per_s = 0.1\n")
    words = ["--duration", "30", "--seeds", "1", "--json", str(out), "--html", str(tmp_path / "plan.html")]
    assert main(["plan", str(path), *words]) == 0
    said = capsys.readouterr().out
    assert "binds" in said
    assert "simulated, not validated" in said
    answer = json.loads(out.read_text())
    passed = {one["replicas"]: one["is_pass"] for one in answer["simulated"]}
    smallest = answer["smallest"]
    assert smallest is not None
    assert passed[smallest]
    assert smallest == 1 or not passed[smallest - 1]
    assert f"smallest fleet that suffices: {smallest}" in said
    drawn = (tmp_path / "plan.html").read_text()
    assert "simulated, not validated" in drawn
    assert f"smallest fleet that suffices: {smallest}" in drawn
    assert "<script" not in drawn


def test_a_trace_without_a_clock_says_nothing_of_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weka.jsonl"
    row = {"timestamp": 0, "input_length": 9, "output_length": 1}
    path.write_text("".join(json.dumps(row | {"session_id": name}) + "\n" for name in "ab"))
    assert main(["plan", str(path), "--closed-form"]) == 1
    assert "all sessions begin at 0" in capsys.readouterr().err
