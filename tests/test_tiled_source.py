"""Sources on demand: the same numbers as encoding everything up front, a tile at a time, within a budget."""

from __future__ import annotations

import threading

import pytest
import torch

from flexcore.errors import SourceError
from flexcore.grid import Grid
from flexcore.mapped_source import MappedSource
from flexcore.sources import TensorSource
from flexcore.tiled_source import TiledSource, UnitEncoder, gather

WIDTH = 5
GRIDS = {
    "image-6x6-over-18x18": (Grid.blocks((6, 6), (18, 18), region=4, tile=6), (6, 6)),
    "video-2x3x3-over-8x6x6": (
        Grid.blocks((2, 3, 3), (8, 6, 6), region=(2, 3, 3), tile=(2, 6, 6)),
        (1, 6, 6),
    ),
    "audio-10-over-120": (Grid.blocks((10,), (120,), region=7, tile=30), (30,)),
    "ragged-10-over-107": (Grid.blocks((10,), (107,), region=7, tile=30), (30,)),
    "ragged-4x5-over-13x17": (Grid.blocks((4, 5), (13, 17), region=3, tile=(6, 7)), (6, 7)),
    "official-9x9-over-24x24": (Grid.official(8, 24), (8, 8)),
}


class Media:
    """Random features of some media, and an encoder that hands out their tiles and counts."""

    def __init__(self, name: str, n: int = 2, **options):
        self.grid, self.tile = GRIDS[name]
        self.features = [torch.randn(self.grid.n_fine, WIDTH) for _ in range(n)]
        self.calls: list[list] = []
        self.broken: set = set()
        self.encoder = UnitEncoder(self.encode, WIDTH, **options)
        self.tiled = [
            TiledSource(self.grid, self.tile, self.encoder, key=k, name=f"scan {k}") for k in range(n)
        ]
        self.eager = [TensorSource(f, self.grid) for f in self.features]

    def encode(self, units):
        self.calls.append(list(units))
        if bad := self.broken & set(units):
            raise OSError(f"block {min(bad)} is gone")
        return torch.stack([self.unit(key, index) for key, index in units])

    def unit(self, key: int, index: int) -> torch.Tensor:
        """One tile's features, cut out of the whole map by slicing; past its end they are what nobody may read."""
        fits = [-(-size // side) * side for size, side in zip(self.grid.fine, self.tile, strict=True)]
        whole = torch.full((*fits, WIDTH), float("nan"))
        whole[tuple(slice(size) for size in self.grid.fine)] = self.features[key].view(*self.grid.fine, WIDTH)
        slices = []
        for size, side in zip(reversed(fits), reversed(self.tile), strict=True):
            at = index % (size // side)
            index //= size // side
            slices.append(slice(at * side, (at + 1) * side))
        return whole[tuple(reversed(slices))].reshape(-1, WIDTH)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("budget", [None, 0, 1500])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_equals_the_tensor_bit_for_bit(name, budget, micro_batch):
    media = Media(name, max_bytes=budget, micro_batch=micro_batch)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        asked = [torch.randperm(media.grid.n_regions, generator=generator)[:n] for n in (5, 3)]
        found = gather(list(zip(media.tiled, asked, strict=True)))
        for source, regions, features in zip(media.eager, asked, found, strict=True):
            assert torch.equal(features, source.features(regions))
        assert budget is None or media.encoder.stats.bytes <= budget
        assert max(map(len, media.calls)) <= micro_batch


def test_only_the_tiles_chosen_are_encoded_and_only_once():
    media = Media("image-6x6-over-18x18")
    per_tile = 4  # blocks of 4 and 2 on each axis of a tile of 6
    first_tile = torch.tensor([0, 1, 6, 7])
    assert len(first_tile) == per_tile
    media.tiled[0].features(first_tile)
    assert media.calls == [[(0, 0)]]
    media.tiled[0].features(first_tile)
    stats = media.encoder.stats
    assert (stats.units, stats.hits, stats.regions, stats.tokens) == (1, 1, 8, 36)
    assert stats.bytes == 36 * WIDTH * 4 and stats.seconds > 0
    media.tiled[0].features(torch.arange(media.grid.n_regions))
    assert stats.units == media.tiled[0].n_tiles == 9


def test_a_batch_shares_micro_batches():
    media = Media("audio-10-over-120", n=4, micro_batch=8)
    gather([(source, torch.tensor([0])) for source in media.tiled])
    assert media.calls == [[(k, 0) for k in range(4)]]
    mixed = gather([(media.tiled[0], torch.tensor([3])), (media.eager[1], torch.tensor([2]))])
    assert torch.equal(mixed[1], media.eager[1].features(torch.tensor([2])))


def test_least_recently_used_tiles_go_first():
    tile = 36 * WIDTH * 4
    media = Media("image-6x6-over-18x18", n=1, max_bytes=2 * tile)
    regions = [torch.tensor([0]), torch.tensor([2]), torch.tensor([4])]  # tiles 0, 1 and 2
    for i in (0, 1, 0, 2, 0, 1):
        media.tiled[0].features(regions[i])
    assert [units for call in media.calls for _, units in call] == [0, 1, 2, 1]


def test_an_error_names_medium_and_place():
    media = Media("audio-10-over-120")
    media.broken = {(1, 2)}
    source = TiledSource(
        media.grid, media.tile, media.encoder, 1, "call.wav", lambda u: f"{u * 0.5:.1f}-{u * 0.5 + 0.5:.1f} s"
    )
    with pytest.raises(
        SourceError, match=r"call.wav, tile 2 of 4, 1.0-1.5 s can't be read: block \(1, 2\) is gone"
    ):
        source.features(torch.arange(media.grid.n_regions))
    regions = torch.tensor([0, 1])
    assert torch.equal(source.features(regions), media.eager[1].features(regions))


def test_unreadable_tiles_can_be_left_out():
    media = Media("audio-10-over-120", n=1, on_error="skip")
    media.broken = {(0, 2)}
    source, everything = media.tiled[0], torch.arange(media.grid.n_regions)
    with pytest.warns(UserWarning, match="tile 2 of 4 can't be read: .* it is left out"):
        found = source.features(everything)
    tokens = media.grid.tokens(everything)
    bad = ((tokens >= 60) & (tokens < 90)).any(dim=1)
    assert torch.equal(source.readable(everything), ~bad) and bool(bad.any()) and not bool(bad.all())
    assert torch.equal(found[~bad], media.eager[0].features(everything[~bad]))
    assert not bool(found[bad].any())


def test_threads_share_an_encoder():
    media = Media("image-6x6-over-18x18", n=1, max_bytes=2000)
    expected = media.eager[0].features(torch.arange(media.grid.n_regions))
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            regions = torch.randperm(media.grid.n_regions, generator=generator)[:6]
            if not torch.equal(media.tiled[0].features(regions), expected[regions]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": 0}, "micro_batch must be >= 1, got 0"),
        ({"max_bytes": -1}, "max_bytes must be >= 0"),
        ({"on_error": "ignore"}, "on_error must be one of raise, skip"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        UnitEncoder(lambda units: torch.zeros(0), WIDTH, **options)


def test_tiles_must_fit_the_grid():
    media = Media("image-6x6-over-18x18")
    for tile in ((6,), (0, 6)):
        with pytest.raises(ValueError, match="tile must hold one side >= 1 per axis of the fine grid"):
            TiledSource(media.grid, tile, media.encoder, 0)
    wrong = UnitEncoder(lambda units: torch.zeros(len(units), 36, WIDTH + 1), WIDTH)
    with pytest.raises(ValueError, match="encode must return"):
        TiledSource(media.grid, media.tile, wrong, 0).features(torch.tensor([0]))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_features_survive_the_file(name, dtype, tmp_path):
    grid, _ = GRIDS[name]
    eager = TensorSource(torch.randn(grid.n_fine, WIDTH).to(dtype), grid)
    MappedSource.write(tmp_path / "scan.safetensors", eager, chunk=5)
    assert [p.name for p in tmp_path.iterdir()] == ["scan.safetensors"]
    mapped = MappedSource(tmp_path / "scan.safetensors")
    assert mapped.grid == grid and mapped.dtype == dtype and mapped.width == WIDTH
    regions = torch.randperm(grid.n_regions)[:9]
    assert torch.equal(mapped.features(regions), eager.features(regions))
    import pickle

    again = pickle.loads(pickle.dumps(mapped))
    assert torch.equal(again.features(regions), eager.features(regions))


def test_mapped_refuses_other_files(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        MappedSource(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello, this is no tensor file")
    with pytest.raises(ValueError, match=r"MappedSource\.write"):
        MappedSource(tmp_path / "text")
    save_file({"features": torch.zeros(3, 2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no grid"):
        MappedSource(tmp_path / "other")


def test_an_interrupted_write_leaves_nothing(tmp_path):
    media = Media("audio-10-over-120", n=1)
    media.broken = {(0, 3)}
    with pytest.raises(SourceError):
        MappedSource.write(tmp_path / "scan", media.tiled[0], chunk=1)
    assert list(tmp_path.iterdir()) == []
