"""From float32 logits to token ids on the device: greedy, or temperature, top-k, top-p and min-p by one given number.

Owns the choice. Makes no random numbers (the host keys them), never sorts a row, never touches the logits.

Two kernels. `scan` reads the logits once, all programs: the best of every SUB tokens, the sum of every CHUNK. `choose`
is one program a row. A row without limits walks the sums to one chunk. A row with limits needs a floor: the largest
logit that enough tokens reach. With top-k, the k-th best of the SUB maxima is below it for certain; with top-p the
GUESS-th is tried, then one WIDER times as far. The few hundred tokens above are gathered, in order of id, and the floor
is found among them by bisecting float bits; should they not be enough, among the whole row. Tokens of one logit stay or
go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = tl.constexpr(4096)
SUB = tl.constexpr(256)
ROOM = tl.constexpr(4096)  # gathered tokens; more and the row itself is searched
GUESS = tl.constexpr(64)
WIDER = tl.constexpr(7)  # the second guess, 448 of 128k's 501 maxima, gathers about 1,100 tokens
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def scan(logits, temperatures, sub_best, chunk_sum, V, SUBS, CHUNKS):
    """Best of each SUB and sum of exp((l - best of chunk) / temperature). NaN or +inf make the sum NaN."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(logits + row * V + token, mask=token < V, other=float("-inf"))
    is_fine = value < float("inf")
    value = tl.where(is_fine, value, float("-inf"))
    temperature = tl.load(temperatures + row)
    scale = 1.0 / tl.where(temperature > 0.0, temperature, 1.0)
    best = tl.max(tl.reshape(value, [CHUNK // SUB, SUB]), 1)
    top = tl.maximum(tl.max(best, 0), LOWEST)
    total = tl.sum(tl.exp((value - top) * scale), 0)
    tl.store(sub_best + row * SUBS + chunk * (CHUNK // SUB) + tl.arange(0, CHUNK // SUB), best)
    tl.store(chunk_sum + row * CHUNKS + chunk, tl.where(tl.min(is_fine.to(tl.int32), 0) == 1, total, float("nan")))


@triton.jit
def ordered(value):
    """float32 -> int32 that compares alike; its own inverse on the bits."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_of(best, top, rank):
    """The rank-th largest of `best`, by bisecting its bits."""
    does = ordered(top * 0.0 + LOWEST)
    fails = ordered(top) + 1
    while does + 1 < fails:
        middle = (does & fails) + ((does ^ fails) >> 1)
        if tl.sum((best >= unordered(middle)).to(tl.int32), 0) >= rank:
            does = middle
        else:
            fails = middle
    return unordered(does)


@triton.jit
def above(values, held, n, floor, top, scale, WEIGHTED: tl.constexpr, HELD: tl.constexpr):
    """How many of n values reach the floor, or what they weigh; HELD: all of them sit in the registers of `held`."""
    total = 0.0
    if HELD:
        weight = tl.exp((held - top) * scale) if WEIGHTED else tl.full([ROOM], 1.0, tl.float32)
        total += tl.sum(tl.where(held >= floor, weight, 0.0), 0)
    else:
        for first in range(0, n, CHUNK):
            at = first + tl.arange(0, CHUNK)
            value = tl.load(values + at, mask=at < n, other=float("-inf"))
            weight = tl.exp((value - top) * scale) if WEIGHTED else tl.full([CHUNK], 1.0, tl.float32)
            total += tl.sum(tl.where(value >= floor, weight, 0.0), 0)
    return total


@triton.jit
def floor_for(values, held, n, low, top, scale, target, WEIGHTED: tl.constexpr, HELD: tl.constexpr):
    """The largest value whose tokens and betters number (or weigh) `target` or more; `low` must be known to do."""
    does = ordered(low)
    fails = ordered(top) + 1
    while does + 1 < fails:
        middle = (does & fails) + ((does ^ fails) >> 1)  # the mean without overflow
        if above(values, held, n, unordered(middle), top, scale, WEIGHTED, HELD) >= target:
            does = middle
        else:
            fails = middle
    return unordered(does)


@triton.jit
def draw(values, first, n, floor, top, scale, target):
    """Place of the first of values[first:n] at which the running weight of what reaches the floor passes `target`."""
    found = n
    last = first
    running = 0.0
    for start in range(first, n, CHUNK):
        if found == n:
            at = start + tl.arange(0, CHUNK)
            value = tl.load(values + at, mask=at < n, other=float("-inf"))
            is_kept = value >= floor
            weight = tl.where(is_kept, tl.exp((value - top) * scale), 0.0)
            passed = running + tl.cumsum(weight, 0)
            found = tl.min(tl.where(is_kept & (passed > target), at, n), 0)
            last = tl.maximum(last, tl.max(tl.where(is_kept, at, first), 0))
            running += tl.sum(weight, 0)
    return tl.where(found < n, found, last)  # rounding may leave the target a hair beyond the sum


@triton.jit
def limited(values, held, n, low, top, scale, k, p, lowest, u, V, HELD: tl.constexpr):
    """Place of the token drawn from n values under top-k, then top-p of what that leaves, then the floor `lowest`."""
    floor = low
    if k < V:
        floor = floor_for(values, held, n, floor, top, scale, k.to(tl.float32), False, HELD)
    if p < 1.0:
        nucleus = p * above(values, held, n, floor, top, scale, True, HELD)
        floor = floor_for(values, held, n, floor, top, scale, nucleus, True, HELD)
    floor = tl.maximum(floor, lowest)
    return draw(values, 0, n, floor, top, scale, u * above(values, held, n, floor, top, scale, True, HELD))


@triton.jit
def gather(logits, sub, best, floor, names, values, subs, V):
    """Tokens that reach the floor into values and names, in order of id; how many there are (stored up to ROOM)."""
    hit = best >= floor
    tl.store(subs + tl.cumsum(hit.to(tl.int32), 0) - 1, sub, mask=hit)
    hits = tl.sum(hit.to(tl.int32), 0)
    tl.debug_barrier()
    count = 0
    for first in range(0, hits, CHUNK // SUB):
        i = first + tl.arange(0, CHUNK) // SUB
        token = tl.load(subs + i, mask=i < hits, other=0) * SUB + tl.arange(0, CHUNK) % SUB
        value = tl.load(logits + token, mask=(i < hits) & (token < V), other=float("-inf"))
        is_kept = (value >= floor) & (i < hits) & (token < V)
        at = count + tl.cumsum(is_kept.to(tl.int32), 0) - 1
        tl.store(values + at, value, mask=is_kept & (at < ROOM))
        tl.store(names + at, token, mask=is_kept & (at < ROOM))
        count += tl.sum(is_kept.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@triton.jit
def choose(
    logits, temperatures, top_ks, top_ps, min_ps, uniforms, sub_best, chunk_sum, names, values, subs, ids, is_bad,
    V, SUB_STRIDE, CHUNKS, SUBS: tl.constexpr, CHUNKS_PAD: tl.constexpr,
):  # fmt: skip
    """One row: the token, and whether the row's logits were not finite (then the token is 0)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    temperature = tl.load(temperatures + row)
    sub = tl.arange(0, SUBS)
    best = tl.load(sub_best + row * SUB_STRIDE + sub, mask=sub < SUB_STRIDE, other=float("-inf"))
    top = tl.max(best, 0)
    chunk = tl.arange(0, CHUNKS_PAD)
    sums = tl.load(chunk_sum + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=0.0)
    bad = (tl.sum(sums, 0) != tl.sum(sums, 0)) | (top < LOWEST)
    token = 0
    if (temperature <= 0.0) & (bad == 0):
        at = tl.min(tl.where(best == top, sub, SUBS), 0) * SUB + tl.arange(0, SUB)
        value = tl.load(logits + at, mask=at < V, other=float("-inf"))
        token = tl.min(tl.where(value == top, at, V), 0)
    if (temperature > 0.0) & (bad == 0):
        scale = 1.0 / temperature
        k = tl.load(top_ks + row)
        k = tl.where((k <= 0) | (k > V), V, k)
        p = tl.load(top_ps + row)
        min_p = tl.load(min_ps + row)
        u = tl.load(uniforms + row)
        chunk_best = tl.max(tl.reshape(best, [SUBS // (CHUNK // SUB), CHUNK // SUB]), 1)
        places = tl.arange(0, SUBS // (CHUNK // SUB))
        sums = tl.load(chunk_sum + row * CHUNKS + places, mask=places < CHUNKS, other=0.0)
        sums *= tl.exp((tl.maximum(chunk_best, LOWEST) - top) * scale)
        total = tl.sum(sums, 0)
        if (k == V) & (p >= 1.0) & (min_p <= 0.0):
            ends = tl.cumsum(sums, 0)
            pick = tl.min(tl.where(ends > u * total, places, CHUNKS - 1), 0)
            before = tl.sum(tl.where(places < pick, sums, 0.0), 0)
            token = draw(
                logits, pick * CHUNK, tl.minimum(pick * CHUNK + CHUNK, V), LOWEST, top, scale, u * total - before
            )
        else:
            lowest = tl.where(
                min_p > 0.0, top + tl.log(tl.maximum(tl.minimum(min_p, 1.0), 1e-30)) * temperature, LOWEST
            )
            rank = tl.where(k < V, k, tl.where(p < 1.0, GUESS, SUB_STRIDE))
            names += row * ROOM
            values += row * ROOM
            room = tl.arange(0, ROOM)
            is_enough = False
            floor = lowest
            held = tl.full([ROOM], float("-inf"), tl.float32)
            count = 0
            while (rank <= SUB_STRIDE) & (is_enough == 0):
                if (k < V) | (p < 1.0):
                    floor = best_of(best, top, rank)
                count = gather(logits, sub, best, floor, names, values, subs + row * SUBS, V)
                held = tl.load(values + room, mask=room < count, other=float("-inf"))
                is_enough = count <= ROOM
                if (k == V) & (p < 1.0) & is_enough:
                    is_enough = above(values, held, count, floor, top, scale, True, True) >= p * total
                rank = tl.where((k == V) & (count < ROOM), rank * WIDER, SUB_STRIDE + 1)
            if is_enough:
                token = tl.load(names + limited(values, held, count, floor, top, scale, k, p, lowest, u, V, True))
            else:
                token = limited(logits, held, V, top * 0.0 + LOWEST, top, scale, k, p, lowest, u, V, False)
    tl.store(ids + row, token)
    tl.store(is_bad + row, bad.to(tl.int32))


@dataclass(frozen=True, slots=True)
class Knobs:
    """Sampling of each row, device tensors [rows]. `temperature` 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: Tensor  # float32
    top_k: Tensor  # int32
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    uniform: Tensor  # float32 in [0, 1)


@dataclass(frozen=True, slots=True)
class Sampler:
    """Buffers for up to `rows` rows of one vocabulary."""

    vocab: int
    sub_best: Tensor  # [rows, subs] float32
    chunk_sum: Tensor  # [rows, chunks] float32
    names: Tensor  # [rows, ROOM] int32
    values: Tensor  # [rows, ROOM] float32
    subs: Tensor  # [rows, subs padded] int32
    answer: Tensor  # [2, rows] int32: ids, then whether the row was bad; one copy takes both

    @classmethod
    def make(cls, rows: int, vocab: int, device: torch.device) -> Sampler:
        """About 33 KiB a row."""
        chunks = triton.cdiv(vocab, CHUNK.value)
        subs = chunks * (CHUNK.value // SUB.value)
        room = ROOM.value

        def buffer(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows, width, device=device, dtype=dtype)

        return cls(
            vocab, buffer(subs, torch.float32), buffer(chunks, torch.float32), buffer(room, torch.int32),
            buffer(room, torch.float32), buffer(triton.next_power_of_2(subs), torch.int32),
            torch.zeros(2, rows, device=device, dtype=torch.int32),
        )  # fmt: skip

    def choose(self, logits: Tensor, knobs: Knobs) -> tuple[Tensor, Tensor]:
        """[rows, vocab] float32 -> ids and is_bad, int32, views of this sampler's buffers."""
        rows, (chunks, subs) = len(logits), (self.chunk_sum.shape[1], self.sub_best.shape[1])
        scan[(rows, chunks)](
            logits, knobs.temperature, self.sub_best, self.chunk_sum, self.vocab, subs, chunks, num_warps=8
        )
        choose[(rows,)](
            logits, knobs.temperature, knobs.top_k, knobs.top_p, knobs.min_p, knobs.uniform, self.sub_best,
            self.chunk_sum, self.names, self.values, self.subs, *self.answer, self.vocab, subs, chunks,
            SUBS=triton.next_power_of_2(subs), CHUNKS_PAD=triton.next_power_of_2(chunks), num_warps=8,
        )  # fmt: skip
        return self.answer[0, :rows], self.answer[1, :rows]
