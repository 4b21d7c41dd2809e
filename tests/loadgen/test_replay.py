"""A replay offers what the trace says when it says so, whatever the server does; what it saw is never lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import msgspec
import pytest

from loadgen.client import Client, Target
from loadgen.records import Record
from loadgen.replay import Options, Replay
from loadgen.traces import CLASSES, ClassName, Header, Row, Trace
from tests.loadgen.server import Asked, Script, answer_all, scripted

WAIT_S = 60.0


def row(
    at_ms: float | None = 0,
    delay_ms: float | None = None,
    *,
    session: str = "",
    timeout_s: float | None = None,
    output: int = 2,
    request_class: ClassName = "chatbot+",
) -> Row:
    return Row(
        timestamp=at_ms,
        delay=delay_ms,
        session_id=session,
        request_class=request_class,
        user="user-01",
        input_length=20,
        output_length=output,
        timeout_s=timeout_s,
        hash_ids=[1],
    )


def replayed(
    rows: Sequence[Row], script: Script, duration_s: float = 5.0, grace_s: float = 5.0
) -> tuple[Replay, list[Asked]]:
    async def scene() -> tuple[Replay, list[Asked]]:
        async with scripted(script) as server:
            options = Options(model="m", duration_s=duration_s, grace_s=grace_s)
            replay = Replay(Trace(Header(block_size=16), tuple(rows)), Client(Target.parse(server.url)), options)
            await asyncio.wait_for(replay.run(), WAIT_S)
            return replay, server.asked

    return asyncio.run(scene())


def first_s(record: Record) -> float:
    assert record.intended_s is not None
    return record.token_s[0] - record.intended_s


def test_every_row_is_sent_once_as_the_trace_says_and_answered() -> None:
    rows = [row(0), row(10, request_class="data-processor"), row(20, session="s", request_class="background-agent")]
    replay, asked = replayed(rows, answer_all)
    assert [record.outcome for record in replay.records] == ["done"] * 3
    assert [record.prompt_tokens for record in replay.records] == [20] * 3
    assert [len(one.prompt) for one in asked] == [20] * 3
    assert {one.path for one in asked} == {"/v1/completions"}


def test_no_request_names_its_true_class() -> None:
    rows = [row(0, request_class=name, session="" if name == "data-processor" else name) for name in CLASSES]
    _, asked = replayed(rows, answer_all)
    said = [json.dumps([one.headers, one.body]) for one in asked]
    assert not [name for name in CLASSES for text in said if name in text]


def test_a_stalled_server_delays_no_send_and_is_charged_for_the_whole_stall() -> None:
    """Coordinated omission: a closed loop would have sent one request, and seen one slow answer."""
    released: list[float] = []
    everyone_came = asyncio.Event()

    async def script(asked: Asked) -> None:
        if asked.number == 9:
            released.append(asked.came)
            everyone_came.set()
        await everyone_came.wait()
        await answer_all(asked)

    replay, asked = replayed([row(20.0 * number) for number in range(10)], script)
    assert len(asked) == 10
    assert all(record.outcome == "done" for record in replay.records)
    # Each had to wait until the last had come: by the server's own clock, and from the moment it was intended.
    for record, one in zip(replay.records, asked, strict=True):
        assert record.intended_s is not None
        assert first_s(record) >= (released[0] - replay.origin) - record.intended_s
        assert record.token_s[0] + replay.origin >= one.sent[0]


def test_a_stamp_is_never_before_the_servers_own_and_the_order_is_kept() -> None:
    async def script(asked: Asked) -> None:
        asked.open_stream()
        for _ in range(3):
            asked.token()
            await asyncio.sleep(0.01)
        asked.close_stream()

    replay, asked = replayed([row(0, output=3)], script)
    stamps = [stamp + replay.origin for stamp in replay.records[0].token_s]
    assert len(stamps) == 3
    assert all(ours >= theirs - 1e-5 for ours, theirs in zip(stamps, asked[0].sent, strict=True))


def test_a_later_turn_is_intended_at_the_end_of_the_one_before_it_plus_the_gap() -> None:
    replay, asked = replayed([row(0, session="s"), row(None, 50.0, session="s")], answer_all)
    first, second = replay.records
    assert first.end_s is not None
    assert second.intended_s is not None
    assert second.intended_s - first.end_s == pytest.approx(0.05)
    assert asked[1].came - replay.origin >= second.intended_s
    assert (first.turn, second.turn) == (0, 1)


def test_a_client_whose_patience_ends_hangs_up_and_that_is_a_miss() -> None:
    async def script(asked: Asked) -> None:
        asked.open_stream(**{"x-headway-class": "chatbot+"})
        asked.event(b": still working\n\n")
        asked.event(b'data: {"choices": [{"text": ""}]}\n\n')  # a stream, but nothing to read
        await asked.left.wait()

    async def scene() -> tuple[Replay, list[Asked]]:
        async with scripted(script) as server:
            rows = (row(0, timeout_s=1.0, session="s"), row(None, 1.0, session="s"))
            options = Options(model="m", duration_s=5.0, grace_s=5.0)
            replay = Replay(Trace(Header(block_size=16), rows), Client(Target.parse(server.url)), options)
            await asyncio.wait_for(replay.run(), WAIT_S)
            await asyncio.wait_for(server.asked[0].left.wait(), WAIT_S)  # the server saw it hang up
            return replay, server.asked

    replay, asked = asyncio.run(scene())
    left, abandoned = replay.records
    assert len(asked) == 1
    assert (left.outcome, len(left.token_s), left.assigned_class) == ("left", 0, "chatbot+")
    assert abandoned.outcome == "abandoned"


def test_who_reads_a_stream_stays_beyond_his_patience() -> None:
    async def script(asked: Asked) -> None:
        asked.open_stream()
        asked.token()
        await asyncio.sleep(1.2)
        asked.token()
        asked.close_stream()

    replay, _ = replayed([row(0, timeout_s=1.0)], script)
    record = replay.records[0]
    assert (record.outcome, len(record.token_s)) == ("done", 2)
    assert record.end_s is not None
    assert record.end_s > 1.0


def test_who_waits_for_a_whole_answer_leaves_although_it_has_begun() -> None:
    async def script(asked: Asked) -> None:
        asked.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        await asked.left.wait()

    replay, _ = replayed([row(0, timeout_s=0.1, request_class="data-processor")], script)
    assert [record.outcome for record in replay.records] == ["left"]


def test_a_refused_client_comes_back_and_is_timed_from_its_first_intended_moment() -> None:
    async def script(asked: Asked) -> None:
        if asked.number == 0:
            asked.json(503, {"error": {"message": "full"}}, **{"retry-after-ms": "100"})
        else:
            await answer_all(asked)

    replay, asked = replayed([row(0)], script)
    record = replay.records[0]
    assert (record.outcome, record.attempts) == ("done", 2)
    assert first_s(record) >= asked[1].came - asked[0].came


def test_a_session_that_is_refused_for_good_takes_its_later_turns_with_it() -> None:
    async def script(asked: Asked) -> None:
        asked.json(503, {"error": {"code": "no_capacity", "message": "full"}}, **{"x-should-retry": "false"})

    rows = [row(0, session="s"), row(None, 1.0, session="s"), row(None, 1e6, session="s")]
    replay, asked = replayed(rows, script)
    assert [record.outcome for record in replay.records] == ["refused", "abandoned"]
    assert replay.records[0].reason == "no_capacity: full"
    assert replay.not_reached == 1  # its time would have come after the end
    assert len(asked) == 1


def test_what_begins_after_the_offered_time_is_not_offered() -> None:
    replay, asked = replayed([row(0), row(60_000), row(70_000)], answer_all, duration_s=0.2)
    assert (len(asked), len(replay.records), replay.not_reached) == (1, 1, 2)


def test_a_request_still_open_at_the_end_is_unfinished() -> None:
    async def script(asked: Asked) -> None:
        asked.open_stream()
        asked.token()
        await asked.left.wait()

    replay, _ = replayed([row(0)], script, duration_s=0.1, grace_s=1.0)
    assert [(record.outcome, len(record.token_s)) for record in replay.records] == [("unfinished", 1)]


def test_an_interrupted_run_keeps_what_it_saw_and_forgets_what_it_never_sent() -> None:
    async def scene() -> Replay:
        begun = asyncio.Event()

        async def script(asked: Asked) -> None:
            if asked.number == 0:
                await answer_all(asked)
                return
            asked.open_stream()
            begun.set()
            await asked.left.wait()

        async with scripted(script) as server:
            rows = (row(0, session="s"), row(None, 30.0, session="s"), row(60_000))  # the second comes after the first
            options = Options(model="m", duration_s=120.0)
            replay = Replay(Trace(Header(block_size=16), rows), Client(Target.parse(server.url)), options)
            running = asyncio.ensure_future(replay.run())
            await asyncio.wait_for(begun.wait(), WAIT_S)
            running.cancel()
            await asyncio.wait_for(asyncio.gather(running, return_exceptions=True), WAIT_S)
        return replay

    replay = asyncio.run(scene())
    assert [record.outcome for record in replay.records] == ["done", "unfinished"]
    assert replay.not_reached == 1


def test_a_server_that_dies_mid_stream_fails_one_request_and_not_the_run() -> None:
    async def script(asked: Asked) -> None:
        if asked.number == 0:
            asked.open_stream()
            asked.token()
            await asyncio.sleep(0)
            asked.transport.abort()
        else:
            await answer_all(asked)

    replay, _ = replayed([row(0), row(50)], script)
    assert [record.outcome for record in replay.records] == ["failed", "done"]


def test_speed_divides_arrivals_and_gaps() -> None:
    async def scene() -> list[Record]:
        async with scripted(answer_all) as server:
            rows = (row(0), row(1000, session="s"), row(None, 1000.0, session="s"))
            options = Options(model="m", speed=10.0, duration_s=5.0)
            replay = Replay(Trace(Header(block_size=16), rows), Client(Target.parse(server.url)), options)
            await asyncio.wait_for(replay.run(), WAIT_S)
            return replay.records

    first, second, third = asyncio.run(scene())
    assert (first.intended_s, second.intended_s) == (0.0, 0.1)
    assert second.end_s is not None
    assert third.intended_s is not None
    assert third.intended_s - second.end_s == pytest.approx(0.1)


CALLER = (row(0, session="s"), row(None, 40.0, session="s"))


def agent(delay_ms: float, *after: str) -> Row:
    return msgspec.structs.replace(row(None, delay_ms, session="s/a"), parent="s", after=list(after))


def with_agent() -> list[Row]:
    first, last = CALLER
    return [first, agent(30.0, "s#0"), agent(10.0), msgspec.structs.replace(last, after=["s/a#1"])]


def test_a_subagent_starts_after_its_caller_and_the_caller_goes_on_after_it() -> None:
    replay, _ = replayed(with_agent(), answer_all)
    by_row = {record.row: record for record in replay.records}
    first, one, two, last = (by_row[number] for number in range(4))
    assert [record.outcome for record in (first, one, two, last)] == ["done"] * 4
    assert first.end_s
    assert one.end_s
    assert two.end_s
    assert one.intended_s == pytest.approx(first.end_s + 0.030)
    assert two.intended_s == pytest.approx(one.end_s + 0.010)
    assert last.intended_s == pytest.approx(two.end_s + 0.040)
    assert (one.parent, last.parent) == ("s", "")


def test_a_subagent_that_fails_takes_its_caller_with_it() -> None:
    async def script(asked: Asked) -> None:
        if asked.number == 1:
            asked.json(500, {"error": {"message": "no"}})
        else:
            await answer_all(asked)

    replay, asked = replayed(with_agent(), script)
    assert {record.row: record.outcome for record in replay.records} == {
        0: "done",
        1: "failed",
        2: "abandoned",
        3: "abandoned",
    }
    assert len(asked) == 2


def test_a_caller_whose_subagents_time_never_comes_does_not_go_on_either() -> None:
    rows = with_agent()
    rows[1] = agent(60_000.0, "s#0")
    replay, _ = replayed(rows, answer_all)
    assert [record.outcome for record in replay.records] == ["done"]
    assert replay.not_reached == 3


def test_messages_are_asked_for_in_their_own_dialect_and_their_stream_is_timed() -> None:
    async def script(asked: Asked) -> None:
        asked.open_stream(**{"x-headway-worker": "w0"})
        for kind, fields in (
            ("message_start", {"message": {"usage": {"input_tokens": 20, "output_tokens": 0}}}),
            ("content_block_delta", {"delta": {"type": "text_delta", "text": " a"}}),
            ("message_delta", {"usage": {"output_tokens": 2}}),
            ("message_stop", {}),
        ):
            asked.event(b"event: x\ndata: " + json.dumps({"type": kind, **fields}).encode() + b"\n\n")
        asked.send(b"0\r\n\r\n")

    async def scene() -> tuple[Record, Asked]:
        async with scripted(script) as server:
            options = Options(model="m", duration_s=1.0, dialect="anthropic", stripped_share=0.0)
            replay = Replay(Trace(Header(block_size=16), (row(0),)), Client(Target.parse(server.url)), options)
            await asyncio.wait_for(replay.run(), WAIT_S)
            return replay.records[0], server.asked[0]

    record, asked = asyncio.run(scene())
    assert (asked.path, asked.headers["anthropic-version"]) == ("/v1/messages", "2023-06-01")
    assert asked.headers["x-claude-code-session-id"]
    assert (record.outcome, len(record.token_s), record.prompt_tokens, record.completion_tokens) == ("done", 1, 20, 2)
