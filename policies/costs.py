"""Step-time model: how long an engine step takes, and, inverted, how many tokens fit in a given time.

Owns the five coefficients of one worker. The engine fits and publishes them; the router only reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepFeatures:
    """What a step computes, as far as its duration depends on it."""

    rows: int  # tokens through the dense layers, padding included
    decode_context: int = 0  # sum of the context lengths of decoding sequences
    chunk_context: int = 0  # sum over prefill chunks of tokens x mean context
    sequences: int = 0


@dataclass(frozen=True, slots=True)
class StepModel:
    """Seconds of one step: bias * (max(floor, row*rows) + base + decode*ctx + chunk*p*c + sequence*n).

    The maximum matters: up to the bend a step is paid by reading the weights, and prefill rows ride for free."""

    floor_s: float  # w: reading the weights once
    row_s: float  # c1
    base_s: float  # c0
    decode_context_s: float  # c2
    chunk_context_s: float  # c3
    sequence_s: float  # c4
    bias: float = 1.0
    q90: float = 1.25  # 90th percentile of actual / predicted
    version: int = 0  # 0 is a prior nobody measured

    def step_s(self, step: StepFeatures) -> float:
        """Predicted median seconds of `step`."""
        dense_s = max(self.floor_s, self.row_s * step.rows)
        attention_s = self.decode_context_s * step.decode_context + self.chunk_context_s * step.chunk_context
        return self.bias * (dense_s + self.base_s + attention_s + self.sequence_s * step.sequences)

    def decode_s(self, sequences: int, decode_context: int) -> float:
        """Predicted seconds of a step that only decodes."""
        return self.step_s(StepFeatures(rows=sequences, decode_context=decode_context, sequences=sequences))

    def prefill_s(self, tokens: int, cached: int = 0) -> float:
        """GPU seconds that computing `tokens` behind `cached` ones takes, whatever the chunks: no floor, no base."""
        mean_context = cached + tokens / 2
        return self.bias * (self.row_s * tokens + self.chunk_context_s * tokens * mean_context)

    def unloaded_ttft_s(self, tokens: int, cached: int = 0) -> float:
        """Seconds to the first token on an idle worker."""
        return max(self.prefill_s(tokens, cached), self.bias * self.floor_s) + self.bias * (
            self.base_s + self.sequence_s
        )
