"""Real recordings with transcripts, out of Debian packages, and the word error rate."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexcore_adapters.audio_io import Recording

PACKAGES = ("pocketsphinx-testdata", "asterisk-core-sounds-en-wav", "asterisk-core-sounds-en")
RATE = 16000
_GAP = 0.3  # seconds of silence between prompts that are joined
_SMALL = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
_SMALL += [f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
_TENS = [f"{stem}ty" for stem in ("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine")]
_SAME = {"mr": "mister", "mrs": "missus", "dr": "doctor", "ok": "okay", "cannot": "can not"}


@dataclass(frozen=True)
class Utterance:
    """A recording and what is said in it: `[n]` samples at 16 kHz, and plain words."""

    name: str
    samples: Tensor
    text: str

    @property
    def seconds(self) -> float:
        """Length."""
        return len(self.samples) / RATE


def fetch(cache: Path) -> Path:
    """Unpack the packages below `cache`, downloading those that aren't there yet.

    Raises:
        RuntimeError: A package can't be downloaded or unpacked.
    """
    root = cache / "root"
    cache.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if (root / "usr/share/doc" / package).exists():
            continue
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise RuntimeError(
                    f"{package} is a Debian package: {tool} is needed to get it, and isn't here"
                )
        for attempt in (
            ("apt-get", "download", package),
            ("apt-get", "update"),
            ("apt-get", "download", package),
        ):
            subprocess.run(attempt, cwd=cache, capture_output=True)
            if files := sorted(cache.glob(f"{package}_*.deb")):
                break
        else:
            raise RuntimeError(f"apt-get download {package} failed")
        subprocess.run(["dpkg-deb", "-x", files[-1].name, "root"], cwd=cache, check=True)
    return root


def pocketsphinx(root: Path) -> list[Utterance]:
    """Ten utterances: five sentences of a novel, five hands of cards."""
    out = []
    folder = root / "usr/share/pocketsphinx/test/data"
    for file in (folder / "librivox/transcription", folder / "cards/cards.transcription"):
        for line in file.read_text().splitlines():
            if match := re.fullmatch(r"<s>(.*)</s> \((.*)\)", line.strip()):
                path = file.parent / f"{match[2]}.wav"
                out.append(Utterance(match[2], _read(path), match[1].strip()))
    return out


def asterisk(root: Path, longest: float) -> list[Utterance]:
    """Telephone prompts of one speaker, joined in the order of the list to clips of at most `longest` seconds."""
    packed = (root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz").read_bytes()
    listed = gzip.decompress(packed).decode()
    folder = root / "usr/share/asterisk/sounds/en_US_f_Allison"
    out: list[Utterance] = []
    parts: list[Tensor] = []
    texts: list[str] = []
    for line in listed.splitlines():
        name, _, text = line.partition(": ")
        path = folder / f"{name}.wav"
        # tones, music and jokes are described in brackets; single letters and words belong to nothing
        if re.search(r"[\[\]<>();]", line) or len(text.split()) < 4 or not path.exists():
            continue
        samples = _read(path)
        if parts and sum(map(len, parts)) + len(samples) > longest * RATE:
            out.append(Utterance(f"asterisk-{len(out)}", torch.cat(parts), " ".join(texts)))
            parts, texts = [], []
        if len(samples) <= longest * RATE:
            parts += [samples, torch.zeros(round(_GAP * RATE))]
            texts.append(text)
    return out


def _read(path: Path) -> Tensor:
    recording = Recording(path)
    return recording.read(0, recording.length(RATE), RATE)


# ---------------------------------------------------------------------- word error rate


def words(text: str) -> list[str]:
    """Plain words: no case, no punctuation, numbers spelt out.

    >>> words("Mr. Smith's 21st: press 4, or #!")
    ['mister', "smith's", 'twenty', 'first', 'press', 'four', 'or', 'pound']
    """
    text = text.lower().replace("#", " pound ").replace("*", " star ").replace("\u2019", "'")
    found = re.findall(r"\d+|[a-z']+", re.sub(r"\b(1st|2nd|3rd|\d*[123](?:st|nd|rd))\b", _ordinal, text))
    out: list[str] = []
    for word in found:
        word = word.strip("'")
        out += _number(word) if word.isdigit() else _SAME.get(word, word).split()
    return out


def _ordinal(match: re.Match[str]) -> str:
    ends = {"1": "first", "2": "second", "3": "third"}
    digits = match[0][:-2]
    tens = digits[:-1] + "0" if len(digits) > 1 else ""
    return f"{tens} {ends[digits[-1]]}"


def _number(digits: str) -> list[str]:
    value = int(digits)
    if len(digits) > 2 or (len(digits) > 1 and digits[0] == "0"):
        return [_SMALL[int(d)] for d in digits]  # as the prompts say them
    if value < 20:
        return [_SMALL[value]]
    return [_TENS[value // 10 - 2]] + ([_SMALL[value % 10]] if value % 10 else [])


def errors(reference: str, found: str) -> tuple[int, int]:
    """Words to insert, delete or exchange, and words of the reference."""
    expected, heard = words(reference), words(found)
    row = list(range(len(heard) + 1))
    for i, word in enumerate(expected, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1], len(expected)
