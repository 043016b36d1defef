"""The model card of a folder of fine weights: what they are, whose, and how to load them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..config import FlexConfig

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


def base_model_name(model: Any) -> str | None:
    """The hub name that a model was loaded from, or None if it came from a folder or nowhere."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name) or Path(name).exists():
        return None
    return name


def model_card(
    model: Any, config: FlexConfig, architecture: dict[str, Any], parameters: int, version: str
) -> str:
    """Markdown with YAML front matter.

    Args:
        model: The wrapped model.
        config: Its config.
        architecture: What a model must share for the weights to fit.
        parameters: How many fine parameters there are.
        version: Of flexcore.
    """
    name, cls = base_model_name(model), type(model).__name__
    layers = list(config.layers or ())
    front = ["---", "library_name: flexcore", "tags:", "- flexcore", "- flexattention", "- high-resolution"]
    if name:
        front += [f"base_model: {json.dumps(name)}", "base_model_relation: adapter"]
    front.append("---")
    if config.share_kv_projections:
        what = "There are no weights of their own: fine tokens go through the layers' own K/V projections."
    else:
        what = f"{parameters:,} parameters: fine K/V projections of layers {ranges(layers)}."
    rows = [f"| `{key}` | `{json.dumps(value)}` |" for key, value in config.to_dict().items()]
    fits = [f"| {key} | {value} |" for key, value in architecture.items() if value is not None]
    lines = [
        *front,
        "",
        f"# Fine projections for {name or cls}",
        "",
        f"Weights that let {f'`{name}`' if name else f'a `{cls}`'} read fine tokens of high-resolution media with "
        f"flexcore {version}. {what}",
        "",
        "## Use",
        "",
        "`model` is the base model, loaded with transformers; `folder` is this folder.",
        "",
        "```python",
        "import flexcore",
        "from flexcore.hf import read_adapter_config",
        "",
        "config, _ = read_adapter_config(folder)",
        "flexcore.wrap(model, config)",
        "model.load_adapter_weights(folder)",
        "```",
        "",
        "## Fits",
        "",
        "| base model | |",
        "|---|---|",
        f"| class | {cls} |",
        *fits,
        "",
        "## Config",
        "",
        "| field | value |",
        "|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def ranges(layers: list[int]) -> str:
    """`[2, 3, 4, 7]` as `2-4, 7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
