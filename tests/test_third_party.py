"""A third party's modality: examples/plugin_timeseries, installed, used by name, and broken on purpose."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import flexcore
from flexcore.hf.tiny import tiny_llama, tiny_tokenizer
from tests.hf.helpers import perturb

PLUGIN = Path(__file__).parents[1] / "examples" / "plugin_timeseries"
MODULE = PLUGIN / "flexcore_timeseries" / "__init__.py"

USE = """
import json, numpy, flexcore
from flexcore.hf.tiny import tiny_llama, tiny_tokenizer
tokenizer = tiny_tokenizer()
model = flexcore.wrap(tiny_llama(layers=4, vocab=len(tokenizer)))
adapter = flexcore.load_adapter("timeseries", model, tokenizer, channels=2)
inputs = adapter(text=["<series> up?", "no series"], series=[numpy.random.randn(700, 2)])
with flexcore.trace(model) as trace:
    out = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
print(json.dumps([type(adapter).__module__, list(out.shape), len(trace) > 0]))
"""


# ---------------------------------------------------------------------- its adapter, in this process


@pytest.fixture(scope="module")
def timeseries() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_timeseries", MODULE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    config = flexcore.FlexConfig(first_layer=1, selector="top_k", top_k=2)
    return perturb(flexcore.wrap(tiny_llama(layers=4, vocab=260), config))


def signal(samples: int, channels: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, channels, generator=torch.Generator().manual_seed(seed))


def test_a_batch_of_recordings_answers_and_reads_only_what_it_chose(timeseries, model):
    adapter = timeseries.TimeSeriesAdapter(model, tiny_tokenizer(), channels=2, patch=4, window=8)
    recordings = [signal(1000).numpy(), signal(33, seed=1), signal(32, seed=2)]
    texts = ["<series> how many?", "no series", "<series> or <series>"]
    inputs = adapter(text=texts, series=recordings)
    assert [[s.grid.coarse for s in sample] for sample in inputs["flex_streams"]] == [
        [(32,)],
        [],
        [(2,), (1,)],
    ]
    stats = inputs["flex_streams"].samples[0][0].source.stats
    assert stats.units == 0  # nothing is encoded at the full rate before the model asks
    with flexcore.trace(model) as trace:
        out = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (3, inputs["input_ids"].shape[1] + 3)
    chosen = {
        (r.sample, r.medium, region)
        for r in trace
        if r.read_in is not None
        for region in r.regions.nonzero()[:, 0].tolist()
    }
    assert stats.units == len(chosen) < 35
    assert {(sample, medium) for sample, medium, _ in chosen} == {(0, 0), (2, 0), (2, 1)}
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert adapter.encoder.weight.grad.abs().sum() > 0


def test_on_demand_equals_up_front(timeseries, model):
    adapter = timeseries.TimeSeriesAdapter(model, tiny_tokenizer(), patch=4, window=8)
    recording = signal(150, 1)[:, 0]
    (stream,) = adapter.streams(recording)
    assert stream.valid.tolist() == [True] * 38 + [False] * 2  # 150 samples are 37.5 patches of 5 windows
    normal = (recording - recording.mean()) / recording.std(correction=0)
    patches = torch.nn.functional.pad(normal, (0, 10)).unflatten(0, (5, 8, 4))
    with torch.no_grad():
        torch.testing.assert_close(stream.source.features(torch.arange(5)), adapter.encoder(patches))


@pytest.mark.parametrize(
    ("recording", "message"),
    [
        (np.zeros((5, 3)), r"series 0 must be \[T, 2\] with T >= 1, got \[5, 3\]"),
        (np.zeros((0, 2)), r"series 0 must be \[T, 2\] with T >= 1, got \[0, 2\]"),
        (np.array([[1.0, np.nan]]), "series 0 must hold finite numbers"),
    ],
    ids=["channels", "empty", "nan"],
)
def test_unusable_recordings(timeseries, model, recording, message):
    adapter = timeseries.TimeSeriesAdapter(model, tiny_tokenizer(), channels=2)
    with pytest.raises(ValueError, match=message):
        adapter(text="<series>", series=recording)


def test_wrong_options(timeseries, model):
    with pytest.raises(ValueError, match="channels, patch and window must be >= 1, got 1, 0 and 16"):
        timeseries.TimeSeriesAdapter(model, tiny_tokenizer(), patch=0)


# ---------------------------------------------------------------------- the package, in an environment of its own


def unpack(folder: Path, to: Path) -> None:
    """Install a pure Python package as an installer would: its module, and metadata from its pyproject.toml."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    name, number = project["project"]["name"], project["project"]["version"]
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        shutil.copytree(folder / package, to / package)
    info = to / f"{name.replace('-', '_')}-{number}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    lines = [f"{key} = {value}" for key, value in project["project"]["entry-points"]["flexcore"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[flexcore]", *lines, ""]))


def broken(name: str, old: str, new: str, to: Path) -> None:
    """A copy of the package under another name, broken in one place."""
    copied = to / "sources" / name
    shutil.copytree(PLUGIN, copied)
    module = f"flexcore_{name}"
    (copied / "flexcore_timeseries").rename(copied / module)
    pyproject = (copied / "pyproject.toml").read_text()
    pyproject = pyproject.replace("flexcore_timeseries", module).replace(
        "flexcore-timeseries", f"flexcore-{name}"
    )
    (copied / "pyproject.toml").write_text(pyproject.replace("timeseries = ", f"{name} = "))
    source = (copied / module / "__init__.py").read_text()
    assert old in source
    (copied / module / "__init__.py").write_text(source.replace(old, new))
    unpack(copied, to)


def run(to: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in an environment that has what this one has, and what was installed in `to`."""
    paths = [str(to), *(path for path in sys.path if path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def adapter_list(to: Path) -> dict[tuple[str, str], str | None]:
    """(name, distribution) to error, as the command prints them."""
    done = run(to, "-m", "flexcore.cli", "adapters", "--json")
    assert done.returncode == 0, done.stderr
    return {(row["name"], row["distribution"]): row["error"] for row in json.loads(done.stdout)}


def test_broken_packages_are_reported_and_hide_nobody(tmp_path):
    unpack(PLUGIN, tmp_path)
    register = "def flexcore_register_adapters(register: Callable[[str, type], None])"
    named = 'register("timeseries"'
    broken("unimportable", "import torch\n", "import no_such_sensor_library\n", tmp_path)
    broken("misspelt", "flexcore_register_adapters(", "flexcore_register_adaptors(", tmp_path)
    broken("argument", register, register.replace("register: ", "model, register: "), tmp_path)
    broken("late", named, f'raise RuntimeError("no licence")\n    {named}', tmp_path)
    rows = adapter_list(tmp_path)
    assert rows.pop(("timeseries", "flexcore-timeseries")) is None
    assert rows.pop(("image", "flexcore")) is None
    reasons = {
        ("unimportable", "flexcore-unimportable"): "No module named 'no_such_sensor_library'",
        ("misspelt", "flexcore-misspelt"): "flexcore_register_adaptors",
        ("argument", "flexcore-argument"): "model",
        ("late", "flexcore-late"): "RuntimeError: no licence",
    }
    assert {key: reason in str(rows.get(key)) for key, reason in reasons.items()} == dict.fromkeys(
        reasons, True
    )
    # flexcore's own adapters, whichever there are, stay healthy
    assert {error for (_, distribution), error in rows.items() if distribution == "flexcore"} <= {None}
    assert "the hooks are flexcore_register_adapters" in str(rows["misspelt", "flexcore-misspelt"])


def test_a_name_that_is_taken_is_reported_with_both_claimants(tmp_path):
    unpack(PLUGIN, tmp_path)
    broken("rival", 'register("timeseries"', 'register("image"', tmp_path)
    rows = adapter_list(tmp_path)
    assert rows["timeseries", "flexcore-timeseries"] is None
    for claimant in ("flexcore", "flexcore-rival"):
        error = str(rows["image", claimant])
        assert "'flexcore'" in error and "'flexcore-rival'" in error and "uninstall all but one" in error


@pytest.mark.slow
def test_installed_by_pip_and_used_by_name(tmp_path):
    pytest.importorskip("pip", reason="this environment has no pip to install with")
    pytest.importorskip(
        "hatchling", reason="the plug-in's build backend isn't installed, and may not be fetched"
    )
    project = tmp_path / "project"  # builds may write next to their sources
    shutil.copytree(PLUGIN, project)
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "--target", str(site), str(project)], check=True)
    assert adapter_list(site)["timeseries", "flexcore-timeseries"] is None
    done = run(site, "-c", USE)
    assert done.returncode == 0, done.stderr
    module, shape, traced = json.loads(done.stdout.splitlines()[-1])
    assert (module, shape[0], traced) == ("flexcore_timeseries", 2, True)
    demo = run(site, str(PLUGIN / "demo.py"))
    assert demo.returncode == 0, demo.stderr
    assert "47 coarse tokens of 1.28 s each" in demo.stdout and "looked at" in demo.stdout


@pytest.mark.slow
def test_used_by_name_and_a_broken_neighbour_is_named_in_the_error(tmp_path):
    unpack(PLUGIN, tmp_path)
    broken("radar", "import torch\n", "import no_such_sensor_library\n", tmp_path)
    done = run(tmp_path, "-c", USE)
    assert done.returncode == 0, done.stderr
    done = run(tmp_path, "-c", "import flexcore; flexcore.load_adapter('radar', None, None)")
    assert done.returncode == 1
    assert "unknown adapter 'radar'" in done.stderr and "'flexcore-radar' failed" in done.stderr
