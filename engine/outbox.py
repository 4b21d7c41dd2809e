"""What one link has not been sent yet: step frames merged into one while the router does not read.

Owns the hand-over from the step loop to the socket's thread. Never blocks: it only says when it is full."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from engine.keys import split
from engine.wire import End, Hello, Load, Start, StepFrame, StepModelParts

TOKENS_MAX = 65_536  # 256 kB; the planner skips the link's sequences from here on


class Outbox:
    """Load parts replace each other, tokens append, stored and evicted keys cancel out."""

    def __init__(self, wake: Callable[[], None], tokens_max: int = TOKENS_MAX) -> None:
        self._wake = wake
        self._tokens_max = tokens_max
        self._lock = threading.Lock()
        self._hello: Hello | None = None
        self._clear()

    def _clear(self) -> None:
        self._tokens: dict[int, list[int]] = {}
        self._count = 0
        self._starts: list[Start] = []
        self._ends: list[End] = []
        self._load: Load | None = None
        self._keys: dict[bytes, bool] = {}  # is it stored now
        self._model: StepModelParts | None = None

    @property
    def is_full(self) -> bool:
        return self._count >= self._tokens_max

    @property
    def is_empty(self) -> bool:
        return self._hello is None and self._load is None

    def open(self, hello: Hello) -> None:
        """The first thing to send."""
        with self._lock:
            self._hello = hello
        self._wake()

    def add(self, frame: StepFrame) -> None:
        """One step more."""
        with self._lock:
            at, ids = 0, np.frombuffer(frame.ids, dtype="<i4").tolist()
            for handle, count in zip(frame.handles, frame.counts, strict=True):
                self._tokens.setdefault(handle, []).extend(ids[at : at + count])
                at += count
            self._count += len(ids)
            self._starts += frame.starts
            self._ends += frame.ends
            self._load = frame.load
            self._keys.update(dict.fromkeys(split(frame.stored), True))
            self._keys.update(dict.fromkeys(split(frame.evicted), False))
            self._model = frame.step_model or self._model
        self._wake()

    def take(self) -> Hello | StepFrame | None:
        """What to send next; None if there is nothing."""
        with self._lock:
            if self._hello is not None:
                hello, self._hello = self._hello, None
                return hello
            if self._load is None:
                return None
            frame = StepFrame(
                handles=list(self._tokens),
                counts=[len(ids) for ids in self._tokens.values()],
                ids=np.array([i for ids in self._tokens.values() for i in ids], dtype="<i4").tobytes(),
                starts=self._starts,
                ends=self._ends,
                load=self._load,
                stored=b"".join(key for key, is_stored in self._keys.items() if is_stored),
                evicted=b"".join(key for key, is_stored in self._keys.items() if not is_stored),
                step_model=self._model,
            )
            self._clear()
            return frame
