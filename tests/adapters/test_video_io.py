"""Reading videos: every kind of input, time stamps, files that are broken, decoders that are."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flexcore_adapters.video_container import inspect
from flexcore_adapters.video_decoder import Decoder
from flexcore_adapters.video_io import is_clip, open_video

from .video_helpers import bunny, fake_decord, ffmpeg, stripes


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.bin"
    path.write_bytes(b"anything")
    return path


def values(video, indices) -> list[int]:
    """What the fake decoder delivers: pixels that are their frame's index."""
    return [int(video.frame(i)[0, 0, 0]) for i in indices]


# ---------------------------------------------------------------------- a real file


def test_real_clip_at_any_frame():
    video = open_video(bunny())
    assert (len(video), video.size, video.keys.tolist()) == (132, (720, 1280), [0])
    assert np.allclose(video.times, np.arange(132) / 25, atol=1e-6) and abs(video.duration - 5.28) < 1e-4
    again = open_video(bunny())
    one_by_one = {i: again.frame(i) for i in range(41)}
    for index in (40, 3, 3, 25):
        assert np.array_equal(video.frame(index), one_by_one[index])
    assert video.decoded == {40: 1, 3: 2, 25: 1}
    assert not np.array_equal(one_by_one[3], one_by_one[4])
    assert video.at(np.array([0.0, 0.039, 0.041, 99.0, -1.0])).tolist() == [0, 0, 1, 131, 0]


def test_real_files_cut_short(tmp_path):
    data = bunny().read_bytes()
    for name, content, message in (
        ("cut.mp4", data[:500_000], "truncated: it ends at byte 500,000 of 1,0"),
        ("headless.mp4", data[: data.index(b"moov") - 4], "moov"),
        ("empty.mp4", b"", "is empty"),
        ("noise.mp4", bytes(range(256)) * 40, "isn't a video that decord can decode"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            open_video(tmp_path / name)
        assert name in str(caught.value)


def test_moved_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(bunny().parent)
    video = open_video("bigbuckbunny.mp4")
    monkeypatch.chdir(tmp_path)
    assert video.frame(1).shape == (720, 1280, 3)


# ---------------------------------------------------------------------- frames in memory


@pytest.mark.parametrize(
    "kind", ["array", "floats", "tensor", "channels first", "pictures", "list of arrays"]
)
def test_frames_in_memory(kind):
    frames = stripes()
    given = {
        "array": frames,
        "floats": frames.astype(np.float64) / 255,
        "tensor": torch.from_numpy(frames),
        "channels first": torch.from_numpy(frames).permute(0, 3, 1, 2),
        "pictures": [Image.fromarray(f) for f in frames],
        "list of arrays": list(frames),
    }[kind]
    assert is_clip(given)
    video = open_video(given, fps=4)
    assert (len(video), video.size, video.duration) == (12, (24, 32), 3.0)
    assert np.array_equal(video.frame(7), frames[7])
    assert open_video(video) is video


@pytest.mark.parametrize(
    "given, message",
    [
        (np.zeros((0, 4, 4, 3), np.uint8), "no frames"),
        (np.zeros((4, 4, 3), np.uint8), "got \\[4, 4, 3\\]"),
        (np.zeros((2, 4, 4, 2), np.uint8), "got \\[4, 4, 2\\]"),
        (np.zeros((2, 4, 0, 3), np.uint8), "with pixels in it"),
        (np.zeros((2, 4, 4, 3), np.int32), "int32"),
        (np.full((2, 4, 4, 3), 7.0), "floats in"),
        (np.full((2, 4, 4, 3), np.nan), "floats in"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "one size"),
        ("https://example.org/clip.mp4", "nothing is downloaded"),
    ],
    ids=lambda v: "" if isinstance(v, (np.ndarray, list)) else v[:12],
)
def test_unusable_clips(given, message):
    with pytest.raises(ValueError, match=message):
        open_video(given, name="video 3")


def test_what_is_a_clip_and_what_a_list_of_them():
    picture = Image.new("RGB", (4, 4))
    assert is_clip("a.mp4") and is_clip(stripes()) and is_clip([picture, picture])
    assert not is_clip(["a.mp4", "b.mp4"]) and not is_clip([stripes(), stripes()]) and not is_clip([])
    with pytest.raises(TypeError, match="int"):
        open_video(3)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_video("nowhere.mp4")


# ---------------------------------------------------------------------- a decoder that misbehaves


def test_frames_come_by_seeking_where_seeks_are_right(clip, tmp_path, monkeypatch):
    body = """
    def seek(self, index):
        open('seeks', 'a').write(f'{index} ')
        super().seek(index)
    """
    monkeypatch.syspath_prepend(fake_decord(tmp_path, body))
    monkeypatch.chdir(tmp_path)
    video = open_video(clip)
    assert values(video, [3, 39, 0, 17, 16, 30, 38]) == [3, 39, 0, 17, 16, 30, 38]
    assert (tmp_path / "seeks").read_text()


@pytest.mark.parametrize(
    "seek",
    ["self.at = index // 8 * 8 + 3", "self.at = max(index // 8 * 8 - 8, 0)", "self.at = 0", "pass"],
)
def test_wrong_seeks_are_noticed_and_done_without(clip, tmp_path, monkeypatch, seek):
    monkeypatch.syspath_prepend(fake_decord(tmp_path, f"def seek(self, index): {seek}"))
    video = open_video(clip)
    assert values(video, [3, 39, 0, 17, 16, 30, 38]) == [3, 39, 0, 17, 16, 30, 38]


def test_times_that_cannot_be(clip, tmp_path, monkeypatch):
    body = """
    def get_frame_timestamp(self, index): return np.full((len(index), 2), -1e14)
    def seek(self, index): raise RuntimeError('never')
    """
    monkeypatch.syspath_prepend(fake_decord(tmp_path, body))
    video = open_video(clip)
    assert not video.dated and np.allclose(video.times, np.arange(40) / 10)
    assert values(video, [20, 10]) == [20, 10]


def test_padded_rows_of_a_rotated_frame(clip, tmp_path, monkeypatch):
    body = """
    def next(self):
        frame = super().next()
        plain = frame.asnumpy().reshape(6, 24)
        padded = np.concatenate([plain, np.full((6, 8), 255, np.uint8)], 1).reshape(6, 8, 4)
        frame.asnumpy = lambda: padded
        return frame
    """
    monkeypatch.syspath_prepend(fake_decord(tmp_path, body))
    frame = open_video(clip).frame(7)
    assert frame.shape == (6, 8, 3) and (frame == 7).all()


def test_a_hang_ends_in_time_and_the_next_request_works(clip, tmp_path, monkeypatch):
    body = """
    def next(self):
        if self.at == 36: time.sleep(60)
        return super().next()
    """
    monkeypatch.syspath_prepend(fake_decord(tmp_path, body))
    video = open_video(clip, decoder=Decoder(timeout=2))
    for _ in range(2):  # the second time nobody waits
        started = time.perf_counter()
        with pytest.raises(TimeoutError, match="frame 36 made no progress for 2 s"):
            video.frame(36)
    assert time.perf_counter() - started < 0.5
    assert values(video, [4, 35]) == [4, 35]


def test_slow_is_not_hanging(clip, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(
        fake_decord(tmp_path, "def next(self):\n    time.sleep(0.2)\n    return super().next()")
    )
    video = open_video(clip, decoder=Decoder(timeout=1))
    assert values(video, [7]) == [7]


def test_a_hang_on_opening(clip, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_decord(tmp_path, "def __len__(self): time.sleep(60)"))
    with pytest.raises(ValueError, match=r"clip.bin.*opening the file made no progress for 1.5 s"):
        open_video(clip, decoder=Decoder(timeout=1.5))


def test_a_crash_takes_nothing_along(clip, tmp_path, monkeypatch):
    body = """
    def next(self):
        if self.at == 20: os._exit(9)
        return super().next()
    """
    monkeypatch.syspath_prepend(fake_decord(tmp_path, body))
    video = open_video(clip)
    with pytest.raises(RuntimeError, match="died while decoding frame 20"):
        video.frame(20)
    assert values(video, [5]) == [5]


def test_noise_on_stdout_does_not_matter(clip, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(
        fake_decord(tmp_path, "def next(self):\n    os.write(1, b'junk')\n    return super().next()")
    )
    assert values(open_video(clip), [6, 2]) == [6, 2]


def test_more_files_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_decord(tmp_path))
    decoder, videos = Decoder(), []
    for i in range(6):
        (tmp_path / f"{i}.bin").write_bytes(b"x")
        videos.append(open_video(tmp_path / f"{i}.bin", decoder=decoder))
    assert [values(v, [9 + i]) for i, v in enumerate(videos)] == [[9 + i] for i in range(6)]


def test_copies_and_forks_start_their_own(clip, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(fake_decord(tmp_path))
    video = open_video(clip)
    assert values(video, [3]) == [3]
    for twin in (copy.deepcopy(video.decoder), pickle.loads(pickle.dumps(video.decoder))):
        assert twin._process is None and twin.timeout == video.decoder.timeout
    child = os.fork()
    if not child:
        os._exit(0 if values(video, [11, 2]) == [11, 2] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert values(video, [12]) == [12]
    video.decoder.close()
    assert values(video, [5]) == [5]


def test_without_decord(clip, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"flexcore\[video\]"):
        open_video(clip)
    assert len(open_video(stripes())) == 12


def test_importing_the_adapter_imports_no_decoder():
    code = "import sys, flexcore_adapters.video; print([m for m in ('decord', 'PIL', 'skvideo') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize("timeout", [0, -1, True, "1", None])
def test_bad_timeout(timeout):
    with pytest.raises(ValueError, match="timeout must be"):
        Decoder(timeout)


# ---------------------------------------------------------------------- files made with ffmpeg


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a file from the real clip with ffmpeg's options."""
    folder = tmp_path_factory.mktemp("made")

    def make(
        name: str, *options: object, source: Path | None = None, before: tuple[object, ...] = ()
    ) -> Path:
        ffmpeg(*before, "-i", source or bunny(), *options, folder / name)
        return folder / name

    return make


@pytest.mark.slow
def test_variable_frame_rate(made):
    keep = "scale=160:90,select='if(lt(t,2),not(mod(n,5)),1)'"
    video = open_video(made("vfr.mp4", "-an", "-vf", keep, "-vsync", "vfr"))
    assert np.allclose(video.times[:11], np.arange(11) / 5, atol=1e-4)
    assert np.allclose(np.diff(video.times[10:]), 1 / 25, atol=1e-4)
    assert video.at(np.array([0.39, 1.0, 3.0])).tolist() == [1, 5, 35]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["160x96", "320x180", "100x50"])
@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotated(made, tmp_path, size, turn):
    plain = made(f"plain{size}.mp4", "-an", "-s", size, "-t", 0.4)
    turned = made(f"turned{turn}.mp4", "-c", "copy", "-metadata:s:v", f"rotate={turn}", source=plain)
    ffmpeg("-i", turned, "-frames:v", 1, tmp_path / "upright.png")  # ffmpeg turns what it decodes
    expected = np.asarray(Image.open(tmp_path / "upright.png").convert("RGB")).astype(int)
    video = open_video(turned)
    frame = video.frame(0)
    assert frame.shape == expected.shape and video.size == expected.shape[:2]
    assert np.abs(frame - expected).mean() < 2 < np.abs(np.flip(frame, (0, 1)) - expected).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("open.mp4", ["-c:v", "libx264", "-g", 12, "-bf", 3, "-x264-params", "open-gop=1"]),
        ("h265.mp4", ["-c:v", "libx265", "-x265-params", "log-level=none", "-g", 12]),
        ("b.mkv", ["-c:v", "libx264", "-g", 12, "-bf", 3]),
        ("b.avi", ["-c:v", "mpeg4", "-bf", 2, "-g", 12]),
        ("1.mpg", ["-c:v", "mpeg1video"]),
        ("2.mpg", ["-c:v", "mpeg2video", "-bf", 2]),
        ("a.wmv", ["-c:v", "wmv2"]),
        ("a.flv", ["-c:v", "flv"]),
        ("a.webm", ["-c:v", "libvpx-vp9", "-t", 2]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_random_frames_are_those_of_a_sequential_read(made, name, options):
    path = made(name, "-an", "-s", "160x90", *options)
    one, other = open_video(path), open_video(path)
    straight = [one.frame(i) for i in range(len(one))]
    for index in np.random.default_rng(0).permutation(len(one))[:25].tolist():
        assert np.array_equal(other.frame(index), straight[index]), index
    assert (np.diff(one.times) > 0).all()


@pytest.mark.slow
def test_edit_lists_cut_frames(made):
    video = open_video(made("edit.mp4", "-an", "-c", "copy", before=("-ss", 1.3)))
    whole = open_video(bunny())
    assert len(video) == 99 and abs(video.times[0]) < 1e-3
    assert np.array_equal(video.frame(0), whole.frame(33)) and np.array_equal(
        video.frame(98), whole.frame(131)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sound.m4a", "sound.mp4", "sound.mkv"])
def test_only_sound(made, name):
    with pytest.raises(ValueError, match="has no video stream, only sound"):
        open_video(made(name, "-vn", "-c:a", "copy"))


@pytest.mark.slow
def test_theora(made):
    with pytest.raises(ValueError, match=r"theora.ogv' isn't a video that decord can decode.*ffmpeg -i"):
        open_video(made("theora.ogv", "-an", "-c:v", "libtheora", "-s", "160x90"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cut.mkv", "cut.avi", "faststart.mp4"])
def test_cut_short(made, name):
    path = (
        made(name, "-an", "-s", "320x180", "-movflags", "+faststart") if "mp4" in name else made(name, "-an")
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="truncated"):
        open_video(path)
    partial = open_video(path, partial=True)
    assert partial.frame(0).any()


@pytest.mark.slow
def test_two_hours_open_in_two_seconds(made):
    path = made("two_hours.mp4", "-an", "-c", "copy", before=("-stream_loop", 1363))
    assert inspect(path).keys[:3] == (0, 132, 264)
    decoder = Decoder()
    open_video(bunny(), decoder=decoder)  # Python and decord start once
    started = time.perf_counter()
    video = open_video(path, decoder=decoder)
    seconds = time.perf_counter() - started
    print(f"{len(video):,} frames opened in {seconds:.2f} s")
    assert len(video) == 180_048 and seconds < 2
    first, far = video.frame(132 + 7), video.frame(132 * 1300 + 7)
    assert np.array_equal(first, far) and np.array_equal(first, open_video(bunny()).frame(7))
