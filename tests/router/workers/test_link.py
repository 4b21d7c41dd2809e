"""The link: what a worker's bytes become, and what a broken worker costs."""

from __future__ import annotations

import pytest

from engine.wire import Abort, End, Hello, Message, Scored, Start, Submit, Told, Welcome, encode
from policies.events import WorkerReport
from policies.request import RequestId, WorkerId
from router.workers.link import Link, LinkLimits, LinkLost
from tests.router.frames import MODEL, Heard, Pipe, hello, load, step, submit

A, B = RequestId("a"), RequestId("b")
WELCOME = Welcome(1, "router", "{}", b"")
END = End(handle=1, reason="stop", cached_tokens=0, output_tokens=2)


class Owner:
    """Keeps what the link tells the fleet."""

    def __init__(self) -> None:
        self.ups: list[Hello] = []
        self.reports: list[WorkerReport] = []
        self.downs: list[str] = []

    def link_up(self, _link: Link, message: Hello) -> None:
        self.ups.append(message)

    def link_report(self, report: WorkerReport) -> None:
        self.reports.append(report)

    def link_down(self, _link: Link, reason: str) -> None:
        self.downs.append(reason)


class Bench:
    """A link with a hand on its clock, its peer and its owner."""

    def __init__(self, limits: LinkLimits | None = None, *, is_up: bool = True) -> None:
        self.now = 0.0
        self.owner, self.pipe = Owner(), Pipe()
        self.link = Link(WorkerId(3), self.owner, WELCOME, limits or LinkLimits(), lambda: self.now)
        self.link.connection_made(self.pipe)
        if is_up:
            self.says(hello())

    def says(self, message: Message) -> None:
        self.link.data_received(encode(message))


def test_hello_is_answered_by_welcome() -> None:
    bench = Bench()

    assert bench.owner.ups == [hello()]
    assert bench.pipe.sent == [WELCOME]


def test_a_frame_brings_start_tokens_and_end_to_its_own_sinks_and_one_report_to_the_owner() -> None:
    bench, one, two = Bench(), Heard(), Heard()
    bench.link.submit(A, submit(), one)
    bench.link.submit(B, submit(), two)
    start = Start(handle=1, cached_tokens=16, queued_s=0.1, prefill_s=0.2)

    bench.says(step({1: [7, 8], 2: [9]}, starts=[start], ends=[END], stored=b"k" * 16))

    assert one.events == [start, [7, 8], END]
    assert two.events == [[9]]
    (report,) = bench.owner.reports
    assert (report.worker, report.first_tokens, report.finished) == (3, ((A, 16),), ((A, 2),))
    assert report.stored == b"k" * 16
    assert report.step_model is None


def test_submits_carry_handles_of_their_own() -> None:
    bench = Bench()

    handles = [bench.link.submit(A, submit(), Heard()), bench.link.submit(A, submit(), Heard())]

    sent = [message for message in bench.pipe.sent if isinstance(message, Submit)]
    assert [message.handle for message in sent] == handles == [1, 2]


def test_the_step_model_is_reported_when_it_came() -> None:
    bench = Bench()

    bench.says(step(step_model=MODEL))

    model = bench.owner.reports[0].step_model
    assert model is not None
    assert (model.floor_s, model.q90, model.version) == (MODEL.floor_s, MODEL.q90, MODEL.version)


def test_tokens_of_an_aborted_attempt_are_dropped_and_not_reported() -> None:
    bench, sink = Bench(), Heard()
    handle = bench.link.submit(A, submit(), sink)

    bench.link.abort(handle, "client left")
    bench.link.abort(handle, "client left")
    bench.says(step({handle: [1]}, ends=[END]))

    assert sink.events == []
    assert bench.owner.reports[0].finished == ()
    assert [message for message in bench.pipe.sent if isinstance(message, Abort)] == [Abort(handle, "client left")]
    assert bench.link.late_frames == 1


def test_an_end_that_the_relay_must_judge_is_not_reported_as_finished() -> None:
    bench, sink = Bench(), Heard()
    handle = bench.link.submit(A, submit(), sink)
    refused = End(handle=handle, reason="refused", cached_tokens=0, output_tokens=0, message="no room")

    bench.says(step(ends=[refused]))

    assert sink.events == [refused]
    assert bench.owner.reports[0].finished == ()


@pytest.mark.parametrize(
    "broken",
    [
        step(handles=[1]),
        step(ids=b"1234"),
        step(handles=[1, 2], counts=[2, -1], ids=b"1234"),
        step(stored=b"short"),
        step(evicted=b"short"),
        step(load=load(step_s=float("nan"))),
        step(step_model=type(MODEL)(*([float("nan")] * 8), 1)),
        step({1: [256]}),
        step({1: [-1]}),
        step(scored=[Scored(1, 3, -1.0, (256,), (-1.0,))]),
        Told(1),
        hello(),
    ],
    ids=[
        "counts",
        "ids",
        "negative",
        "stored",
        "evicted",
        "nan",
        "model",
        "foreign token",
        "negative token",
        "foreign score",
        "answer to nothing",
        "second hello",
    ],
)
def test_a_bad_frame_ejects_the_worker(broken: Message) -> None:
    bench, sink = Bench(), Heard()
    bench.link.submit(A, submit(), sink)

    bench.says(broken)

    assert len(bench.owner.downs) == 1
    assert bench.owner.downs[0].startswith("bad frame: ")
    assert sink.events == bench.owner.downs
    assert bench.pipe.is_closing()


def test_a_worker_with_other_weights_must_introduce_itself_anew() -> None:
    bench, sink = Bench(), Heard()
    bench.link.submit(A, submit(), sink)

    bench.says(step({1: [7]}, weights_version=1))

    assert bench.owner.downs == ["its weights are others: it introduces itself anew"]
    assert sink.events == bench.owner.downs  # and no token of theirs


def test_scores_come_before_their_tokens_to_their_own_request() -> None:
    bench, mine, other = Bench(), Heard(), Heard()
    handles = [bench.link.submit(A, submit(), sink) for sink in (mine, other)]
    scores = [Scored(handles[0], 5, -0.5), Scored(handles[1], 6, -0.25), Scored(handles[0], 7, -1.0)]

    bench.says(step({handles[0]: [5, 7], handles[1]: [6]}, scored=scores))

    assert mine.events == [[scores[0], scores[2]], [5, 7]]
    assert other.events == [[scores[1]], [6]]


def test_bytes_that_are_no_frame_eject_the_worker() -> None:
    bench = Bench()

    bench.link.data_received(b"\x03\0\0\0abc")

    assert bench.owner.downs[0].startswith("bad frame: undecodable")


@pytest.mark.parametrize("first", [hello(protocol=99), hello(block_tokens=0), hello(cached=b"x"), step()])
def test_a_worker_that_opens_wrongly_never_comes_up(first: Message) -> None:
    bench = Bench(is_up=False)

    bench.says(first)

    assert bench.owner.ups == []
    assert len(bench.owner.downs) == 1


def test_nothing_is_delivered_after_the_link_is_down() -> None:
    bench, sink = Bench(), Heard()
    handle = bench.link.submit(A, submit(), sink)

    bench.link.data_received(encode(step(handles=[1])) + encode(step({handle: [1]})))
    bench.link.connection_lost(None)

    assert sink.events == bench.owner.downs
    assert len(bench.owner.downs) == 1
    with pytest.raises(LinkLost):
        bench.link.submit(B, submit(), sink)


def test_a_sink_that_ejects_the_link_in_mid_frame_is_the_last_to_hear() -> None:
    bench, second = Bench(), Heard()
    first = Heard(on_tokens=lambda: bench.link.eject("gone"))
    bench.link.submit(A, submit(), first)
    bench.link.submit(B, submit(), second)

    bench.says(step({1: [1], 2: [2]}))

    assert first.events == [[1], "gone"]
    assert second.events == ["gone"]


def test_a_sink_that_raises_ends_its_own_attempt_and_no_other() -> None:
    def fail() -> None:
        raise RuntimeError("relay bug")

    bench, broken, healthy = Bench(), Heard(on_tokens=fail), Heard()
    bench.link.submit(A, submit(), broken)
    bench.link.submit(B, submit(), healthy)

    bench.says(step({1: [1], 2: [2]}))

    assert broken.events == [[1], "relay failed"]
    assert healthy.events == [[2]]
    assert bench.pipe.sent[-1] == Abort(1, "relay failed")
    assert bench.owner.downs == []


def test_a_worker_that_holds_work_and_makes_no_step_is_ejected() -> None:
    bench, sink = Bench(), Heard()
    bench.link.submit(A, submit(), sink)
    bench.says(step(load=load(steps=1)))
    bench.now = 2.0
    bench.says(step(load=load(steps=1)))  # a heartbeat without a step is no progress

    bench.link.check(3.0)
    assert bench.owner.downs == []
    bench.link.check(3.1)

    assert bench.owner.downs[0].startswith("stalled: no step for 3.1 s with 1 requests held")
    assert bench.link.is_stalled


def test_a_worker_is_not_blamed_for_the_time_in_which_the_router_did_not_run_either() -> None:
    bench = Bench()
    bench.link.submit(A, submit(), Heard())

    bench.link.check(61.0, away_s=60.0)  # a machine that was paused, a laptop that was closed
    bench.link.check(63.0)
    assert bench.owner.downs == []
    bench.link.check(63.1)

    assert bench.link.is_stalled


def test_slow_steps_get_ten_times_their_own_duration() -> None:
    bench = Bench()
    bench.link.submit(A, submit(), Heard())
    bench.says(step(load=load(steps=1, step_s=1.0)))

    bench.link.check(9.9)
    assert bench.owner.downs == []
    bench.link.check(10.1)

    assert bench.link.is_stalled


def test_an_idle_worker_never_stalls() -> None:
    bench = Bench()

    bench.link.check(1e6)

    assert bench.owner.downs == []


def test_a_worker_that_says_no_hello_is_ejected() -> None:
    bench = Bench(is_up=False)

    bench.link.check(5.1)

    assert bench.owner.downs == ["no hello within 5 s"]


def test_a_worker_that_does_not_read_is_ejected_at_the_bound() -> None:
    bench, first = Bench(LinkLimits(outbox_bytes=1000)), Heard()
    bench.pipe.stuck_bytes = 0
    bench.link.submit(A, submit(), first)

    with pytest.raises(LinkLost):
        bench.link.submit(B, submit(ids=b"1234" * 300), Heard())

    assert first.events == bench.owner.downs == ["does not read: 1000 bytes wait for it"]
