"""Real recordings with transcripts, out of Debian packages, and the word error rate."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from collections.abc import Sequence
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


def fetch(cache: Path, packages: Sequence[str] = PACKAGES) -> Path:
    """Unpack Debian packages below `cache`, downloading those that aren't there yet.

    Args:
        cache: A folder of its own.
        packages: Their names; default: those that have transcripts.

    Raises:
        RuntimeError: A package can't be downloaded or unpacked.
    """
    root = cache / "root"
    cache.mkdir(parents=True, exist_ok=True)
    for package in packages:
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


def pocketsphinx(root: Path, part: str) -> list[Utterance]:
    """Five utterances: `librivox`, sentences of a novel, or `cards`, hands of cards; by two other speakers."""
    files = {"librivox": "librivox/transcription", "cards": "cards/cards.transcription"}
    file = root / "usr/share/pocketsphinx/test/data" / files[part]
    out = []
    for line in file.read_text().splitlines():
        if match := re.fullmatch(r"<s>(.*)</s> \((.*)\)", line.strip()):
            out.append(Utterance(match[2], _read(file.parent / f"{match[2]}.wav"), match[1].strip()))
    return out


@dataclass(frozen=True)
class Prompt:
    """A telephone prompt: its name, whose part before the first dash is the application it belongs to."""

    name: str
    text: str
    path: Path

    @property
    def application(self) -> str:
        """Such as `vm` for voice mail."""
        return re.split("[-/_]", self.name)[0]


def prompts(root: Path) -> list[Prompt]:
    """Telephone prompts of one speaker, in the order of the list."""
    packed = (root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz").read_bytes()
    folder = root / "usr/share/asterisk/sounds/en_US_f_Allison"
    out = []
    for line in gzip.decompress(packed).decode().splitlines():
        name, _, text = line.partition(": ")
        path = folder / f"{name}.wav"
        # tones, music and jokes are described in brackets; single letters and words belong to nothing
        if not re.search(r"[\[\]<>();]", line) and len(text.split()) >= 4 and path.exists():
            out.append(Prompt(name, text, path))
    return out


def split(found: Sequence[Prompt], applications: dict[str, set[str]], rest: str) -> dict[str, list[Prompt]]:
    """Deal prompts out by application, so that sets hold other texts.

    Args:
        found: All prompts.
        applications: Of each set but one; of a text that several sets have, the first one keeps it.
        rest: The set of all other applications.
    """
    out: dict[str, list[Prompt]] = {name: [] for name in (*applications, rest)}
    for prompt in found:
        own = next((name for name, some in applications.items() if prompt.application in some), rest)
        out[own].append(prompt)
    taken: set[str] = set()
    for name, own_prompts in out.items():
        out[name] = [p for p in own_prompts if " ".join(words(p.text)) not in taken]
        taken |= {" ".join(words(p.text)) for p in own_prompts}
    return out


def joined(some: Sequence[Prompt], longest: float) -> list[Utterance]:
    """Prompts one after another, as clips of at most `longest` seconds; longer ones are left out."""
    out: list[Utterance] = []
    parts: list[Tensor] = []
    texts: list[str] = []

    def finish() -> None:
        if parts:
            out.append(Utterance(f"prompts-{len(out)}", torch.cat(parts), " ".join(texts)))
        parts.clear()
        texts.clear()

    for prompt in some:
        samples = _read(prompt.path)
        if sum(map(len, parts)) + len(samples) > longest * RATE:
            finish()
        if len(samples) <= longest * RATE:
            parts += [samples, torch.zeros(round(_GAP * RATE))]
            texts.append(prompt.text)
    finish()
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
