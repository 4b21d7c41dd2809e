"""One attention step with random KV: the tensors, the oracle's answer, and the kernels' answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kernels import paged, ref
from engine.kernels.layout import LayerKv
from engine.kernels.paged import Launch, Shape, Step


@dataclass(frozen=True, slots=True)
class Case:
    """A step whose old KV is in the pool and whose rows' own KV is in `qkv` only."""

    shape: Shape
    step: Step
    pool: Tensor  # as the shape's layout has it
    qkv: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    wanted: Tensor  # [rows, heads, head_dim] float32
    wanted_pool: Tensor

    @property
    def rows(self) -> int:
        return len(self.qkv)

    @property
    def last(self) -> LayerKv:
        """The layer that is computed."""
        return self.shape.layout.layer(self.pool, self.shape.layers - 1)

    @property
    def wanted_last(self) -> Tensor:
        """What its memory says when the step is done."""
        return ref.read(self.shape.layout.layer(self.wanted_pool, self.shape.layers - 1))


def make(
    shape: Shape,
    lengths: list[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    shared: int = 0,
    seed: int = 0,
) -> Case:
    """Sequences given as (context, rows). With `shared`, their first tokens lie in common blocks. The last layer is
    the one computed; the free places of the pool hold NaN, as another sequence's failure may leave them."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens = shape.block_tokens
    needed = [-(-context // tokens) for context, _ in lengths]
    blocks = torch.randperm(sum(needed) + 3, generator=generator, device=device).int()
    table = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32, device=device)
    taken = 0
    for number, count in enumerate(needed):
        table[number, :count] = blocks[taken : taken + count]
        taken += count
    table[:, : shared // tokens] = table[0, : shared // tokens]
    row_starts = torch.tensor([0] + [rows for _, rows in lengths], device=device).cumsum(0).int()
    contexts = torch.tensor([context for context, _ in lengths], dtype=torch.int32, device=device)
    positions, slots = [], []
    for number, (context, rows) in enumerate(lengths):
        at = torch.arange(context - rows, context, device=device)
        positions.append(at)
        slots.append(table[number].long()[at // tokens] * tokens + at % tokens)
    frequencies = 1e4 ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
    step = Step(
        row_starts, contexts, table, torch.cat(slots).int(), ref.turn(torch.cat(positions), frequencies),
        torch.full_like(contexts, shared), torch.zeros_like(contexts), torch.full_like(contexts[:1], 1 << 30),
    )  # fmt: skip
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    qkv = torch.randn(int(row_starts[-1]), width, generator=generator, device=device).to(dtype)
    norms = [1 + torch.randn(shape.head_dim, generator=generator, device=device) / 8 for _ in range(2)]
    q_norm, k_norm = norms if shape.has_qk_norm else (None, None)
    pool = shape.layout.pool(int(blocks.max()) + 1, dtype, device)
    # What an earlier owner left: NaN; fp8 has that in scales alone, beside its largest number, 448.
    pool.view(torch.uint8).fill_(0x7E if shape.is_kv_fp8 else 0xFF)
    old = torch.cat([table[number].repeat_interleave(tokens)[: context - rows].long() * tokens
                     + torch.arange(context - rows, device=device) % tokens
                     for number, (context, rows) in enumerate(lengths)])  # fmt: skip
    for layer in range(shape.layers):
        keys, values = torch.randn(2, len(old), shape.kv_heads, shape.head_dim, generator=generator, device=device)
        ref.write(shape.layout.layer(pool, layer), old, keys, values)
    return _answered(shape, step, pool, qkv, q_norm, k_norm)


def _answered(
    shape: Shape, step: Step, pool: Tensor, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None
) -> Case:
    queries, keys, values = ref.split_heads(
        qkv, step.turns, shape.heads, shape.kv_heads, shape.norm_eps, q_norm, k_norm
    )
    wanted_pool = pool.clone()
    written = shape.layout.layer(wanted_pool, shape.layers - 1)
    ref.write(written, step.slots, keys, values)
    wanted, _ = ref.attend(queries, ref.read(written), step.table, step.row_starts, step.contexts, shape.head_dim**-0.5)
    return Case(shape, step, pool, qkv, q_norm, k_norm, wanted, wanted_pool)


def few(case: Case, launch: Launch, part_tokens: int, is_shared: bool = False) -> Tensor:
    """The work-list kernel's answer; writes the case's pool."""
    made = paged.work_lists(case.shape, len(case.step.contexts), case.rows, 64, case.qkv.device)
    out = torch.full((case.rows, case.shape.heads, case.shape.head_dim), torch.nan, device=case.qkv.device)
    case.step.part_size.fill_(part_tokens)
    paged.run_plan(case.shape, case.step, made, has_shared=is_shared)
    for is_shared_pass in [True, False] if is_shared else [False]:
        paged.run_attend(
            case.shape, case.step, made, launch, case.qkv, case.last, out, case.q_norm, case.k_norm, is_shared_pass
        )
    paged.run_merge(case.shape, case.step, made, launch, out)
    return out


def chunks(case: Case, parts: int = 1) -> Tensor:
    """The prefill kernel's answer, each tile's past in so many parts; writes the case's pool and turns its queries in
    place."""
    made = paged.work_lists(case.shape, len(case.step.contexts), case.rows, 64, case.qkv.device)
    out = torch.full((case.rows, case.shape.heads, case.shape.head_dim), torch.nan, device=case.qkv.device)
    paged.run_plan(case.shape, case.step, made, has_chunks=True)
    paged.run_rope_write(case.shape, case.step, 0, case.qkv, case.last, case.q_norm, case.k_norm)
    pool = paged.pool_map(case.shape, case.pool)
    made.chunk_o.fill_(torch.nan)
    per_tile = paged.CHUNK_ROWS // case.shape.pack
    layer, tiles = case.shape.layers - 1, sum(-(-rows // per_tile) for rows in case.step.row_starts.diff().tolist())
    paged.run_prefill(case.shape, case.step, made, tiles, case.qkv, pool, layer, out, parts)
    return out


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative, in the 2-norm; NaN anywhere makes it NaN, which passes no comparison."""
    return float((got.float() - wanted).norm() / wanted.norm())
