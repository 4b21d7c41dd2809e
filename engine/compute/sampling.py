"""From logits to token ids: greedy, or temperature, top-k, top-p and min-p with a random number of its own per token.

Owns the choice; what changes logits before it stands in logit_rules.py. The number depends on (seed, output position)
alone, so a batch's other rows never change a choice."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from engine.compute import logit_rules
from engine.step import History, Int32, Masks, Score
from engine.wire import Sampling

GREEDY_BELOW = 1e-5  # a temperature under this divides into overflow and means greedy anyway
# Candidates looked at before a whole row is sorted: topk(64) takes 0.07 ms a row of 49,152, topk(2048) 0.5, sort 4.
CANDIDATES = (64, 2048)

_KEY = struct.Struct("<qi")


class Choice(NamedTuple):
    """What was chosen for each row. A bad row's id is 0; `messages` says why where it was not the model's fault."""

    ids: Int32
    is_bad: npt.NDArray[np.bool_]
    scores: dict[int, Score]
    messages: dict[int, str]


def choose(
    logits: Tensor,
    sampling: Sequence[Sampling],
    positions: Int32,
    eos_ids: Sequence[int],
    *,
    histories: Mapping[int, History] | None = None,
    masks: Masks | None = None,
) -> Choice:
    """The ids of [sampled, vocab] float32 logits. May write to `logits`."""
    is_bad = ~logits.amax(-1).isfinite()  # a NaN or +inf anywhere is the largest; so is -inf when nothing else is left
    if is_bad.any():
        logits.masked_fill_(is_bad[:, None], 0.0)
    told = [row for row, wanted in enumerate(sampling) if wanted.logprobs >= 0]
    plain = logits[told].log_softmax(-1) if told else logits
    logit_rules.penalise(logits, sampling, histories or {})
    logit_rules.steer(logits, sampling, positions, eos_ids)
    messages: dict[int, str] = {}
    if masks is not None:
        masked = masks.take()
        logit_rules.mask(logits, masked)
        # Where the model's own numbers were bad, that is what is told: then its KV is void, else it is good.
        messages = {row: message for row, message in masked.messages.items() if not is_bad[row]}
        is_bad[masked.rows] |= ~logits[masked.rows].amax(-1).isfinite()
        logits.masked_fill_(is_bad[:, None], 0.0)
    ids = _ids(logits, sampling, positions)
    scores = {row: score(plain[at], int(ids[row]), sampling[row].logprobs) for at, row in enumerate(told)}
    return Choice(ids.to("cpu", torch.int32).numpy(), is_bad.cpu().numpy(), scores, messages)


def score(plain: Tensor, chosen: int, count: int) -> Score:
    """Of [vocab] log-probabilities: the chosen one's, and the likeliest."""
    best = plain.topk(count)
    return Score(float(plain[chosen]), tuple(best.indices.tolist()), tuple(best.values.tolist()))


def _ids(logits: Tensor, sampling: Sequence[Sampling], positions: Int32) -> Tensor:
    ids = logits.argmax(-1)
    random = [row for row, wanted in enumerate(sampling) if wanted.temperature >= GREEDY_BELOW]
    if random:
        rows = torch.tensor(random, device=logits.device)
        keys = [(sampling[row].seed, int(positions[row])) for row in random]
        knobs = _knobs([sampling[row] for row in random], uniforms(keys), logits.shape[-1], logits.device)
        ids[rows] = _draw(logits[rows], knobs)
    return ids


def uniforms(keys: Sequence[tuple[int, int]]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position)."""
    wrapped = [((seed + 2**63) % 2**64 - 2**63, position) for seed, position in keys]
    return np.array([(xxhash.xxh3_64_intdigest(_KEY.pack(*key)) >> 12) * 2.0**-52 for key in wrapped])


@dataclass(frozen=True, slots=True)
class _Knobs:
    """Sampling of some rows as columns, [rows, 1] float64 each. `point` is the row's random number."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor  # the vocabulary's size when off
    point: Tensor

    def rows(self, index: Tensor) -> _Knobs:
        return _Knobs(*(column[index] for column in (self.temperature, self.top_p, self.min_p, self.top_k, self.point)))


def _knobs(sampling: Sequence[Sampling], points: npt.NDArray[np.float64], vocab: int, device: torch.device) -> _Knobs:
    columns = [
        [wanted.temperature, wanted.top_p, min(wanted.min_p, 1.0), wanted.top_k if wanted.top_k > 0 else vocab]
        for wanted in sampling
    ]
    values = np.column_stack([np.array(columns, np.float64), points])
    return _Knobs(*torch.from_numpy(values).to(device).T[:, :, None])


def _draw(logits: Tensor, knobs: _Knobs) -> Tensor:
    """[rows, vocab] -> [rows] int64. Temperature first, then top-k, then top-p of what that leaves, then min-p."""
    vocab = logits.shape[-1]
    # Weights are relative to the best token's, which is 1: min-p compares with them as they are.
    weights = ((logits - logits.amax(-1, keepdim=True)) / knobs.temperature.float()).double().exp()
    is_whole = ((knobs.top_p >= 1) & (knobs.top_k >= vocab))[:, 0]
    whole, left = is_whole.nonzero()[:, 0], (~is_whole).nonzero()[:, 0]
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    ids[whole] = _pick(weights[whole].masked_fill(weights[whole] < knobs.min_p[whole], 0.0), knobs.point[whole])
    for width in (*CANDIDATES, vocab):
        if len(left):
            chosen, is_enough = _draw_best(weights[left], knobs.rows(left), min(width, vocab))
            ids[left[is_enough]] = chosen[is_enough]
            left = left[~is_enough]
    return ids


def _draw_best(weights: Tensor, knobs: _Knobs, width: int) -> tuple[Tensor, Tensor]:
    """Draw from the best `width` tokens, and whether top-k or top-p ends among them: else the draw is not exact."""
    best, names = weights.topk(width)
    rank = torch.arange(width, device=weights.device)
    ends_by_k = knobs.top_k <= width
    best.masked_fill_(rank >= knobs.top_k, 0.0)
    nucleus = knobs.top_p * torch.where(ends_by_k, best.sum(-1, keepdim=True), weights.sum(-1, keepdim=True))
    running = best.cumsum(-1)
    is_enough = ends_by_k | (running[:, -1:] >= nucleus) | (width == weights.shape[-1])
    best.masked_fill_((running - best >= nucleus) & (rank > 0), 0.0)
    best.masked_fill_(best < knobs.min_p, 0.0)
    return names.gather(-1, _pick(best, knobs.point)[:, None])[:, 0], is_enough[:, 0]


def _pick(weights: Tensor, point: Tensor) -> Tensor:
    """The index at which the running sum of [rows, n] weights passes `point` of the whole."""
    running = weights.cumsum(-1)
    return torch.searchsorted(running, point * running[:, -1:], right=True)[:, 0]
