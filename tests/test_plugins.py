"""Discovery of plug-ins: a broken one is reported by name and hides nobody."""

import importlib.metadata
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from flexcore import hookimpl, plugins
from flexcore.errors import FlexcoreError
from tests.fake_plugins import Image, Video, marked, module, registering


@dataclass
class EntryPoint:
    """As much of importlib.metadata.EntryPoint as discovery may rely on."""

    name: str
    dist: SimpleNamespace | None
    load: Callable[[], object]


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs fake plug-ins, each (entry point name, distribution, plug-in or its import error)."""
    monkeypatch.setattr(plugins, "_registry", plugins._Registry())
    monkeypatch.setattr(plugins, "_BUILTIN", ())
    found: list[EntryPoint] = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        assert group == "flexcore"
        return found

    def install(*rows: tuple[str, str | None, object]) -> None:
        def loader(plugin: object) -> Callable[[], object]:
            def load() -> object:
                if isinstance(plugin, BaseException):
                    raise plugin
                return plugin

            return load

        for name, distribution, plugin in rows:
            dist = SimpleNamespace(name=distribution) if distribution else None
            found.append(EntryPoint(name, dist, loader(plugin)))

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return install


def errors() -> dict[str, str]:
    return {row["name"]: row["error"] for row in plugins.report() if row["error"]}


def only_healthy_left(culprit: str, *fragments: str) -> None:
    """`culprit` is reported with all fragments and registered nothing; "image" is there all the same."""
    assert list(plugins.adapters()) == ["image"]
    assert list(errors()) == [culprit]
    for fragment in fragments:
        assert fragment in errors()[culprit]
    assert plugins.load_adapter_class("image") is Image


def test_healthy(install: Install) -> None:
    @hookimpl
    def flexcore_register_selectors(register: Callable[[str, type], None]) -> None:
        register("best", int)

    install(
        ("image", "flexcore", registering(("image", Image))),
        ("more", "flexcore-more", registering(("video", Video), ("clip", Video))),
        ("best", None, module(flexcore_register_selectors=flexcore_register_selectors)),
    )
    assert list(plugins.adapters()) == ["clip", "image", "video"]
    registration = plugins.adapters()["video"]
    assert (registration.cls, registration.kind) == (Video, "adapter")
    assert (registration.plugin, registration.distribution) == ("more", "flexcore-more")
    assert plugins.selectors()["best"].distribution == "unknown"
    assert plugins.load_selector_class("best") is int
    assert plugins.report()[1:] == [
        {
            "name": "more",
            "distribution": "flexcore-more",
            "error": None,
            "adapters": ["clip", "video"],
            "selectors": [],
        },
        {"name": "best", "distribution": "unknown", "error": None, "adapters": [], "selectors": ["best"]},
    ]


def test_adapters_and_selectors_do_not_share_names(install: Install) -> None:
    @hookimpl
    def flexcore_register_selectors(register: Callable[[str, type], None]) -> None:
        register("image", int)

    install(
        ("image", "flexcore", registering(("image", Image))),
        ("other", "other", module(flexcore_register_selectors=flexcore_register_selectors)),
    )
    assert plugins.load_adapter_class("image") is Image
    assert plugins.load_selector_class("image") is int
    assert not errors()


def test_mapping_is_read_only(install: Install) -> None:
    install(("image", "flexcore", registering(("image", Image))))
    with pytest.raises(TypeError):
        plugins.adapters()["mine"] = None  # type: ignore[index]


def test_load_adapter_passes_options(install: Install) -> None:
    install(("image", "flexcore", registering(("image", Image))))
    adapter = plugins.load_adapter("image", "model", "processor", zoom=5)
    assert (adapter.model, adapter.processor, adapter.zoom) == ("model", "processor", 5)
    with pytest.raises(TypeError, match="colour"):
        plugins.load_adapter("image", "model", "processor", colour="red")


def test_unknown_name_lists_known_ones(install: Install) -> None:
    install(("a", "x", registering(("video", Video))), ("b", "y", registering(("image", Image))))
    with pytest.raises(ValueError, match=r"unknown adapter 'audio'; known adapters: image, video$") as caught:
        plugins.load_adapter("audio", None, None)
    assert isinstance(caught.value, FlexcoreError)
    with pytest.raises(ValueError, match=r"unknown selector 'audio'; known selectors: none$"):
        plugins.load_selector_class("audio")


def test_unknown_name_of_a_failed_plugin_carries_its_error(install: Install) -> None:
    failure = ImportError("no module named 'sox'")
    install(("audio", "flexcore-audio", failure), ("image", "flexcore", registering(("image", Image))))
    with pytest.raises(
        ValueError, match=r"known adapters: image; .*'flexcore-audio' failed.*'sox'"
    ) as caught:
        plugins.load_adapter("audio", None, None)
    assert caught.value.__cause__ is failure


@pytest.mark.parametrize("first", ["healthy", "broken"])
@pytest.mark.parametrize(
    "failure",
    [
        ImportError("no module named 'sox'"),
        AttributeError("module has no attribute 'plugin'"),
        SyntaxError("bad"),
        SystemExit(3),
    ],
    ids=lambda e: type(e).__name__,
)
def test_import_error(
    install: Install, first: str, failure: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [("image", "flexcore", registering(("image", Image))), ("broken", "bad-dist", failure)]
    install(*(rows if first == "healthy" else rows[::-1]))
    only_healthy_left("broken", type(failure).__name__, str(failure))
    assert "'broken' of distribution 'bad-dist'" in caplog.text


@pytest.mark.parametrize("first", ["healthy", "broken"])
@pytest.mark.parametrize(
    ("plugin", "fragment"),
    [
        (registering(("video", Video), then=RuntimeError("half-way")), "RuntimeError: half-way"),
        (registering(("video", Video), ("my video", Video)), "'my video'"),
        (module(flexcore_register_adaptors=marked), "flexcore_register_adaptors"),
        (module(flexcore_register_adapters=hookimpl(lambda register, model: None)), "model"),
    ],
    ids=["half-way", "bad-name", "misspelt", "wrong-signature"],
)
def test_broken_plugin(install: Install, first: str, plugin: object, fragment: str) -> None:
    rows = [("image", "flexcore", registering(("image", Image))), ("broken", "bad-dist", plugin)]
    install(*(rows if first == "healthy" else rows[::-1]))
    only_healthy_left("broken", fragment)


def test_keyboard_interrupt_passes_and_leaves_no_half_scan(install: Install) -> None:
    interrupts: list[BaseException] = [KeyboardInterrupt()]

    class Interrupted:
        @hookimpl
        def flexcore_register_adapters(self, register: Callable[[str, type], None]) -> None:
            if interrupts:
                raise interrupts.pop()
            register("video", Video)

    install(("image", "flexcore", registering(("image", Image))), ("slow", "slow", Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        plugins.adapters()
    assert list(plugins.adapters()) == ["image", "video"]


def test_name_claimed_twice(install: Install) -> None:
    install(
        ("image", "flexcore", registering(("image", Image))),
        ("fancy", "fancy-images", registering(("image", Video), ("fancy", Video))),
        ("clip", "clips", registering(("clip", Image))),
    )
    for _ in range(2):  # asking doesn't change the answer
        with pytest.raises(plugins.PluginError, match=r"'image' .*'flexcore'.*'fancy-images'"):
            plugins.load_adapter("image", None, None)
    assert list(plugins.adapters()) == ["clip", "fancy"]
    assert plugins.load_adapter_class("fancy") is Video
    rows = {row["name"]: row for row in plugins.report()}
    assert rows["clip"]["error"] is None
    for name in ("image", "fancy"):
        assert "flexcore" in str(rows[name]["error"]) and "fancy-images" in str(rows[name]["error"])


def test_one_class_by_two_ways_is_no_conflict(install: Install) -> None:
    plugin = registering(("image", Image))
    install(("image", "flexcore", plugin), ("alias", "flexcore", plugin))
    assert plugins.load_adapter_class("image") is Image
    assert not errors()


def test_in_process_registration(install: Install) -> None:
    install(("image", "flexcore", registering(("image", Image))))
    plugins.register_adapter("mine", Image)
    plugins.register_adapter("mine", Video)  # a notebook cell that ran again
    plugins.register_selector("mine", int)
    assert plugins.load_adapter_class("mine") is Video
    assert plugins.adapters()["mine"].distribution == "this process"
    assert plugins.load_selector_class("mine") is int
    assert plugins.report()[-1]["adapters"] == ["mine"]
    with pytest.raises(ValueError, match=r"'image' belongs to .* distribution 'flexcore'"):
        plugins.register_adapter("image", Video)
    assert plugins.load_adapter_class("image") is Image
    with pytest.raises(ValueError, match="lower-case"):
        plugins.register_selector("My selector", int)
    with pytest.raises(ValueError, match="registered as a class"):
        plugins.register_adapter("mine", Video(None, None))  # type: ignore[arg-type]


def test_reload(install: Install) -> None:
    install(("image", "flexcore", registering(("image", Image))))
    plugins.register_adapter("mine", Image)
    assert list(plugins.adapters()) == ["image", "mine"]
    install(("video", "late", registering(("video", Video))))
    assert list(plugins.adapters()) == ["image", "mine"]
    plugins.reload()
    assert list(plugins.adapters()) == ["image", "mine", "video"]


def test_plugin_installed_later_claims_an_in_process_name(install: Install) -> None:
    install()
    plugins.register_adapter("image", Video)
    install(("image", "flexcore", registering(("image", Image))))
    plugins.reload()
    with pytest.raises(plugins.PluginError, match=r"'flexcore'.*'this process'"):
        plugins.load_adapter_class("image")


def test_plugin_that_asks_for_plugins_while_loading(install: Install) -> None:
    class Curious:
        @hookimpl
        def flexcore_register_adapters(self, register: Callable[[str, type], None]) -> None:
            register("more", plugins.load_adapter_class("image"))

    install(("curious", "bad-dist", Curious()), ("image", "flexcore", registering(("image", Image))))
    only_healthy_left("curious", "while they are being loaded")


def test_threads_share_one_scan(install: Install) -> None:
    scans: list[int] = []

    class Slow:
        @hookimpl
        def flexcore_register_adapters(self, register: Callable[[str, type], None]) -> None:
            scans.append(threading.get_ident())
            time.sleep(0.05)
            register("image", Image)

    install(("image", "flexcore", Slow()))
    seen: list[type] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        seen.append(plugins.load_adapter_class("image"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [Image] * 8
    assert len(scans) == 1


def test_builtin_modules_come_first_and_may_be_absent(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "_BUILTIN", ("flexcore.no_such_module", "flexcore.selection"))
    install(("image", "flexcore", registering(("image", Image))))
    assert [(row["name"], row["distribution"]) for row in plugins.report()] == [
        ("flexcore.selection", "flexcore"),
        ("image", "flexcore"),
    ]
    assert "threshold" in plugins.selectors()
    assert not errors()


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_import_is_lazy() -> None:
    """Importing the module asks nobody; asking imports the plug-ins' modules but not what they need later."""
    heavy = "[m for m in ('transformers', 'PIL', 'matplotlib', 'decord', 'torchaudio') if m in sys.modules]"
    adapters = "[m for m in sys.modules if m.startswith('flexcore_adapters')]"
    assert python(f"import sys, flexcore.plugins; print({heavy} + {adapters})") == "[]"
    ask = "flexcore.plugins.adapters(); flexcore.plugins.report()"
    assert python(f"import sys, flexcore.plugins; {ask}; print({heavy})") == "[]"


def test_installed_entry_point(tmp_path: Any) -> None:
    """A real distribution on the path, read by importlib.metadata itself."""
    (tmp_path / "third_party.py").write_text(
        "import flexcore\n"
        "class Depth:\n    def __init__(self, model, processor): pass\n"
        "@flexcore.hookimpl\ndef flexcore_register_adapters(register):\n    register('depth', Depth)\n"
    )
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flexcore]\ndepth = third_party\ngone = third_party_gone\n")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "from flexcore import plugins\n"
        "print(plugins.adapters()['depth'].distribution)\n"
        "print([row['error'] for row in plugins.report() if row['name'] == 'gone'])"
    )
    out = python(code).splitlines()
    assert out[0] == "third-party"
    assert "ModuleNotFoundError" in out[1]
