"""Loading an example as a module: it finds its neighbours as it does when it is run as a script."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from flexcore.hf.tiny import tiny_llava

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def load_example() -> Callable[[str], ModuleType]:
    """A function from an example's name to its module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(FOLDER)
            spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved LLaVA of no size: 6x6 coarse cells, 4 layers."""
    folder = tmp_path_factory.mktemp("llava")
    model, processor = tiny_llava(layers=4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def read_costs() -> Callable[[str], dict[str, list[float | None]]]:
    """A function from what was printed to prefill GFLOP, answer GFLOP and seconds by way; None: not run."""

    def read(out: str) -> dict[str, list[float | None]]:
        rows = {}
        for name in ("coarse only", "flex", "dense high resolution"):
            (line,) = [line for line in out.splitlines() if line.startswith(name + "  ")]
            found = re.search(r"([\d,]+\.\d+) +([\d,]+\.\d+) +([\d.]+|not run)$", line)
            assert found is not None, line
            rows[name] = [None if n == "not run" else float(n.replace(",", "")) for n in found.groups()]
        return rows

    return read
