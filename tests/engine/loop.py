"""A whole engine in one thread around any runner: orders in, each one's tokens, scores and end out.

Owns no model. Time stands still: what is proved here does not depend on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass, field

import numpy as np

from engine.build import build
from engine.compute.masks import Grammar
from engine.config import EngineConfig
from engine.core import Attach, Core, Inbox, Order
from engine.outbox import Outbox
from engine.step import ModelFacts, Runner
from engine.wire import Control, End, Hello, Sampling, Scored, StepFrame, Submit, Told


@dataclass
class Heard:
    """What one handle got."""

    ids: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the weights, for each token
    end: End | None = None


class Loop:
    """Submit, then run until every order has ended. Unless a clock is given, a look at it takes 10 ms."""

    def __init__(
        self,
        runner: Runner,
        facts: ModelFacts,
        block_tokens: int,
        *,
        has_drafts: bool = False,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._inbox = Inbox()
        config = EngineConfig(socket="", block_tokens=block_tokens, has_drafts=has_drafts)
        ticks = itertools.count()
        self.core: Core = build(
            runner, facts, config, self._inbox, clock or (lambda: next(ticks) / 100), is_strict=True
        )
        self._outbox = Outbox(lambda: None)
        self._inbox.put(Attach(1, self._outbox))
        self._handles = 0
        self._later: tuple[int, Control] | None = None
        self.told: list[Told] = []
        self.heard: dict[int, Heard] = {}

    def submit(
        self, ids: list[int], sampling: Sampling, *, prompt_len: int | None = None, grammar: Grammar | None = None
    ) -> Heard:
        self._handles += 1
        heard = self.heard[self._handles] = Heard()
        order = Submit(
            handle=self._handles,
            ids=np.array(ids, "<i4").tobytes(),
            prompt_len=len(ids) if prompt_len is None else prompt_len,
            salt=b"",
            public_blocks=0,
            request_class=0,
            first_left_s=1.0,
            tpot_s=0.04,
            deadline_left_s=float("inf"),
            session="",
            sampling=sampling,
        )
        self._inbox.put(Order(1, order, 0.0, grammar))
        return heard

    def run(self, steps_max: int = 2000) -> None:
        """Until all have ended, and nothing is left behind."""
        for _ in range(steps_max):
            self.core.turn()
            self._read()
            if self._later and sum(len(heard.ids) for heard in self.heard.values()) >= self._later[0]:
                order, self._later = self._later[1], None
                self._begin(order)
            if all(heard.end for heard in self.heard.values()):
                self.core.turn()
                return
        raise AssertionError(f"no end within {steps_max} steps")

    def tell(self, order: Control, *, after_tokens: int | None = None) -> None:
        """An order about the worker: done on return, or sent while it runs, once so many tokens are there."""
        if after_tokens is not None:
            self._later = (after_tokens, order)
            return
        self._begin(order)
        self.core.turn()
        self._read()

    def _read(self) -> None:
        while message := self._outbox.take():
            if isinstance(message, StepFrame):
                self._take(message)
            elif isinstance(message, Told):
                self.told.append(message)

    def _begin(self, order: Control) -> None:
        """Send it, and wait for the thread that loads."""
        self._inbox.put(Order(1, order, 0.0))
        self.core.turn()
        for loading in self.core._control._loading:
            wait([loading.renewal], timeout=240)

    def attach(self) -> Hello:
        """What a second link hears first."""
        outbox = Outbox(lambda: None)
        self._inbox.put(Attach(2, outbox))
        self.core.turn()
        hello = outbox.take()
        assert isinstance(hello, Hello)
        return hello

    def _take(self, frame: StepFrame) -> None:
        ids, at = np.frombuffer(frame.ids, "<i4").tolist(), 0
        for handle, count in zip(frame.handles, frame.counts, strict=True):
            self.heard[handle].ids += ids[at : at + count]
            self.heard[handle].versions += [frame.weights_version] * count
            at += count
        for scored in frame.scored:
            self.heard[scored.handle].scored.append(scored)
        for end in frame.ends:
            self.heard[end.handle].end = end

    def ask(self, ids: list[int], sampling: Sampling, **options: object) -> Heard:
        """Submit and run."""
        heard = self.submit(ids, sampling, **options)  # type: ignore[arg-type]
        self.run()
        return heard
