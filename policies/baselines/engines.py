"""Published step planners: how much prefill goes into a step, and whose.

Owns the rules. Every resident decodes in each step, KV is kept by recency alone; blocks, victims and admission to the
memory are the scheduler's, the same for all."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from policies.api import EnginePolicy
from policies.costs import StepFeatures, StepModel
from policies.retention import Band, SpanView
from policies.step_plan import NOBODY, BatchView, Chunk, Ints, StepPlan

NIYAMA_ALPHA = 0.5  # how much a second of remaining work counts beside a second of deadline
ROWS_MAX = 2048


def static(tokens: int, *, is_priority: bool = False) -> EnginePolicy:
    """vLLM's and SGLang's: decodes first, then prompts in order of arrival up to `tokens` rows; by class before that
    where `is_priority`."""
    return EnginePolicy(functools.partial(_static, tokens=tokens, is_priority=is_priority), keep_recent)


def niyama() -> EnginePolicy:
    """Niyama-like (arXiv 2503.22562): the chunk fills the tightest decode's slack; earliest deadline first, blended
    with least work; who is late already is served last."""
    return EnginePolicy(_niyama, keep_recent)


def keep_recent(span: SpanView, now: float) -> tuple[Band, float]:
    """Plain LRU."""
    del span, now
    return Band.CHATBOT, 0.0


def _static(batch: BatchView, model: StepModel, now: float, *, tokens: int, is_priority: bool) -> StepPlan:
    del now
    decodes, prompts = _split(batch)
    keys = (batch.arrived[prompts], batch.request_class[prompts]) if is_priority else (batch.arrived[prompts],)
    left, chunks = tokens - len(decodes), []
    for row in prompts[np.lexsort(keys)].tolist():
        if left <= 0:
            break
        chunks.append(Chunk(row, min(left, int(batch.pending[row]))))
        left -= chunks[-1].tokens
    return _plan(batch, model, decodes, chunks)


def _niyama(batch: BatchView, model: StepModel, now: float) -> StepPlan:
    decodes, prompts = _split(batch)
    slack_s = float((batch.due[decodes] - now).min()) if len(decodes) else np.inf
    pending = batch.pending[prompts]
    work_s = pending * (model.row_s + model.chunk_context_s * (batch.context[prompts] + 0.5 * pending))
    is_late = batch.due[prompts] - work_s < now
    due = np.minimum(batch.due[prompts], now + 1e9)
    chunks: list[Chunk] = []
    for row in prompts[np.lexsort((due + NIYAMA_ALPHA * work_s, is_late))].tolist():
        step = _features(batch, decodes, chunks)
        fitting = model.tokens_within(min(slack_s, 1.0), step, int(batch.context[row]))
        if not decodes.size and not chunks:
            fitting = max(fitting, 128)  # an idle device takes a chunk, however late it is
        tokens = min(fitting, int(batch.pending[row]), ROWS_MAX - step.rows)
        if tokens <= 0:
            break
        chunks.append(Chunk(row, tokens))
    if not chunks and len(prompts) and slack_s <= 0.0:
        row = int(prompts[np.lexsort((due + NIYAMA_ALPHA * work_s, is_late))][0])
        chunks.append(Chunk(row, min(128, int(batch.pending[row]))))  # lines that are lost must not stop all prefill
    return _plan(batch, model, decodes, chunks)


def _split(batch: BatchView) -> tuple[Ints, Ints]:
    is_free = ~batch.is_blocked
    return (batch.is_decoding & is_free).nonzero()[0], (~batch.is_decoding & is_free).nonzero()[0]


def _features(batch: BatchView, decodes: Ints, chunks: list[Chunk]) -> StepFeatures:
    attended = sum(int(chunk.tokens * (int(batch.context[chunk.row]) + chunk.tokens / 2)) for chunk in chunks)
    rows = len(decodes) + sum(chunk.tokens for chunk in chunks)
    return StepFeatures(rows, int(batch.context[decodes].sum()), attended, len(decodes) + len(chunks))


def _plan(batch: BatchView, model: StepModel, decodes: Ints, chunks: list[Chunk]) -> StepPlan:
    return StepPlan(decodes, tuple(chunks), NOBODY, (), model.step_s(_features(batch, decodes, chunks)))


ENGINES: dict[str, Callable[[], EnginePolicy]] = {
    "static-512": lambda: static(512),
    "static-2048": lambda: static(2048),
    "static-8192": lambda: static(8192),
    "priority-512": lambda: static(512, is_priority=True),
    "priority-2048": lambda: static(2048, is_priority=True),
    "priority-8192": lambda: static(8192, is_priority=True),
    "niyama": niyama,
}
