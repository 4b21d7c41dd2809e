"""The wire: whatever way bytes are cut, the same messages come out; what no correct peer sends is a WireError."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.wire import (
    FRAME_MAX_BYTES,
    Abort,
    Drain,
    FrameReader,
    Sampling,
    Submit,
    WireError,
    decode_from_router,
    decode_from_worker,
    encode,
)

SAMPLING = Sampling(temperature=0.0, seed=7, max_tokens=5, stop_ids=(2, 3))
SUBMIT = Submit(1, b"\x01\x00\x00\x00", 1, b"salt", 0, 2, -0.5, float("inf"), 3.0, "session", SAMPLING)
MESSAGES = [SUBMIT, Abort(1, "gone"), Drain(2.5)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(MESSAGES), max_size=6), st.data())
def test_messages_survive_any_cut_of_the_stream(messages: list[Submit | Abort | Drain], data: st.DataObject) -> None:
    """The reader gives the frames that were written, in order, however the socket cut them."""
    stream, reader, read = b"".join(map(encode, messages)), FrameReader(), []
    while stream:
        count = data.draw(st.integers(1, len(stream)))
        read += [decode_from_router(frame) for frame in reader.feed(stream[:count])]
        stream = stream[count:]
    assert read == messages


def test_a_frame_over_the_limit_is_refused_on_both_sides() -> None:
    with pytest.raises(WireError, match="over the limit"):
        encode(Abort(1, "x" * FRAME_MAX_BYTES))
    with pytest.raises(WireError, match="announces"):
        FrameReader().feed(struct.pack("<I", FRAME_MAX_BYTES + 1))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_a_wire_error(frame: bytes) -> None:
    """Nothing that a broken peer sends raises anything else."""
    for decode in (decode_from_router, decode_from_worker):
        try:
            decode(frame)
        except WireError as error:
            assert "undecodable" in str(error)  # noqa: PT017 the point is that no other error comes


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(WireError):
        decode_from_worker(encode(SUBMIT)[4:])
