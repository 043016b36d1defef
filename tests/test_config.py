"""FlexConfig: what is accepted, what is refused by name, and what comes back from JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from flexcore import FlexConfig

FULL: dict[str, Any] = {
    "first_layer": 3,
    "layers": (4, 7, 11),
    "selector": "nearest",
    "threshold": 0,
    "top_k": 5,
    "fraction": 0.25,
    "top_p": 1.0,
    "seed": 9,
    "selector_options": {"radius": 2, "names": ["a", "b"], "deep": {"x": None}},
    "readout": "text",
    "positions": "fractional",
    "init": "random",
    "fine_norm": True,
    "share_kv_projections": True,
    "static": True,
    "regions": "official",
    "region_size": 3,
    "fine_cache_bytes": 1 << 40,
    "alpha_warmup": 3.5,
    "selection_loss": 0.3,
}


def test_full_covers_every_field() -> None:
    default = FlexConfig()
    assert set(FULL) == {f.name for f in dataclasses.fields(FlexConfig)}
    assert all(FULL[name] != getattr(default, name) for name in FULL)


@pytest.mark.parametrize(
    "config", [FlexConfig(), FlexConfig(**FULL), FlexConfig.reference(), FlexConfig(layers=())]
)
def test_json_round_trip(config: FlexConfig) -> None:
    again = FlexConfig.from_json(config.to_json())
    assert again == config and again is not config
    assert again.layers is None or isinstance(again.layers, tuple)
    assert FlexConfig.from_dict(config.to_dict()) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert set(config.to_dict()) == set(FULL)


def test_every_field_survives_json() -> None:
    for name, value in FULL.items():
        assert getattr(FlexConfig.from_json(FlexConfig(**{name: value}).to_json()), name) == value


OUT_OF_RANGE: dict[str, list[Any]] = {
    "selection_loss": [-0.1, math.nan, "0.3", True],
    "first_layer": [-1, 10_001, 1.0, True, "8"],
    "layers": [5, "12", (3, 2), (3, 3), (-1,), (1, None), (True,), (1.0,)],
    "selector": ["", None, 3],
    "threshold": [-1, 256, 48.0, True, None, "48"],
    "top_k": [0, -1, 2.0, False, 1 << 32],
    "fraction": [-0.01, 1.01, math.nan, None, True, "0.1"],
    "top_p": [-0.01, 1.01, math.nan, None],
    "seed": [-1, 1 << 31, 0.5, None],
    "selector_options": [None, [("a", 1)], "a", 3],
    "readout": ["last", "", None, 1],
    "positions": ["Parent", None],
    "init": ["zeros", None],
    "fine_norm": [None, 1, "yes"],
    "share_kv_projections": [None, 0, "no"],
    "static": [None, 1, "yes"],
    "regions": ["tiles", None, 9],
    "region_size": [0, -8, 8.0, None, True],
    "fine_cache_bytes": [-1, 1.5, True, "4GB"],
    "alpha_warmup": [-0.1, math.inf, math.nan, None, "fast"],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in OUT_OF_RANGE.items() for value in values],
    ids=lambda v: v if isinstance(v, str) and v in OUT_OF_RANGE else repr(v),
)
def test_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        FlexConfig(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} must"):
        FlexConfig().replace(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} must"):
        FlexConfig.from_dict({name: value})


def test_each_field_is_checked() -> None:
    assert set(OUT_OF_RANGE) == set(FULL)


EDGES: list[dict[str, Any]] = [
    {"first_layer": 0},
    {"layers": [0]},
    {"layers": range(3, 6)},
    {"threshold": 255},
    {"top_k": 1},
    {"fraction": 0},
    {"fraction": 1},
    {"top_p": 0},
    {"seed": (1 << 31) - 1},
    {"fine_cache_bytes": 0},
    {"fine_cache_bytes": None},
    {"alpha_warmup": 0},
    {"region_size": 1},
]


@pytest.mark.parametrize("change", EDGES, ids=str)
def test_the_edges_are_accepted(change: dict[str, Any]) -> None:
    config = FlexConfig(**change)
    (name,) = change
    expected = tuple(change[name]) if name == "layers" else change[name]
    assert getattr(config, name) == expected
    assert FlexConfig.from_json(config.to_json()) == config


def test_unknown_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"\['theshold', 'top_q'\].*'threshold'"):
        FlexConfig.from_dict({"top_q": 1, "theshold": 48, "seed": 0})
    with pytest.raises(TypeError, match="theshold"):
        FlexConfig(theshold=48)  # type: ignore[call-arg]
    for text in ("[1]", "3", "null"):
        with pytest.raises(ValueError, match="must be an object"):
            FlexConfig.from_json(text)
    with pytest.raises(ValueError, match="Expecting"):
        FlexConfig.from_json("{")


def test_reference_is_the_official_recipe() -> None:
    """Semantics sections 1, 3, 4 and 6: layer 8 selects, threshold 48 of 255, 9x9 regions, blended tables."""
    config = FlexConfig.reference()
    official = {
        "first_layer": 8,
        "selector": "threshold",
        "threshold": 48,
        "regions": "official",
        "positions": "official",
        "init": "random",
        "readout": "answer",
        "alpha_warmup": 10.0,
        "fine_norm": False,
        "share_kv_projections": False,
        "static": False,
    }
    assert {name: getattr(config, name) for name in official} == official
    changed = FlexConfig.reference(threshold=64, first_layer=2)
    assert (changed.threshold, changed.first_layer, changed.regions) == (64, 2, "official")
    assert FlexConfig() != config
    with pytest.raises(ValueError, match="threshold must be an integer"):
        FlexConfig.reference(threshold=999)


@pytest.mark.parametrize("warmup", [0.0, 3.0, 10.0])
def test_alpha_is_the_epoch_times_the_warmup(warmup: float) -> None:
    config = FlexConfig(alpha_warmup=warmup)
    for epoch in (-0.5, 0.0, 0.04, 0.1, 0.33, 1.0, 7.0):
        expected = epoch * warmup
        expected = 0.0 if expected < 0 else 1.0 if expected > 1 else expected
        assert config.alpha(epoch) == expected
    assert 0 < FlexConfig(alpha_warmup=3.0).alpha(0.1) < 1


def test_a_config_is_a_value() -> None:
    options = {"radius": 2}
    config = FlexConfig(selector_options=options)
    options["radius"] = 3
    assert config.selector_options == {"radius": 2}
    assert hash(config) == hash(FlexConfig(selector_options={"radius": 2}))
    assert config.replace(seed=1) != config and config.replace() == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
