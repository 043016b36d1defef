"""The dry run of `wrap`: a few tokens through the model, to see how its layers attend and which of them can read.

Nothing is known about any family here. A model runs once as it is and once with our attention function in the place
of its own, and what differs, or what a layer's attention does that fine tokens can't take part in, decides.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import UnsupportedModelError
from .interface import CARRIED, Probe, TransparentName, registered_name
from .offload import execution_device
from .probes import Findings, findings
from .site import arguments

LENGTH, PADDED, ENCODED = 12, 3, 7
NAME_ASKED = re.compile(r"_attn_implementation\s*(?:==|!=|in\b|not\s+in\b)([^\n:]*)")


class _Operations(TorchDispatchMode):
    """Which tensor operations a model runs, and the shapes they make."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.append((func, *(tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor))))
        return out


class Watch:
    """What the modules of a decoder were called with, and which module made a tensor."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._made_by: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
        self._alive: list[Tensor] = []  # an id is only good while its tensor lives

    def maker(self, tensor: Any) -> tuple[nn.Module | None, dict[str, Any]]:
        """The innermost module that returned this very tensor, and what it was called with (it may run twice)."""
        return self._made_by.get(id(tensor), (None, {}))

    @contextmanager
    def on(self, decoder: nn.Module) -> Iterator[None]:
        """Watch the modules of `decoder`."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls[module] = (args, dict(kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            for t in tree_leaves(out):
                if isinstance(t, Tensor) and id(t) not in self._made_by:
                    self._made_by[id(t)] = (module, arguments(module, args, kwargs))
                    self._alive.append(t)

        handles = []
        try:
            for module in decoder.modules():
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Trial:
    """Two rows of random tokens, one left-padded, for a model or, if it can't do without media, its decoder."""

    def __init__(self, model: nn.Module, decoder: nn.Module):
        self.model, self.decoder = model, decoder
        embed = decoder.get_input_embeddings()  # type: ignore[operator]
        device = execution_device(embed)
        if device.type == "meta":
            raise UnsupportedModelError(
                "the model's weights are on the meta device; load them before wrapping"
            )
        self.mask = torch.ones(2, LENGTH, dtype=torch.long, device=device)
        self.mask[1, :PADDED] = 0
        generator = torch.Generator().manual_seed(0)
        vocabulary = embed.weight.shape[0]
        special = _special_tokens(model.config.to_dict())  # type: ignore[union-attr,operator]
        ordinary = torch.tensor([t for t in range(min(vocabulary, 4096)) if t not in special] or [0])
        picks = torch.randint(len(ordinary), (2, LENGTH), generator=generator)
        self.ids = ordinary[picks].to(device)
        width = getattr(decoder.config, "hidden_size", embed.weight.shape[1])
        embeds = torch.randn(2, LENGTH, width, generator=generator)
        self.embeds = embeds.to(device, embed.weight.dtype)
        self.top = model is not decoder
        # an encoder-decoder model: what its encoder would hand over
        self.encoded: Tensor | None = None
        if getattr(model.config, "is_encoder_decoder", False):
            self.top = False
            encoded = torch.randn(2, ENCODED, width, generator=generator)
            self.encoded = encoded.to(device, embed.weight.dtype)

    def run(self, **kwargs: Any) -> tuple[list[Tensor], list[Any]]:
        """The floating-point outputs of a forward pass, and the operations that it ran."""
        with torch.no_grad(), _Operations() as operations:
            common = {"attention_mask": self.mask, "use_cache": False, **kwargs}
            if self.encoded is not None:
                common["encoder_hidden_states"] = self.encoded
            if self.top:
                out = self.model(input_ids=self.ids, **common)
            else:
                out = self.decoder(inputs_embeds=self.embeds, **common)
        values = list(out.values()) if hasattr(out, "values") else out
        return [t for t in tree_leaves(values) if isinstance(t, Tensor)], operations.seen


def text_decoder(model: Any) -> Any:
    """The text decoder of a model.

    Raises:
        UnsupportedModelError: It has none.
    """
    for found in (model.get_decoder(), getattr(model, "base_model", None)):
        # some models keep their output layer where others keep the decoder
        if hasattr(found, "set_attn_implementation") and hasattr(found, "get_input_embeddings"):
            return found
    raise UnsupportedModelError(
        f"{type(model).__name__} has no text decoder; use a model that generates text"
    )


def explore(model: nn.Module, decoder: nn.Module, name: str, base: str) -> Findings:
    """Try a model with our attention function, and leave that function switched on.

    Args:
        model: The whole model.
        decoder: Its text decoder.
        name: The model's class's name, for messages.
        base: The attention backend that the decoder uses.

    Raises:
        UnsupportedModelError: The model can't work. The attention implementation is left switched: undo it.
    """
    modes = {m: m.training for m in model.modules()}
    try:
        for module in modes:
            module.training = False
        # a refusal for want of dispatch comes before anything runs: some models rewrite weights on their first run
        own = _switch(decoder, registered_name(base), base, name)
        _use(decoder, own, base)
        trial = _Trial(model, decoder)
        plain = _reference(trial, name)
        # where modeling code asks for the name, it may do so to decide whether to dispatch at all
        for carried, disguised in ((False, True), (False, False), (True, True), (True, False)):
            if not disguised:
                if not isinstance(own, TransparentName):
                    continue  # it went by its plain name just now
                _use(decoder, own, base)
            own = _switch(decoder, registered_name(base, carried), base, name, disguised)
            probe, watch = Probe(), Watch()
            token = CARRIED.set(probe)
            try:
                with watch.on(decoder):
                    ours = trial.run(**({} if carried else {"flex_streams": probe}))
            except TypeError:
                if carried:
                    raise
                continue  # a signature without room for our keyword
            finally:
                CARRIED.reset(token)
            if probe.calls:
                break
        if not probe.calls:
            raise UnsupportedModelError(
                f"{name}: its layers' attention doesn't go through transformers' attention interface, so there is "
                "nowhere to read fine tokens; use a model whose attention does"
            )
        if not _same(plain, ours):
            # tables and buffers that a first run leaves behind (rotary ones do) must not count: once more, in turn
            given: dict[str, Any] = {} if carried else {"flex_streams": Probe()}
            _use(decoder, own, base)
            plain = trial.run()
            _use(decoder, base, own)
            token = CARRIED.set(Probe())
            try:
                ours = trial.run(**given)
            finally:
                CARRIED.reset(token)
            if not _same(plain, ours):
                raise UnsupportedModelError(
                    f"{name}: computes something else when its attention function goes by another name, so it "
                    "wouldn't be the same model without media; use another model, or another attn_implementation"
                )
        counts = Counter(id(call.module) for call in probe.calls)
        if max(counts.values()) > 1:
            raise UnsupportedModelError(
                f"{name}: its attention modules call the attention function {max(counts.values())} times in a "
                "forward pass, and fine tokens would need keys and values for each call; use another model"
            )
        with torch.no_grad():
            return findings(decoder, probe, watch, name, own, carried, trial.encoded)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _reference(trial: _Trial, name: str) -> tuple[list[Tensor], list[Any]]:
    """The run of the model as it is; decides whether the whole model or only its decoder can be tried."""
    if trial.top:
        try:
            return trial.run()
        except Exception:  # some models can't do without their media
            trial.top = False
    try:
        return trial.run()
    except Exception as error:
        raise UnsupportedModelError(
            f"{name}: its decoder doesn't run on {LENGTH} embeddings and a padding mask ({error}), so it can't be "
            "tried; use a decoder-only model"
        ) from error


def _switch(decoder: nn.Module, own: str, base: str, name: str, disguised: bool = True) -> str:
    """Set our attention function on the decoder; returns the name it goes by.

    Args:
        decoder: The decoder.
        own: The name that our function is registered under.
        base: The name of the base backend.
        name: The model's class's name, for messages.
        disguised: Pass for the base where modeling code asks for its name.
    """
    decoder.set_attn_implementation(own)  # type: ignore[operator]
    config: Any = decoder.config
    if config._attn_implementation != own:
        raise UnsupportedModelError(
            f"{name} has attention code of its own that doesn't dispatch through transformers' attention "
            "interface; use a model class whose attention does"
        )
    if disguised and _asks_for_the_name(decoder, base):
        _use(decoder, own, own := TransparentName(own, base))
    return own


def _asks_for_the_name(decoder: nn.Module, base: str) -> bool:
    """Whether the modeling code compares the implementation's name with the base's, or with what can't be read off."""
    sources = {type(m).__module__ for m in decoder.modules()}
    for source in sources:
        path = getattr(sys.modules.get(source), "__file__", None)
        if not path or source.startswith("torch."):
            continue
        with open(path, encoding="utf-8", errors="ignore") as file:
            for with_what in NAME_ASKED.findall(file.read()):
                literals = re.findall(r"[\"']([^\"']*)[\"']", with_what)
                if base in literals or not literals:
                    return True
    return False


def _same(plain: tuple[list[Tensor], list[Any]], ours: tuple[list[Tensor], list[Any]]) -> bool:
    """Whether two runs ran the same operations to the same bits."""
    return (
        len(plain[0]) == len(ours[0])
        and all(
            a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
            for a, b in zip(plain[0], ours[0], strict=True)
        )
        and plain[1] == ours[1]
    )


def _use(decoder: nn.Module, before: str, after: str) -> None:
    """Rename the attention implementation in every config of the decoder that has it."""
    for config in {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}.values():
        if getattr(config, "_attn_implementation_internal", None) == str(before):
            config._attn_implementation_internal = after  # type: ignore[union-attr]


def _special_tokens(config: Any) -> set[int]:
    """Every token id that a config mentions: placeholders of media among them."""
    out: set[int] = set()
    if isinstance(config, dict):
        for key, value in config.items():
            if isinstance(value, dict):
                out |= _special_tokens(value)
            elif "token" in str(key):
                found = value if isinstance(value, list | tuple) else [value]
                out |= {v for v in found if isinstance(v, int) and not isinstance(v, bool)}
    return out
