"""The engine's step: who decodes, whose prompt gets a chunk and how large, so that the tightest resident line holds.

Owns the order of work inside one worker. Never touches KV: the scheduler finds blocks or victims for what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from policies.costs import StepFeatures, StepModel
from policies.request import RequestClass

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Owed = tuple[float, float, float]  # seconds, by class

CHAT, BACKGROUND, BATCH = (int(c) for c in RequestClass)
NOTHING_OWED: Owed = (0.0, 0.0, 0.0)
MIN_SHARE = 0.05  # of each step goes to chat prompts however many decode: what progress_tokens come to
NOBODY: Ints = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """Start values; each is a bound of one step."""

    step_s_max: float = 0.25  # a step is also the reaction time to what arrives and to aborts
    margin: float = 0.93  # of the time left: the model is right in the median only
    lend_lines: float = 3.0  # a stream ahead of its line lends at most so many: no visible stall over 120 ms
    quantum_tokens: int = 64  # chunks end on multiples of it, so that they fill blocks
    progress_tokens: int = 128  # what a chat prompt gets each step even if residents pay for it ...
    progress_s: float = 0.020  # ... but no more than takes so long: on a CPU 128 tokens are 0.2 s
    rows_max: int = 2048
    candidates_max: int = 32  # prompts looked at in one step, most urgent first
    shares: Owed = (0.0, 0.05, 0.02)  # of all time, owed to each class while it waits
    owed_s_max: float = 0.5  # neither credit nor debt of a class grows beyond this
    # A less urgent answer makes way for chat prompts while it is ahead of its line and this share of its time lasts;
    # where a chat prompt would be late otherwise, whatever its share.
    yield_share: float = 0.4
    aging: float = 0.1  # a late prompt gains a second of work on shorter ones each ten seconds


class BatchView(NamedTuple):
    """Everything a worker holds, one row a sequence: residents and the heads of the waiting queues alike."""

    request_class: Ints
    due: Floats  # when its next token is due, local seconds; inf: none promised
    pace_s: Floats  # seconds a token promised; inf: none
    context: Ints  # tokens computed, cached ones included
    pending: Ints  # tokens not computed yet; 1 for a decode
    arrived: Floats
    deadline: Floats  # when its whole answer is due; inf: none promised
    is_decoding: Bools
    is_blocked: Bools  # not in this step: its link is full, or another sequence computes its prefix right now
    owed_s: Owed = (0.0, 0.0, 0.0)  # by class: time that starvation has earned it


class Chunk(NamedTuple):
    """Prompt tokens of one sequence in this step."""

    row: int  # of the view
    tokens: int


class StepPlan(NamedTuple):
    """What one step computes. Rows are the view's."""

    decodes: Ints
    chunks: tuple[Chunk, ...]
    paused: Ints  # decodes left out: KV stays
    excused: tuple[int, ...]  # classes that decode only because starvation has earned it
    predicted_s: float


def plan(batch: BatchView, model: StepModel, now: float, limits: PlanLimits = PlanLimits()) -> StepPlan:
    """The next step. Empty only when every sequence is blocked or there is none."""
    decodes, paused, excused = _decodes(batch, model, now, limits)
    prefills = (~batch.is_decoding & ~batch.is_blocked).nonzero()[0]
    room_s = _room_s(batch, decodes, now, limits) if len(prefills) else limits.step_s_max
    step = _Step(batch, model, limits, decodes)
    step.fill(prefills[_order(batch, prefills, model, now, limits)], room_s)
    return StepPlan(decodes, tuple(step.chunks), paused, excused, model.step_s(step.features()))


def peak_tokens(known: Floats, remaining: Floats) -> float:
    """The most KV tokens that sequences will hold together, if each ends after `remaining` more."""
    order = np.argsort(-remaining, kind="stable")
    return float((remaining[order] * np.arange(1, len(order) + 1) + np.cumsum(known[order])).max())


def owe(chosen: StepPlan, batch: BatchView, model: StepModel, step_s: float, limits: PlanLimits) -> Owed:
    """What each class is owed after a step: its share of time while it waits, less what it was given."""
    if not chosen.chunks and not len(chosen.paused) and batch.is_decoding.all():
        return NOTHING_OWED
    chunk_rows = {chunk.row for chunk in chosen.chunks}
    left = [row for row in (~batch.is_decoding).nonzero()[0].tolist() if row not in chunk_rows]
    classes = batch.request_class.tolist()
    waiting = {classes[row] for row in (*left, *chosen.paused.tolist())}
    given = [0.0, 0.0, 0.0]
    for chunk in chosen.chunks:
        given[classes[chunk.row]] += model.prefill_s(chunk.tokens, int(batch.context[chunk.row]))
    for excused in chosen.excused:
        given[excused] += step_s
    owed = [0.0, 0.0, 0.0]
    for c in (BACKGROUND, BATCH):
        if c in waiting or given[c] > 0.0:
            change_s = limits.shares[c] * step_s - given[c]
            owed[c] = min(max(batch.owed_s[c] + change_s, -limits.owed_s_max), limits.owed_s_max)
    return owed[0], owed[1], owed[2]


def victims(batch: BatchView, urgent: int, now: float) -> Ints:
    """Rows that may lose their KV to class `urgent`, first victim first: batch, then the laxest of background."""
    lower = np.flatnonzero(batch.request_class > urgent)
    left = np.minimum(batch.due[lower] - now, 1e9)
    return lower[np.lexsort((-left, -batch.request_class[lower]))]


def _decodes(batch: BatchView, model: StepModel, now: float, limits: PlanLimits) -> tuple[Ints, Ints, tuple[int, ...]]:
    """Every resident decodes, unless that alone breaks the pace of a more urgent class: then the lowest one pauses.
    What has time makes way for chat prompts: a step with thirty decodes leaves them a fifth of it."""
    ready = batch.is_decoding & ~batch.is_blocked
    keep, excused = ready, []
    if not len(batch.request_class) or batch.request_class.max() == batch.request_class.min():
        return ready.nonzero()[0], NOBODY, ()
    for lowest in (BATCH, BACKGROUND):
        above = keep & (batch.request_class < lowest)
        below = keep & (batch.request_class == lowest)
        if not (above.any() and below.any()):
            continue
        decode_s = model.decode_s(int(keep.sum()), int(batch.context[keep].sum()))
        if decode_s <= float(batch.pace_s[above].min()):
            break
        if batch.owed_s[lowest] >= decode_s:
            excused.append(lowest)
        else:
            keep = keep & ~below
    may_wait = _may_wait(batch, model, now, limits)
    for lowest in (BATCH, BACKGROUND):
        patient = keep & (batch.request_class == lowest) & may_wait
        if not patient.any() or lowest in excused:
            continue
        decode_s = model.decode_s(int(keep.sum()), int(batch.context[keep].sum()))
        if batch.owed_s[lowest] >= decode_s:
            excused.append(lowest)
        elif not patient[keep].all():  # a step decodes something: what its prompts need may not be there
            keep = keep & ~patient
    return keep.nonzero()[0], (ready & ~keep).nonzero()[0], tuple(excused)


def _may_wait(batch: BatchView, model: StepModel, now: float, limits: PlanLimits) -> Bools:
    """Decodes that lose nothing by a step without them, while a chat prompt waits for time."""
    prompts = ((batch.request_class == CHAT) & ~batch.is_decoding & ~batch.is_blocked).nonzero()[0]
    if not len(prompts):
        return np.zeros(len(batch.due), dtype=np.bool_)
    is_early = batch.due - now > limits.step_s_max
    if not _is_threatened(batch, prompts, model, now):
        is_early &= now - batch.arrived < limits.yield_share * (batch.deadline - batch.arrived)
    # What has missed its deadline has nothing more to lose; the share that its class is owed keeps it going.
    return is_early | ((batch.deadline < now) & (batch.request_class > CHAT))


def _is_threatened(batch: BatchView, prompts: Ints, model: StepModel, now: float) -> bool:
    """Whether one of these chat prompts misses its line, though it could be kept, if all decodes stay in each step."""
    prompts = prompts[batch.due[prompts] > now]
    decodes = batch.is_decoding & ~batch.is_blocked
    if not len(prompts) or not decodes.any():
        return False
    prompts = prompts[np.argsort(batch.due[prompts], kind="stable")]
    decode_s = model.decode_s(int(decodes.sum()), int(batch.context[decodes].sum()))
    share = max(1.0 - decode_s / float(batch.pace_s[decodes].min()), MIN_SHARE)
    ahead_s = np.cumsum(_work_s(batch, prompts, model))
    return bool((ahead_s > share * (batch.due[prompts] - now)).any())


def _work_s(batch: BatchView, rows: Ints, model: StepModel) -> Floats:
    """Seconds that these prompts still need, without floor and base."""
    pending, context = batch.pending[rows], batch.context[rows]
    seconds: Floats = model.bias * pending * (model.row_s + model.chunk_context_s * (context + 0.5 * pending))
    return seconds


def _room_s(batch: BatchView, decodes: Ints, now: float, limits: PlanLimits) -> float:
    """How long the step may take: the tightest line among its decodes, of the most urgent class that decodes."""
    classes = batch.request_class[decodes]
    promised = decodes[classes <= BACKGROUND]
    if not len(promised):
        return limits.step_s_max
    tightest = promised[batch.request_class[promised] == batch.request_class[promised].min()]
    left_s = np.minimum(batch.due[tightest] - now, limits.lend_lines * batch.pace_s[tightest])
    return min(float(left_s.min()) * limits.margin, limits.step_s_max)


def _order(batch: BatchView, rows: Ints, model: StepModel, now: float, limits: PlanLimits) -> Ints:
    """chat feasible by laxity | background feasible | chat late, shortest first, aged | background late | batch."""
    if len(rows) < 2:
        return np.arange(len(rows))
    classes, work_s = batch.request_class[rows], _work_s(batch, rows, model)
    laxity_s = np.minimum(batch.due[rows] - now, 1e9) - work_s
    is_late = laxity_s < 0.0
    group = np.where(classes == BATCH, 4, classes + 2 * is_late)
    key = np.where(is_late, work_s + limits.aging * laxity_s, laxity_s)
    # Batch keeps its arrival order: the router sends siblings of one prefix in a row.
    return np.lexsort((np.where(classes == BATCH, batch.arrived[rows], key), group))


class _Step:
    """A step while it is filled."""

    def __init__(self, batch: BatchView, model: StepModel, limits: PlanLimits, decodes: Ints) -> None:
        self.batch, self.model, self.limits = batch, model, limits
        self.chunks: list[Chunk] = []
        self._rows = self._sequences = len(decodes)
        self._decode_context = int(batch.context[decodes].sum())
        self._chunk_context = 0

    def features(self) -> StepFeatures:
        return StepFeatures(self._rows, self._decode_context, self._chunk_context, self._sequences)

    def fill(self, order: Ints, room_s: float) -> None:
        """Chunks in order while time lasts; progress for chat, and for whom starvation has earned it, in any case."""
        musts = self._musts(order)
        for row in order[: self.limits.candidates_max].tolist():
            features = self.features()
            if self._rows >= self.limits.rows_max or self.model.tokens_within(room_s, features, 0) < 1:
                break
            self._add(row, self._fitting(row, room_s, features), must=row in musts)
        for row in musts - {chunk.row for chunk in self.chunks}:
            self._add(row, self._fitting(row, 0.0, self.features()), must=True)

    def _musts(self, order: Ints) -> set[int]:
        """At most one row a class that gets a chunk even where none fits."""
        classes = self.batch.request_class[order].tolist()
        classes_due = [CHAT, *(c for c in (BACKGROUND, BATCH) if self.batch.owed_s[c] > 0.0)]
        musts = {int(order[classes.index(c)]) for c in classes_due if c in classes}
        if not (musts or self._rows) and len(order):
            return {int(order[0])}  # work conserving: an idle device takes a chunk however large its smallest one is
        return musts

    def _fitting(self, row: int, room_s: float, features: StepFeatures) -> int:
        return self.model.tokens_within(room_s, features, int(self.batch.context[row]))

    def _add(self, row: int, fitting: int, *, must: bool) -> None:
        context, pending = int(self.batch.context[row]), int(self.batch.pending[row])
        tokens = self._aligned(fitting, context, pending)
        if must:
            tokens = max(tokens, self._progress(context, pending))
        tokens = min(tokens, self.limits.rows_max - self._rows)
        if tokens <= 0:
            return
        self.chunks.append(Chunk(row, tokens))
        self._rows += tokens
        self._sequences += 1
        self._chunk_context += int(tokens * (context + tokens / 2))

    def _aligned(self, tokens: int, context: int, pending: int) -> int:
        if tokens >= pending:
            return pending
        return (context + tokens) // self.limits.quantum_tokens * self.limits.quantum_tokens - context

    def _progress(self, context: int, pending: int) -> int:
        """The smallest chunk worth a step. To its block's end only where that is cheap: 16 tokens behind 2,000
        take a CPU 55 ms, which made each step of the residents a third longer than promised."""
        marginal_s = self.model.bias * (self.model.row_s + self.model.chunk_context_s * context)
        within = int(self.limits.progress_s / max(marginal_s, 1e-12))
        tokens = max(1, min(self.limits.progress_tokens, within))
        up = -(-(context + tokens) // self.limits.quantum_tokens) * self.limits.quantum_tokens - context
        return min(pending, up if up <= within else tokens)
