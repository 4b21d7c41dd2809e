"""Orders of one link on their way to the loop: those with a grammar wait here until it is compiled, in one thread.

Owns the orders that wait. The loop never compiles, and an order without a grammar never waits behind one that has."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace

import numpy as np

from engine.compute.masks import Grammar, GrammarError
from engine.core import Command, Order
from engine.wire import Abort, End, Submit

WAITING_MAX = 256  # of one link; at 20 ms each the last one waits 5 s

Compile = Callable[[str, str], Grammar]  # (kind, source); raises GrammarError


def no_grammars(kind: str, source: str) -> Grammar:
    """Compile of a worker that has no tokenizer."""
    del kind, source
    raise GrammarError("this worker's model has no tokenizer, so it cannot follow a grammar")


class GrammarGate:
    """Made for a link, its tasks in the link's own group."""

    def __init__(
        self, compile_: Compile, thread: Executor, put: Callable[[Command], None], tasks: asyncio.TaskGroup
    ) -> None:
        self._compile = compile_
        self._thread = thread
        self._put = put
        self._tasks = tasks
        self._waiting: dict[int, asyncio.Task[None]] = {}

    def put(self, order: Order) -> None:
        """To the loop, now or when its grammar is there. An abort of one that waits ends it here."""
        message = order.message
        if isinstance(message, Abort) and (task := self._waiting.pop(message.handle, None)):
            task.cancel()
        elif not isinstance(message, Submit) or not message.sampling.grammar_kind:
            self._put(order)
        elif len(self._waiting) >= WAITING_MAX:
            busy = End(message.handle, "refused", 0, 0, "too many grammars wait to be compiled")
            self._put(replace(order, refused=busy))
        else:
            self._waiting[message.handle] = self._tasks.create_task(self._prepare(order, message))

    def close(self) -> None:
        """The link is gone, and with it whoever waited."""
        for task in self._waiting.values():
            task.cancel()

    async def _prepare(self, order: Order, submit: Submit) -> None:
        loop = asyncio.get_running_loop()
        try:
            grammar = await loop.run_in_executor(self._thread, prepared, self._compile, submit)
            ready = replace(order, grammar=grammar)
        except GrammarError as error:
            ready = replace(order, refused=End(submit.handle, "invalid", 0, 0, str(error)))
        self._waiting.pop(submit.handle, None)
        self._put(ready)


def prepared(compile_: Compile, submit: Submit) -> Grammar:
    """The grammar of an order, behind the tokens that an earlier attempt emitted."""
    grammar = compile_(submit.sampling.grammar_kind, submit.sampling.grammar)
    for token in np.frombuffer(submit.ids, dtype="<i4")[submit.prompt_len :].tolist():
        grammar.accept(token)
    return grammar
