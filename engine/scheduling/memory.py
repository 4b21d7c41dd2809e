"""Whether another sequence's KV fits, as outputs of each class have been: LightLLM's Past-Future rule.

Owns what was learned of output lengths. Never takes a block."""

from __future__ import annotations

import numpy as np

from engine.scheduling.sequence import Sequence
from engine.scheduling.table import Table, join, most_tokens
from policies.request import RequestClass
from policies.step_plan import peak_tokens

OUTPUT_WEIGHT = 0.05  # of the newest answer in its class's mean length


class PeakMemory:
    """Looks at the coming peak, not at now: answers grow, and not all of them end at once."""

    def __init__(self, output_guess_tokens: int, block_tokens: int) -> None:
        self._output_mean = [float(output_guess_tokens)] * len(RequestClass)
        self._block_tokens = block_tokens

    def learn(self, sequence: Sequence) -> None:
        """An answer has ended by itself."""
        mean = self._output_mean[sequence.request_class]
        self._output_mean[sequence.request_class] += OUTPUT_WEIGHT * (sequence.output_tokens - mean)

    def fits_surely(self, table: Table, sequence: Sequence, blocks: int) -> bool:
        """Whether it can join even if every answer grows to its bound: no peak is higher. The only question where
        memory is plenty, and 1 us in place of the 45 of `fits` for each of the eight that join a GPU's step."""
        tokens = table.tokens_max + most_tokens(sequence) + (table.count + 1) * self._block_tokens
        return tokens <= blocks * self._block_tokens

    def fits(self, table: Table, sequence: Sequence, blocks: int) -> bool:
        """Whether `sequence` can join the residents if they all may use so many blocks, each counting its own."""
        size, rows = self._block_tokens, np.flatnonzero(table.is_used)
        if not len(rows):
            return True
        guess = np.array(self._output_mean)
        known = join(table.length[rows], [sequence.length])
        emitted = join(table.emitted[rows], [sequence.output_tokens])
        most = join(table.output_max[rows], [sequence.sampling.max_tokens]) - emitted
        classes = join(table.request_class[rows], [sequence.request_class])
        remaining = np.minimum(np.maximum(guess[classes] - emitted, size), most)
        return peak_tokens(known + size, remaining) <= blocks * size
