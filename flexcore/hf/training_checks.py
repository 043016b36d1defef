"""What training asks of a forward pass: no fine gradient may be lost, and no rank may leave a parameter out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sources import FineSource, TensorSource
from ..streams import StreamBatch
from .fine_projections import FineProjections
from .offload import execution_device


def trains_together(fine: FineProjections) -> bool:
    """Whether several processes train fine projections now, and so must all reach the same parameters and layers.

    A process whose batch has no media then lets every reading layer's output depend on that layer's fine projections
    by a zero: gradients are exchanged parameter by parameter (DDP) and layer by layer (FSDP), and the others wait.
    """
    distributed = torch.distributed
    return (
        torch.is_grad_enabled()
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
        and any(p.requires_grad for p in fine.parameters())
    )


def no_media(inputs: dict[str, Any]) -> StreamBatch:
    """A batch of text-only samples, as many as the inputs hold."""
    given = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "labels"))
    return StreamBatch(((),) * len(next(t for t in given if t is not None)))


def check_reentrant_features(source: FineSource, regions: Tensor) -> None:
    """Refuse trainable fine features under reentrant checkpointing, which would lose or corrupt their gradients.

    Every checkpointed layer runs a backward pass of its own there, and what the layers share (a projector in front of
    the features) would be gone after the first.

    Raises:
        ValueError: The features require grad and aren't leaf tensors.
    """
    if isinstance(source, TensorSource):
        trainable = source.tensor.requires_grad and not source.tensor.is_leaf
    else:
        with torch.enable_grad():
            trainable = source.features(regions).requires_grad
    if trainable:
        raise ValueError(
            "use_reentrant must be False for gradient checkpointing when the fine features themselves are trained "
            "(they require grad), got True"
        )


def check_reentrant_inputs(model: Any, inputs: dict[str, Any]) -> None:
    """Refuse reentrant checkpointing of layers whose inputs don't require grad: their fine gradients would be lost.

    Raises:
        ValueError: There are trainable fine parameters, and the decoder's inputs don't require grad.
    """
    if not any(p.requires_grad for p in model.flex_fine.live().parameters()):
        return
    given = inputs.get("inputs_embeds")
    if given is None:
        embed = model.get_input_embeddings()
        given = embed(torch.zeros(1, 1, dtype=torch.long, device=execution_device(embed)))
    if not given.requires_grad:
        raise ValueError(
            "use_reentrant must be False for gradient checkpointing when the input embeddings don't require grad, "
            "got True: the fine projections would get no gradients; or call model.enable_input_require_grads()"
        )
