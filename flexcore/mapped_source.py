"""MappedSource: fine features written once and read from a memory-mapped file, for media asked about many times."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .grid import Grid
from .sources import FineSource

FEATURES, LAYOUT = "features", "flexcore_grid"


class MappedSource(FineSource):
    """Fine features in a safetensors file; only the chosen regions' pages are ever read.

    Regions lie one after the other, so that a region is one contiguous read.

    Args:
        path: A file that `write` made.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It isn't one of ours.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is missing")
        try:
            self._file = safe_open(str(self.path), framework="pt")
            meta = (self._file.metadata() or {}).get(LAYOUT)
            rows = self._file.get_slice(FEATURES)
        except SafetensorError as error:
            raise ValueError(f"{self.path} must be a file that MappedSource.write made: {error}") from error
        if meta is None:
            raise ValueError(f"{self.path} must be a file that MappedSource.write made; it holds no grid")
        self.grid = _grid(meta)
        self._rows = rows
        n, self.width = rows.get_shape()
        if n != self.grid.n_fine:
            raise ValueError(f"{self.path} must hold {self.grid.n_fine} fine tokens for its grid, got {n}")
        self.device = torch.device("cpu")
        self._starts = torch.cat([torch.zeros(1, dtype=torch.long), self.grid.region_lengths.cumsum(0)])
        self.dtype = rows[0:1].dtype

    def features(self, regions: Tensor) -> Tensor:
        regions = self.grid.check_regions(regions)
        out = torch.zeros(len(regions), self.grid.region_tokens, self.width, dtype=self.dtype)
        for i, region in enumerate(regions.tolist()):
            start, stop = int(self._starts[region]), int(self._starts[region + 1])
            out[i, : stop - start] = self._rows[start:stop]
        return out

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}  # a data loader's worker opens the file anew

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    @staticmethod
    def write(path: str | Path, source: FineSource, chunk: int = 64) -> None:
        """Write all of a source's features, a few regions at a time; an interrupted write leaves no file behind.

        Args:
            path: Where to; an existing file is replaced once the new one is complete.
            source: What to write.
            chunk: Regions asked for at once.

        Raises:
            ValueError: Features aren't floating point, or `chunk` is below 1.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be >= 1, got {chunk}")
        path = Path(path)
        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
        if source.dtype not in names:
            raise ValueError(f"features must be floating point to be written, got {source.dtype}")
        shape = [source.grid.n_fine, source.width]
        size = math.prod(shape) * source.dtype.itemsize
        header = {
            "__metadata__": {LAYOUT: _text(source.grid)},
            FEATURES: {"dtype": names[source.dtype], "shape": shape, "data_offsets": [0, size]},
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        part = path.with_name(path.name + ".part")
        try:
            with part.open("wb") as file:
                # written by hand because safetensors' writer wants the whole tensor in memory
                file.write(len(text).to_bytes(8, "little") + text)
                for rows in _chunks(source, chunk):
                    file.write(rows.contiguous().view(torch.uint8).numpy().tobytes())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _chunks(source: FineSource, chunk: int) -> Iterator[Tensor]:
    """The features of every region in order, without padding, `[tokens, C]` at a time."""
    lengths = source.grid.region_lengths
    for start in range(0, source.grid.n_regions, chunk):
        regions = torch.arange(start, min(start + chunk, source.grid.n_regions))
        features = source.features(regions).detach().cpu()
        keep = torch.arange(features.shape[1]) < lengths[regions][:, None]
        yield features[keep]


def _text(grid: Grid) -> str:
    return json.dumps([grid.coarse, grid.fine, grid.edges, grid.padding, grid.lattice])


def _grid(text: str) -> Grid:
    coarse, fine, edges, padding, lattice = json.loads(text)
    return Grid(
        tuple(coarse),
        tuple(fine),
        tuple(tuple(e) for e in edges),
        tuple((a, b) for a, b in padding),
        None if lattice is None else tuple(lattice),
    )
