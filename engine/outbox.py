"""What one link has not been sent yet: step frames merged into one while the router does not read.

Owns the hand-over from the step loop to the socket's thread. Never blocks: it only says when it is full."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import groupby

from engine.kv.keys import split
from engine.wire import Hello, StepFrame, Told

TOKENS_MAX = 65_536  # 256 kB; the planner skips the link's sequences from here on
FRAMES_MAX = 64  # then they are merged, so that a link that never reads holds one frame


class Outbox:
    """Load parts replace each other, tokens append, stored and evicted keys cancel out."""

    def __init__(self, wake: Callable[[], None], tokens_max: int = TOKENS_MAX) -> None:
        self._wake = wake
        self._tokens_max = tokens_max
        self._lock = threading.Lock()
        self._hello: Hello | None = None
        self._frames: list[StepFrame] = []
        self._tokens = 0
        self._told: list[Told] = []  # as many as the peer has asked for and not read: it must read what it asks

    @property
    def is_full(self) -> bool:
        return self._tokens >= self._tokens_max

    @property
    def is_empty(self) -> bool:
        return self._hello is None and not self._frames and not self._told

    def open(self, hello: Hello) -> None:
        """The first thing to send."""
        with self._lock:
            self._hello = hello
        self._wake()

    def add(self, frame: StepFrame) -> None:
        """One step more."""
        with self._lock:
            self._frames.append(frame)
            self._tokens += _size(frame)
            if len(self._frames) >= FRAMES_MAX:
                self._frames = [merge(run) for run in _runs(self._frames)]
        self._wake()

    def tell(self, told: Told) -> None:
        """An order about the worker is answered."""
        with self._lock:
            self._told.append(told)
        self._wake()

    def take(self) -> Hello | StepFrame | Told | None:
        """What to send next; None if there is nothing."""
        with self._lock:
            if self._hello is not None:
                hello, self._hello = self._hello, None
                return hello
            if self._told:
                return self._told.pop(0)
            frames, *later = _runs(self._frames) or [[]]
            self._frames = [frame for run in later for frame in run]
            self._tokens = sum(map(_size, self._frames))
        return merge(frames) if frames else None


def _size(frame: StepFrame) -> int:
    """Tokens and log-probabilities."""
    return len(frame.ids) // 4 + sum(1 + len(score.top_ids) for score in frame.scored)


def _runs(frames: list[StepFrame]) -> list[list[StepFrame]]:
    """Frames that may become one: a token is never told with a version of the weights that did not make it."""
    return [list(run) for _, run in groupby(frames, key=lambda frame: frame.weights_version)]


def merge(frames: list[StepFrame]) -> StepFrame:
    """Several steps as one frame; each handle's tokens stay in order."""
    if len(frames) == 1:
        return frames[0]
    tokens: dict[int, list[bytes]] = {}
    keys: dict[bytes, bool] = {}  # is it stored in the end
    for frame in frames:
        at = 0
        for handle, count in zip(frame.handles, frame.counts, strict=True):
            tokens.setdefault(handle, []).append(frame.ids[at : at + 4 * count])
            at += 4 * count
        keys.update(dict.fromkeys(split(frame.stored), True))
        keys.update(dict.fromkeys(split(frame.evicted), False))
    joined = {handle: b"".join(pieces) for handle, pieces in tokens.items()}
    return StepFrame(
        handles=list(joined),
        counts=[len(ids) // 4 for ids in joined.values()],
        ids=b"".join(joined.values()),
        starts=[start for frame in frames for start in frame.starts],
        ends=[end for frame in frames for end in frame.ends],
        load=frames[-1].load,
        stored=b"".join(key for key, is_stored in keys.items() if is_stored),
        evicted=b"".join(key for key, is_stored in keys.items() if not is_stored),
        acks=[ack for frame in frames for ack in frame.acks],
        scored=[score for frame in frames for score in frame.scored],
        weights_version=frames[-1].weights_version,
        step_model=next((frame.step_model for frame in reversed(frames) if frame.step_model), None),
    )
