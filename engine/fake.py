"""A runner without a model: the same wire, worker, core and scheduler, but tokens are hash(prompt, output index).

Owns a pretend KV memory that holds token ids and is read back through the block tables, so a stale, foreign, lost or
repeated block shows as a wrong token. Speed and faults are scripted. Never needs torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from engine.kv.keys import Ids
from engine.step import HOST_BYTES_PER_S, Bytes, Copied, Fence, ModelFacts, StepBatch, StepResult, at_once
from engine.wire import Message, encode
from policies.costs import StepFeatures, StepModel

FAKE_SPEED = StepModel(
    floor_s=2e-3, row_s=20e-6, base_s=0.5e-3, decode_context_s=2e-9, chunk_context_s=1e-9, sequence_s=20e-6
)


def token(prompt: Ids, index: int, vocab_size: int, eos_ids: tuple[int, ...] = ()) -> int:
    """Output token `index` (from 0) of `prompt`: what a client must see, whatever happened on the way."""
    chosen = xxhash.xxh3_64_intdigest(prompt.tobytes(), seed=index) % vocab_size
    while chosen in eos_ids:
        chosen = (chosen + 1) % vocab_size
    return chosen


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong at step `step` (from 1)."""

    kind: str  # stall | nan | foreign | bad-frame | die
    step: int
    seconds: float = 0.0  # of a stall

    @classmethod
    def parse(cls, text: str) -> Fault:
        """`stall@100:3.5`, `nan@7`, `foreign@7` (a token outside the vocabulary), `bad-frame@7`, `die@7`."""
        kind, _, rest = text.partition("@")
        step, _, seconds = rest.partition(":")
        if kind not in ("stall", "nan", "foreign", "bad-frame", "die") or not step.isdigit():
            raise ValueError(f"a fault is KIND@STEP[:SECONDS], such as stall@100:3.5; this is {text!r}")
        return cls(kind, int(step), float(seconds or 0.0))


def speed(slower: float) -> StepModel:
    """The fake's step model, so many times slower."""
    if not slower > 0.0:
        raise ValueError("--slower must be above 0")
    return replace(FAKE_SPEED, bias=slower)


def encoder(runner: FakeRunner, faults: tuple[Fault, ...]) -> Callable[[Message], bytearray]:
    """Encodes frames, but for the first one after a `bad-frame` step: that is a frame no router can read."""
    steps = sorted(fault.step for fault in faults if fault.kind == "bad-frame")

    def encode_or_garble(message: Message) -> bytearray:
        if steps and runner.steps >= steps[0]:
            steps.pop(0)
            return bytearray(b"\x04\x00\x00\x00junk")
        return encode(message)

    return encode_or_garble


class FakeKV:
    """engine.step.KVMemory over the pretended KV."""

    def __init__(self, kv: Ids) -> None:
        self._bytes: Bytes = kv.view(np.uint8)
        self.block_bytes = self._bytes.shape[1]
        self.first_bytes_per_s = HOST_BYTES_PER_S

    def fence(self) -> None:
        """No step is ever under way."""

    def save(self, blocks: Sequence[int], into: Sequence[Bytes]) -> Copied:
        """Copy blocks out."""
        return at_once(self._save, blocks, into)

    def load(self, blocks: Sequence[int], payloads: Sequence[Bytes], _after: Fence) -> Copied:
        """Copy blocks in."""
        return at_once(self._load, blocks, payloads)

    def _save(self, block: int, into: Bytes) -> None:
        into[:] = self._bytes[block]

    def _load(self, block: int, payload: Bytes) -> None:
        self._bytes[block] = payload


class FakeRunner:
    """Takes as long as `speed` says, by `sleep`: the real one in a process, a virtual clock in tests."""

    def __init__(
        self,
        facts: ModelFacts,
        memory: tuple[int, int],
        speed: StepModel,
        sleep: Callable[[float], None],
        faults: tuple[Fault, ...] = (),
        *,
        says: Callable[[Ids], Ids] | None = None,
    ) -> None:
        self.blocks_total, self.block_tokens = memory
        self.steps = 0
        self._facts = facts
        self._speed = speed
        self._sleep = sleep
        self._says = says  # prompt to answer, where somebody is to be fed words; None: hashes
        self._faults = {fault.step: fault for fault in faults}
        self._kv = np.full((self.blocks_total, self.block_tokens), -1, dtype=np.int32)
        self.kv = FakeKV(self._kv)

    def run(self, batch: StepBatch) -> StepResult:
        """Write ids where KV would go, read whole contexts back, hash."""
        self.steps += 1
        fault = self._faults.get(self.steps)
        if fault and fault.kind == "die":
            os._exit(9)
        is_written = batch.write_slots >= 0
        self._kv.reshape(-1)[batch.write_slots[is_written]] = batch.ids[is_written]
        ids = np.array([self._sample(batch, at) for at in range(len(batch.sample_rows))], dtype=np.int32)
        is_bad = np.zeros(len(ids), dtype=bool)
        if fault and fault.kind == "nan":
            is_bad[:1] = True
        if fault and fault.kind == "foreign":
            ids[:1] = self._facts.vocab_size
        seconds = self._speed.step_s(features(batch))
        self._sleep(seconds + (fault.seconds if fault else 0.0))
        return StepResult(ids, is_bad, seconds)

    def _sample(self, batch: StepBatch, at: int) -> int:
        sequence = int(np.searchsorted(batch.row_starts, batch.sample_rows[at], side="right")) - 1
        context = int(batch.contexts[sequence])
        blocks = batch.block_tables[sequence, : -(-context // self.block_tokens)]
        index = int(batch.sample_positions[at])
        prompt = self._kv[blocks].reshape(-1)[: context - index]
        if self._says is not None and (prompt >= 0).all() and index < len(answer := self._says(prompt)):
            return int(answer[index])
        return token(prompt, index, self._facts.vocab_size, self._facts.eos_ids)


def features(batch: StepBatch) -> StepFeatures:
    tokens = np.diff(batch.row_starts).astype(np.int64)
    mean = batch.contexts - tokens / 2
    is_decode = tokens == 1
    return StepFeatures(
        rows=int(tokens.sum()),
        decode_context=int(batch.contexts[is_decode].sum()),
        chunk_context=int((tokens * mean)[~is_decode].sum()),
        sequences=len(tokens),
    )
