"""Step-time model: how long an engine step takes, and, inverted, how many tokens fit in a given time.

Owns the five coefficients of one worker. The engine fits and publishes them; the router only reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class StepFeatures(NamedTuple):  # made several times a step: a third of what a frozen dataclass costs
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

    def tokens_within(self, seconds: float, step: StepFeatures, context: int) -> int:
        """How many prompt tokens behind `context` still fit, if `step` with them is to take `seconds`; 0 if none do.

        Step time grows with tokens, and is the larger of two parabolas: reading weights hides rows, or rows do."""
        rest_s = seconds / self.bias - self.base_s - self.sequence_s * (step.sequences + 1)
        rest_s -= self.decode_context_s * step.decode_context + self.chunk_context_s * step.chunk_context
        curve, slope = self.chunk_context_s, self.chunk_context_s * context
        hidden = _root(curve, slope, rest_s - self.floor_s)
        paid = _root(curve, slope + self.row_s, rest_s - self.row_s * step.rows)
        return int(min(hidden, paid) + 1e-6)

    def prefill_s(self, tokens: int, cached: int = 0) -> float:
        """GPU seconds that computing `tokens` behind `cached` ones takes, whatever the chunks: no floor, no base."""
        mean_context = cached + tokens / 2
        return self.bias * (self.row_s * tokens + self.chunk_context_s * tokens * mean_context)

    def request_s(self, tokens: int, cached: int, output: int) -> float:
        """GPU-seconds of one request's own: its prompt and its share of the steps that it decodes in."""
        step_s = self.bias * (self.sequence_s + self.decode_context_s * tokens)
        return self.prefill_s(tokens - cached, cached) + output * step_s

    def unloaded_ttft_s(self, tokens: int, cached: int = 0) -> float:
        """Seconds to the first token on an idle worker."""
        return max(self.prefill_s(tokens, cached), self.bias * self.floor_s) + self.bias * (
            self.base_s + self.sequence_s
        )


def _root(curve: float, slope: float, room: float) -> float:
    """The largest p with curve*p*p/2 + slope*p <= room; stable where curve or slope is zero."""
    if room <= 0.0:
        return 0.0
    steepness = slope + math.sqrt(slope * slope + 2.0 * curve * room)
    return min(2.0 * room / steepness, TOKENS_MAX) if steepness > 0.0 else TOKENS_MAX


TOKENS_MAX = 1e9  # what a model that says "free" is taken to allow
BENDS = tuple(2.0 ** (power / 2) for power in range(21))  # rows at which reading the weights may stop hiding work
FORGETTING = 0.999  # a step a thousand steps ago counts a third
PRIOR_WEIGHT = 1e-2  # of one step: a term whose share of the steps so far is small stays near the prior
BIAS_WEIGHT = 0.05  # of the newest step in the bias: about 20 steps of memory
BIAS_LIMITS = (0.5, 2.0)
Q90_GAIN = 0.02
WARM_STEPS = 32  # until then even a tenfold surprise is believed: the prior may be of another machine
OUTLIER = 4.0  # later one stalled step counts as at most this many times its prediction
PUBLISH_CHANGE = 0.05  # predictions that moved by more are worth a new version ...
PUBLISH_STEPS = 16  # ... but not more often than this


class StepFit:
    """Learns a StepModel from steps as they are timed: least squares on relative error, forgetting, nothing negative.

    `max(floor, row*rows)` is `row * max(bend, rows)` with bend = floor / row, which is linear once the bend is known:
    so one small fit runs for each candidate bend and the one that predicts best speaks. Each keeps discounted normal
    equations and descends them coordinate by coordinate, which cannot diverge (the covariance form of recursive least
    squares did, after steps of one shape). Fixed-order numpy, hence replayable. Hot: once a step, about 50 us."""

    def __init__(self, prior: StepModel) -> None:
        self._bends = np.array(BENDS)
        unit = np.array([prior.row_s, prior.base_s, prior.decode_context_s, prior.chunk_context_s, prior.sequence_s])
        self._unit = np.maximum(unit, 1e-15)  # coefficients are learned in units of the prior, so all are near 1
        count = len(BENDS)
        self._parts = np.empty((5, count))
        self._theta = np.ones((5, count))
        self._squares = np.zeros((5, 5, count))  # sum of x x^T
        self._products = np.zeros((5, count))  # sum of x; each target is 1
        # Before any step the candidate nearest to the prior's own bend speaks.
        bend = prior.floor_s / max(prior.row_s, 1e-15)
        self._error = 1e-3 * np.abs(np.log((self._bends + 1.0) / (bend + 1.0)))
        self._bias, self._q90, self._steps = prior.bias, prior.q90, 0
        self._published, self._published_at = prior, 0
        self._model = prior

    @property
    def model(self) -> StepModel:
        """What is believed now; its version is that of the last one worth publishing."""
        return self._model

    @property
    def published(self) -> StepModel:
        """The last model that was worth a version."""
        return self._published

    def observe(self, step: StepFeatures, seconds: float) -> StepModel | None:
        """Learn from one step; the model if it is worth publishing, else None."""
        if not (math.isfinite(seconds) and seconds > 0.0):
            return None
        self._steps += 1
        if self._steps == 1:
            self._unit *= seconds / self._model.step_s(step)  # the prior may be of another machine: right its scale
        if self._steps > WARM_STEPS:
            expected_s = self._model.step_s(step)
            seconds = min(max(seconds, expected_s / OUTLIER), expected_s * OUTLIER)
        ratio = seconds / max(self._learn(step, seconds), 1e-12)
        self._bias += BIAS_WEIGHT * (min(max(ratio, BIAS_LIMITS[0]), BIAS_LIMITS[1]) - self._bias)
        surprise = ratio / self._bias
        self._q90 = max(1.0, self._q90 + Q90_GAIN * self._q90 * (0.9 if surprise > self._q90 else -0.1))
        self._model = self._believed(self._published.version)
        return self._publish(step)

    def publish(self) -> StepModel:
        """Give what is believed now a new version, whatever changed."""
        self._model = self._published = self._believed(self._published.version + 1)
        self._published_at = self._steps
        return self._model

    def _publish(self, step: StepFeatures) -> StepModel | None:
        change = abs(self._model.step_s(step) / self._published.step_s(step) - 1.0)
        if change < PUBLISH_CHANGE or self._steps - self._published_at < PUBLISH_STEPS:
            return None
        return self.publish()

    def _learn(self, step: StepFeatures, seconds: float) -> float:
        """Update all candidates; what the one that spoke had predicted, bias left out."""
        parts, theta, squares = self._parts, self._theta, self._squares
        parts[0] = np.maximum(self._bends, step.rows)
        parts[1:] = ((1.0,), (step.decode_context,), (step.chunk_context,), (step.sequences,))
        parts *= (self._unit / seconds)[:, None]  # each part as a share of what really passed: their sum should be 1
        predicted = (parts * theta).sum(axis=0)
        spoke = float(predicted[int(self._error.argmin())]) * seconds
        self._error += 0.01 * (np.minimum((1.0 - predicted) ** 2, 1.0) - self._error)
        squares *= FORGETTING
        squares += parts[:, None] * parts[None]
        self._products *= FORGETTING
        self._products += parts
        for i in range(5):  # one sweep; the next step's goes on from here
            weight = squares[i, i]
            wanted = self._products[i] - (squares[i] * theta).sum(axis=0) + weight * theta[i] + PRIOR_WEIGHT
            theta[i] = np.maximum(wanted, 0.0) / (weight + PRIOR_WEIGHT)
        return spoke

    def _believed(self, version: int) -> StepModel:
        best = int(self._error.argmin())
        row, base, decode_context, chunk_context, sequence = (self._theta[:, best] * self._unit).tolist()
        return StepModel(
            floor_s=row * BENDS[best],
            row_s=row,
            base_s=base,
            decode_context_s=decode_context,
            chunk_context_s=chunk_context,
            sequence_s=sequence,
            bias=self._bias,
            q90=self._q90,
            version=version,
        )
