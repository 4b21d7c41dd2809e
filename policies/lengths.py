"""How long answers are: log-histograms by class, tenant and shape of the request, forgetting with a half-life.

Owns the counts. Never sees text; a prediction is three quantiles, capped by what the client asked for."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from policies.api import Floats, Output
from policies.request import Request, RequestClass

BINS = 32
EDGES: Floats = 2.0 ** np.linspace(0.0, 17.0, BINS + 1)  # 1 .. 131,072 tokens, 45 % a bin
_EDGES: list[float] = EDGES.tolist()  # to find one bin in: numpy takes ten times as long
MIDDLES: Floats = np.sqrt(EDGES[:-1] * EDGES[1:])
HALF_LIFE_S = 3600.0
NEWS = 0.05  # of a leaf's answers: so many new ones, and its quantiles are taken again
PARENT_WEIGHT = 20.0  # answers that a leaf needs before it says as much as its parent

# Median and 90th percentile before the first answer: Mooncake conversation, TraceLab Claude Code, Azure 2023 code.
PRIORS = ((350.0, 597.0), (252.0, 1500.0), (69.0, 389.0))

Leaf = tuple[RequestClass, str, bool, bool]


def _prior(median: float, p90: float) -> Floats:
    sigma = np.log(p90 / median) / 1.2816
    weights = np.exp(-0.5 * ((np.log(MIDDLES) - np.log(median)) / sigma) ** 2)
    share: Floats = weights / weights.sum()
    return share


PRIOR_SHARES = tuple(_prior(*prior) for prior in PRIORS)


class _Histogram:
    __slots__ = ("at", "counts", "new", "total")

    def __init__(self, now: float) -> None:
        self.counts: Floats = np.zeros(BINS)
        self.total = self.new = 0.0  # of the counts; and of those since the quantiles were taken
        self.at = now

    def learn(self, tokens: int, now: float) -> None:
        left = 0.5 ** (max(0.0, now - self.at) / HALF_LIFE_S)
        self.counts *= left
        self.total, self.new, self.at = self.total * left + 1.0, self.new + 1.0, now
        self.counts[min(BINS - 1, max(0, bisect_right(_EDGES, tokens) - 1))] += 1.0


class Lengths:
    """Predicts from the leaf, backed by its class, backed by the prior."""

    def __init__(self, leaves_max: int) -> None:
        self._leaves_max = leaves_max
        self._leaves: dict[Leaf, _Histogram] = {}
        self._classes: dict[RequestClass, _Histogram] = {}
        self._cache: dict[Leaf, tuple[float, float, float]] = {}

    def expect(self, request: Request, request_class: RequestClass) -> Output:
        """The output of such a request."""
        leaf = _leaf(request, request_class)
        found = self._cache.get(leaf)
        if found is None:
            found = self._cache[leaf] = self._quantiles(leaf)
            while len(self._cache) > self._leaves_max:
                del self._cache[next(iter(self._cache))]
        cap = float(request.max_output) if request.max_output is not None else _EDGES[-1]
        return Output(mean=min(cap, found[0]), q50=min(cap, found[1]), q80=min(cap, found[2]))

    def learn(self, request: Request, request_class: RequestClass, tokens: int, now: float) -> None:
        """An answer ended by itself after `tokens`."""
        leaf = _leaf(request, request_class)
        histogram = self._leaves.pop(leaf, None) or _Histogram(now)
        self._leaves[leaf] = histogram  # moved to the end: the least recently used leaf goes first
        while len(self._leaves) > self._leaves_max:
            del self._leaves[next(iter(self._leaves))]
        histogram.learn(tokens, now)
        self._classes.setdefault(request_class, _Histogram(now)).learn(tokens, now)
        if histogram.new >= NEWS * histogram.total:
            histogram.new = 0.0
            self._cache.pop(leaf, None)

    def _quantiles(self, leaf: Leaf) -> tuple[float, float, float]:
        share = PRIOR_SHARES[leaf[0]]
        for histogram in (self._classes.get(leaf[0]), self._leaves.get(leaf)):
            if histogram is not None:
                counts = histogram.counts + PARENT_WEIGHT * share
                share = counts / counts.sum()
        below = np.cumsum(share)
        q50, q80 = MIDDLES[np.minimum(below.searchsorted((0.5, 0.8)), BINS - 1)].tolist()
        return float(share @ MIDDLES), q50, q80


def _leaf(request: Request, request_class: RequestClass) -> Leaf:
    facts = request.facts
    return request_class, request.tenant.id, facts.tool_count > 0, facts.last_role == "tool"
