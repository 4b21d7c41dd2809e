"""The gate: grammars are compiled apart, nothing waits behind one, and what is no grammar ends with its reason."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import numpy as np

from engine.compute import grammar_gate
from engine.compute.grammar import GrammarCompiler
from engine.compute.grammar_gate import GrammarGate, no_grammars
from engine.compute.masks import Grammar
from engine.core import Command, Order
from engine.wire import Abort, Sampling, Submit
from tests.engine.compute.test_grammar import EOS, TOKENIZER, allowed
from tests.engine.rig import order, prompt

COMPILER = GrammarCompiler(TOKENIZER.to_str(), 257, [EOS])


def wanting(handle: int, regex: str, said: str = "") -> Submit:
    ids = np.array(TOKENIZER.encode("say: " + said).ids, np.int32)
    sampling = Sampling(grammar_kind="regex", grammar=regex)
    return order(handle, ids, sampling=sampling, prompt_len=len(ids) - len(said))


class Door:
    """A gate, what has passed it, and a compiler that waits until the test lets it go on."""

    def __init__(self, tasks: asyncio.TaskGroup, compile_: Any = COMPILER.compile) -> None:
        self.passed: list[Command] = []
        self.may_go_on = Event()
        self._compile = compile_
        self._thread = ThreadPoolExecutor(1)
        self.gate = GrammarGate(self._slow, self._thread, self.passed.append, tasks)

    def _slow(self, kind: str, source: str) -> Grammar:
        assert self.may_go_on.wait(60)
        compiled: Grammar = self._compile(kind, source)
        return compiled

    def put(self, *messages: Submit | Abort) -> None:
        for message in messages:
            self.gate.put(Order(1, message, 0.0))

    async def open(self, count: int) -> list[Order]:
        self.may_go_on.set()
        async with asyncio.timeout(60):
            while len(self.passed) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        return [command for command in self.passed if isinstance(command, Order)]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_an_order_without_a_grammar_passes_those_that_wait_for_theirs() -> None:
    async def work() -> None:
        async with asyncio.TaskGroup() as tasks:
            door = Door(tasks)
            door.put(wanting(1, "a|b"), order(2, prompt(2, 4)))
            assert [command.message.handle for command in door.passed] == [2]  # type: ignore[union-attr]
            orders = await door.open(2)
            assert orders[1].grammar is not None
            assert [TOKENIZER.id_to_token(token) for token in allowed(orders[1].grammar)] == ["a", "b"]

    run(work())


def test_a_resumed_orders_grammar_stands_behind_what_was_said() -> None:
    async def work() -> None:
        async with asyncio.TaskGroup() as tasks:
            door = Door(tasks)
            door.put(wanting(1, "(ab)*c", said="aba"))
            (resumed,) = await door.open(1)
            assert resumed.grammar is not None
            assert [TOKENIZER.id_to_token(token) for token in allowed(resumed.grammar)] == ["b"]

    run(work())


def test_what_cannot_be_compiled_ends_as_invalid() -> None:
    async def work() -> None:
        async with asyncio.TaskGroup() as tasks:
            door = Door(tasks)
            door.put(wanting(1, "(a"))
            (refused,) = await door.open(1)
            assert refused.refused is not None
            assert (refused.refused.handle, refused.refused.reason) == (1, "invalid")
            without = Door(tasks, no_grammars)
            without.put(wanting(3, "a"))
            (refused,) = await without.open(1)
            assert refused.refused is not None
            assert "no tokenizer" in refused.refused.message

    run(work())


def test_who_leaves_meanwhile_never_reaches_the_loop() -> None:
    async def work() -> None:
        async with asyncio.TaskGroup() as tasks:
            door = Door(tasks)
            door.put(wanting(1, "a"), wanting(2, "a"), Abort(1, "client gone"))
            (only,) = await door.open(1)
            assert isinstance(only.message, Submit)
            assert only.message.handle == 2
            door.put(wanting(3, "a"))
            door.gate.close()
        assert len(door.passed) == 1

    run(work())


def test_beyond_the_bound_an_order_is_refused() -> None:
    async def work() -> None:
        async with asyncio.TaskGroup() as tasks:
            door = Door(tasks)
            door.put(*(wanting(handle, "a") for handle in range(grammar_gate.WAITING_MAX + 1)))
            (refused,) = [command for command in door.passed if isinstance(command, Order)]
            assert refused.refused is not None
            assert (refused.refused.handle, refused.refused.reason) == (grammar_gate.WAITING_MAX, "refused")
            door.gate.close()
            door.may_go_on.set()

    run(work())
