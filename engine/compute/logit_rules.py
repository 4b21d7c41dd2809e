"""What a request changes in its logits before a token is chosen: penalties, bias, no early end, its grammar's mask.

Owns these rules and their order. Keeps no state: penalties are counted from the ids, so a resumed answer goes on as
it would have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.step import History, Int32, Masked
from engine.wire import Sampling


def penalise(logits: Tensor, sampling: Sequence[Sampling], histories: Mapping[int, History]) -> None:
    """Repetition counts prompt and answer, as in transformers; presence and frequency the answer, as at OpenAI."""
    for row, history in histories.items():
        wanted = sampling[row]
        if wanted.repetition_penalty != 1.0:
            seen = _tensor(np.unique(history.ids), logits)
            scores = logits[row, seen]
            rate = wanted.repetition_penalty
            logits[row, seen] = torch.where(scores > 0, scores / rate, scores * rate)
        said, counts = np.unique(history.ids[history.prompt_len :], return_counts=True)
        taken = wanted.presence_penalty + wanted.frequency_penalty * counts
        logits[row, _tensor(said, logits)] -= torch.from_numpy(taken).to(logits)


def steer(logits: Tensor, sampling: Sequence[Sampling], positions: Int32, eos_ids: Sequence[int]) -> None:
    """Add the bias; put what would end the text out of reach before min_tokens."""
    for row, (wanted, position) in enumerate(zip(sampling, positions.tolist(), strict=True)):
        if wanted.logit_bias:
            ids, bias = zip(*wanted.logit_bias, strict=True)
            logits[row, list(ids)] += torch.tensor(bias, dtype=logits.dtype, device=logits.device)
        if position < wanted.min_tokens and not wanted.grammar_kind:  # a grammar knows best where its text ends
            logits[row, list({*eos_ids, *wanted.stop_ids})] = -torch.inf


def mask(logits: Tensor, masked: Masked) -> None:
    """Put out of reach what a grammar does not allow. Where it allows nothing, nothing is left."""
    is_allowed = np.unpackbits(masked.bits.view(np.uint8), axis=-1, bitorder="little")[:, : logits.shape[-1]]
    rows = _tensor(np.array(masked.rows), logits)
    is_out = torch.from_numpy(is_allowed).to(logits.device) == 0
    logits[rows] = logits[rows].masked_fill_(is_out, -torch.inf)


def _tensor(ids: np.typing.NDArray[np.integer], like: Tensor) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64)).to(like.device)
