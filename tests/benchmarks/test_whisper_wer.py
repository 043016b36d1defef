"""benchmarks/whisper_wer.py: what goes into which set, results that stay, and the section it writes."""

import json
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip(
    "soundfile", reason="soundfile reads the recordings (pip install 'flexcore[audio]')"
)
pytest.importorskip("torchaudio", reason="torchaudio resamples (pip install 'flexcore[audio]')")

from benchmarks.speech_data import RATE, Prompt, joined, split  # noqa: E402
from benchmarks.whisper_arms import rate  # noqa: E402
from benchmarks.whisper_wer import NOVEL, PROMPTS, Results, arguments, markdown  # noqa: E402


def test_no_text_is_in_two_sets() -> None:
    named = {
        "vm-1": "Press 4 to go on.",
        "vm-2": "You have mail.",
        "dir-1": "Press four, to go on!",
        "dir-2": "Whom do you look for?",
        "conf-1": "You have mail",
        "conf-2": "You are the only one here.",
        "conf-3": "You are the only one here.",
        "queue/hold": "Please hold the line.",
    }
    found = [Prompt(name, text, Path(name)) for name, text in named.items()]
    sets = split(found, {"test": {"vm"}, "validation": {"dir", "queue"}}, "training")
    assert {name: [p.name for p in some] for name, some in sets.items()} == {
        "test": ["vm-1", "vm-2"],
        "validation": ["dir-2", "queue/hold"],
        "training": ["conf-2", "conf-3"],
    }


def test_prompts_are_joined_up_to_a_length(tmp_path: Path) -> None:
    some = []
    for i, seconds in enumerate((2.0, 1.0, 9.0, 2.0, 1.5)):
        soundfile.write(tmp_path / f"{i}.wav", np.full(round(seconds * 8000), 0.1 * i), 8000)
        some.append(Prompt(f"a-{i}", f"text {i}", tmp_path / f"{i}.wav"))
    clips = joined(some, 5.0)
    # nine seconds are too long for any clip; the one before it ends there
    assert [clip.text for clip in clips] == ["text 0 text 1", "text 3 text 4"]
    assert [clip.seconds for clip in clips] == pytest.approx([3.6, 4.1])
    middle = [float(clips[0].samples[round(at * RATE)]) for at in (1.0, 2.15, 2.8)]
    assert middle == pytest.approx([0.0, 0.0, 0.1], abs=1e-2)


def test_results_stay_and_belong_to_their_settings(tmp_path: Path) -> None:
    made = []

    def make() -> dict:
        made.append(1)
        return {"arms": {"flex": row(1, 10)}}

    base = ["--cache", str(tmp_path)]
    for options in ([], ["--seeds", "5", "--markdown"], ["--lr", "0.1"], ["--lr", "0.1"]):
        found = Results(arguments([*base, *options])).get("trained flex, seed 0", make)
        assert rate(found["arms"]["flex"], PROMPTS) == 0.1
    assert len(made) == 2  # seeds and the like decide no single result

    def broken() -> dict:
        raise KeyboardInterrupt

    results = Results(arguments(base))
    with pytest.raises(KeyboardInterrupt):
        results.get("another", broken)
    assert results.get("another", make) == {"arms": {"flex": row(1, 10)}}


def row(wrong: int, words: int, fine: float = 0.0) -> dict:
    sets = {name: {"wrong": wrong, "words": words, "examples": []} for name in (PROMPTS, NOVEL)}
    return {"sets": sets, "coarse states": 150, "fine states": fine, "seconds": 1.0}


def test_the_section_says_what_was_measured() -> None:
    one = {"steps": 40, "CPU seconds": 50.0, "losses": [1.0, 0.5], "validation errors by step": {}}
    found = {
        "command": "python -m benchmarks.whisper_wer",
        "versions": {"torch": "2.0", "transformers": "5.0"},
        "machine": {"cores": 2, "threads": 1},
        "settings": {"pool": 10, "steps": 60, "every": 20, "seeds": 2},
        "sets": {
            name: {"clips": 7, "seconds": 70.4}
            for name in (PROMPTS, NOVEL, "validation prompts", "validation cards", "training")
        },
        "training": {
            "pooled only": [one, {**one, "steps": 60}],
            "flex": [{**one, "CPU seconds": 90.0}, {**one, "CPU seconds": 110.0}],
        },
        "untrained": {
            "full": [{**row(4, 100), "coarse states": 1500}],
            "flex": [row(12, 100, 39.4)],
            "flex, random regions": [row(50, 100, 40.2), row(60, 100, 40.2)],
        },
        "trained": {"flex": [row(5, 100, 39.4), row(7, 100, 39.4)]},
    }
    text = markdown(json.loads(json.dumps(found)))
    assert "| full | 4.0 % |  | 4.0 % |  | 1500 |" in text
    assert "| flex | 12.0 % | 6.0 % (5.0 to 7.0) | 12.0 % | 6.0 % (5.0 to 7.0) | 150 + 39 |" in text
    assert "| flex, random regions | 55.0 % (50.0 to 60.0) |  |" in text
    assert "after 40, 60 steps for pooling alone, after 40, 40 with fine projections" in text
    assert "50 s and 100 s of one core" in text and "7 clips, 70 s, 100 words" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {7}
    untrained = markdown({**found, "training": {}, "trained": {}})
    assert "| flex | 12.0 % |  |" in untrained and "seeds" not in untrained
