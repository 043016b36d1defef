"""Which image adapter a model takes: `ImageAdapter(model, ...)` makes the one for the model's kind."""

from __future__ import annotations

from typing import Any

from flexcore.errors import UnsupportedModelError

from .anyres_tower import is_anyres

KINDS = (
    "models with a vision tower of one fixed square size and a projector (LLaVA), AnyRes models (LLaVA-NeXT, "
    "LLaVA-OneVision), native-resolution models (Qwen2-VL, Qwen2.5-VL, Qwen3-VL), and text-only models with a tower "
    "of one's own in tower=..."
)


class OneOfSeveral:
    """Base of `ImageAdapter`: making one makes the adapter of the model's kind, as `pathlib.Path` makes a `PosixPath`.

    Here and not in `ImageAdapter` itself, whose signature says which options it has.
    """

    def __new__(cls, model: Any = None, processor: Any = None, **options: Any) -> Any:
        from .image import ImageAdapter

        # a copy is made without arguments, and a subclass that is named is meant
        if cls is not ImageAdapter or model is None:
            return super().__new__(cls)
        kind = adapter_class(model)
        # Python goes on to initialise what is an ImageAdapter, and nothing else
        return super().__new__(kind) if issubclass(kind, cls) else kind(model, processor, **options)


def adapter_class(model: Any) -> type[Any]:
    """The image adapter for models of this one's kind; imported when it is needed.

    Raises:
        UnsupportedModelError: No kind that is known.
    """
    inner = getattr(model, "model", model)
    config = getattr(model, "config", None)
    if hasattr(inner, "visual"):
        from .image_native import NativeImageAdapter

        return NativeImageAdapter
    if is_anyres(model):
        from .image_anyres import AnyResImageAdapter

        return AnyResImageAdapter
    vision = getattr(config, "vision_config", None)
    sizes = (getattr(vision, field, None) for field in ("image_size", "patch_size"))
    packs = hasattr(config, "image_grid_pinpoints")  # in a way of its own
    if hasattr(model, "get_image_features") and all(size is not None for size in sizes) and not packs:
        from .image import ImageAdapter

        return ImageAdapter
    others = (
        vision is not None or hasattr(config, "audio_config") or getattr(config, "is_encoder_decoder", False)
    )
    if hasattr(model, "get_input_embeddings") and not others:
        from .image_embedding import EmbeddingImageAdapter

        return EmbeddingImageAdapter
    raise UnsupportedModelError(f"ImageAdapter takes {KINDS}; {type(model).__name__} is none of these")
