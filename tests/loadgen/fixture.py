"""Twenty requests whose verdict was worked out by hand; the comments are that working.

Budgets: chatbot+ 1 s + 1 ms a new token and 40 ms a token; background-agent 15 s + 10 ms a new and 100 ms an output
token; data-processor 900 s. A chat request has 500 tokens, 400 of them known: 100 new, so its target is 1.1 s."""

from __future__ import annotations

from collections.abc import Sequence

from loadgen.records import Outcome, Record, Run
from loadgen.targets import BudgetLine, Budgets, to_plain
from loadgen.traces import ClassName, Slo

BUDGETS: Budgets = {
    "chatbot+": BudgetLine(ttft_s=1.0, ttft_s_per_new_token=0.001, tpot_s=0.040),
    "background-agent": BudgetLine(
        ttft_s=15.0, tpot_s=0.15, deadline_s=15.0, deadline_s_per_new_token=0.01, deadline_s_per_output_token=0.1
    ),
    "data-processor": BudgetLine(deadline_s=900.0),
}

RUN = Run(
    target="http://127.0.0.1:8080",
    model="m",
    trace_name="twenty.jsonl",
    trace_digest="0123456789ab",
    seed=1,
    speed=1.0,
    stripped_share=0.2,
    duration_s=100.0,
    wall_s=110.0,
    started="2026-01-01T00:00:00+00:00",
    machine="a machine",
    version="0",
    client_cpu_s=1.0,
    budgets=to_plain(BUDGETS),
)


def even(first_s: float, pace_s: float, count: int = 11) -> list[float]:
    return [first_s + number * pace_s for number in range(count)]


def chat(  # noqa: PLR0917  a row of the table below, in its order
    row: int,
    user: str,
    session: str,
    worker: str,
    stamps: Sequence[float],
    outcome: Outcome = "done",
    *,
    attempts: int = 1,
    assigned: str = "chatbot+",
) -> Record:
    is_done = outcome == "done"
    return Record(
        row=row,
        session=session,
        user=user,
        request_class="chatbot+",
        input_tokens=500,
        output_tokens=11,
        ideal_cached=400,
        intended_s=None if outcome == "abandoned" else 0.0,
        sent_s=None if outcome == "abandoned" else 0.001 * row,
        token_s=list(stamps),
        end_s=stamps[-1] if stamps else None,
        outcome=outcome,
        attempts=attempts,
        assigned_class=assigned,
        class_reason="interactive-agent" if assigned else "",
        worker=worker,
        prompt_tokens=500 if is_done else None,
        completion_tokens=len(stamps) if is_done else None,
        cached_tokens=(384 if worker == "w0" else 0) if is_done else None,
    )


def other(row: int, request_class: ClassName, worker: str, end_s: float, slo: Slo | None = None) -> Record:
    is_agent = request_class == "background-agent"
    return Record(
        row=row,
        user="u4",
        request_class=request_class,
        slo=slo,
        input_tokens=1000,
        output_tokens=10,
        ideal_cached=900 if is_agent else 0,
        intended_s=0.0,
        sent_s=0.0,
        token_s=[1.0, end_s] if is_agent else [],
        end_s=end_s,
        outcome="done",
        attempts=1,
        assigned_class=request_class,
        worker=worker,
        prompt_tokens=1000,
        completion_tokens=10,
    )


TWENTY = (
    chat(1, "u1", "A", "w0", even(0.5, 0.02)),  # met
    chat(2, "u1", "A", "w0", even(1.1, 0.02)),  # met: at the target is within it
    chat(3, "u1", "A", "w1", even(1.2, 0.02)),  # first token too late
    chat(4, "u1", "B", "w1", even(0.5, 0.05)),  # too slow on average, though never behind its line
    chat(5, "u1", "B", "w1", [*even(0.5, 0.005, 10), 0.795]),  # met: mean 29.5 ms; but it paused for 250 ms
    chat(6, "u2", "C", "w0", even(1.0, 0.039)),  # met
    chat(7, "u2", "C", "w0", [], "refused", attempts=3),  # for good
    chat(8, "u2", "C", "", [], "abandoned", attempts=0, assigned=""),  # so its session's next turn never came
    chat(9, "u2", "D", "w0", [1.05, 1.19, 1.19, 1.19, 1.2], attempts=2),  # met on its return; second token off the line
    chat(10, "u2", "D", "w1", even(0.4, 0.02, 3), "failed", assigned="background-agent"),
    chat(11, "u3", "E", "w1", [0.6], "left", assigned=""),
    chat(12, "u3", "E", "", [], "unfinished", assigned=""),
    other(13, "background-agent", "w0", 16.9),  # met: 15 + 1 + 1 = 17 s
    other(14, "background-agent", "w0", 17.1),
    other(15, "background-agent", "w1", 3.0),  # met
    other(16, "background-agent", "w1", 3.0, Slo(deadline_s=2.0)),  # its own target is tighter
    other(17, "data-processor", "w0", 100.0),  # met
    other(18, "data-processor", "w0", 901.0),
    other(19, "data-processor", "w1", 5.0),  # met
    other(20, "data-processor", "w1", 5.0),  # met
)
