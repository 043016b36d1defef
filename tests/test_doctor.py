"""`flexcore doctor`: every finding, in environments that are made up, and once in the one at hand."""

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from flexcore import cli, doctor, plugins
from tests.fake_plugins import Image, registering

REQUIRES = [
    "torch>=2.6",
    "transformers>=5.0,<6",
    "tqdm",
    "tomli; python_version < '3'",
    "pillow; extra == 'image'",
    "decord2; extra == 'video'",
    "soundfile; extra == 'audio'",
    "torchaudio; extra == 'audio'",
    "accelerate; extra == 'train'",
    "matplotlib; extra == 'cli'",
    "pillow; extra == 'cli'",
    "flexcore[image,video]; extra == 'all'",
]


@dataclass
class Environment:
    """What is installed, and how trying it out ends."""

    versions: dict[str, str] = field(
        default_factory=lambda: {"flexcore": "0.1.0", "torch": "2.9.1", "transformers": "5.1.0", "tqdm": "4"}
    )
    builds: dict[str, str] = field(default_factory=dict)
    python: str = ">=3.11"
    answers: dict[str, tuple[bool, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def version(self, name: str) -> str:
        if name not in self.versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return self.versions[name]

    def probe(self, code: str) -> tuple[bool, str]:
        self.asked.append(code)
        return next((answer for part, answer in self.answers.items() if part in code), (True, "fine"))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    made = Environment()
    monkeypatch.setattr(importlib.metadata, "version", made.version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: {"Requires-Python": made.python})
    monkeypatch.setattr(doctor, "probe", made.probe)
    monkeypatch.setattr(doctor, "build", lambda name: made.builds.get(name, made.versions.get(name)))
    return made


def only(checks: list[doctor.Check], status: str, *fragments: str) -> doctor.Check:
    """The one check there is has this status and says all of this."""
    (check,) = checks
    assert check["status"] == status, check
    for fragment in fragments:
        assert fragment in f"{check['found']} -> {check['advice']}"
    return check


def named(checks: list[doctor.Check], name: str) -> list[doctor.Check]:
    return [check for check in checks if check["name"] == name]


def test_versions_in_range(environment):
    checks = doctor.check_flexcore() + doctor.check_python() + doctor.check_requirements()
    assert [c["name"] for c in checks] == ["flexcore", "python", "torch", "transformers", "tqdm"]
    assert not doctor.failed(checks) and {c["advice"] for c in checks} == {None}


def test_versions_out_of_range(environment):
    environment.versions.update(torch="2.5.0+cpu", transformers="4.57.1")
    del environment.versions["tqdm"]
    environment.python = ">=4"
    only(doctor.check_python(), "fail", "flexcore needs >=4", "make an environment with Python >=4")
    checks = doctor.check_requirements()
    only(named(checks, "torch"), "fail", "2.5.0+cpu", "flexcore needs >=2.6", "install 'torch>=2.6'")
    only(named(checks, "transformers"), "fail", "4.57.1", "install 'transformers<6,>=5.0'")
    only(named(checks, "tqdm"), "fail", "not installed", "install 'tqdm'")


def test_a_prerelease_of_the_next_torch_is_in_range(environment):
    environment.versions["torch"] = "2.10.0.dev20260101+cu130"
    only(named(doctor.check_requirements(), "torch"), "ok", "2.10.0.dev20260101+cu130")


def test_flexcore_on_the_path_only(environment):
    del environment.versions["flexcore"]
    only(doctor.check_flexcore(), "fail", "isn't installed", "pip install -e")
    assert not doctor.check_python() + doctor.check_requirements() + doctor.check_extras()


def test_extras(environment):
    environment.versions.update(pillow="12.0", soundfile="0.13")
    checks = doctor.check_extras()
    only(named(checks, "extra image"), "ok", "pillow 12.0")
    only(named(checks, "extra video"), "warn", "missing: decord2", "to look at videos", "'flexcore[video]'")
    only(named(checks, "extra audio"), "warn", "missing: torchaudio", "'flexcore[audio]'")
    only(named(checks, "extra cli"), "warn", "missing: matplotlib")
    assert not doctor.failed(checks)


def test_builds_that_do_not_fit(environment):
    environment.versions.update(torchaudio="2.9.1")
    environment.builds.update(torch="2.9.1+cpu", torchaudio="2.9.1+cu128")
    lost = "OSError: libcudart.so.12: cannot open shared object file"
    environment.answers["import torchaudio"] = (False, lost)
    environment.answers["LlamaForCausalLM"] = (False, lost)
    only(
        doctor.check_builds(),
        "fail",
        "2.9.1+cu128 beside torch 2.9.1+cpu",
        "the builds cpu and cu128 don't fit",
        lost,
        "same index (its cpu builds)",
        "pip uninstall torchaudio",
    )
    only(doctor.check_transformers(), "fail", lost, "uninstall the package")


def test_builds_that_fit(environment):
    assert not doctor.check_builds() and not environment.asked  # nothing to try out
    environment.versions.update(torchaudio="2.11", torchvision="0.29")
    # release numbers went separate ways: loading decides
    assert [check["status"] for check in doctor.check_builds()] == ["ok", "ok"]
    only(doctor.check_transformers(), "ok")


def test_torchvision_of_another_release(environment):
    environment.versions.update(torchvision="0.20")
    environment.answers["import torchvision"] = (
        False,
        "RuntimeError: operator torchvision::nms does not exist",
    )
    check = only(doctor.check_builds(), "fail", "torchvision::nms", "install torch and torchvision together")
    assert "don't fit" not in check["found"]  # the tags agree: no claim about them


def test_decord(environment):
    assert not doctor.check_decord()
    environment.versions["decord2"] = "3.4"
    only(doctor.check_decord(), "ok", "decord2 3.4", "H.264")
    environment.answers["VideoReader"] = (False, "OSError: libdecord.so")
    only(doctor.check_decord(), "fail", "can't open an H.264 clip: OSError: libdecord.so", "decord2")
    environment.asked.clear()
    environment.versions["decord"] = "0.6.0"
    only(
        doctor.check_decord(),
        "fail",
        "decord 0.6.0 and decord2 3.4 both install the module 'decord'",
        "pip uninstall -y decord decord2 && python -m pip install --force-reinstall decord2",
    )
    assert not environment.asked


def test_soundfile(environment):
    assert not doctor.check_soundfile()
    environment.versions["soundfile"] = "0.13"
    known = ["1.2.2", ["FLAC", "MP3", "OGG", "WAV"]]
    environment.answers["import json, soundfile"] = (True, json.dumps(known))
    only(doctor.check_soundfile(), "ok", "libsndfile 1.2.2")
    known[1].remove("MP3")
    environment.answers["import json, soundfile"] = (True, json.dumps(known))
    only(doctor.check_soundfile(), "warn", "without MP3", "libsndfile 1.1 or newer")
    environment.answers["import json, soundfile"] = (False, "OSError: sndfile library not found")
    only(doctor.check_soundfile(), "fail", "sndfile library not found", "--force-reinstall soundfile")


def test_gpu(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: ([60, 1][i] << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H100")
    monkeypatch.setattr(doctor, "_sdpa", lambda: doctor._check("sdpa backends", "ok", "flash"))
    environment.versions["flash-attn"] = "2.8"
    environment.answers["import flash_attn"] = (False, "ImportError: undefined symbol")
    checks = doctor.check_gpu()
    only(named(checks, "gpu 0"), "ok", "NVIDIA H100, compute capability 9.0, 60.0 GiB of 80.0 GiB free")
    only(named(checks, "gpu 1"), "warn", "1.0 GiB of 80.0 GiB free", "close what else is running")
    only(named(checks, "flash-attn"), "fail", "2.8 doesn't load", "undefined symbol", "built for this torch")
    only(named(checks, "triton"), "warn", "not installed", "pip install triton")
    environment.versions["triton"] = "3.5"
    only(named(doctor.check_gpu(), "triton"), "ok", "3.5")


@pytest.mark.parametrize(
    ("cuda", "advice"), [(None, "a torch build with CUDA"), ("13.0", "driver to one for CUDA 13.0")]
)
def test_a_gpu_that_torch_does_not_find(environment, monkeypatch, cuda, advice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    only(doctor.check_gpu(), "ok")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    only(doctor.check_gpu(), "warn", "finds no GPU", advice)


def test_no_attention_kernel(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("No available kernel. Aborting execution.")

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, dtype: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    only([doctor._sdpa()], "warn", "the plain one only", "made for this GPU")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *x: None)
    only([doctor._sdpa()], "ok", "flash, efficient, cudnn")


@pytest.mark.parametrize(("free", "status"), [(8 << 30, "ok"), (1 << 30, "warn"), (None, "ok")])
def test_memory(monkeypatch, free, status):
    monkeypatch.setattr(doctor, "free_memory", lambda: free)
    only(doctor.check_memory(), status)


def test_plugins(monkeypatch):
    def fail() -> object:
        raise ImportError("libsound is missing")

    candidates = [
        ("image", "flexcore", lambda: registering(("image", Image))),
        ("sound", "flexcore-sound", fail),
    ]
    monkeypatch.setattr(plugins, "_registry", plugins._Registry())
    monkeypatch.setattr(plugins, "_candidates", lambda: iter(candidates))
    checks = doctor.check_plugins()
    only(named(checks, "plug-in image"), "ok", "image from flexcore")
    only(
        named(checks, "plug-in sound"), "fail", "libsound is missing", "update or uninstall the distribution"
    )


def test_a_check_that_crashes_is_reported(monkeypatch):
    def check_the_moon() -> list[doctor.Check]:
        raise ZeroDivisionError("no moon")

    monkeypatch.setattr(doctor, "CHECKS", (check_the_moon, lambda: [doctor._check("sun", "ok", "shines")]))
    checks = doctor.diagnose()
    assert [check["name"] for check in checks] == ["the moon", "sun"]
    only(checks[:1], "fail", "ZeroDivisionError: no moon", "report this")


@pytest.mark.parametrize("worst", ["ok", "warn", "fail"])
def test_the_command(monkeypatch, capsys, worst):
    found = [doctor._check("sun", "ok", "shines"), doctor._check("sky", worst, "is grey", "wait")]
    monkeypatch.setattr(doctor, "CHECKS", (lambda: found,))
    status = 1 if worst == "fail" else 0
    assert cli.main(["doctor", "--json"]) == status
    assert json.loads(capsys.readouterr().out) == found
    assert cli.main(["doctor"]) == status
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["ok", "sun", "shines"]
    assert [line.strip() for line in out[1:3]] == [f"{worst:<4}  sky  is grey", "-> wait"]
    assert (
        out[-1]
        == f"{1 + (worst == 'ok')} ok, {int(worst == 'warn')} to look at, {int(worst == 'fail')} failed"
    )


def test_probe(monkeypatch, tmp_path):
    assert doctor.probe("print('a'); print('b')") == (True, "b")
    assert doctor.probe("raise OSError('libcudart is missing')") == (False, "OSError: libcudart is missing")
    assert doctor.probe("import os; os.kill(os.getpid(), 9)") == (False, "ended by signal 9")
    (tmp_path / "json.py").write_text("raise RuntimeError('a file of the current folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert doctor.probe("import json; print('fine')") == (True, "fine")
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 0.2)
    assert doctor.probe("import time; time.sleep(60)") == (False, "no answer within 0.2 s")


def test_a_library_that_really_fails_to_load(monkeypatch, tmp_path):
    package = tmp_path / "torchaudio"
    package.mkdir()
    (package / "version.py").write_text("__version__ = '2.9.1+cu999'\n")
    (package / "__init__.py").write_text(
        "raise OSError('libcudart.so.999: cannot open shared object file')\n"
    )
    info = tmp_path / "torchaudio-2.9.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchaudio\nVersion: 2.9.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for known in ("torchaudio", "torchaudio.version"):
        monkeypatch.delitem(sys.modules, known, raising=False)
    checks = named(doctor.check_builds(), "torchaudio")
    only(
        checks, "fail", f"2.9.1+cu999 beside torch {torch.__version__}", "libcudart.so.999", "cu999 don't fit"
    )
    assert "torchaudio" not in sys.modules


@pytest.mark.slow
def test_the_environment_at_hand():
    code = (
        "import sys; from flexcore.cli import main; status = main(['doctor', '--json']); "
        "heavy = {'transformers', 'torchaudio', 'torchvision', 'decord', 'soundfile', 'matplotlib'}; "
        "print(status, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    checks = json.loads(done.stdout)
    failures = [check for check in checks if check["status"] == "fail"]
    assert done.stderr.splitlines()[-1] == f"{int(bool(failures))} []"
    assert not [check for check in checks if "the check itself crashed" in check["found"]]
    assert {"torch", "transformers", "gpu", "extra image"} <= {check["name"] for check in checks}
    assert Path(doctor.__file__).name not in done.stderr
