"""A benchmark writes its own section of the results and no other."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.sections import write_json, write_section


def test_a_section_is_replaced_and_the_rest_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "RESULTS.md"
    write_section("speed", "fast", path)
    write_section("magnifier", "old", path)
    whole = path.read_text().replace("fast", "fast and furious")
    path.write_text(whole + "by hand\n")
    write_section("magnifier", "new\n", path)
    assert path.read_text() == whole.replace("old", "new") + "by hand\n"
    assert whole.startswith("# Results\n\n<!-- speed: begin -->\nfast and furious\n<!-- speed: end -->\n")


def test_numbers_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "made" / "numbers.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": [2]})
    assert json.loads(path.read_text()) == {"a": [2]} and [p.name for p in path.parent.iterdir()] == [
        path.name
    ]
