"""Cost: the FLOPs and bytes of a decoder that reads fine tokens, beside coarse-only and dense high resolution.

Conventions, the same for every function: a multiply-add is 2 FLOPs; only matrix products count (norms, rotary
tables, softmax and activations are well under 1 %); causal attention counts half of the square; the language
model's head runs on one row. What makes the features (vision tower, projector) is not part of the decoder and not
counted here: `flexcore.hf.cost` measures it, and `flexcore.roofline` turns FLOPs and bytes into time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

MULTIPLY_ADD = 2


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder-only language model that its cost follows from.

    Args:
        layers: Decoder layers.
        hidden: Width of the residual stream, and of the fine features.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Width of one head.
        intermediate: Width of the MLP.
        vocab: Rows of the output head.
        mlp_matrices: 3 for a gated MLP (gate, up, down), 2 for a plain one.
        reading: Layers that read fine tokens, rising; `model.flex_config.layers` of a wrapped model.
        value_dim: Width of one head's values, where it isn't `head_dim`; 0 if it is.
        windows: How far back each layer sees: None to the beginning, 0 for a layer without attention. Empty: every
            layer sees everything.
        active_params: Weights that one token passes through in all layers together, where they don't follow from
            the sizes above (mixtures of experts, latent attention, hybrid layers).
        fine_params: Weights of one reading layer's fine projections, where they don't.
        cache_width: Numbers that one layer caches of a token of the sequence, where it isn't key and value: latent
            attention may cache what it makes both from.
        cached_params: Weights that every cached token passes through anew in each step, in all layers: what it then
            takes to make both.

    Raises:
        ValueError: A size is not positive, heads don't divide, or a reading layer is outside the model.

    >>> DecoderShape(2, 64, 4, 2, 16, 128, 100, reading=(1,)).params_per_layer
    36864
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    mlp_matrices: int = 3
    reading: tuple[int, ...] = ()
    value_dim: int = 0
    windows: tuple[int | None, ...] = ()
    active_params: int | None = None
    fine_params: int | None = None
    cache_width: int | None = None
    cached_params: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reading", tuple(self.reading))
        object.__setattr__(self, "windows", tuple(self.windows))
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("reading", "windows") or (value is None and f.default is None):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{f.name} must be an integer >= 1, got {value!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads={self.heads}, got {self.kv_heads}")
        if self.mlp_matrices not in (2, 3):
            raise ValueError(f"mlp_matrices must be 3 (gated) or 2 (plain), got {self.mlp_matrices}")
        if list(self.reading) != sorted(set(self.reading)):
            raise ValueError(f"reading must rise without repeats, got {self.reading}")
        if self.reading and not 0 <= self.reading[0] <= self.reading[-1] < self.layers:
            raise ValueError(f"reading must lie in [0, {self.layers}), got {self.reading}")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(
                f"windows must hold one entry per layer ({self.layers}), got {len(self.windows)}"
            )
        for i, window in enumerate(self.windows):
            if window is not None:
                _count(f"windows[{i}]", window)

    @classmethod
    def from_config(cls, config: Any, reading: Sequence[int] = (), mlp_matrices: int = 3) -> DecoderShape:
        """Read the sizes off a Hugging Face config; of a composite one, off its `text_config`.

        Args:
            config: Any object with the usual names (`hidden_size`, `num_attention_heads`, ...).
            reading: Layers that read fine tokens.
            mlp_matrices: 3 for a gated MLP, 2 for a plain one; configs don't say.

        Raises:
            ValueError: A size is missing, or the MLP is a mixture of experts.
        """
        text = getattr(config, "text_config", None) or config
        for name in ("num_local_experts", "num_experts", "n_routed_experts"):
            if (getattr(text, name, None) or 0) > 1:
                raise ValueError(
                    f"{name}={getattr(text, name)}: a mixture of experts is not covered here; "
                    "flexcore.hf.cost.measure(config) finds out what one token uses, or build a DecoderShape whose "
                    "intermediate is that width"
                )

        def size(*names: str, default: int | None = None) -> int:
            found = next((value for n in names if (value := getattr(text, n, None)) is not None), default)
            if found is None:
                raise ValueError(f"{type(text).__name__} must have one of {', '.join(names)}, it has none")
            return int(found)

        hidden = size("hidden_size", "n_embd", "d_model")
        heads = size("num_attention_heads", "n_head", "num_heads")
        return cls(
            layers=size("num_hidden_layers", "n_layer", "num_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=size("num_key_value_heads", default=heads),
            head_dim=size("head_dim", default=hidden // heads),
            intermediate=size("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden),
            vocab=size("vocab_size"),
            mlp_matrices=mlp_matrices,
            reading=tuple(reading),
        )

    @property
    def params_per_layer(self) -> int:
        """Weights of one layer's matrices: q and o, k and v, and the MLP."""
        attention = 2 * self.hidden * self.heads * self.head_dim + self.fine_params_per_layer
        return attention + self.mlp_matrices * self.hidden * self.intermediate

    @property
    def params(self) -> int:
        """Weights that one token passes through in all layers."""
        return self.layers * self.params_per_layer if self.active_params is None else self.active_params

    @property
    def fine_params_per_layer(self) -> int:
        """Weights of one layer's key and value projection, the fine ones alike."""
        return self.hidden * self.kv_width if self.fine_params is None else self.fine_params

    @property
    def kv_width(self) -> int:
        """Numbers that one token's key and value are, in one layer."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def pair_flops(self) -> int:
        """FLOPs of one query row and one key, over the heads: q k and p v."""
        return MULTIPLY_ADD * self.heads * (self.head_dim + self.value_dim)

    def seen(self, context: int) -> int:
        """Keys that a row sees among the last `context` tokens, summed over layers."""
        windows = self.windows or (None,) * self.layers
        return sum(context if w is None else min(context, w) for w in windows)

    def kept(self, tokens: int) -> int:
        """Tokens whose K/V stay in memory, summed over layers: a window needs those before the next row alone."""
        windows = self.windows or (None,) * self.layers
        return sum(tokens if w is None else min(tokens, max(w - 1, 0)) for w in windows)

    @property
    def readout_layers(self) -> int:
        """Layers that work out readout logits: those that read, and the one that selects for the first of them."""
        return len(self.reading) + 1 if self.reading else 0


@dataclass(frozen=True)
class Cost:
    """FLOPs of one forward pass, by part; `total` sums them.

    Args:
        linear: All the layers' projections and MLPs, on the tokens in the sequence.
        attention: The sequence's attention to itself, both products.
        lm_head: The output head, on one row.
        fine_projection: Fine K/V of the fine tokens that were not cached yet.
        readout_logits: The readout rows' logits over the sequence, worked out a second time.
        fine_attention: The readout rows' attention to fine K/V, both products.
    """

    linear: int
    attention: int
    lm_head: int
    fine_projection: int = 0
    readout_logits: int = 0
    fine_attention: int = 0

    @property
    def total(self) -> int:
        """FLOPs in all."""
        return sum(getattr(self, f.name) for f in fields(self))


def coarse_prefill(shape: DecoderShape, n_text: int, n_coarse: int) -> Cost:
    """Prefill with text and coarse tokens only: what the model does without flexcore.

    Args:
        shape: The decoder.
        n_text: Text tokens.
        n_coarse: Coarse tokens.

    Raises:
        ValueError: A count is negative.
    """
    return _sequence(shape, _count("n_text", n_text) + _count("n_coarse", n_coarse))


def dense_prefill(shape: DecoderShape, n_text: int, n_coarse: int, n_fine: int) -> Cost:
    """Prefill with text, coarse and all fine tokens in the sequence: dense high resolution.

    Args:
        shape: The decoder.
        n_text: Text tokens.
        n_coarse: Coarse tokens.
        n_fine: Fine tokens.

    Raises:
        ValueError: A count is negative.
    """
    return _sequence(
        shape, _count("n_text", n_text) + _count("n_coarse", n_coarse) + _count("n_fine", n_fine)
    )


def flex_prefill(
    shape: DecoderShape,
    n_text: int,
    n_coarse: int,
    fine_projected: int | Sequence[int],
    fine_read: int | Sequence[int] | None = None,
    rows: int = 1,
) -> Cost:
    """Prefill with text and coarse tokens, while `rows` readout rows read fine tokens in the reading layers.

    Args:
        shape: The decoder, with its reading layers.
        n_text: Text tokens.
        n_coarse: Coarse tokens.
        fine_projected: Fine tokens of the distinct regions that were projected: one number for every reading
            layer, or one per reading layer.
        fine_read: Fine tokens read, summed over the readout rows, likewise; None: each row reads all of
            `fine_projected`.
        rows: Readout rows.

    Raises:
        ValueError: A count is negative, or there isn't one per reading layer.
    """
    plain = coarse_prefill(shape, n_text, n_coarse)
    projected = _per_layer("fine_projected", fine_projected, shape)
    read = (
        _per_layer("fine_read", fine_read, shape)
        if fine_read is not None
        else _count("rows", rows) * projected
    )
    return _with_fine(shape, plain, n_text + n_coarse, projected, read, rows)


def decode(
    shape: DecoderShape,
    context: int,
    fine_read: int | Sequence[int] | None = None,
    fine_projected: int | Sequence[int] = 0,
) -> Cost:
    """One step of generation: one row, with the K/V of the sequence cached.

    Args:
        shape: The decoder, with its reading layers.
        context: Tokens that the row attends to in the sequence.
        fine_read: Fine tokens read: one number for every reading layer, or one per reading layer; None is the
            model without flexcore.
        fine_projected: Those of them whose K/V is not cached, likewise. The official code projects all that it
            reads at every step; here it is what no earlier row has read.

    Raises:
        ValueError: A count is negative, or there isn't one per reading layer.
    """
    plain = Cost(
        linear=MULTIPLY_ADD * (shape.params + (shape.cached_params or 0) * max(context - 1, 0)),
        attention=shape.seen(_count("context", context)) * shape.pair_flops,
        lm_head=MULTIPLY_ADD * shape.hidden * shape.vocab,
    )
    if fine_read is None:
        return plain
    read = _per_layer("fine_read", fine_read, shape)
    projected = _per_layer("fine_projected", fine_projected, shape)
    return _with_fine(shape, plain, context, projected, read, 1)


def kv_bytes(
    shape: DecoderShape, tokens: int | Sequence[int], layers: int | None = None, itemsize: int = 2
) -> int:
    """Bytes that keys and values take in memory.

    Args:
        shape: The decoder.
        tokens: Tokens held per layer, or one number per reading layer.
        layers: Layers that hold `tokens` each; default all of them, as far as their windows go. Only for a single
            number.
        itemsize: Bytes of one number: 2 for float16 and bfloat16.

    Raises:
        ValueError: A count is negative, or there isn't one per reading layer.
    """
    if isinstance(tokens, int):
        n = _count("tokens", tokens)
        if layers is None:
            return shape.kept(n) * (shape.cache_width or shape.kv_width) * itemsize
        held = n * _count("layers", layers)
    else:
        held = _per_layer("tokens", tokens, shape)
    return held * shape.kv_width * itemsize


def _sequence(shape: DecoderShape, n: int) -> Cost:
    # twice the pairs in a layer: causality leaves half of a square, and a window the half of its own last one too
    pairs = sum(
        n * n if window is None or window >= n else window * (2 * n - window)
        for window in shape.windows or (None,) * shape.layers
    )
    return Cost(
        linear=MULTIPLY_ADD * shape.params * n,
        attention=pairs * shape.pair_flops // 2,
        lm_head=MULTIPLY_ADD * shape.hidden * shape.vocab if n else 0,
    )


def _with_fine(shape: DecoderShape, plain: Cost, context: int, projected: int, read: int, rows: int) -> Cost:
    return Cost(
        plain.linear,
        plain.attention,
        plain.lm_head,
        fine_projection=MULTIPLY_ADD * shape.fine_params_per_layer * projected,
        readout_logits=MULTIPLY_ADD
        * (shape.readout_layers * _count("rows", rows) * context * shape.heads * shape.head_dim),
        fine_attention=read * shape.pair_flops,
    )


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    return value


def _per_layer(name: str, tokens: int | Sequence[int], shape: DecoderShape) -> int:
    """The sum over reading layers of what is one number for all of them or one for each."""
    if isinstance(tokens, int):
        return _count(name, tokens) * len(shape.reading)
    if len(tokens) != len(shape.reading):
        raise ValueError(
            f"{name} must hold one number per reading layer ({len(shape.reading)}), got {len(tokens)}"
        )
    return sum(_count(f"{name}[{i}]", int(value)) for i, value in enumerate(tokens))
