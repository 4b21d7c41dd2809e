"""What every kernel must compute, in plain torch and float32: the oracles of the tests and of the self-check.

Owns the definition of right. Never runs in a step, never imports triton."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.layout import FP8, QUAD_TOKENS, LayerKv
from engine.kernels.scaled import Weight, widened

E4M3_MAX = 448.0
SCALE_MIN = 2.0**-14  # float16's smallest normal


def linear(
    x: Tensor,
    weight: Weight,
    norm_eps: float | None = None,
    is_gated: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """[rows, K] and [N or 2 * N, K] -> [rows, N]; the norm's weight is folded into `weight`."""
    y = x.float() @ widened(weight).T
    if norm_eps is not None:
        y = y * rms_scale(x, norm_eps)
    if bias is not None:
        y = y + bias.float()
    if is_gated:
        y = gated(y)
    return y if residual is None else y + residual.float()


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """[.., n] -> [.., 1]: 1 / sqrt(mean(x^2) + eps)."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """Over the last axis."""
    y = x.float() * rms_scale(x, eps)
    return y if weight is None else y * weight.float()


def gated(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last axis."""
    gate, up = gate_up.float().chunk(2, -1)
    return functional.silu(gate) * up


def turn(positions: Tensor, frequencies: Tensor) -> Tensor:
    """[rows], [head_dim / 2] -> [rows, head_dim]: all cosines, then all sines."""
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def rope(heads: Tensor, turns: Tensor) -> Tensor:
    """[rows, heads, head_dim] turned by `turn`: neighbours of a head are one complex number."""
    cos, sin = turns[:, None].float().chunk(2, -1)
    even, odd = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def split_heads(
    qkv: Tensor, turns: Tensor, heads: int, kv_heads: int, eps: float, q_norm: Tensor | None, k_norm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, (heads + 2 * kv_heads) * head_dim] -> queries, keys (normed if the model has it, turned) and values,
    rounded as they are stored."""
    parts = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
    queries, keys = (
        rope(part if norm is None else rms_norm(part, eps, norm), turns).to(qkv.dtype)
        for part, norm in zip(parts[:2], (q_norm, k_norm), strict=True)
    )
    return queries, keys, parts[2]


def fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """[.., head_dim] -> the same in e4m3, and its scales [..] in float16: what is read is their product."""
    scales = (values.float().abs().amax(-1) / E4M3_MAX).clamp(min=SCALE_MIN).half()
    return (values.float() / scales.float()[..., None]).to(FP8), scales


def write(kv: LayerKv, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Store [rows, kv_heads, head_dim] in one layer; -1 writes nowhere."""
    tokens = kv.numbers.shape[3]
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, place = slot // tokens, slot % tokens
        if kv.scales is None:
            kv.numbers[block, 0, :, place], kv.numbers[block, 1, :, place] = keys[row], values[row]
            continue
        scales, in_quads = halves(kv.scales)[block, :, place], quads(kv.numbers[:, 1])
        kv.numbers[block, 0, :, place], scales[:, 0] = fp8(keys[row])
        in_quads[block, :, place // QUAD_TOKENS, :, place % QUAD_TOKENS], scales[:, 1] = fp8(values[row])


def halves(words: Tensor) -> Tensor:
    """[.., tokens] words -> [.., tokens, 2] float16: the scales of keys and of values."""
    pairs: Tensor = words.view(torch.float16).unflatten(-1, (-1, 2))
    return pairs


def quads(values: Tensor) -> Tensor:
    """fp8 values as they lie, [.., tokens, head_dim] by name -> [.., tokens / 4, head_dim, 4]."""
    lying: Tensor = values.flatten(-2).unflatten(-1, (-1, values.shape[-1], QUAD_TOKENS))
    return lying


def read(kv: LayerKv) -> Tensor:
    """What one layer's memory says: [blocks, 2, kv_heads, tokens, head_dim] float32."""
    if kv.scales is None:
        return kv.numbers.float()
    values = quads(kv.numbers[:, 1]).float().transpose(-1, -2).flatten(-3, -2)
    scales = halves(kv.scales).float().permute(0, 3, 1, 2)
    return torch.stack([kv.numbers[:, 0].float(), values], 1) * scales[..., None]


def attend(
    queries: Tensor, kv: Tensor, table: Tensor, row_starts: Tensor, contexts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of ragged rows over one layer's pages: [rows, heads, head_dim] float32 and the natural log of
    each row's sum. The rows' own keys must be written; a sequence's last row sees all its `contexts` tokens."""
    out = torch.zeros(queries.shape, device=queries.device)
    lse = torch.zeros(queries.shape[:2], device=queries.device)
    group = queries.shape[1] // kv.shape[2]
    for sequence, context in enumerate(contexts.tolist()):
        start, end = int(row_starts[sequence]), int(row_starts[sequence + 1])
        blocks = table[sequence, : -(-context // kv.shape[3])].long()
        pages = (
            kv[blocks].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
        )  # [2, kv_heads, tokens, head_dim]
        keys, values = pages.repeat_interleave(group, 1)
        score = torch.einsum("rhd,htd->rht", queries[start:end].float(), keys) * scale
        position = torch.arange(context - (end - start), context, device=kv.device)
        future = torch.arange(context, device=kv.device)[None, :] > position[:, None]
        score.masked_fill_(future[:, None, :], -torch.inf)
        lse[start:end] = score.logsumexp(-1)
        out[start:end] = torch.einsum("rht,htd->rhd", score.softmax(-1), values)
    return out, lse


def kept(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """[vocab] -> which tokens may be drawn: top-k, then top-p of what that leaves, then min-p. Equals of the last
    token kept are kept."""
    weights = ((logits - logits.max()).double() / temperature).exp()
    floor = logits.min()
    if 0 < top_k < len(logits):
        floor = logits.topk(top_k).values[-1]
    if top_p < 1.0:
        best = torch.where(logits >= floor, weights, 0.0).sort(descending=True)
        before = best.values.cumsum(0) - best.values
        floor = logits[best.indices[before < top_p * best.values.sum()]].min()
    return (logits >= floor) & (weights >= min_p)


def sample(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, uniform: float = 0.0
) -> int:
    """The token at which the running weight of the kept tokens, in order of id, passes `uniform` of their sum."""
    if temperature <= 0.0:
        return int(logits.argmax())
    weights = ((logits - logits.max()).double() / temperature).exp()
    running = torch.where(kept(logits, temperature, top_k, top_p, min_p), weights, 0.0).cumsum(0)
    return int(torch.searchsorted(running, uniform * running[-1], right=True))
