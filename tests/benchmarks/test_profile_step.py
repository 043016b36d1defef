"""The profile of a step: its parts exist, and time and operations go to the innermost one."""

from __future__ import annotations

import importlib
import json
import time

import pytest
import torch

from benchmarks.profile_step import PARTS, REST, WHAT, Meter, main
from flexcore.selection import Selector

SMALL = "--hidden 64 --layers 4 --first-layer 1 --repeats 2 --slow-repeats 1"


@pytest.mark.parametrize("label", PARTS)
def test_every_part_is_something_that_exists(label):
    """A part that was renamed would be left out of the table, and its time booked on the part around it."""
    module, path = PARTS[label]
    owner = importlib.import_module(module)
    for name in path.split("."):
        owner = getattr(owner, name)
    assert callable(owner)


def test_time_and_operations_go_to_the_innermost_part():
    meter = Meter()

    def inside():
        time.sleep(0.02)
        return torch.ones(2) + 1  # two operations

    booked = meter.around("inner", inside)

    def outside():
        time.sleep(0.01)
        return booked() * 2  # one more

    whole = meter.around("outer", outside)
    with meter:
        assert whole().tolist() == [4, 4]
    assert meter.operations == {"inner": 2, "outer": 1}
    seconds, total = meter.read(whole)
    assert seconds["inner"] >= 0.02 and seconds["outer"] >= 0.01 and meter.running == [REST]
    assert 0.03 <= sum(seconds.values()) <= total


def test_a_part_that_fails_is_left_behind():
    meter = Meter()

    def broken():
        raise KeyError("broken")

    with pytest.raises(KeyError):
        meter.around("inner", broken)()
    assert meter.running == [REST]


@pytest.mark.parametrize("what", WHAT)
def test_a_profile_accounts_for_all_operations(what, capsys):
    plain = Selector.select
    assert main(["--what", what, "--json", *SMALL.split()]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts = found["parts"]
    assert sum(part["operations"] for part in parts.values()) == found["operations"]["flex"]
    assert found["operations"]["flex"] > found["operations"]["coarse"] > 0
    assert {"readout", "selector", REST} <= set(parts) and found["ratio"]["median"] > 0
    assert ("static: all regions" in parts) == (what == "static")
    assert Selector.select is plain, "nothing stays booked"
