"""What `flexcore doctor` finds out about an environment, and what it says to do.

Versions and builds are read from the installed metadata. Whether a library really loads is tried in a process of its
own: one that crashes there takes nothing down here.
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypedDict

Status = Literal["ok", "warn", "fail"]

# What each extra is for, as the advice says it.
_EXTRAS = {
    "image": "look at pictures",
    "big": "look at pictures too large to hold in memory",
    "video": "look at videos",
    "audio": "listen to sound",
    "train": "train",
    "cli": "draw what was looked at",
    "bench": "run the benchmarks",
}
_DECORDS = ("decord", "decord2", "eva-decord")
_AUDIO_FORMATS = ("WAV", "FLAC", "OGG", "MP3")
_LOW_MEMORY = 2 << 30
_PROBE_SECONDS = 120
# Two grey frames of 64x48 pixels, H.264 in MP4, deflated: what most videos are.
_CLIP = (
    "eNp9Ur1PwlAQvxY0hJCICRoGhpoQwmICBDQxMUFdGBzVOKhJ4RVp6KNN+1o/Vh10czY4OOno5urA4GBcSdzcHPwf8K5AKIhe3r37"
    "ePfu3t3vAYBSF2eW7pgcQAaSyAXVq+W5VcwDhGa4aXoAYHCvwWCMQl8A0g1IQGtE0njUpF2Gf0nGtSNstYn6gWj6NUO/s2Fd+L/O"
    "1Lq05XwzrTHhoExphiNGNwZ5/bvSG2e6iorC2WTvWeQ47HZ8Y7nBDHt44ulMC0buoW1W1BYzNIqRTrjeqqOS8LifNPjMNOufpZit"
    "1QNtxFzbUAYPXHVE1UD92REOC8Q8EGh/jIIaz0EFZWUYEdvGeMXQq6eFleI0IJK9HrWGUVvS5ku09wmLxyg/5r/DZYKENvmic/0o"
    "QbjxPvdKA7FUxxqUJ05UhT2YrbzfZ0g6wp/78JmId4T0BLYT9BOn0Feb8MmBs/PxfwMJ5Gg/V80c3QuVUK67TBCWJa75kmgpiBti"
    "bauWZQRnENH7nyNStzUCNcOZSnZcu7pcy2Rj7fad2z10u0fom924VRbun34AClBvvA=="
)


class Check(TypedDict):
    """One thing that was looked at: its name, how it stands, what was found, and what to do about it."""

    name: str
    status: Status
    found: str
    advice: str | None


def diagnose() -> list[Check]:
    """Run every check; one that crashes is reported like any other."""
    # Most of the time goes into the processes that try out libraries: they may run side by side.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return [check for checks in pool.map(_guarded, CHECKS) for check in checks]


def failed(checks: Iterable[Check]) -> bool:
    """Whether any check failed; a warning is no failure."""
    return any(check["status"] == "fail" for check in checks)


def render(checks: Iterable[Check]) -> str:
    """The checks as lines of text, with what to do below each that needs something."""
    rows = list(checks)
    width = max((len(row["name"]) for row in rows), default=0)
    lines = []
    for row in rows:
        lines.append(f"{row['status']:<4}  {row['name']:<{width}}  {row['found']}")
        if row["advice"]:
            lines.append(f"{'':<4}  {'':<{width}}  -> {row['advice']}")
    counts = [sum(row["status"] == status for row in rows) for status in ("ok", "warn", "fail")]
    return "\n".join([*lines, "", "{} ok, {} to look at, {} failed".format(*counts)])


# ---------------------------------------------------------------------- what the checks ask


def version(distribution: str) -> str | None:
    """The installed version of a distribution, None if it isn't installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def probe(code: str) -> tuple[bool, str]:
    """Run Python code in a process of its own.

    Args:
        code: Prints what was found on its last line.

    Returns:
        Whether it ended well, and the last line of what it printed, or of its error.
    """
    try:
        done = subprocess.run(
            # -P: a file of the current folder must not pass for a library
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {_PROBE_SECONDS} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode < 0:  # a crash in native code leaves no message
        return False, f"ended by signal {-done.returncode}"
    return done.returncode == 0, lines[-1].strip() if lines else ""


def build(package: str) -> str | None:
    """The version with its build tag, as in `2.9.1+cpu`, read without importing the package.

    Wheels from the default index carry no tag in their metadata; their own `version.py` does.
    """
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if path is None or not path.is_file():
        return version(package)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("__version__"):
            return line.split("=", 1)[1].strip().strip("'\"")
    return version(package)


def _requirements() -> list[Any]:
    from packaging.requirements import Requirement

    if version("flexcore") is None:  # check_flexcore says so
        return []
    return [Requirement(text) for text in importlib.metadata.requires("flexcore") or []]


def _check(name: str, status: Status, found: str, advice: str | None = None) -> Check:
    return Check(name=name, status=status, found=found, advice=advice)


def _guarded(check: Callable[[], list[Check]]) -> list[Check]:
    name = check.__name__.removeprefix("check_").replace("_", " ")
    try:
        return check()
    except Exception as error:
        found = f"the check itself crashed with {type(error).__name__}: {error}"
        return [_check(name, "fail", found, "report this to flexcore, with the other lines of this list")]


# ---------------------------------------------------------------------- the checks


def check_flexcore() -> list[Check]:
    """flexcore is installed, not only on the path: its adapters come in through its metadata."""
    if installed := version("flexcore"):
        return [_check("flexcore", "ok", installed)]
    found = "its code is on the path, but it isn't installed, so its adapters can't be found"
    return [
        _check("flexcore", "fail", found, "python -m pip install -e FOLDER, the folder of its pyproject.toml")
    ]


def check_python() -> list[Check]:
    """Python against the range that flexcore declares."""
    from packaging.specifiers import SpecifierSet

    if version("flexcore") is None:
        return []
    wanted = importlib.metadata.metadata("flexcore")["Requires-Python"]
    found = f"{platform.python_version()} (flexcore needs {wanted})"
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return [_check("python", "ok", found)]
    return [_check("python", "fail", found, f"make an environment with Python {wanted}")]


def check_requirements() -> list[Check]:
    """What flexcore can't do without, against the ranges it declares."""
    out = []
    for requirement in _requirements():
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed, wanted = version(requirement.name), str(requirement.specifier)
        range_ = f" (flexcore needs {wanted})" if wanted else ""
        advice = f"python -m pip install '{requirement.name}{wanted}'"
        if installed is None:
            out.append(_check(requirement.name, "fail", f"not installed{range_}", advice))
        elif not requirement.specifier.contains(installed, prereleases=True):
            out.append(_check(requirement.name, "fail", f"{installed}{range_}", advice))
        else:
            out.append(_check(requirement.name, "ok", f"{installed}{range_}"))
    return out


def check_extras() -> list[Check]:
    """What each extra of flexcore brings; an absent one is no failure."""
    out = []
    for extra, purpose in _EXTRAS.items() if version("flexcore") else ():
        names = [
            r.name
            for r in _requirements()
            if r.name != "flexcore"
            and r.marker is not None
            and r.marker.evaluate({"extra": extra})
            # a marker that has nothing to do with extras holds for any
            and not r.marker.evaluate({"extra": ""})
        ]
        missing = [name for name in names if version(name) is None]
        if missing:
            advice = f"to {purpose}: python -m pip install 'flexcore[{extra}]'"
            out.append(_check(f"extra {extra}", "warn", f"missing: {', '.join(missing)}", advice))
        else:
            out.append(_check(f"extra {extra}", "ok", ", ".join(f"{n} {version(n)}" for n in names)))
    return out


def check_builds() -> list[Check]:
    """torchaudio and torchvision load beside the torch that is here."""
    out = []
    for package in ("torchaudio", "torchvision"):
        if version(package) is None:
            continue
        torch, mine = build("torch") or "none", build(package)
        works, message = probe(f"import {package}; print({package}.__version__)")
        found = f"{mine} beside torch {torch}"
        if works:
            out.append(_check(package, "ok", found))
            continue
        if _tag(torch) != _tag(mine or ""):
            found += (
                f": the builds {_tag(torch) or 'untagged'} and {_tag(mine or '') or 'untagged'} don't fit"
            )
        advice = (
            f"install torch and {package} together, from the same index (its {_tag(torch) or 'default'} builds), or "
            f"python -m pip uninstall {package}; until then transformers' models may not import either"
        )
        out.append(_check(package, "fail", f"{found}; import {package} ends with {message}", advice))
    return out


def _tag(build: str) -> str:
    return build.partition("+")[2]


def check_transformers() -> list[Check]:
    """A model's class can be imported: transformers imports much of what is installed on the way."""
    works, message = probe("from transformers import LlamaForCausalLM; print('imports')")
    if works:
        return [_check("transformers' models", "ok", "LlamaForCausalLM can be imported")]
    advice = "mend or uninstall the package that the message names; transformers imports it because it is installed"
    return [_check("transformers' models", "fail", f"importing LlamaForCausalLM ends with {message}", advice)]


def check_decord() -> list[Check]:
    """One distribution brings the module `decord`, and it opens a clip."""
    installed = {name: found for name in _DECORDS if (found := version(name))}
    if not installed:
        return []
    listed = " and ".join(f"{name} {found}" for name, found in installed.items())
    if len(installed) > 1:
        advice = f"python -m pip uninstall -y {' '.join(installed)} && python -m pip install --force-reinstall decord2"
        found = f"{listed} both install the module 'decord', each over the other's files"
        return [_check("decord", "fail", found, advice)]
    clip = base64.b64encode(zlib.decompress(base64.b64decode(_CLIP))).decode()
    works, message = probe(
        "import base64, io, decord\n"
        f"frames = decord.VideoReader(io.BytesIO(base64.b64decode('{clip}'))).get_batch([0, 1]).asnumpy()\n"
        "assert frames.shape == (2, 48, 64, 3) and 120 < frames.mean() < 136, 'frames came out wrong'\n"
        "print('opens H.264')"
    )
    if works:
        return [_check("decord", "ok", f"{listed}, opens an H.264 clip")]
    advice = "python -m pip install --force-reinstall decord2, whose wheels carry their decoders"
    return [_check("decord", "fail", f"{listed} can't open an H.264 clip: {message}", advice)]


def check_soundfile() -> list[Check]:
    """soundfile loads its library, and the library knows the usual formats."""
    if version("soundfile") is None:
        return []
    works, message = probe(
        "import json, soundfile\n"
        "print(json.dumps([soundfile.__libsndfile_version__, sorted(soundfile.available_formats())]))"
    )
    if not works:
        advice = "python -m pip install --force-reinstall soundfile, or install libsndfile with the system's packages"
        return [_check("soundfile", "fail", f"{version('soundfile')} doesn't load: {message}", advice)]
    library, formats = json.loads(message)
    missing = [name for name in _AUDIO_FORMATS if name not in formats]
    found = f"{version('soundfile')} with libsndfile {library}"
    if missing:
        advice = f"use libsndfile 1.1 or newer to read {' and '.join(missing)}; soundfile's wheels carry one"
        return [_check("soundfile", "warn", f"{found}, without {', '.join(missing)}", advice)]
    return [_check("soundfile", "ok", f"{found}, reads {', '.join(_AUDIO_FORMATS)}")]


def check_gpu() -> list[Check]:
    """A GPU, the attention backends that run on it, and its free memory."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            accelerator = (
                "Apple's MPS" if torch.backends.mps.is_available() else "none; models run on the CPU"
            )
            return [_check("gpu", "ok", accelerator)]
        advice = (
            "install a torch build with CUDA"
            if torch.version.cuda is None
            else f"update the NVIDIA driver to one for CUDA {torch.version.cuda}, or install a torch build for yours"
        )
        found = f"nvidia-smi is here, but torch {torch.__version__} finds no GPU"
        return [_check("gpu", "warn", found, advice)]
    out = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        found = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, "
        out.append(_memory(f"gpu {index}", free, found + f"{_size(free)} of {_size(total)} free"))
    return [*out, _sdpa(), *_flash_attn(), _triton()]


def _sdpa() -> Check:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    x = torch.zeros(1, 2, 16, 64, device="cuda", dtype=torch.float16)
    running = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(x, x, x)
            running.append(backend.name.removesuffix("_ATTENTION").lower())
        except RuntimeError:
            pass  # torch's way of saying that this backend can't run here
    if running:
        return _check("sdpa backends", "ok", ", ".join(running))
    advice = "long sequences will be slow: use a torch build that was made for this GPU"
    return _check("sdpa backends", "warn", "the plain one only", advice)


def _flash_attn() -> list[Check]:
    if (installed := version("flash-attn")) is None:
        return []
    works, message = probe("import flash_attn; print(flash_attn.__version__)")
    if works:
        return [_check("flash-attn", "ok", installed)]
    advice = (
        "install a flash-attn wheel built for this torch, or uninstall it: SDPA has a flash kernel of its own"
    )
    return [_check("flash-attn", "fail", f"{installed} doesn't load: {message}", advice)]


def _triton() -> Check:
    if installed := version("triton") or version("triton-windows"):
        return _check("triton", "ok", installed)
    return _check("triton", "warn", "not installed", "torch.compile needs it: python -m pip install triton")


def check_plugins() -> list[Check]:
    """Every plug-in loaded and registered what it brings."""
    from . import plugins

    out = []
    for row in plugins.report():
        names = ", ".join([*row["adapters"], *row["selectors"]])
        name = f"plug-in {row['name']}"
        if row["error"] is None:
            out.append(_check(name, "ok", f"{names} from {row['distribution']}"))
            continue
        advice = f"update or uninstall the distribution {row['distribution']}"
        out.append(_check(name, "fail", f"of {row['distribution']}: {row['error']}", advice))
    return out


def check_memory() -> list[Check]:
    """Memory that a model could still take."""
    free = free_memory()
    if free is None:
        return [_check("memory", "ok", "this system doesn't say how much is free")]
    return [_memory("memory", free, f"{_size(free)} free")]


def free_memory() -> int | None:
    """Bytes that a new process could take, None if the system doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if available is None else int(available) * 1024


def _memory(name: str, free: int, found: str) -> Check:
    if free >= _LOW_MEMORY:
        return _check(name, "ok", found)
    return _check(name, "warn", found, "close what else is running, or expect only small models to fit")


def _size(n: int) -> str:
    return f"{n / (1 << 30):.1f} GiB"


CHECKS: tuple[Callable[[], list[Check]], ...] = (
    check_flexcore,
    check_python,
    check_requirements,
    check_extras,
    check_builds,
    check_transformers,
    check_decord,
    check_soundfile,
    check_gpu,
    check_memory,
    check_plugins,
)
