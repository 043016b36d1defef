# mypy: allow-untyped-defs, allow-incomplete-defs
"""Gather, project, rotate: fine features straight to rotated keys and values of new pages, in one launch.

For layers whose keys and values are one linear map each (bias or not), the keys turned as in Llama. A program makes
one head of keys or values for one tile of tokens, as two halves, because the rotation mixes dimension i with i + D/2:
`k[:D/2] cos - k[D/2:] sin` and `k[D/2:] cos + k[:D/2] sin`. Nothing between features and pages is written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .reference import gather_project_rotate_reference as gather_project_rotate_reference
from .tiles import product


# fmt: off
@triton.jit(do_not_specialize=["n_tokens"])
def project_pages(
    features, tokens, key_weight, value_weight, key_bias, value_bias, cos, sin, key, value,
    f_token, f_width,
    weight_row, weight_width,
    cos_token, cos_width,
    sin_token, sin_width,
    n_tokens, width, heads, key_half, value_half,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
):
# fmt: on
    """One token tile of one head of `key[token, head]` or, in the second half of the heads, `value[token, head]`."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < n_tokens
    token = m.to(tl.int64)
    present = real
    if tokens is not None:
        token = tl.load(tokens + m, mask=real, other=-1).to(tl.int64)
        present = token >= 0
    head = tl.program_id(1) % heads
    is_key = tl.program_id(1) < heads
    weight = value_weight
    half = value_half
    if is_key:
        weight = key_weight
        half = key_half
    h = tl.arange(0, BLOCK_H)
    first_row = (head * 2 * half + h).to(tl.int64)
    in_half = h < half
    low = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    high = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for start in range(0, width, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < width
        here = features + token[:, None] * f_token + c[None, :] * f_width
        f = tl.load(here, mask=present[:, None] & inside[None, :], other=0)
        here = weight + first_row[None, :] * weight_row + c[:, None] * weight_width
        needed = inside[:, None] & in_half[None, :]
        w = tl.load(here, mask=needed, other=0)
        low += product(f, w)
        here = weight + (first_row + half)[None, :] * weight_row + c[:, None] * weight_width
        w = tl.load(here, mask=needed, other=0)
        high += product(f, w)
    if key_bias is not None:
        bias = value_bias
        if is_key:
            bias = key_bias
        low += tl.load(bias + first_row, mask=in_half, other=0).to(tl.float32)[None, :]
        high += tl.load(bias + first_row + half, mask=in_half, other=0).to(tl.float32)[None, :]
    needed = real[:, None] & in_half[None, :]
    at = m.to(tl.int64)[:, None] * heads * 2 * half + first_row[None, :]
    if is_key:
        turn = cos + m[:, None].to(tl.int64) * cos_token + h[None, :] * cos_width
        cos_low = tl.load(turn, mask=needed, other=0).to(tl.float32)
        cos_high = tl.load(turn + half * cos_width, mask=needed, other=0).to(tl.float32)
        turn = sin + m[:, None].to(tl.int64) * sin_token + h[None, :] * sin_width
        sin_low = tl.load(turn, mask=needed, other=0).to(tl.float32)
        sin_high = tl.load(turn + half * sin_width, mask=needed, other=0).to(tl.float32)
        turned = low * cos_low - high * sin_low
        high = high * cos_high + low * sin_high
        tl.store(key + at, turned.to(key.dtype.element_ty), mask=needed)
        tl.store(key + at + half, high.to(key.dtype.element_ty), mask=needed)
    else:
        tl.store(value + at, low.to(value.dtype.element_ty), mask=needed)
        tl.store(value + at + half, high.to(value.dtype.element_ty), mask=needed)


def project_blocks(n_tokens: int, half: int, item: int) -> dict[str, int]:
    """Tile sizes for so many tokens and heads of `2 * half`."""
    block_h = max(16, triton.next_power_of_2(half))
    # the taller the tile, the fewer times all weights pass; wide or odd heads and float32 leave no room for it, and
    # halves that aren't aligned least of all: 40 wide ones spill from a tile of 64
    most = 128 if half == block_h and block_h * item <= 128 else 64 if block_h * item <= 256 else 32
    most = most if half % 16 == 0 else 32
    block_m = min(most, max(16, triton.next_power_of_2(n_tokens)))
    block_c = 64 if item == 2 and block_h <= 64 else 32
    warps = 8 if block_m * block_h * item >= 8192 else 4
    return dict(
        BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_H=block_h, num_warps=warps, num_stages=3 if item == 2 else 2
    )


def gather_project_rotate(
    features: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    *,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys and values of fine tokens, rotated; what `gather_project_rotate_reference` says in torch.

    Args:
        features: `[T, C]`, any strides.
        key_weight: `[Hkv * D, C]`, D even; copied only if its strides aren't those of `value_weight`.
        value_weight: `[Hkv * Dv, C]`, Dv even.
        cos: `[N, D]` rotary table of the tokens.
        sin: `[N, D]`.
        heads: Hkv.
        key_bias: `[Hkv * D]`, together with `value_bias` or not at all.
        value_bias: `[Hkv * Dv]`.
        tokens: `[N]` rows of `features`, -1 for a region's padding (whose features are zeros); None takes all rows
            in order.

    Returns:
        `[N, Hkv, D]` and `[N, Hkv, Dv]`, contiguous: with N = n * P, the pages of n regions.
    """
    if key_weight.stride() != value_weight.stride():
        key_weight, value_weight = key_weight.contiguous(), value_weight.contiguous()
    n_tokens = cos.shape[0]
    key_width, value_width = key_weight.shape[0] // heads, value_weight.shape[0] // heads
    key = features.new_empty(n_tokens, heads, key_width)
    value = features.new_empty(n_tokens, heads, value_width)
    blocks = project_blocks(n_tokens, max(key_width, value_width) // 2, features.element_size())
    launch(
        project_pages,
        (triton.cdiv(n_tokens, blocks["BLOCK_M"]), 2 * heads),
        features=features,
        tokens=tokens,
        key_weight=key_weight,
        value_weight=value_weight,
        key_bias=key_bias,
        value_bias=value_bias,
        cos=cos,
        sin=sin,
        key=key,
        value=value,
        f_token=features.stride(0),
        f_width=features.stride(1),
        weight_row=key_weight.stride(0),
        weight_width=key_weight.stride(1),
        cos_token=cos.stride(0),
        cos_width=cos.stride(1),
        sin_token=sin.stride(0),
        sin_width=sin.stride(1),
        n_tokens=n_tokens,
        width=features.shape[1],
        heads=heads,
        key_half=key_width // 2,
        value_half=value_width // 2,
        **blocks,
    )
    return key, value
