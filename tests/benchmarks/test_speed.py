"""The speed benchmark on a model of no size: what it runs, how it compares, what it says."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest
import torch

from benchmarks import speed, speed_memory, speed_no_media, speed_report
from benchmarks.speed_arms import COARSE, Bench

TINY = ["--hidden", "64", "--layers", "4", "--first-layer", "1", "--repeats", "2", "--slow-repeats", "1"]


def result(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    draw, inside, trials = random.Random(0), 0, 1500
    for _ in range(trials):
        pairs = [draw.lognormvariate(0, 0.3) for _ in range(31)]
        found = speed.ratio(pairs, [1.0] * len(pairs))
        assert found["median"] == statistics.median(pairs) and found["pairs"] == 31
        assert found["quartile_1"] < found["low"] < found["median"] < found["high"] < found["quartile_3"]
        inside += found["low"] <= 1 <= found["high"]
    # at least 95 %, and with 31 pairs not much more: the next narrower interval holds it in 93 %
    assert 0.935 < inside / trials < 0.985
    exact = 1 - 2 * sum(math.comb(31, i) for i in range(10)) / 2**31
    assert sorted(pairs)[9] == found["low"] and exact > 0.95


def test_arms_take_turns_in_both_orders():
    ran: list[str] = []
    runs = {name: lambda name=name: (ran.append(name), float(len(ran)))[1] for name in "abc"}
    seconds = speed.rounds(3, runs, "nothing")
    assert "".join(ran) == "cba" + "abc" + "cba" + "abc"
    assert seconds == {"a": [4.0, 9.0, 10.0], "b": [5.0, 8.0, 11.0], "c": [6.0, 7.0, 12.0]}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--arms", "coarse", "dense"], "--arms must have flex among them"),
        (["--arms", "flex", "official", "--batch", "2"], "--arms must be among coarse, flex, dense"),
        (["--arms", "flex", "dense", "--on-demand"], "--arms must be among coarse, flex"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_run(capsys, options, message):
    with pytest.raises(SystemExit):
        speed.arguments(options)
    assert message in capsys.readouterr().err


def test_every_arm_and_part(capsys):
    assert speed.main([*TINY, "--json"]) == 0
    found = result(capsys)
    assert {
        *("prefill_flex_over_coarse", "prefill_official_over_flex", "prefill_dense_over_flex"),
        *("decode_flex_over_coarse", "decode_official_over_flex", "decode_official_over_coarse"),
        *("decode_dense_over_flex", "training_flex_over_coarse"),
    } == set(found["ratios"])
    assert all(value > 0 for value in found["ratios"].values())
    assert found["ratios"]["prefill_dense_over_flex"] > 2  # nine times the tokens
    assert found["regions"] == 16 and found["settings"]["fraction"] == 0.2
    union = found["union of the answer rows' regions"]
    assert set(union) == {"2", "3"} and all(16 / 81 <= share <= 1 for share in union.values())
    assert (
        "python -m benchmarks.speed" in found["command"] and found["versions"]["torch"] == torch.__version__
    )


def test_flex_reads_as_many_regions_as_it_is_told_to_and_then_holds_them():
    import flexcore
    from flexcore.hf.kv_cache import cache_argument

    bench = Bench(speed.arguments([*TINY, "--zoom", "9", "--on-demand", "--regions", "5"]))
    cache = bench.prefill("flex")[1]
    with torch.no_grad(), flexcore.trace(bench.model) as trace:
        for token in range(8):
            bench.model(torch.tensor([[token]]), **cache_argument(bench.model, cache))
    assert {int(r.regions.sum()) for r in trace} == {5}
    for layer in (1, 2):  # the last layer chooses for nobody, and only while a trace listens
        chosen = [r.regions for r in trace.where(layer=layer)]
        assert all(torch.equal(chosen[2], later) for later in chosen[3:])
    (stream,) = bench.streams.samples[0]
    assert stream.grid.n_fine == (9 * COARSE) ** 2 and stream.source.encoded == []  # every run has its own


def test_peaks_are_what_tensors_took():
    def run() -> torch.Tensor:
        kept = torch.ones(1 << 20)
        torch.ones(1 << 21)  # freed at once
        return kept + 1

    most = speed_memory.peak(run, torch.device("cpu"))
    assert 12 << 20 <= most < (12 << 20) + 4096


def test_memory_of_a_prefill(capsys):
    assert speed_memory.main([*TINY, "--arms", "coarse", "flex", "--json"]) in (0, 1)
    found = result(capsys)
    # 16 regions of 64 tokens in each of two layers, keys and values, 64 numbers each
    assert found["fine_kv_bytes"] == 2 * 16 * 64 * 2 * 64 * 4
    assert found["flex_beyond_coarse"] == found["peak_bytes"]["flex"] - found["peak_bytes"]["coarse"] > 0


def test_no_media_adds_no_operation():
    bench = Bench(speed.arguments(TINY))
    inputs = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
    assert speed_no_media.extra_operations(bench.model, inputs) == 0
    # a model that is looked into otherwise does more
    bench.model.register_forward_pre_hook(lambda module, args: torch.zeros(1) + 1 and None)
    assert speed_no_media.extra_operations(bench.model, inputs) > 0


def test_the_report_names_what_was_reached_and_what_was_not(tmp_path):

    def case(**ratios: float) -> dict:
        about = {
            "versions": {"torch": "2"},
            "machine": {"cpu": "some", "load": 9.0},
            "command": "python -m x --json",
        }
        times = {f"{part} {arm}": 10.0 for part in ("prefill", "decode") for arm in ("coarse", "flex")}
        return {
            **about,
            "ratios": ratios,
            "milliseconds": times,
            "spread": {
                name: {"median": value, "low": value - 0.1, "high": value + 0.1, "pairs": 31}
                for name, value in ratios.items()
            },
        }

    found = {
        "default": {
            "20 %": case(
                prefill_flex_over_coarse=1.1, decode_official_over_flex=2.0, decode_official_over_coarse=2.6
            ),
            "10 %": case(prefill_flex_over_coarse=1.07),
        },
        "zoom": {"3": case(prefill_flex_over_coarse=1.2), "27": case(prefill_flex_over_coarse=1.3)},
        "memory": {
            "20 %": {
                **{"flex_beyond_coarse": 20 << 20, "bound": 16 << 20, "fine_kv_bytes": 12 << 20},
                "peak_bytes": {"coarse": 40 << 20, "flex": 60 << 20},
            }
        },
    }
    text = speed_report.section(found)
    assert "| prefill, Flex over coarse, 20 % | <= 1.12 | 1.1 | yes |" in text
    assert "| prefill, Flex over coarse, 10 % | <= 1.06 | 1.07 | no |" in text
    assert ">= 2.08 | 2 | no |" in text and "<= 16 | 20 | no |" in text
    assert "| prefill, zoom 27 over zoom 3, as many tokens chosen | <= 1.15 | 1 | yes |" in text
    assert (
        "load" not in text and "| 20 % | prefill, flex / coarse | 1.100 | 1.000 to 1.200 | 31 | `x` |" in text
    )
    speed_report.plot(found, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"speed_fraction.png", "speed_zoom.png"}
