"""The torch runner: a step's flat arrays in, token ids out.

Owns weights, KV memory and the device. Never decides what a step holds: rows, blocks and slots are given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.compute import sampling
from engine.loading import manifest, room, weights
from engine.models.config import ELSEWHERE, ModelConfig, ModelError, read
from engine.models.decoder import Decoder
from engine.models.pages import SPARE_BLOCKS, KVPool
from engine.step import DROPS_WEIGHTS, Int64, KVMemory, Score, StepBatch, StepResult

SCORED_ROWS = 128  # of prompts at a time: 25 MB of logits for a vocabulary of 49,152


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """What a runner may use. float32 is what makes greedy text equal on every path (CPU default)."""

    block_tokens: int = 16
    kv_bytes: int = 256 * 2**20  # 5,700 tokens of SmolLM2 in float32 (46 kB each)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def refuse_what_does_not_fit(folder: Path, model: ModelConfig, config: RunnerConfig) -> None:
    """Raise ModelError, so that no half-loaded worker is killed by the system. KV that is there already counts as 0."""
    if torch.device(config.device).type != "cpu":
        return
    needed, free = model.parameters * config.dtype.itemsize, room.available_bytes()
    if needed + config.kv_bytes > free:
        kv = f" and {config.kv_bytes / 2**30:.1f} of KV" if config.kv_bytes else ""
        sizes, left = f"{needed / 2**30:.1f} GiB of weights{kv}", f"{free / 2**30:.1f} GiB of memory are free"
        raise ModelError(
            f"{folder} needs {sizes}, and {left}; {'lower --kv-bytes' if kv else 'free some'}, or {ELSEWHERE}"
        )


def nobody(_message: object) -> None:
    """Who computes alone tells no other rank."""


@dataclass(frozen=True, slots=True)
class _Source:
    """Where weights came from."""

    folder: Path
    digest: str


class TorchRunner:
    """engine.step.Runner on one torch device."""

    def __init__(self, decoder: Decoder, config: RunnerConfig):
        block_bytes = config.block_tokens * decoder.config.kv_bytes_per_token(config.dtype.itemsize)
        blocks = config.kv_bytes // block_bytes - SPARE_BLOCKS
        if blocks < 1:
            needed = (SPARE_BLOCKS + 1) * block_bytes
            raise ModelError(f"kv_bytes = {config.kv_bytes} holds no KV block: one and its spares take {needed} bytes")
        self._decoder: Decoder | None = decoder  # None: asleep without weights
        self._model, self._config, self._device = decoder.config, config, torch.device(config.device)
        self._source: _Source | None = None  # to load the weights from again; None: they were made, not loaded
        self._tell: Callable[[StepBatch], None] = nobody
        self._pool = KVPool(decoder.config, blocks, config.block_tokens, config.dtype, self._device)

    @classmethod
    def load(cls, folder: Path, config: RunnerConfig) -> TorchRunner:
        """A runner for a Hugging Face folder. Raises ModelError when the folder cannot be served, or is damaged."""
        manifest.verify(folder)
        refuse_what_does_not_fit(folder, read(folder), config)
        with torch.inference_mode():
            runner = cls(weights.load(folder, config.dtype, torch.device(config.device)), config)
        runner._source = _Source(folder, manifest.digest_of(folder))
        return runner

    def prepare(self, folder: Path) -> Callable[[], None]:
        """engine.step.Renewable. Both sets of weights are in memory until the old one is let go."""
        refuse_what_does_not_fit(folder, read(folder), replace(self._config, kv_bytes=0))
        decoder, source = self._load(folder), _Source(folder, manifest.digest_of(folder))

        def renew() -> None:
            self._decoder, self._source = decoder, source

        return renew

    def _load(self, folder: Path) -> Decoder:
        manifest.verify(folder)
        with torch.inference_mode():
            decoder = weights.load(folder, self._config.dtype, self._device)
        if decoder.config != self.model:
            raise ModelError(f"{folder} holds a model of another shape than the one that is served")
        return decoder

    def _load_again(self, source: _Source) -> Decoder:
        folder = source.folder
        if not folder.is_dir() or manifest.digest_of(folder) != source.digest:
            raise ModelError(f"{folder} does not hold the weights any more that were served; restart the worker")
        refuse_what_does_not_fit(folder, self.model, self._config)
        return self._load(folder)

    def sleep(self, level: int) -> None:
        """engine.step.Sleeper. glibc is asked to return what is free: it keeps pieces below 32 MiB for itself else."""
        self._pool.close()
        if level >= DROPS_WEIGHTS and self._source is not None:
            self._decoder = None
        room.give_back()

    def wake(self) -> Callable[[], None]:
        """engine.step.Sleeper. Weights come from the converted folder, which is verified as at a start."""
        decoder, source = self._decoder, self._source
        if decoder is None:
            assert source is not None, "weights without a folder are kept"
            decoder = self._load_again(source)

        def rise() -> None:
            self._decoder = decoder
            self._pool.open()

        return rise

    @property
    def blocks_total(self) -> int:
        """KV blocks that fit."""
        return self._pool.blocks

    @property
    def block_tokens(self) -> int:
        """Tokens a block holds."""
        return self._pool.block_tokens

    @property
    def kv(self) -> KVMemory | None:
        """Whole blocks as bytes, for the tiers below."""
        return self._pool

    @property
    def model(self) -> ModelConfig:
        """The model's shape: context_max, vocab_size, eos_ids."""
        return self._model

    # Hot: once per step. Python and small ops together about 4 ms a step on CPU, bench/engine_cpu.py.
    def run(self, batch: StepBatch) -> StepResult:
        """Compute one step: write KV, sample. Raises only on what is our own fault."""
        started = time.perf_counter()
        with torch.inference_mode():
            hidden, computed_at = self._hidden(batch)
            scores = list(self._prompt_scores(batch, hidden, computed_at))
            chosen = sampling.choose(
                self._sampled_logits(batch, hidden, computed_at),
                batch.sampling,
                batch.sample_positions,
                self.model.eos_ids,
                histories=batch.histories,
                masks=batch.masks,
            )
        seconds = time.perf_counter() - started
        return StepResult(chosen.ids, chosen.is_bad, seconds, chosen.scores, chosen.messages, scores)

    def lead(self, tell: Callable[[StepBatch], None]) -> None:
        """From now on `tell` makes other ranks `follow` each step."""
        self._tell = tell

    def follow(self, batch: StepBatch) -> None:
        """Another rank's part of a step that rank 0 computes: no head, no choice."""
        with torch.inference_mode():
            self._hidden(batch)

    def logits(self, batch: StepBatch) -> Tensor:
        """[sampled, vocab] float32 of one step, for proofs: `run` without the choice."""
        with torch.inference_mode():
            return self._sampled_logits(batch, *self._hidden(batch))

    def _hidden(self, batch: StepBatch) -> tuple[Tensor, Int64]:
        """Hidden states as computed, and where each row of the batch is among them."""
        self._tell(batch)
        pages = self._pool.plan(batch)
        ids = self._tensor(batch.ids[pages.order])
        hidden = self._awake.forward(ids, self._tensor(batch.positions[pages.order]), pages)
        computed_at = np.empty(len(pages.order), np.int64)
        computed_at[pages.order] = np.arange(len(pages.order))
        return hidden, computed_at

    def _prompt_scores(self, batch: StepBatch, hidden: Tensor, computed_at: Int64) -> Iterator[Score]:
        """Of prompt tokens; the head runs in pieces, since a row of logits is large."""
        for start in range(0, len(batch.scored_rows), SCORED_ROWS):
            piece = slice(start, start + SCORED_ROWS)
            rows = self._tensor(computed_at[batch.scored_rows[piece]])
            plain = self._awake.logits(hidden[rows]).log_softmax(-1)
            told = zip(plain, batch.scored_ids[piece].tolist(), batch.scored_tops[piece].tolist(), strict=True)
            yield from (sampling.score(row, token, count) for row, token, count in told)

    def _sampled_logits(self, batch: StepBatch, hidden: Tensor, computed_at: Int64) -> Tensor:
        if not len(batch.sample_rows):  # a step of chunks none of which ends its prompt
            return hidden.new_empty((0, self.model.vocab_size), dtype=torch.float32)
        return self._awake.logits(hidden[self._tensor(computed_at[batch.sample_rows])])

    @property
    def _awake(self) -> Decoder:
        assert self._decoder is not None, "no step is computed while the runner sleeps"
        return self._decoder

    def _tensor(self, numbers: np.typing.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self._device)
