# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the kernels share inside: matrix products of known precision, logits, masks and the running softmax.

Everything between the inputs and the one rounding at the end is float32, as in the torch path. Tensor cores take
16-bit or tf32 operands, so float32 operands are split into parts whose products add up to float32's accuracy.
"""

from __future__ import annotations

import triton
import triton.language as tl

# numpy knows no bfloat16: in the interpreter a product of raw bfloat16 bits would be nonsense
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

NO_MASK = tl.constexpr(0)
CAUSAL = tl.constexpr(1)
BOOLEAN = tl.constexpr(2)
ADDITIVE = tl.constexpr(3)


@triton.jit
def product(a, b):
    """`a @ b` of operands of one dtype, accumulated in float32; exact products for 16-bit ones."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def wide_product(a, b):
    """`a @ b` in float32 whatever the operands are: three tf32 products."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32x3")


@triton.jit
def split_product(a, b):
    """`a @ b` for float32 `a` and 16-bit `b`: `a` as the sum of two 16-bit numbers, so 16 bits of it count or more."""
    if b.dtype == tl.float32:
        out = wide_product(a, b)
    else:
        high = a.to(b.dtype)
        low = (a - high.to(tl.float32)).to(b.dtype)
        out = product(low, b) + product(high, b)
    return out


@triton.jit
def row_units(a):
    """Largest magnitude of each row, 1 for a row of zeros: float16 has no room for gradients as they come."""
    unit = tl.max(tl.abs(a), 1)
    return tl.where(unit > 0, unit, 1.0)


@triton.jit
def gradient_product(a, b):
    """As `split_product`, for `a` of any magnitude."""
    if b.dtype == tl.float32:
        out = wide_product(a, b)
    else:
        unit = row_units(a)
        out = split_product(a / unit[:, None], b) * unit[:, None]
    return out


@triton.jit
def outer_product(p, g, like):
    """`p^T @ g` for float32 `p` `[M, N]` and `g` `[M, E]`, of which `like`'s dtype holds two parts each."""
    if like.dtype == tl.float32:
        out = wide_product(tl.trans(p), g)
    else:
        unit = row_units(g)
        g = g / unit[:, None]
        p = tl.trans(p * unit[:, None])
        high = g.to(like.dtype)
        low = (g - high.to(tl.float32)).to(like.dtype)
        out = gradient_product(p, high) + gradient_product(p, low)
    return out


@triton.jit
def squashed(s, softcap):
    """`tanh(s / softcap)`; its absolute error is that of float32 at 1, which is what a logit of `softcap` has."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * s / softcap))


@triton.jit
def capped(s, softcap, CAP: tl.constexpr):
    """Scaled logits, before any mask."""
    if CAP:
        s = squashed(s, softcap) * softcap
    return s


@triton.jit
def masked(s, mask, row_offset, stride_key, last, n, seen, MASK: tl.constexpr):
    """Logits `[M, N]` with -inf where a row doesn't see a key.

    `seen` says which rows and keys there are; `last` `[M]` is the last key of a causal row; `mask` holds bytes
    (BOOLEAN) or numbers to add (ADDITIVE), row m's at `row_offset[m]`.
    """
    if MASK == CAUSAL:
        seen = seen & (n[None, :] <= last[:, None])
    elif MASK != NO_MASK:
        at = mask + row_offset[:, None] + n.to(tl.int64)[None, :] * stride_key
        value = tl.load(at, mask=seen, other=0)
        if MASK == BOOLEAN:
            seen = seen & (value != 0)
        else:
            s += value.to(tl.float32)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def grown(top, s):
    """The running maximum after another tile of logits, and the same with 0 for rows that have seen nothing."""
    new = tl.maximum(top, tl.max(s, 1))
    return new, tl.where(new == float("-inf"), 0.0, new)


@triton.jit
def log_sum(top, total):
    """Log-sum-exp from a running maximum and a sum; -inf for a row that saw nothing."""
    return tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def log_add(a, b):
    """`log(exp(a) + exp(b))`, -inf when both are."""
    top = tl.maximum(a, b)
    safe = tl.where(top == float("-inf"), 0.0, top)
    return log_sum(safe, tl.exp(a - safe) + tl.exp(b - safe))
