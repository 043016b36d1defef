"""The wrapped model's class: `forward` and `generate` that find, begin or continue a request."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from ..errors import StreamError
from .binding import FlexBinding
from .checkpoint import load_adapter_weights, save_adapter_weights
from .coarse_embeds import with_coarse_embeds
from .context import FlexContext
from .dry_run import text_decoder
from .kv_cache import cache_among, cache_of
from .pickling import reduce_wrapped
from .roundabout import injecting, roundabout
from .saving import saving_methods
from .state import FlexRequest
from .state_names import loading_methods
from .static import project_all, running, static_step
from .teaching import Teaching
from .training_checks import check_reentrant_inputs, no_media, trains_together

ON_CACHE = "_flexcore_request"
NEW_ARGUMENTS = ("flex_streams", "readout_mask", "alpha")


@functools.cache
def wrapped_class(base: Any) -> type:
    """A subclass whose `forward`, `prepare_inputs_for_generation` and `generate` also take the media.

    It keeps the base's name, and shows the base's signatures plus the new arguments, because `generate` and
    `Trainer` decide by signature what they may pass.
    """
    names = list(inspect.signature(base.forward).parameters)[1:]
    own_generate = hasattr(base, "generate") and base.generate is not GenerationMixin.generate
    inputs = list(inspect.signature(base.generate).parameters)[1:] if hasattr(base, "generate") else []

    def forward(
        self: Any,
        *args: Any,
        flex_streams: Any = None,
        readout_mask: Tensor | None = None,
        alpha: float | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        cache = cache_among(kwargs)
        if "_flex_binding" not in self.__dict__:
            # unwrapped since, but something that was put around the model's `forward` still calls this one
            return base.forward(self, *args, **kwargs)
        if alpha is not None and not isinstance(alpha, Tensor):
            alpha = float(alpha)  # a warm-up's alpha is an object that knows the step
        if self._flex_binding.config.static:
            request = getattr(cache, ON_CACHE, None) if flex_streams is None else flex_streams
            step = None if args else static_step(self._flex_binding, request, kwargs, alpha)
            if step is not None:
                with running(self._flex_binding):
                    return base.forward(self, **kwargs, flex_streams=step)
        together = flex_streams is None and trains_together(self.flex_fine.live())
        if (
            flex_streams is None
            and (cache is None or not hasattr(cache, ON_CACHE))
            and not args
            and not together
        ):
            return base.forward(self, **kwargs)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if together and not hasattr(cache_among(kwargs), ON_CACHE):
            flex_streams = no_media(kwargs)
        binding: FlexBinding = self._flex_binding.follow(self)
        with binding.running():
            context = _context(binding, kwargs, flex_streams, readout_mask, alpha)
            kwargs = with_coarse_embeds(self, kwargs, context)
            if context is None:
                return base.forward(self, **kwargs)
            context.teaching = Teaching.of(self, kwargs)
            if binding.ear is None and not binding.carried:
                out = base.forward(self, **kwargs, flex_streams=context)
            else:
                out = roundabout(self, binding, context, functools.partial(base.forward, self, **kwargs))
            if not context.attended:
                raise StreamError(
                    f"flex_streams didn't reach the layers of {base.__name__}: its forward drops keyword arguments on "
                    "the way to the text decoder"
                )
            if context.reentrant:
                check_reentrant_inputs(self, kwargs)
            if binding.config.static:
                project_all(context)
            _ride_on_cache(out, context.request)
            if context.teaching is not None:
                out = context.teaching.added(out, context.reentrant)
        return out

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.prepare_inputs_for_generation(self, *args, **kwargs)

    def generate(
        self: Any, *args: Any, flex_streams: Any = None, readout_mask: Any = None, **kwargs: Any
    ) -> Any:
        binding: FlexBinding = self._flex_binding.follow(self)
        with binding.running():
            named = {**dict(zip(inputs, args, strict=False)), **kwargs}
            request = _generation_request(binding, named, flex_streams, readout_mask)
            if request is None:
                return base.generate(self, *args, **kwargs)
            if own_generate and binding.ear is None and not binding.carried:
                begin = functools.partial(_context, binding, given=request, readout_mask=None, alpha=None)
                with injecting(text_decoder(self), begin):
                    return base.generate(self, *args, **kwargs)
            return base.generate(self, *args, **{**kwargs, "flex_streams": request})

    def _get_candidate_generator(self: Any, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # an assistant model drafts without media: it may be plain, and has no fine tokens of our width
        own = {k: v for k, v in model_kwargs.items() if k not in NEW_ARGUMENTS}
        return base._get_candidate_generator(self, *args, model_kwargs=own, **kwargs)

    body: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_flex_base": base,
        "forward": _signed(forward, base.forward, NEW_ARGUMENTS),
        "save_adapter_weights": save_adapter_weights,
        "load_adapter_weights": load_adapter_weights,
        "__reduce_ex__": reduce_wrapped,
        **saving_methods(base),
        **loading_methods(base),
    }
    if hasattr(base, "generate"):
        body["prepare_inputs_for_generation"] = _signed(
            prepare_inputs_for_generation, base.prepare_inputs_for_generation, NEW_ARGUMENTS[:1]
        )
        body["generate"] = _signed(generate, base.generate, NEW_ARGUMENTS[:2])
        body["_get_candidate_generator"] = _get_candidate_generator
    return type(base.__name__, (base,), body)


def _signed(function: Any, base: Any, added: tuple[str, ...]) -> Any:
    """`function` with the base's signature and docstring plus keyword arguments of ours."""
    signature = inspect.signature(base)
    parameters = list(signature.parameters.values())
    tail = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    new = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in added]
    function.__signature__ = signature.replace(
        parameters=[*parameters[: len(parameters) - len(tail)], *new, *tail]
    )
    function.__doc__ = base.__doc__
    return function


def _length(kwargs: dict[str, Any]) -> tuple[int, int]:
    """Batch and tokens of the inputs of a forward; of an encoder-decoder model, of its decoder."""
    for name in ("decoder_inputs_embeds", "decoder_input_ids", "inputs_embeds", "input_ids"):
        if kwargs.get(name) is not None:
            return kwargs[name].shape[0], kwargs[name].shape[1]
    raise StreamError("input_ids or inputs_embeds must be given when flex_streams is")


def _past(binding: FlexBinding, cache: Any) -> int:
    # asked of a layer that keeps every token: in hybrid models the first layer may not count them
    return 0 if cache is None else int(cache.get_seq_length(binding.counting))


@torch.compiler.disable
def _context(
    binding: FlexBinding, kwargs: dict[str, Any], given: Any, readout_mask: Tensor | None, alpha: Any
) -> FlexContext | None:
    """The state of one forward pass, with its request found, continued or begun; None if there are no media."""
    cache = cache_among(kwargs)
    past = _past(binding, cache)
    request = getattr(cache, ON_CACHE, None)
    if request is not None and not past:
        delattr(cache, ON_CACHE)  # the cache was reset: what rode on it belongs to another text
        request = None
    if binding.crosses and kwargs.get("labels") is not None and "decoder_input_ids" not in kwargs:
        kwargs = {**kwargs, "decoder_input_ids": kwargs["labels"]}  # the model shifts them into its inputs
    batch, length = _length(kwargs) if given is not None or request is not None else (0, 0)
    if isinstance(given, FlexRequest):
        request = given
    elif given is not None:
        binding.check_streams(given)
        _check(given, batch, None if binding.crosses else past + length)
        if request is None:
            request = binding.new_request(given)
        else:
            request.adopt(given, past)
    if request is None:
        return None
    if not isinstance(given, FlexRequest) or request.prefix is None:
        labels = kwargs.get("labels")
        readout_mask = request.explicit if readout_mask is None else readout_mask
        if labels is not None and readout_mask is None:
            readout_mask = labels.cpu() != -100  # a decoder's inputs are its labels, already shifted
            if not binding.crosses:
                readout_mask = torch.nn.functional.pad(readout_mask[:, 1:], (0, 1))
        if given is not None or readout_mask is not None or request.prefix is None:
            padding = kwargs.get("decoder_attention_mask" if binding.crosses else "attention_mask")
            request.begin_turn(past + length, past, binding.config.readout, padding, readout_mask)
    version = binding.weights_version()
    if request.weights != version:
        request.kv.clear()
        request.static = None
        request.weights = version
    if cache is not None:
        setattr(cache, ON_CACHE, request)
    return FlexContext(binding, request, past, length, batch, 1.0 if alpha is None else alpha)


def _check(streams: Any, batch: int, length: int | None) -> None:
    """Raise StreamError unless the media fit a batch of this shape; a length of None isn't known yet."""
    if not len(streams) or batch % len(streams):
        raise StreamError(
            f"flex_streams must hold one entry per sample of the batch ({batch}), got {len(streams)}"
        )
    for i, sample in enumerate(streams.samples):
        for j, stream in enumerate(sample):
            if stream.coarse_positions is None:
                raise StreamError(
                    f"flex_streams sample {i}, medium {j}: coarse_positions must be set, see stream.at"
                )
            if length is not None and int(stream.coarse_positions.max()) >= length:
                raise StreamError(
                    f"flex_streams sample {i}, medium {j}: coarse_positions must lie in the sequence of {length} "
                    f"tokens, got {int(stream.coarse_positions.max())}"
                )


def _generation_request(
    binding: FlexBinding, kwargs: dict[str, Any], given: Any, readout_mask: Any
) -> FlexRequest | None:
    """The request that a `generate` call begins or continues; it knows where the prompt ends."""
    cache = cache_among(kwargs)
    past = _past(binding, cache)
    request = getattr(cache, ON_CACHE, None) if past else None
    if given is None and request is None:
        return None
    if isinstance(given, FlexRequest):
        return given
    if binding.crosses:
        # where the decoder's prompt ends is known when it first runs; `generate` may write that prompt itself
        request = binding.new_request(given)
        request.explicit = readout_mask
        return request
    inputs = kwargs.get("inputs")
    batch, length = _length({"input_ids": inputs, **kwargs} if inputs is not None else kwargs)
    attention_mask = kwargs.get("attention_mask")
    if attention_mask is not None and attention_mask.ndim == 2:
        length = max(length, attention_mask.shape[1])  # a later turn may pass its new tokens only
    if given is not None:
        binding.check_streams(given)
        _check(given, batch, length)
    if request is None:
        request = binding.new_request(given)
    elif given is not None:
        request.adopt(given, past)
    request.begin_turn(length, past, binding.config.readout, attention_mask, readout_mask)
    return request


def _ride_on_cache(out: Any, request: FlexRequest) -> None:
    """Attach the request to the KV cache that a forward made, for the steps and turns to come."""
    cache = cache_of(out)
    if cache is not None:
        setattr(cache, ON_CACHE, request)
