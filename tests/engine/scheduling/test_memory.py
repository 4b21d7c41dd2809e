"""Room for another sequence: where the quick bound says yes, the coming peak does; it follows who comes and goes."""

from __future__ import annotations

import numpy as np

from engine.scheduling.memory import PeakMemory
from engine.scheduling.sequence import Sequence
from engine.scheduling.table import Table
from engine.step import ModelFacts
from tests.engine.rig import order, prompt

FACTS = ModelFacts("none", "none", "cpu", "none", 1000, 8192, ())
SIZE = 16


def sequence(serial: int, tokens: int, outputs: int) -> Sequence:
    return Sequence(1, order(serial, prompt(serial, tokens), max_tokens=outputs), serial, FACTS, now=0.0)


def test_what_fits_at_its_bound_fits_at_its_peak() -> None:
    random = np.random.default_rng(3)
    answers = set()
    for _ in range(200):
        memory, table = PeakMemory(int(random.integers(1, 200)), SIZE), Table(8, 600)
        for serial in range(int(random.integers(0, 8))):
            resident = sequence(serial, int(random.integers(1, 300)), int(random.integers(1, 300)))
            table.add(resident, 0)
            rows, steps = np.array([resident.row]), int(random.integers(0, resident.sampling.max_tokens))
            table.skip(rows, steps)
        newcomer, blocks = sequence(9, int(random.integers(1, 300)), 100), int(random.integers(1, 300))
        surely, fits = memory.fits_surely(table, newcomer, blocks), memory.fits(table, newcomer, blocks)
        assert fits or not surely or not table.count
        answers.add((surely, fits))

    assert answers == {(True, True), (False, True), (False, False)}


def test_the_bound_follows_who_comes_and_goes() -> None:
    table, memory = Table(4, 600), PeakMemory(10, SIZE)
    first, second = sequence(1, 40, 60), sequence(2, 100, 20)
    for resident in (first, second):
        table.add(resident, 0)
    assert table.tokens_max == 40 + 60 + 100 + 20

    table.emit(np.array([first.row]), np.array([7], np.int32), 0.0)
    assert table.tokens_max == 220
    table.remove(first)
    table.remove(second)

    assert table.tokens_max == 0
    assert memory.fits_surely(table, first, 8)
    assert not memory.fits_surely(table, first, 7)  # 100 tokens, and a block that is begun
