"""fp8 KV inside a kernel: a token's numbers of one head as e4m3, and the two float16 scales that belong to them.

Owns rounding and the word of two scales. Never knows where they lie (layout.py).

A scale brings the largest of a head's numbers to 448; both scales of a token, its key's and its value's, are one word
of 32 bits: the compiler's pipeline of asynchronous copies takes no narrower load, and one that is not in it would be
waited for in every tile. Rounding is done here and not left to the conversion, which is exact then: Triton 3.7's
interpreter drops the carry into the exponent (124.3 became 64 instead of 128), and the tests run the kernels' own
source. Products run in float16, in which e4m3 is exact: widening two numbers is one instruction, to bfloat16 three."""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
SCALE_MIN = tl.constexpr(6.103515625e-05)  # float16's smallest normal: below it a scale would lose its own bits
NORMAL_MIN = tl.constexpr(0.015625)  # e4m3's; below lie steps of 2^-9
SMALL_STEPS = tl.constexpr(24576.0)  # 1.5 * 2^14: a float32 beside it has steps of 2^-9
QUAD = tl.constexpr(4)  # tokens whose values lie side by side
# Of a weight times its value's scale, so that float16 holds it: weights above 2.6e-7 where a head's largest value is
# 0.1 (1.6e-8 at 1.6), and values up to 28,000.
WEIGHT_GAIN = tl.constexpr(1024.0)


@triton.jit
def scale_of(values):
    """[tokens, D] float32 -> [tokens]: float16 scales, as float32. Of numbers one of which is none: NaN."""
    largest = tl.max(tl.abs(values), 1)
    is_bad = tl.max((values != values).to(tl.int32), 1) != 0  # noqa: PLR0124  # true of NaN alone
    scale = tl.maximum(largest / E4M3_MAX, SCALE_MIN).to(tl.float16).to(tl.float32)
    return tl.where(is_bad, float("nan"), scale)


@triton.jit
def rounded(values):
    """The nearest numbers of e4m3, on a tie the even one, as float32. What is no number is 0: its scale tells of it.
    So memory of fp8 numbers never holds a NaN, and what lies behind a context's end needs no mask of its own."""
    bits = values.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (values + SMALL_STEPS) - SMALL_STEPS
    near = tl.where(tl.abs(values) < NORMAL_MIN, small, normal)
    return tl.where(values == values, near, 0.0)  # noqa: PLR0124


@triton.jit
def joined(key_scale, value_scale):
    """Both scales in one word, the key's in the low half."""
    low = key_scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (value_scale.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def key_scale(word):
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def value_scale(word):
    return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def in_tokens(quads, BLOCK: tl.constexpr, D: tl.constexpr):
    """[BLOCK / 4, 4 * D] as values lie -> [BLOCK, D]."""
    apart = tl.reshape(quads, [BLOCK // QUAD, D, QUAD])
    return tl.reshape(tl.permute(apart, (0, 2, 1)), [BLOCK, D])
