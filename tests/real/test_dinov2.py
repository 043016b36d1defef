"""The vision tower alone: its features must tell pictures apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

pytestmark = pytest.mark.slow


def test_halves_of_a_picture_are_closer_than_other_pictures(
    dinov2: Any, photo: Callable[[str], Image.Image]
) -> None:
    # The plain class needs torchvision.
    cls = getattr(transformers, "BitImageProcessorPil", None) or transformers.BitImageProcessor
    processor = cls(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    halves = []
    for name in ("coffee.png", "chelsea.png", "astronaut.png", "rocket.jpg"):
        picture = photo(name)
        width, height = picture.size
        halves += [picture.crop((0, 0, width * 2 // 3, height)), picture.crop((width // 3, 0, width, height))]
    with torch.no_grad():
        features = dinov2(**processor(halves, return_tensors="pt")).pooler_output
    likeness = torch.nn.functional.normalize(features, dim=-1)
    likeness = likeness @ likeness.T
    likeness.fill_diagonal_(-1)
    assert likeness.argmax(dim=-1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
