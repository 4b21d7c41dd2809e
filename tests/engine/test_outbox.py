"""A link's outbox: what it merges, what it keeps in order, when it is full."""

from __future__ import annotations

import numpy as np

from engine.outbox import FRAMES_MAX, Outbox
from engine.wire import End, Load, Start, StepFrame, StepModelParts

MODEL = StepModelParts(1, 1, 1, 1, 1, 1, 1, 1, 7)


def frame(tokens: dict[int, list[int]], steps: int = 0, stored: bytes = b"", evicted: bytes = b"") -> StepFrame:
    return StepFrame(
        handles=list(tokens),
        counts=[len(ids) for ids in tokens.values()],
        ids=np.array([each for ids in tokens.values() for each in ids], dtype="<i4").tobytes(),
        starts=[Start(handle, 0, 0.0, 0.0) for handle in tokens if steps == 0],
        ends=[End(steps, "stop", 0, 1)],
        load=Load(0, 0, 0, 0, 0, 0, 0.0, steps, 0.0),
        stored=stored,
        evicted=evicted,
        step_model=MODEL if steps == 1 else None,
    )


def outbox(tokens_max: int = 100) -> Outbox:
    return Outbox(lambda: None, tokens_max)


def test_one_step_goes_out_as_it_is() -> None:
    box, only = outbox(), frame({1: [5]})
    box.add(only)

    assert box.take() is only
    assert box.take() is None


def test_steps_merge_each_handle_in_order_and_the_newest_load_wins() -> None:
    box = outbox()
    for step, tokens in enumerate([{1: [10], 2: [20]}, {2: [21, 22]}, {1: [11], 3: [30]}]):
        box.add(frame(tokens, step))
    merged = box.take()

    assert isinstance(merged, StepFrame)
    assert (merged.handles, merged.counts) == ([1, 2, 3], [2, 3, 1])
    assert np.frombuffer(merged.ids, "<i4").tolist() == [10, 11, 20, 21, 22, 30]
    assert [start.handle for start in merged.starts] == [1, 2]
    assert [end.handle for end in merged.ends] == [0, 1, 2]
    assert merged.load.steps == 2
    assert merged.step_model == MODEL


def test_a_key_that_came_and_went_is_told_once_as_it_is_in_the_end() -> None:
    a, b, c = (bytes([each]) * 16 for each in range(3))
    box = outbox()
    box.add(frame({}, 0, stored=a + b))
    box.add(frame({}, 1, stored=c, evicted=a))
    box.add(frame({}, 2, stored=a, evicted=b))
    merged = box.take()

    assert isinstance(merged, StepFrame)
    assert (merged.stored, merged.evicted) == (a + c, b)


def test_it_is_full_by_tokens_and_empty_again_when_taken() -> None:
    box = outbox(tokens_max=4)
    box.add(frame({1: [1, 2, 3]}))
    assert not box.is_full
    box.add(frame({1: [4]}))
    assert box.is_full
    box.take()

    assert not box.is_full
    assert box.is_empty


def test_a_link_that_never_reads_holds_few_frames() -> None:
    box = outbox()
    for step in range(10 * FRAMES_MAX):
        box.add(frame({1: [step]}, step))

    assert len(box._frames) < FRAMES_MAX
    merged = box.take()
    assert isinstance(merged, StepFrame)
    assert np.frombuffer(merged.ids, "<i4").tolist() == list(range(10 * FRAMES_MAX))
