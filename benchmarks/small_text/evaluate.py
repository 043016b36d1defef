"""What an arm says about test pictures, where it looked and what that cost: through the adapter and `generate`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from tqdm import tqdm

import flexcore
from flexcore.cost import DecoderShape, coarse_prefill, dense_prefill, flex_prefill

from ..magnifier.loop import generator
from .signs import WORDS, Sign, ground, put, shares
from .stages import chat

_BATCH = 8


def test_signs(n: int, side: int, sizes: tuple[int, int]) -> list[Sign]:
    """Pictures with signs on photographs that nothing was trained or chosen on.

    Args:
        n: How many.
        side: Of a picture in pixels.
        sizes: Of the font, see `put`.
    """
    return [put(rng, ground(rng, "test", side), sizes) for rng in (generator(9, i) for i in range(n))]


@torch.no_grad()
def evaluate(
    llava: Any, processor: Any, adapter: Any, signs: list[Sign], label: str, look: bool
) -> dict[str, Any]:
    """Ask a model about pictures.

    Args:
        llava: The model, wrapped or not, in eval mode.
        processor: Its processor.
        adapter: The image adapter for it.
        signs: The pictures.
        label: For the progress bar.
        look: Give it the fine tokens; it must be wrapped then.

    Returns:
        `accuracy`, some of what it `said`, `gflops` of a prefill (causal attention halved, output head left out) and
        of a dense one, and of a model that looks: by layer and in any of them the share of signs of which a region
        was chosen, and the share of regions that is read.
    """
    prompt, said, hits, shares_read = chat(processor), [], [], []
    for start in tqdm(range(0, len(signs), _BATCH), desc=f"asking {label}", disable=None):
        some = signs[start : start + _BATCH]
        inputs = adapter([prompt] * len(some), images=[sign.image for sign in some])
        streams = inputs.pop("flex_streams")
        length = inputs["input_ids"].shape[1]
        with flexcore.trace(llava) if look else contextlib.nullcontext() as trace:
            more = {"flex_streams": streams} if look else {}
            ids = llava.generate(**inputs, **more, max_new_tokens=4, do_sample=False)
        said += processor.tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
        if look:
            hit, read = chosen(trace, some, length - 1, llava.flex_config.layers)
            hits.append(hit)
            shares_read.append(read)
    answers = [WORDS[sign.word] for sign in signs]
    right = [text.strip() == answer for text, answer in zip(said, answers, strict=True)]
    shape = DecoderShape.from_config(llava.config, reading=llava.flex_config.layers if look else ())
    coarse = adapter.cells**2
    fine, text = coarse * adapter.zoom**2, length - coarse
    found: dict[str, Any] = {
        "accuracy": sum(right) / len(right),
        "questions": len(right),
        "said": list(zip(answers, said, strict=True))[:16],
        "gflops": without_head(coarse_prefill(shape, text, coarse)),
        "gflops, dense": without_head(dense_prefill(shape, text, coarse, fine)),
    }
    if look:
        hit, read = torch.cat(hits), torch.cat(shares_read)
        tokens = [round(float(share) * fine) for share in read.mean(0)]
        layers = llava.flex_config.layers
        found |= {
            "hits": {
                str(layer): float(share) for layer, share in zip(layers, hit.float().mean(0), strict=True)
            },
            "hit_any": float(hit.any(1).float().mean()),
            "regions": float(read.mean()),
            "gflops": without_head(flex_prefill(shape, text, coarse, tokens, tokens, 1)),
        }
    return found


def chosen(
    trace: flexcore.Trace, signs: list[Sign], row: int, layers: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, layers]` whether a region that the sign touches was chosen, and which share of all regions was.

    Args:
        trace: Of one batch.
        signs: Its pictures.
        row: The row that answers.
        layers: The layers that read.
    """
    hit = torch.zeros(len(signs), len(layers), dtype=torch.bool)
    read = torch.zeros(len(signs), len(layers))
    for record in trace:
        if record.position != row or record.read_in is None:
            continue
        sign, at = signs[record.sample], layers.index(record.read_in)
        cells = round(len(record.regions) ** 0.5)
        touched = shares(torch.from_numpy(sign.box)[None].float(), cells, sign.image.width)[0] > 0
        hit[record.sample, at] = bool((record.regions & touched).any())
        read[record.sample, at] = float(record.regions.float().mean())
    return hit, read


def without_head(cost: Any) -> float:
    """GFLOP but for the output head."""
    return (cost.total - cost.lm_head) / 1e9
