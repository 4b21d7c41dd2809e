"""Matrix products of few rows with a weight, memory-bound: a row-dot GEMV and a tall-tile GEMM, epilogues fused in.

Owns y = epilogue(x @ w.T) for up to 256 rows. Never chooses its tile (tuned.py does), never packs a weight.

Hot: four launches a layer. The floor is the weight's bytes over the memory rate; bench/gpu_micro.py holds both to it.
Weights of 8 bits (scaled.py) are read as they are and widened in registers: half the bytes, the same float32 sums.
Epilogues, in this order: SCALED multiplies by the weight row's scale, NORM by 1 / rms(x) (the norm's weight is folded
into w at load), BIAS adds a row, GATED computes silu(gate) * up from rows n and N + n of w, RESIDUAL adds [rows, N].
All arithmetic is float32.
Programmatic launch (PDL 1: signal at once, 2: signal after the loop): weights do not depend on the kernel before, x
does, so everything up to `gdc_wait` may run beside that kernel's tail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.scaled import Scaled, Weight
from engine.kernels.tuned import Choice


@triton.jit
def silu_mul(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def gemv(
    x,
    w,
    scale,
    bias,
    residual,
    y,
    M,
    N,
    K,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    HEAD: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN outputs of ROWS rows. The first HEAD columns of the weight sit in registers before x is waited for.

    A thread takes 8 neighbours of w and of x: with 16, as 8-bit weights would have it, x lies in other threads than its
    weights, and every load of w goes through shared memory and a barrier."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, ROWS)
    head = tl.max_contiguous(tl.arange(0, HEAD), 8)
    wp = w + n.to(tl.int64)[:, None] * K
    up = wp + N.to(tl.int64) * K
    if PDL == 1:
        tl.extra.cuda.gdc_launch_dependents()
    w0 = tl.load(wp + head[None, :], eviction_policy="evict_first")
    if GATED:
        u0 = tl.load(up + head[None, :], eviction_policy="evict_first")
    if PDL > 0:
        tl.extra.cuda.gdc_wait()
    rows = (m < M)[:, None, None]
    xp = x + (m * K)[:, None, None]
    xv = tl.load(xp + head[None, None, :], mask=rows, other=0.0).to(tl.float32)
    acc = tl.sum(w0.to(tl.float32)[None, :, :] * xv, 2)  # [ROWS, BN]
    square = tl.sum(xv * xv, 2)  # [ROWS, 1]
    if GATED:
        acc_up = tl.sum(u0.to(tl.float32)[None, :, :] * xv, 2)
    if K > HEAD:
        part = tl.zeros([ROWS, BN, BK], tl.float32)
        part_up = part
        squares = tl.zeros([ROWS, 1, BK], tl.float32)
        k = tl.max_contiguous(tl.arange(0, BK), 8)
        for start in range(HEAD, K, BK):
            xk = tl.load(xp + (start + k)[None, None, :], mask=rows, other=0.0).to(tl.float32)
            wv = tl.load(wp + (start + k)[None, :], eviction_policy="evict_first").to(tl.float32)
            part += wv[None, :, :] * xk
            if GATED:
                uv = tl.load(up + (start + k)[None, :], eviction_policy="evict_first").to(tl.float32)
                part_up += uv[None, :, :] * xk
            if NORM:
                squares += xk * xk
        acc += tl.sum(part, 2)
        square += tl.sum(squares, 2)
        if GATED:
            acc_up += tl.sum(part_up, 2)
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
    if SCALED:
        acc *= tl.load(scale + n)[None, :]
        if GATED:
            acc_up *= tl.load(scale + N + n)[None, :]
    if NORM:
        norm = tl.rsqrt(square / K + EPS)
        acc *= norm
        if GATED:
            acc_up *= norm
    if BIAS:
        acc += tl.load(bias + n).to(tl.float32)[None, :]
    if GATED:
        acc = silu_mul(acc, acc_up)
    at = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None]
    if RESIDUAL:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def tile(w, row, n, k, K, BK: tl.constexpr, TMA: tl.constexpr):
    """BK columns of BN weight rows from `row` on."""
    if TMA:
        weights = w.load([row, k])
    else:
        at = w + (row + n).to(tl.int64)[:, None] * K + (k + tl.arange(0, BK))[None, :]
        weights = tl.load(at, eviction_policy="evict_first")
    return weights


@triton.jit(do_not_specialize=["M"])  # rows: tiles are the same for 5, 16 and 1
def gemm(
    x,
    w,
    scale,
    bias,
    residual,
    y,
    partials,
    arrivals,
    M,
    N,
    K,
    K_PART,
    SPLITS,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """A [ROWS, BN] tile over one of SPLITS parts of K; SWAP computes it transposed, so that wgmma's 64 rows are
    weights. The last part to arrive adds all parts in order: the sum never depends on who was last."""
    pn = tl.program_id(0)
    split = tl.program_id(1)
    n = tl.arange(0, BN)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    if PDL == 1:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL > 0:
        tl.extra.cuda.gdc_wait()
    if SWAP:
        acc = tl.zeros([BN, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, BN], tl.float32)
    acc_up = acc
    squares = tl.zeros([ROWS, BK // 8], tl.float32)
    for k in range(split * K_PART, (split + 1) * K_PART, BK):
        wv = tile(w, pn * BN, n, k, K, BK, TMA)
        if TMA:
            xv = x.load([tl.program_id(2) * ROWS, k])
        else:
            xv = tl.load(x + m[:, None] * K + (k + tl.arange(0, BK))[None, :], mask=(m < M)[:, None], other=0.0)
        if SWAP:
            acc = tl.dot(wv.to(xv.dtype), tl.trans(xv), acc)
        else:
            acc = tl.dot(xv, tl.trans(wv.to(xv.dtype)), acc)
        if GATED:
            uv = tile(w, N + pn * BN, n, k, K, BK, TMA)
            if SWAP:
                acc_up = tl.dot(uv.to(xv.dtype), tl.trans(xv), acc_up)
            else:
                acc_up = tl.dot(xv, tl.trans(uv.to(xv.dtype)), acc_up)
        if NORM:  # a thread holds 8 neighbours of a row: this sum crosses no lanes
            xf = tl.reshape(xv.to(tl.float32), [ROWS, BK // 8, 8])
            squares += tl.sum(xf * xf, 2)
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
    if SWAP:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    if NORM:
        norm = tl.rsqrt(tl.sum(squares, 1) / K + EPS)[:, None]
        acc *= norm
        acc_up *= norm
    if SPLIT:
        slot = (tl.program_id(2) * tl.num_programs(0) + pn) * SPLITS
        cell = tl.arange(0, ROWS)[:, None] * BN + n[None, :]
        tl.store(partials + (slot + split) * (ROWS * BN) + cell, acc)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + slot // SPLITS, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            total = tl.zeros([ROWS, BN], tl.float32)
            for part in range(SPLITS):
                total += tl.load(partials + (slot + part) * (ROWS * BN) + cell, cache_modifier=".cg")
            tl.store(arrivals + slot // SPLITS, 0)
            finish(total, total, scale, bias, residual, y, m, pn * BN + n, M, N, BIAS, False, RESIDUAL, SCALED)
    else:
        finish(acc, acc_up, scale, bias, residual, y, m, pn * BN + n, M, N, BIAS, GATED, RESIDUAL, SCALED)


@triton.jit
def finish(
    acc, acc_up, scale, bias, residual, y, m, n, M, N,
    BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    inside = (m < M)[:, None]
    at = m[:, None] * N + n[None, :]
    if SCALED:
        acc *= tl.load(scale + n)[None, :]
        if GATED:
            acc_up *= tl.load(scale + N + n)[None, :]
    if BIAS:
        acc += tl.load(bias + n).to(tl.float32)[None, :]
    if GATED:
        acc = silu_mul(acc, acc_up)
    if RESIDUAL:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Scratch:
    """What split sums need: partial tiles, and counters that are zero between launches. One serves a stream."""

    partials: Tensor  # float32
    arrivals: Tensor  # int32, zero

    @classmethod
    def make(cls, device: torch.device, floats: int = 8 << 20, tiles: int = 1 << 14) -> Scratch:
        """Room for `floats` partial numbers (32 MiB) over `tiles` output tiles."""
        return cls(torch.empty(floats, device=device), torch.zeros(tiles, device=device, dtype=torch.int32))


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What happens to x @ w.T before it is stored."""

    norm_eps: float | None = None  # multiply by 1 / sqrt(mean(x^2) + eps); the norm's weight is folded into w
    is_gated: bool = False  # w is [2 * N, K]: silu(first half) * second half


PLAIN = Epilogue()


def linear(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    choice: Choice,
    scratch: Scratch,
    epilogue: Epilogue = PLAIN,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """out = epilogue(x @ weight.T) [+ bias] [+ residual], by one of this file's kernels; `residual` may be `out`."""
    assert bias is None or not epilogue.is_gated
    (rows, columns), outputs = x.shape, out.shape[1]
    matrix, scales = (weight.values, weight.scales) if isinstance(weight, Scaled) else (weight, out)
    flags: dict[str, Any] = {
        "EPS": epilogue.norm_eps or 0.0,
        "NORM": epilogue.norm_eps is not None,
        "BIAS": bias is not None,
        "GATED": epilogue.is_gated,
        "RESIDUAL": residual is not None,
        "SCALED": isinstance(weight, Scaled),
        "PDL": choice.pdl,
        "num_warps": choice.warps,
        "launch_pdl": choice.pdl > 0,
    }
    tail = (scales, out if bias is None else bias, out if residual is None else residual, out)
    padded = max(1 if choice.kernel == "gemv" else 16, triton.next_power_of_2(rows))
    if choice.kernel == "gemv":
        grid: tuple[int, ...] = (outputs // choice.block_n,)
        gemv[grid](x, matrix, *tail, rows, outputs, columns, ROWS=padded, BN=choice.block_n, HEAD=choice.head_k,
                   BK=choice.block_k, **flags)  # fmt: skip
        return out
    tile_rows = min(padded, choice.rows_max)
    x_in, w_in = (x, matrix) if choice.kernel == "dot" else _described(x, matrix, tile_rows, choice)
    grid = (outputs // choice.block_n, choice.splits, triton.cdiv(rows, tile_rows))
    gemm[grid](x_in, w_in, *tail, scratch.partials, scratch.arrivals, rows, outputs, columns,
               columns // choice.splits, choice.splits,
               ROWS=tile_rows, BN=choice.block_n, BK=choice.block_k, SWAP=choice.is_swapped, TMA=choice.kernel == "tma",
               SPLIT=choice.splits > 1, num_stages=choice.stages, **flags)  # fmt: skip
    return out


def _described(x: Tensor, weight: Tensor, tile_rows: int, choice: Choice) -> tuple[Any, Any]:
    """Both operands as tensor-map descriptors for the bulk copy engine."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(x, [tile_rows, choice.block_k]),
        TensorDescriptor.from_tensor(weight, [choice.block_n, choice.block_k]),
    )
