"""Fine K/V through the layer's own code path: shadow attention and capture.

A shallow copy of the layer's attention module, with our K/V projections in place of its own, is run on the fine
features and stopped where it hands key and value to the attention function. Whatever the family does between the
projection and the attention (head split, norms on keys, partial rotary, latents) happens to fine tokens too, without
a line of per-family code.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import UnsupportedModelError
from .fused import Spread, rows_only, used_rows
from .interface import CARRIED, Capture, Captured
from .offload import execution_device, plain_copy
from .site import AttentionSite, rotary_tables

MASKED_TOKENS = (
    512  # where a layer wants a mask (it compares all tokens with all), features go through in parts
)


class ZeroQuery(nn.Module):
    """In a shadow, stands in for `q_proj`: one head of zeros instead of a projection nobody uses."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)


def shadow_key_value(
    site: AttentionSite,
    replaced: dict[str, nn.Module],
    features: Tensor,
    positions: Tensor | None,
    longest: int = 0,
    tables: Any = None,
) -> tuple[Tensor, Tensor]:
    """Key and value that a layer would make of `features`, with some of its submodules replaced.

    Args:
        site: The layer.
        replaced: Submodules to use instead, by name within the attention module (dotted for nested ones).
        features: `[B, N, C]`.
        positions: `[..., B, N]` rotary positions, or None if the layer has no use for them.
        longest: Largest position in the sequence.
        tables: Rotary tables to use instead of the family's at `positions`.

    Returns:
        `[B, Hkv, N, D]` and `[B, Hkv, N, Dv]`, rotated as the family does.
    """
    if site.needs_mask and positions is not None and features.shape[1] > MASKED_TOKENS:
        parts = [
            shadow_key_value(site, replaced, f, p, longest)
            for f, p in zip(features.split(MASKED_TOKENS, 1), positions.split(MASKED_TOKENS, -1), strict=True)
        ]
        key, value = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        return key, value
    if site.rotary is not None:
        if tables is None:
            assert positions is not None
            tables = rotary_tables(site.rotary, features, positions, longest)
        if _plain(site, replaced, features, tables):
            on_gpu = features.is_cuda or kernels.INTERPRETED
            return (_projected if on_gpu else _turned)(replaced, features, tables)
    return _captured(site, replaced, features, positions, tables)


def _captured(
    site: AttentionSite,
    replaced: dict[str, nn.Module],
    features: Tensor,
    positions: Tensor | None,
    tables: Any,
) -> tuple[Tensor, Tensor]:
    """`shadow_key_value` by shadow and capture, with the rotary tables made."""
    shadow = _with_modules(site.attention, replaced)
    call = {name: {} if value is dict else value for name, value in site.call.items()}
    if "position_ids" in call:
        call["position_ids"] = positions
    if site.rotary is not None:
        call[site.rotary.argument] = tables
    if site.needs_mask:
        batch, length = features.shape[:2]
        call["attention_mask"] = features.new_ones(batch, 1, length, length, dtype=torch.bool)
    capture = Capture()
    if site.carried:
        token = CARRIED.set(capture)
    else:
        call["flex_streams"] = capture
    try:
        # the class's forward: hooks on the instance (offloading) belong to the real module
        if site.states:
            call[site.states], features = features, features.new_zeros(features.shape[0], 1, site.width)
        type(site.attention).forward(shadow, features, **call)
    except Captured:
        pass
    finally:
        if site.carried:
            CARRIED.reset(token)
    if capture.key is None or capture.value is None:
        raise UnsupportedModelError(
            f"{type(site.attention).__name__} returned without calling the attention function, so fine tokens can't "
            "be projected through it; leave this layer out"
        )
    return capture.key, capture.value


_like_llama: WeakKeyDictionary[AttentionSite, bool] = WeakKeyDictionary()


def _plain(site: AttentionSite, replaced: dict[str, nn.Module], features: Tensor, tables: Any) -> bool:
    """Whether a faster way makes key and value: two fine linear layers, Llama's rotation, and nothing else."""
    key, value = (replaced.get(name) for name in ("k_proj", "v_proj"))
    if not (type(key) is nn.Linear and type(value) is nn.Linear) or _hooked(key) or _hooked(value):
        return False
    if not (isinstance(tables, tuple) and len(tables) == 2 and features.shape[0] == 1):
        return False
    if any(not isinstance(t, Tensor) or t.shape[:-1] != features.shape[:-1] for t in tables):
        return False
    if features.is_cuda or kernels.INTERPRETED:
        if not kernels.projects(features, key, value, tables[0], tables[1]):
            return False
    elif not _turns(features, key, value, tables[0]):
        return False
    if site not in _like_llama:
        _like_llama[site] = _makes_like_llama(site, replaced, features, tables[0].shape[-1])
    return _like_llama[site]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


@torch.no_grad()
def _makes_like_llama(
    site: AttentionSite, replaced: dict[str, nn.Module], features: Tensor, width: int
) -> bool:
    """Try a layer's own code on random weights and tables, small features and large ones, against Llama's formula."""
    from ..kernels.reference import gather_project_rotate_reference

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(features)

    linear: dict[str, nn.Module] = {}
    weights = []
    for name in ("k_proj", "v_proj"):
        weight = replaced[name].weight
        assert isinstance(weight, Tensor)
        # its own initialisation would draw from the generator that a sampling user seeded
        module = nn.utils.skip_init(
            nn.Linear, site.width, len(weight), bias=False, device=weight.device, dtype=weight.dtype
        )
        weights.append(module.weight.copy_(random(*weight.shape) * site.width**-0.5))
        linear[name] = module
    heads = len(weights[0]) // width
    positions = torch.arange(4, device=features.device)[None]
    for size in (1.0, 1e3):  # some families clamp what they project
        some, cos, sin = size * random(1, 4, site.width), random(1, 4, width), random(1, 4, width)
        try:
            found = _captured(site, {**replaced, **linear}, some, positions, (cos, sin))
        except Exception:  # whatever its code makes of tables that aren't its own
            return False
        expected = gather_project_rotate_reference(some[0], weights[0], weights[1], cos[0], sin[0], heads)
        for f, e in zip(found, expected, strict=True):
            e = e.transpose(0, 1)[None]
            # rounding is far below, every other formula far above
            if f.shape != e.shape or not float((f - e).abs().max()) < 0.02 * float(e.abs().max()):
                return False
    return True


def _projected(replaced: dict[str, nn.Module], features: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
    from ..kernels.gather_project_rotate import gather_project_rotate

    key, value = replaced["k_proj"], replaced["v_proj"]
    assert isinstance(key, nn.Linear) and isinstance(value, nn.Linear)
    cos, sin = (t[0] for t in tables)
    pages = gather_project_rotate(
        features[0],
        key.weight,
        value.weight,
        cos,
        sin,
        key.weight.shape[0] // cos.shape[-1],
        key_bias=key.bias,
        value_bias=value.bias,
    )
    key_pages, value_pages = (t.transpose(0, 1)[None] for t in pages)
    return key_pages, value_pages


def _turns(features: Tensor, key: nn.Linear, value: nn.Linear, cos: Tensor) -> bool:
    """Whether `_turned` takes these features, linear layers and rotary tables."""
    width, exact = cos.shape[-1], (torch.float32, torch.float64)
    leaves = features, key.weight, value.weight
    if features.dtype not in exact or any(t.dtype != features.dtype for t in (*leaves, cos)):
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled(features.device.type) or width % 2:
        return False
    heads, rest = divmod(key.weight.shape[0], width)
    return not rest and not value.weight.shape[0] % heads


def _turned(replaced: dict[str, nn.Module], features: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
    """What `gather_project_rotate_reference` says, with keys rotated where they lie: in two passes instead of five."""
    cos, sin = (t[0][:, None] for t in tables)
    width, half = cos.shape[-1], cos.shape[-1] // 2
    key = replaced["k_proj"](features[0]).unflatten(1, (-1, width))
    value = replaced["v_proj"](features[0]).unflatten(1, (key.shape[1], -1))
    turned = key * cos
    # not `addcmul_`, which rounds once less: layers that don't come this way must give the same bits
    turned[..., :half].sub_(key[..., half:] * sin[..., :half])
    turned[..., half:].add_(key[..., :half] * sin[..., half:])
    return turned.transpose(0, 1)[None], value.transpose(0, 1)[None]


def _with_modules(module: nn.Module, replaced: dict[str, nn.Module]) -> nn.Module:
    """A shallow copy with some (possibly nested) submodules swapped; nothing of the original changes."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    nested: dict[str, dict[str, nn.Module]] = {}
    for name, new in replaced.items():
        head, _, rest = name.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = new
        else:
            twin._modules[head] = new
    for head, inner in nested.items():
        child = module._modules[head]
        assert child is not None
        twin._modules[head] = _with_modules(child, inner)
    return twin


def key_value_modules(site: AttentionSite) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Submodules whose parameters shape key or value, found by differentiating through a copy.

    Returns:
        Their names, and of fused projections the output rows that matter.

    Raises:
        UnsupportedModelError: The attention can't be run on features, or has no such parameters.
    """
    twin = plain_copy(site.attention, site.dtype)
    leaves = {n: m for n, m in twin.named_modules() if next(m.parameters(recurse=False), None) is not None}
    parameters = {(n, k): p for n, m in leaves.items() for k, p in m.named_parameters(recurse=False)}
    first = next(iter(parameters.values()))
    with torch.enable_grad(), torch.inference_mode(False):
        for p in parameters.values():
            p.requires_grad_(p.is_floating_point())
        features, positions = _example(site, 4, first.device, first.dtype)
        key, value = shadow_key_value(replace(site, attention=twin), {}, features, positions)
        total = key.float().square().sum() + value.float().square().sum()
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    gradients = {key: g for key, g in zip(parameters, grads, strict=True) if g is not None}
    found = {name for name, _ in gradients}
    if not found or "" in found:
        raise UnsupportedModelError(
            f"{type(site.attention).__name__} keeps no key/value projection as a module of its own, so there is "
            "nothing to copy for fine tokens"
        )
    names = tuple(n for n in leaves if n in found)
    rows = {n: used_rows(leaves[n], gradients.get((n, "weight"))) for n in names}
    return names, {n: used for n, used in rows.items() if used is not None}


def _example(site: AttentionSite, n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random features `[1, n, C]` and positions to try a layer with."""
    features = torch.randn(1, n, site.width, generator=torch.Generator().manual_seed(0))
    axes = site.rotary.axes if site.rotary is not None else ()
    return features.to(device, dtype), torch.arange(n, device=device).expand(*axes, 1, n)


def zero_query(site: AttentionSite, names: tuple[str, ...]) -> nn.Module | None:
    """A stub for `q_proj` if the layer's keys and values come out bit-identical with it, else None."""
    q_proj = site.attention._modules.get("q_proj")
    width = getattr(site.attention, "head_dim", None)
    if q_proj is None or "q_proj" in names or not isinstance(width, int):
        return None
    features, positions = _example(site, 3, execution_device(q_proj), site.dtype)
    with torch.no_grad():
        full = shadow_key_value(site, {}, features, positions)
        stub = ZeroQuery(width)
        try:
            short = shadow_key_value(site, {"q_proj": stub}, features, positions)
        except Exception:  # whatever its code makes of an unexpected width
            return None
    return stub if all(torch.equal(a, b) for a, b in zip(full, short, strict=True)) else None


class FineProjection(nn.Module):
    """One layer's own K/V projections for fine tokens: the layer's K/V modules, copied or newly drawn.

    Args:
        site: The layer.
        names: Its submodules that shape key or value.
        rows: The rows to keep of those that are fused with something else.
        init: `copy` or `random`.
        std: Of random weights.
    """

    def __init__(
        self, site: AttentionSite, names: tuple[str, ...], rows: dict[str, Tensor], init: str, std: float
    ):
        super().__init__()
        self.names = names
        self.rows = rows
        self.widths: dict[str, int] = {}
        for name in names:
            module = plain_copy(site.attention.get_submodule(name), site.dtype)
            if name in rows:
                self.widths[name] = module.weight.shape[0 if isinstance(module, nn.Linear) else 1]  # type: ignore
                module = rows_only(module, rows[name])
            module.requires_grad_(True)
            if init == "random":
                _draw(module, std)
            self.add_module(name.replace(".", "__"), module)

    def live(self) -> FineProjection:
        """Itself; through peft's `modules_to_save` wrapper, the copy that is in use."""
        return self

    def modules_by_name(self) -> dict[str, nn.Module]:
        """Submodules to put in the shadow, read at call time so that later LoRA layers count."""
        out = {}
        for name in self.names:
            module = self._modules[name.replace(".", "__")]
            assert module is not None
            out[name] = Spread(module, self.rows[name], self.widths[name]) if name in self.rows else module
        return out


@torch.no_grad()
def _draw(module: nn.Module, std: float) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, std)  # N(0, 0.02) in the official model
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1.0)
