"""Words on signs in photographs: large in a view that the encoder sees whole, or small in a picture four times wider.

The words and the fonts are the same in all splits, the photographs aren't, nor where and in which colours a sign is
put: what is learned is to find and read these words anywhere, not to read any word. A picture's fine tiles differ from
those of its photograph only where the sign is, so a photograph that is used again is encoded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from flexcore.grid import Grid
from flexcore_adapters.image_tower import normalise

from ..magnifier.loop import generator
from ..magnifier.scenes import background

# Words that SmolLM2's tokenizer has as one token each.
# fmt: off
WORDS = (
    "stop", "exit", "open", "bank", "sale", "fire", "park", "gate", "milk", "shop", "road", "king",
    "blue", "food", "book", "gold", "north", "south", "east", "west", "bus", "train", "wine", "fish",
)
# fmt: on
QUESTION = "What does the sign say?"
ZOOM, REGION = 4, 4  # a region is what one coarse cell shows: 4x4 fine tokens
# Sizes of the font in pixels, in a view that the encoder sees whole and in a picture, which its coarse view shrinks.
LARGE, SMALL = (20, 30), (22, 28)
_FONTS = (
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
    *("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
)


@dataclass(frozen=True)
class Sign:
    """A picture with a sign.

    Args:
        image: The picture.
        word: Index in `WORDS`.
        box: `[4]` left, top, width and height of the sign in pixels.
    """

    image: Image.Image
    word: int
    box: np.ndarray


def put(rng: np.random.Generator, picture: Image.Image, sizes: tuple[int, int]) -> Sign:
    """A copy of a picture with a sign somewhere in it, dark on light or light on dark.

    Args:
        rng: Where it is drawn from.
        picture: What it is put on.
        sizes: Smallest and largest size of the font, in pixels.
    """
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    out, word, size = picture.copy(), int(rng.integers(len(WORDS))), int(rng.integers(sizes[0], sizes[1] + 1))
    font = ImageFont.truetype(str(fonts / rng.choice(_FONTS)), size)
    draw, gap = ImageDraw.Draw(out), max(2, size // 6)
    left, top, right, bottom = draw.textbbox((0, 0), WORDS[word], font=font)
    width, height = (min(out.width, round(v) + 2 * gap) for v in (right - left, bottom - top))
    x, y = int(rng.integers(0, out.width - width + 1)), int(rng.integers(0, out.height - height + 1))
    dark, light = (tuple(int(v) for v in rng.integers(*some, 3)) for some in ((0, 70), (190, 256)))
    plate, ink = (light, dark) if rng.random() < 0.5 else (dark, light)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=plate)
    draw.text((x + gap - left, y + gap - top), WORDS[word], fill=ink, font=font)
    return Sign(out, word, np.array([x, y, width, height]))


def ground(rng: np.random.Generator, split: str, side: int) -> Image.Image:
    """A piece of one of a split's photographs."""
    return Image.fromarray((255 * background(rng, split, side)).astype(np.uint8))


def shares(boxes: Tensor, cells: int, side: int) -> Tensor:
    """`[n, cells * cells]` how much of each cell of a square of `side` pixels lies in `[n, 4]` boxes."""
    step = side / cells
    start = torch.arange(cells) * step
    sides = []
    for axis in (1, 0):
        low = torch.maximum(boxes[:, axis, None], start)
        high = torch.minimum(boxes[:, axis, None] + boxes[:, axis + 2, None], start + step)
        sides.append((high - low).clamp(min=0) / step)
    return (sides[0][:, :, None] * sides[1][:, None, :]).flatten(1)


# ---------------------------------------------------------------------- encoded


@torch.no_grad()
def features(llava: Any, image_processor: Any, tiles: Tensor, batch: int = 32) -> Tensor:
    """`[k, cells * cells, C]` float16: what the projector of a LLaVA is given for `[k, 3, side, side]` uint8 tiles."""
    tower, layer = llava.model.vision_tower, llava.config.vision_feature_layer
    out = []
    for some in tqdm(tiles.split(batch), desc="encoding", disable=None, leave=False):
        found = tower(pixel_values=normalise(image_processor, some), output_hidden_states=True)
        out.append(found.hidden_states[layer][:, 1:].half())
    return torch.cat(out)


@dataclass(frozen=True)
class Large:
    """Views with large signs: `[n, cells², C]` features, `[n]` words, `[n, 4]` boxes."""

    features: Tensor
    words: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Small:
    """Pictures with small signs, of few photographs.

    Args:
        grounds: `[G, tiles, cells², C]` the photographs without signs.
        of: `[n]` which photograph.
        coarse: `[n, cells², C]` coarse views.
        changed: `[m, 2]` picture and tile that a sign is in.
        tiles: `[m, cells², C]` those tiles.
        words: `[n]`.
        boxes: `[n, 4]`.
    """

    grounds: Tensor
    of: Tensor
    coarse: Tensor
    changed: Tensor
    tiles: Tensor
    words: Tensor
    boxes: Tensor

    def fine(self, which: Tensor) -> Tensor:
        """`[B, fine tokens, C]` whole fine views of some pictures, in raster order."""
        maps = self.grounds[self.of[which]].clone()
        for row, picture in enumerate(which.tolist()):
            mine = self.changed[:, 0] == picture
            maps[row, self.changed[mine, 1]] = self.tiles[mine]
        cells = round(maps.shape[2] ** 0.5)
        lattice = maps.unflatten(1, (ZOOM, ZOOM)).unflatten(3, (cells, cells))
        return lattice.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)


def grid(cells: int) -> Grid:
    """The lattice of a square picture, as the image adapter lays it out."""
    return Grid.blocks((cells,) * 2, (ZOOM * cells,) * 2, REGION, tile=cells)


def large(llava: Any, adapter: Any, split: str, n: int) -> Large:
    """Encoded views with large signs."""
    rng = generator(1, sum(split.encode()))
    signs = [put(rng, ground(rng, split, adapter.side), LARGE) for _ in range(n)]
    shown = torch.stack([torch.from_numpy(np.array(s.image)).permute(2, 0, 1) for s in signs])
    found = features(llava, adapter.processor.image_processor, shown)
    return Large(
        found, torch.tensor([s.word for s in signs]), torch.from_numpy(np.stack([s.box for s in signs]))
    )


def small(llava: Any, adapter: Any, split: str, n: int, grounds: int) -> Small:
    """Encoded pictures with small signs, cut and shrunk as the image adapter does."""
    rng = generator(2, sum(split.encode()))
    whole = [ground(rng, split, adapter.side * ZOOM) for _ in range(grounds)]
    encode = adapter.processor.image_processor
    of, coarse, changed, tiles, words, boxes = [], [], [], [], [], []
    for i in tqdm(range(n), desc=f"{split} pictures", disable=None, leave=False):
        of.append(int(rng.integers(grounds)))
        sign = put(rng, whole[of[-1]], SMALL)
        (view,) = adapter.views([sign.image])
        hit = shares(torch.from_numpy(sign.box)[None], ZOOM, sign.image.width)[0].nonzero()[:, 0]
        coarse.append(torch.from_numpy(np.array(view.coarse)).permute(2, 0, 1))
        tiles.append(view.tiles(hit))
        changed += [(i, int(tile)) for tile in hit]
        words.append(sign.word)
        boxes.append(sign.box)
    plain = torch.cat([view.tiles() for view in adapter.views(whole)])
    return Small(
        features(llava, encode, plain).unflatten(0, (grounds, -1)),
        torch.tensor(of),
        features(llava, encode, torch.stack(coarse)),
        torch.tensor(changed),
        features(llava, encode, torch.cat(tiles)),
        torch.tensor(words),
        torch.from_numpy(np.stack(boxes)),
    )


def kept(path: Path, kind: type, make: Any) -> Any:
    """Encoded pictures from a file, or made now and kept there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({name: value.contiguous() for name, value in vars(make()).items()}, part)
        part.replace(path)
    return kind(**load_file(path))
