"""What a foreign engine still holds of what was sent to it, by its own words on blocks stored and removed.

Owns the belief, a least-recently-sent order of our keys, and the engine's count of tokens. Its blocks have other names
than our keys, so it says how much is left, and we forget what it will have dropped first: the ends of the oldest
prompts. Knows no socket."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from engine.kv.keys import KEY_BYTES
from policies.request import WorkerId

BlockHash = int | bytes  # as vLLM and SGLang name their blocks
Forgotten = dict[WorkerId, bytes]  # chain keys by worker: what the mind is told as evicted

BLOCKS_MAX = 1 << 20  # of one engine: 16 million tokens in blocks of 16; beyond it we begin anew
KEYS_MAX = 1 << 18  # of what was sent to it: as many tokens; the oldest are believed without a record


class Residence:
    """One engine's. `tokens_a_key`: what one of our keys stands for."""

    def __init__(self, tokens_a_key: int, blocks_max: int = BLOCKS_MAX, keys_max: int = KEYS_MAX) -> None:
        self._tokens_a_key, self._blocks_max, self._keys_max = tokens_a_key, blocks_max, keys_max
        self._blocks: dict[BlockHash, int] = {}  # tokens of each that was stored since we listen
        self._sent: OrderedDict[tuple[WorkerId, bytes], None] = OrderedDict()
        self._has_evicted = False  # until it drops something, all that we sent is there
        self.resident_tokens = 0

    @property
    def believed_tokens(self) -> int:
        """What we take to be there, by our own count of tokens."""
        return len(self._sent) * self._tokens_a_key

    def sent(self, worker: WorkerId, chain: bytes) -> None:
        """A prompt goes there. Engines drop the end of a prompt before its beginning, so its beginning is newest."""
        sent = self._sent
        for at in range(len(chain) - KEY_BYTES, -1, -KEY_BYTES):
            key = (worker, chain[at : at + KEY_BYTES])
            sent[key] = None
            sent.move_to_end(key)
        while len(sent) > self._keys_max:
            sent.popitem(last=False)

    def stored(self, hashes: Iterable[BlockHash], block_tokens: int) -> Forgotten:
        """Blocks are there."""
        for block in hashes:
            if block not in self._blocks:
                self._blocks[block] = block_tokens
                self.resident_tokens += block_tokens
        return self.cleared() if len(self._blocks) > self._blocks_max else {}

    def removed(self, hashes: Iterable[BlockHash]) -> Forgotten:
        """Blocks are gone. What was there before we listened is not counted, then or now."""
        for block in hashes:
            self.resident_tokens -= self._blocks.pop(block, 0)
        self._has_evicted = True
        return self._surplus()

    def cleared(self) -> Forgotten:
        """Nothing is there, or nobody knows any more what is."""
        self._blocks.clear()
        self.resident_tokens, self._has_evicted = 0, False
        return self._forget(len(self._sent))

    def _surplus(self) -> Forgotten:
        return self._forget(max(0, self.believed_tokens - self.resident_tokens) // self._tokens_a_key)

    def _forget(self, count: int) -> Forgotten:
        parts: dict[WorkerId, list[bytes]] = {}
        for _ in range(count):
            (worker, key), _ = self._sent.popitem(last=False)
            parts.setdefault(worker, []).append(key)
        return {worker: b"".join(keys) for worker, keys in parts.items()}
