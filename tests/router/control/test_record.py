"""Recordings: what is written replays byte for byte, and a difference is found where it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from policies.api import PolicySpec
from policies.costs import StepModel
from policies.events import (
    Arrived,
    Event,
    Gone,
    Offered,
    PolicyFault,
    Reconfigured,
    Started,
    Tick,
    WorkerLoad,
    WorkerLost,
    WorkerReport,
    WorkerUp,
)
from policies.request import Facts, Request, RequestClass, RequestId, Tenant, WorkerId
from router.cli import main
from router.control.record import Header, Recorder, RecordError, read_events, set_aside
from router.control.reducer import build, load_policy, loader
from router.control.replay import replay
from router.settings.config import Config, Policy

MODEL = StepModel(0.005, 0.0001, 0.001, 1e-8, 1e-8, 1e-5, version=1)
W0 = WorkerId(0)


def request(number: int) -> Request:
    facts = Facts(stream=True, user_agent="pytest", declared_class=RequestClass(number % 3))
    return Request(RequestId(f"r{number}"), Tenant(), f"s{number % 4}", "tiny", facts, number * 0.01, 100, 20)


def story() -> list[tuple[float, Event]]:
    """A worker comes, ten requests run on it, some leave, it dies, one is refused in its absence."""
    events: list[tuple[float, Event]] = [
        (0.0, Started("digest", "0.1.0", 7, "{}")),
        (0.0, WorkerUp(W0, "tiny", 16, 64, 1024, MODEL, cached=bytes(range(32)))),
    ]
    for number in range(10):
        at = 0.01 * (number + 1)
        events += [
            (at, Offered(request(number))),
            (at + 0.001, Arrived(RequestId(f"r{number}"), 40 + number, bytes(16) + bytes([number]) * 16)),
        ]
    load = WorkerLoad(3, 1, 64, 40, 8, 120, 0.011)
    events += [
        (0.2, WorkerReport(W0, load, first_tokens=((RequestId("r0"), 16),), stored=b"k" * 16, step_model=MODEL)),
        (0.3, Gone(RequestId("r1"))),
        (0.4, WorkerReport(W0, load, finished=((RequestId("r0"), 12),), evicted=b"k" * 16)),
        (0.5, PolicyFault("place", "took 7.0 ms")),
        (0.55, Reconfigured("digest2", PolicySpec("lmetric", {"promises": {"chat": {"patience_s": 9.0}}}).to_json())),
        (0.56, Offered(request(10))),
        (0.57, Arrived(RequestId("r10"), 40, bytes(32))),
        (0.6, WorkerLost(W0, "connection lost")),
        (0.7, Tick()),
        (700.0, Tick()),
    ]
    return events


def record(path: Path, config: Config, segment_bytes: int = 1 << 20, segments_max: int = 8) -> Recorder:
    """Run the story as the live router does, and record it."""
    faults: deque[PolicyFault] = deque()
    policy = load_policy(config, faults, is_timed=True)
    reducer = build(config, policy, 7, loader(faults, is_timed=True))
    header = Header(1, 0, "0.1.0", 7, msgspec.Raw(config.to_json()))
    recorder = Recorder(path, header, segment_bytes=segment_bytes, segments_max=segments_max)
    for now, event in story():
        recorder.write(now, event, reducer.handle(event, now))
        for fault in [faults.popleft() for _ in range(len(faults))]:
            recorder.write(now, fault, reducer.handle(fault, now))
    recorder.close()
    return recorder


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def test_a_recording_replays_byte_for_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    record(path, Config())

    outcome = replay(path)

    assert outcome.difference is None
    assert outcome.events == len(story())
    assert outcome.actions > 10
    assert main(["replay-events", str(path)]) == 0
    assert "equal byte for byte" in capsys.readouterr().out


def test_events_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path, Config())

    assert [(now, event) for _, now, event, _ in read_events(path)] == story()


def test_a_changed_action_is_found_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    record(path, Config())
    edit(path, lambda text: text.replace('"Tokenise",{"request_id":"r4"', '"Tokenise",{"request_id":"r5"'))

    code = main(["replay-events", str(path)])

    printed = capsys.readouterr().out
    assert code == 1
    assert f"> {path}:12 " in printed
    assert "Offered" in printed


def test_a_recording_goes_on_in_further_files_until_it_is_full(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    recorder = record(path, Config(), segment_bytes=2000, segments_max=3)

    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.jsonl", "run.jsonl.1", "run.jsonl.2"]
    outcome = replay(path)
    assert outcome.difference is None
    assert outcome.events + recorder.dropped_events == len(story())
    assert recorder.dropped_events > 0


def test_a_later_file_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path, Config(), segment_bytes=2000)

    with pytest.raises(RecordError, match="a replay begins with the first"):
        replay(tmp_path / "run.jsonl.1")


def test_a_line_cut_by_a_kill_ends_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path, Config())
    path.write_bytes(path.read_bytes()[:-5])

    outcome = replay(path)

    assert outcome.difference is None
    assert outcome.events == len(story()) - 1


@pytest.mark.parametrize(
    "text", ["", "{}", "not json", '{"headway_recording":9,"segment":0,"code_version":"","seed":1,"config":{}}']
)
def test_what_is_no_recording_is_said_to_be_none(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)

    assert main(["replay-events", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_a_new_start_keeps_one_earlier_recording(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path, Config(), segment_bytes=2000, segments_max=3)

    set_aside(path)
    record(path, Config())

    assert replay(tmp_path / "run.jsonl.old").difference is None
    assert replay(path).difference is None
    assert not (tmp_path / "run.jsonl.1").exists()


def test_a_policy_that_fails_is_recorded_and_replays(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path, Config(policy=Policy(ref="tests.router.bad_policies:raises_at_place")))

    outcome = replay(path)

    assert outcome.difference is None
    assert outcome.events > len(story())
    assert any(isinstance(event, PolicyFault) and "raised" in event.reason for _, _, event, _ in read_events(path))


def test_request_facts_keep_their_types(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path, Config())

    offered = next(event for _, _, event, _ in read_events(path) if isinstance(event, Offered))

    assert offered.request == replace(request(0), session="s0")
    assert isinstance(offered.request.facts.declared_class, RequestClass)
