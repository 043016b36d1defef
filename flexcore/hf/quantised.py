"""Quantised linear layers as plain ones: what fine projections of a quantised model start from.

Fine projections are trained, so they are plain `nn.Linear` layers in the dtype the model computes in, whatever the
base's weights are stored as.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

_CHUNK = 1024  # unit vectors per call when a weight has to be read off a layer's outputs


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight isn't a plain floating-point tensor."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) for size in sizes) or next(module.children(), None) is not None:
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return True
    # torch's own `dequantize` is on every tensor; a quantised subclass brings one of its own
    own = type(weight).dequantize is not Tensor.dequantize
    return own or not weight.is_floating_point() or weight.dtype.itemsize == 1


def plain_twins(module: nn.Module, dtype: torch.dtype | None = None) -> dict[int, nn.Linear]:
    """Plain layers for the quantised ones in a module, by their `id`; adapters (LoRA) on them are merged in.

    Args:
        module: Any module.
        dtype: What the model computes in. Default: what the layers say of themselves.
    """
    out: dict[int, nn.Linear] = {}
    inside: set[int] = set()
    for part in module.modules():
        if hasattr(part, "get_base_layer") and is_quantised(part.get_base_layer()):  # type: ignore[operator]
            inside.add(id(part.get_base_layer()))  # type: ignore[operator]
            out[id(part)] = plain_linear(part, dtype)
        elif is_quantised(part) and id(part) not in inside:
            out[id(part)] = plain_linear(part, dtype)
    return out


def plain_linear(module: Any, dtype: torch.dtype | None = None) -> nn.Linear:
    """A plain linear layer with the dequantised weight (and the bias) of a quantised one, on its device.

    torchao tensors and bitsandbytes layers are dequantised by their own functions; from any other kind the weight is
    read off the layer's outputs for unit vectors.

    Args:
        module: A layer for which `is_quantised` holds, or an adapter (LoRA) around one.
        dtype: What the model computes in. Default: what the layer says of itself.

    Raises:
        UnsupportedModelError: The layer can't be run where it is, so its weight can't be read.
    """
    bias = getattr(module, "bias", None)
    with torch.no_grad():
        weight = _dequantised(module)
        if weight is None:
            weight, bias = _read_off(module, dtype)
    dtype = dtype or _compute_dtype(module, weight)
    if list(weight.shape) != [module.out_features, module.in_features]:
        raise UnsupportedModelError(
            f"{type(module).__name__}: its dequantised weight must be [{module.out_features}, {module.in_features}], "
            f"got {list(weight.shape)}; pass a model whose K/V projections are plain or of another quantisation"
        )
    plain = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.detach().to(dtype, copy=True).contiguous())
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
    return plain.train(module.training)


def _compute_dtype(module: Any, weight: Tensor) -> torch.dtype:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    for dtype in (getattr(state, "dtype", None), getattr(getattr(module, "bias", None), "dtype", None)):
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    return weight.dtype


def _dequantised(module: Any) -> Tensor | None:
    """The weight by the quantiser's own function, or None if it has none that we know."""
    if hasattr(module, "get_base_layer"):
        return None  # an adapter: what it adds to the weight shows in its outputs
    weight = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        if getattr(weight.quant_state, "packing_format_for_cpu", False):  # type: ignore[union-attr]
            return (
                None  # its first call on a CPU reordered it for the kernel, and `dequantize_4bit` can't tell
            )
        functional = importlib.import_module("bitsandbytes.functional")
        return functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return, union-attr]
    if kind == "Int8Params":
        # the layer's first call moves the scales from the weight to its state
        scales = weight.SCB if weight.SCB is not None else module.state.SCB  # type: ignore[union-attr]
        functional = importlib.import_module("bitsandbytes.functional")
        return functional.int8_vectorwise_dequant(weight.data, scales)  # type: ignore[no-any-return, union-attr]
    if isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize()
    return None


def _read_off(module: Any, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of any affine layer, from its outputs for zero and for every unit vector."""
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if dtype is None:
        floating = (t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1)
        dtype = next(floating, torch.get_default_dtype())
    width = module.in_features
    modes = {m: m.training for m in module.modules()}
    try:
        module.eval()  # no dropout
        zero = module(torch.zeros(1, width, device=device, dtype=dtype))
        columns = [
            module(torch.eye(width, device=device, dtype=dtype)[start : start + _CHUNK]) - zero
            for start in range(0, width, _CHUNK)
        ]
    except (RuntimeError, ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{type(module).__name__}: its quantised weight can't be read on {device} ({error}); move the model to "
            "the device that its kernels run on before wrapping it"
        ) from error
    finally:
        for part, mode in modes.items():
            part.training = mode
    return torch.cat(columns).T, zero[0] if getattr(module, "bias", None) is not None else None
