"""The world in virtual time: it repeats, fused runs change nothing, and failures cost no request."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from loadgen.records import Record
from loadgen.sim.script import Failure
from loadgen.traces import Header, Row, Trace
from policies import plugins
from policies.builtin import BUILTINS, ENGINES
from policies.limits import Limits
from policies.reservations import Counts
from tests.loadgen.sim.small import mix, world


def encoded(records: list[Record]) -> bytes:
    return msgspec.json.encode(records)


def outcomes(records: list[Record]) -> Counter[str]:
    return Counter(record.outcome for record in records)


@pytest.mark.parametrize("seed", [1, 2])
def test_runs_of_decodes_computed_at_once_equal_those_computed_step_by_step(seed: int) -> None:
    trace, failures = mix(seed=seed), (Failure("kill", 0, 12.0, 5.0), Failure("stall", 1, 20.0, 1.5))
    fused, single = (world(trace, seed=seed, failures=failures, is_fused=each) for each in (True, False))
    assert encoded(fused.run()) == encoded(single.run())
    assert [worker.steps for worker in fused.workers] == [worker.steps for worker in single.workers]
    assert fused.events < single.events  # it did save something


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    trace = mix(duration_s=15.0)
    one, again, other = (encoded(world(trace, seed=seed).run()) for seed in (3, 3, 4))
    assert one == again
    assert one != other


def test_a_dead_workers_requests_end_whole_elsewhere() -> None:
    trace = mix(load=2.0)
    records = world(trace, failures=(Failure("kill", 1, 10.0, 8.0),)).run()
    assert outcomes(records)["done"] == len(records)
    assert all(len(record.token_s) == record.output_tokens for record in records)
    assert all(earlier <= later for r in records for earlier, later in zip(r.token_s, r.token_s[1:], strict=False))


def test_without_any_worker_clients_leave_when_their_patience_ends() -> None:
    rows = (Row(timestamp=1000.0, input_length=10, output_length=2, timeout_s=5.0),)
    records = world(
        Trace(Header(block_size=16), rows), failures=(Failure("kill", 0, 0.5, 99.0), Failure("kill", 1, 0.5, 99.0))
    ).run()
    # Refused after 95 % of its declared timeout, told to come back, and gone before that.
    assert [(record.outcome, record.end_s, record.attempts) for record in records] == [("refused", 6.0, 1)]


def test_who_was_refused_and_obeys_finds_the_room_that_was_kept() -> None:
    """Sixty agents within a second, four users, and room for a few: who was promised a place comes back to it."""
    rows = tuple(
        Row(
            timestamp=20.0 * number,
            session_id=f"s{number}",
            request_class="background-agent",
            user=f"u{number % 4}",
            input_length=2_000,
            output_length=20,
        )
        for number in range(60)
    )

    def served(share: float) -> tuple[int, Counts]:
        limits = Limits(room_s=(2.0, 2.0, 2.0), reservation_share=share)
        run = world(Trace(Header(block_size=16), rows), limits=limits, is_oracle=True)
        return outcomes(run.run())["done"], run.reservations

    done, counts = served(0.5)
    assert done == 60
    assert counts.made == counts.kept > 20
    done, counts = served(0.0)
    assert done < 50
    assert counts.made == 0


def test_a_session_goes_on_after_its_answer_and_stops_with_its_client() -> None:
    rows = (
        Row(timestamp=0.0, session_id="s", input_length=64, output_length=4, hash_ids=[1, 2, 3, 4]),
        Row(delay=500.0, session_id="s", gap="tool", input_length=80, output_length=4, hash_ids=[1, 2, 3, 4, 5]),
        Row(delay=500.0, session_id="s", gap="tool", input_length=5000, output_length=4, timeout_s=0.01),
        Row(delay=500.0, session_id="s", gap="tool", input_length=96, output_length=4),
    )
    first, second, third, fourth = world(Trace(Header(block_size=16), rows)).run()
    assert second.intended_s == pytest.approx((first.end_s or 0.0) + 0.5)
    assert second.cached_tokens == 64
    assert [third.outcome, fourth.outcome] == ["left", "abandoned"]


@pytest.mark.parametrize("policy", sorted(BUILTINS))
def test_every_built_in_router_serves_all_that_is_offered(policy: str) -> None:
    records = world(mix(duration_s=15.0, load=2.0), policy=policy).run()
    assert outcomes(records) == {"done": len(records)}


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_every_built_in_engine_policy_serves_all_that_is_offered(engine: str) -> None:
    records = world(mix(duration_s=15.0, load=2.0), engine=plugins.load_engine(engine)).run()
    assert outcomes(records) == {"done": len(records)}


def test_declared_classes_are_the_true_ones_and_inferred_ones_may_differ() -> None:
    trace = mix(duration_s=15.0)
    declared = world(trace, is_oracle=True).run()
    assert all(record.assigned_class == record.request_class for record in declared)
    assert {record.class_reason for record in declared} == {"declared"}
    assert len({record.class_reason for record in world(trace).run()}) > 1
