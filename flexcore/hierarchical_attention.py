"""Hierarchical attention: readout rows attend to `[ordinary keys ; chosen fine keys]` in one softmax.

`hierarchical_attention_reference` says it in one concatenation. `hierarchical_attention` gives the same numbers from
a plain output that is already there: with the exact log-sum-exp of both parts, the joint softmax is
`o = o_plain * exp(lse - lse_joint) + o_fine * exp(lse_fine - lse_joint)` (semantics section 5). On CUDA a kernel may
do the fine part and the merge (`flexcore/kernels`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .row_attention import RowMask, row_attention, with_sinks


def hierarchical_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fine_key: Tensor,
    fine_value: Tensor,
    *,
    mask: Tensor | None,
    fine_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """The readable twin of `hierarchical_attention`; same arguments, with both masks as plain tensors.

    Args:
        query: `[B, Hq, R, D]`.
        key: `[B, Hkv, S, D]`.
        value: `[B, Hkv, S, Dv]`.
        fine_key: `[B, Hkv, N, D]`.
        fine_value: `[B, Hkv, N, Dv]`.
        mask: `[B, 1|Hq, R, S]` bool, True sees; None sees all.
        fine_mask: `[B, R, N]` bool, each row's selection.
        scaling: Factor on the logits.
        softcap: See `row_attention`.
        sinks: `[Hq]` attention sinks.
        alpha: Weight of the joint output against the plain one (training blend, semantics section 5).

    Returns:
        `[B, R, Hq, Dv]` in the query's dtype.
    """
    groups = query.shape[1] // key.shape[1]
    exact = torch.promote_types(query.dtype, torch.float32)
    q = query.to(exact)
    k, v, kf, vf = (t.to(exact).repeat_interleave(groups, dim=1) for t in (key, value, fine_key, fine_value))

    def logits(keys: Tensor, see: Tensor | None) -> Tensor:
        s = q @ keys.transpose(2, 3) * scaling
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        return s if see is None else s.masked_fill(~see, torch.finfo(exact).min)

    def attend(s: Tensor, values: Tensor) -> Tensor:
        if sinks is not None:
            sink = sinks.to(exact)[None, :, None, None].expand(*s.shape[:3], 1)
            return torch.softmax(torch.cat([s, sink], dim=-1), dim=-1)[..., :-1] @ values
        return torch.softmax(s, dim=-1) @ values

    plain = logits(k, mask)
    o_plain = attend(plain, v)
    o_joint = attend(torch.cat([plain, logits(kf, fine_mask[:, None])], dim=-1), torch.cat([v, vf], dim=2))
    return ((1 - alpha) * o_plain + alpha * o_joint).transpose(1, 2).to(query.dtype)


def merge(
    plain: Tensor, plain_lse: Tensor, fine: Tensor, fine_lse: Tensor, alpha: float | Tensor = 1.0
) -> Tensor:
    """Joint softmax of two parts from their outputs `[B, H, R, Dv]` and log-sum-exps `[B, H, R]`, all float32.

    A row whose fine part is empty (`fine_lse` = -inf) comes out bit-identical to `plain`.
    """
    # a finite floor, as -inf less -inf is NaN: with it a row that sees nothing at all keeps `plain`
    floor = torch.finfo(fine_lse.dtype).min
    # exp(fine_lse) / (exp(plain_lse) + exp(fine_lse)); where it is 0, lerp gives `plain` itself
    share = torch.sigmoid(fine_lse - plain_lse.clamp(min=floor))[..., None]
    return torch.lerp(plain, fine, share * alpha if isinstance(alpha, Tensor) or alpha != 1.0 else share)


def hierarchical_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    fine_key: Tensor,
    fine_value: Tensor,
    *,
    mask: RowMask | None = None,
    fine_mask: RowMask | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    plain: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Readout rows attend to ordinary and chosen fine keys in one softmax, without concatenating them.

    Args:
        query: `[B, Hq, R, D]`.
        key: `[B, Hkv, S, D]`; not needed when `lse` is given.
        value: `[B, Hkv, S, Dv]`; not needed when `plain` is given.
        fine_key: `[B, Hkv, N, D]`.
        fine_value: `[B, Hkv, N, Dv]`; like `fine_key` finite even where no row looks, for `0 * NaN` is NaN. Sources
            zero a region's padding for this reason.
        mask: What each row sees of the ordinary keys; None sees all.
        fine_mask: What each row sees of the fine keys; None sees all.
        scaling: Factor on the logits.
        softcap: See `row_attention`.
        sinks: `[Hq]` attention sinks.
        alpha: Weight of the joint output against the plain one.
        plain: `[B, R, Hq, Dv]` output over the ordinary keys, as the model's own backend computed it.
        lse: `[B, Hq, R]` log-sum-exp over the ordinary keys, sinks included.

    Returns:
        `[B, R, Hq, Dv]` in the query's dtype.

    Raises:
        ValueError: `plain` or `lse` is missing and what it would be computed from is missing too.
    """
    if plain is None or lse is None:
        if key is None or (plain is None and value is None):
            raise ValueError("key (and value) must be given unless both plain and lse are, got None")
        own, own_lse, _ = row_attention(
            query, key, value if plain is None else None, mask, scaling=scaling, softcap=softcap
        )
        if plain is None:
            assert own is not None
            if sinks is not None:
                own = own * torch.exp(own_lse - with_sinks(own_lse, sinks))[..., None]
            plain = own.transpose(1, 2)
        lse = with_sinks(own_lse, sinks) if lse is None else lse
    if (query.is_cuda or kernels.INTERPRETED) and kernels.reads_regions(
        query, fine_key, fine_value, fine_mask
    ):
        from .kernels.region_attention import read_regions

        return read_regions(
            query,
            fine_key,
            fine_value,
            fine_mask,
            plain,
            lse,
            scaling=scaling,
            softcap=softcap,
            alpha=alpha,
        )
    fine, fine_lse, _ = row_attention(
        query, fine_key, fine_value, fine_mask, scaling=scaling, softcap=softcap
    )
    assert fine is not None
    out = merge(plain.transpose(1, 2).to(fine.dtype), lse.to(fine.dtype), fine, fine_lse, alpha)
    return out.transpose(1, 2).to(query.dtype)
