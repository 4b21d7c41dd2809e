"""The self-check at start: each kernel against its oracle on one shape, in the precision that it serves in.

Owns the shapes and the bounds. Never raises: a kernel that fails, or does not compile, is named with its reason."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from engine.kernels import fp8, paged, ref, scaled, tuned
from engine.kernels.linear import Epilogue, Scratch, linear
from engine.kernels.paged import Launch, Shape, Step
from engine.kernels.sample import Knobs, Sampler

log = logging.getLogger(__name__)

ERROR_MAX = 1e-2  # relative, 2-norm: bf16 operands give 2-5e-3
OUTPUTS, COLUMNS = 256, 1024


def failures(device: torch.device, dtype: torch.dtype, shape: Shape, *, has_fp8: bool = False) -> dict[str, str]:
    """Which of products, attention, prefill and sampling cannot be trusted here, and why; products of 8 bits too, where
    they are served."""
    found = {}
    checks: dict[str, Callable[[], float]] = {
        "products": lambda: max(_product(device, dtype, role, count) for role in ROLES for count in (1, 16)),
        "attention": lambda: _attention(device, dtype, shape, [200, 70], [1, 1]),
        "prefill": lambda: _attention(device, dtype, shape, [250, 90], [100, 33]),
        "sampling": lambda: _sampling(device),
    }
    if has_fp8:
        checks[FP8_OWN] = lambda: max(
            _product(device, dtype, role, count, is_fp8=True) for role in FP8_ROLES for count in (1, 16, 64)
        )
        checks[FP8_LIBRARY] = lambda: max(_rounded_product(device, dtype, role) for role in FP8_ROLES)
    for name, check in checks.items():
        try:
            error = check()
        except Exception as problem:  # border: a compiler or a launch may fail in any way; we serve without  # noqa: BLE001
            found[name] = repr(problem)[:300]
            continue
        if not error < ERROR_MAX:
            found[name] = f"relative error {error:.2g}"
    for name, reason in found.items():
        log.warning("the %s kernels failed their self-check (%s)", name, reason)
    return found


ROLES: tuple[tuned.Role, ...] = ("norm", "gated", "residual", "plain")
FP8_ROLES: tuple[tuned.Role, ...] = ("norm", "gated", "residual")  # "plain" is the head's, which is never of 8 bits
FP8_OWN, FP8_LIBRARY = "8-bit products", "the library's 8-bit products"


def _error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def _operands(device: torch.device, dtype: torch.dtype, role: tuned.Role, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(count)
    height = OUTPUTS * (2 if role == "gated" else 1)
    x = torch.randn(count, COLUMNS, generator=generator, device=device).to(dtype)
    return x, (torch.randn(height, COLUMNS, generator=generator, device=device) / 30).to(dtype)


def _product(device: torch.device, dtype: torch.dtype, role: tuned.Role, count: int, *, is_fp8: bool = False) -> float:
    x, plain = _operands(device, dtype, role, count)
    weight = scaled.stored(plain, dtype, is_fp8=is_fp8)
    epilogue = Epilogue(1e-5 if role in ("norm", "gated") else None, role == "gated")
    residual = x[:, :OUTPUTS].contiguous() if role == "residual" else None
    out = torch.full((count, OUTPUTS), torch.nan, device=device, dtype=torch.float32 if role == "plain" else dtype)
    choice = tuned.rule(role, count, OUTPUTS, COLUMNS, is_fp8=is_fp8)
    linear(x, weight, out, choice, Scratch.make(device, 1 << 20, 1024), epilogue, residual=residual)
    return _error(out, ref.linear(x, weight, epilogue.norm_eps, epilogue.is_gated, None, residual))


def _rounded_product(device: torch.device, dtype: torch.dtype, role: tuned.Role, count: int = 128) -> float:
    """Both operands of 8 bits; behind the gated one its own result is rounded, as the down projection takes it."""
    x, plain = _operands(device, dtype, role, count)
    weight = scaled.rounded(plain)
    eps = None if role == "residual" else 1e-5
    residual = x[:, :OUTPUTS].contiguous() if role == "residual" else None
    out = torch.full((count, OUTPUTS), torch.nan, device=device, dtype=dtype)
    gate_up = torch.full((count, 2 * OUTPUTS), torch.nan, device=device, dtype=dtype)
    room = fp8.Room(fp8.Rounding.make(count, COLUMNS, device), torch.full_like(out, torch.nan), gate_up)
    rows = scaled.widened(scaled.rounded(x if eps is None else ref.rms_norm(x, eps)))
    fp8.product(role, x, weight, out, room, eps or 0.0, None, residual)
    error = _error(out, ref.linear(rows, weight, None, role == "gated", None, residual))
    if role != "gated":
        return error
    wanted = scaled.widened(scaled.rounded(ref.gated(gate_up)))
    return max(error, _error(scaled.widened(room.rounding.gated(gate_up)), wanted))


def _attention(device: torch.device, dtype: torch.dtype, shape: Shape, contexts: list[int], counts: list[int]) -> float:
    """Decode rows (in parts and whole) or chunks behind a past, over shuffled pages."""
    size, generator = shape.block_tokens, torch.Generator(device).manual_seed(3)
    blocks = [-(-context // size) for context in contexts]
    pool = shape.layout.pool(sum(blocks), dtype, device)
    order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(5)).int()
    table = torch.zeros(len(contexts), max(blocks), dtype=torch.int32)
    for sequence, part in enumerate(order.split(blocks)):
        table[sequence, : len(part)] = part
    positions = torch.cat([torch.arange(c - n, c) for c, n in zip(contexts, counts, strict=True)])
    owner = torch.repeat_interleave(torch.arange(len(contexts)), torch.tensor(counts))
    slots = table[owner, positions // size] * size + positions % size
    frequencies = 1e4 ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    zeros = torch.zeros(len(contexts), dtype=torch.int32, device=device)
    step = Step(
        starts.to(device), torch.tensor(contexts).int().to(device), table.to(device), slots.int().to(device),
        ref.turn(positions, frequencies).to(device), zeros, zeros, torch.tensor([size]).int().to(device),
    )  # fmt: skip
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    qkv = torch.randn(sum(counts), width, generator=generator, device=device).to(dtype)
    norm = torch.ones(shape.head_dim, device=device, dtype=dtype) if shape.has_qk_norm else None
    layer = shape.layers - 1
    kv = shape.layout.layer(pool, layer)
    old = torch.randn(2, sum(blocks) * size, shape.kv_heads, shape.head_dim, generator=generator, device=device)
    ref.write(kv, torch.arange(sum(blocks) * size), *old.to(dtype))
    queries, keys, values = ref.split_heads(qkv, step.turns, shape.heads, shape.kv_heads, shape.norm_eps, norm, norm)
    written = shape.layout.layer(pool.clone(), layer)
    ref.write(written, step.slots, keys, values)
    wanted, _ = ref.attend(queries, ref.read(written), step.table, step.row_starts, step.contexts, shape.head_dim**-0.5)
    out = torch.full((sum(counts), shape.heads, shape.head_dim), torch.nan, device=device, dtype=dtype)
    lists = paged.work_lists(shape, len(contexts), sum(counts), 64, device)
    is_chunked = max(counts) > 1
    paged.run_plan(shape, step, lists, has_chunks=is_chunked)
    if is_chunked:  # each tile's past whole, and in parts
        tiles = len(lists.chunk_items)
        paged.run_rope_write(shape, step, 0, qkv, kv, norm, norm)
        paged.run_prefill(shape, step, lists, tiles, qkv, paged.pool_map(shape, pool), layer, out)
        joined, cut = torch.full_like(out, torch.nan), max(1, len(lists.chunk_o) // paged.chunk_programs(shape, tiles))
        paged.run_prefill(shape, step, lists, tiles, qkv, paged.pool_map(shape, pool), layer, joined, min(2, cut))
        return max(_error(out, wanted), _error(joined, wanted), _error(ref.read(kv), ref.read(written)))
    launch = Launch(16, stages=2)
    paged.run_attend(shape, step, lists, launch, qkv, kv, out, norm, norm)
    paged.run_merge(shape, step, lists, launch, out)
    return max(_error(out, wanted), _error(ref.read(kv), ref.read(written)))


def _sampling(device: torch.device) -> float:
    """The share of rows whose token is not the oracle's."""
    limits = [(0.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 20, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.1)]
    logits = torch.randn(len(limits), 5000, generator=torch.Generator().manual_seed(1)) * 3
    columns = [torch.tensor(column, device=device) for column in zip(*limits, strict=True)]
    uniforms = torch.full((len(limits),), 0.3, device=device)
    knobs = Knobs(columns[0].float(), columns[1].int(), columns[2].float(), columns[3].float(), uniforms)
    ids, is_bad = Sampler.make(len(limits), logits.shape[1], device).choose(logits.to(device), knobs)
    wanted = [ref.sample(row, *limit, uniform=0.3) for row, limit in zip(logits, limits, strict=True)]
    wrong: int = sum(a != b for a, b in zip(ids.tolist(), wanted, strict=True))
    return float(is_bad.sum()) + wrong / len(limits)
