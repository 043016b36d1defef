"""`flexcore cost`: the rows, design section 6, the paper's claim, and the command."""

import json
from dataclasses import replace

import pytest

from flexcore import cli
from flexcore.hf import cost, cost_claims, cost_report
from flexcore.hf.cost_report import (
    COARSE,
    CROSS,
    DENSE,
    FLEX,
    OFFICIAL,
    PARTS,
    Setting,
    report,
    seconds,
    total,
)
from flexcore.roofline import MACHINES, Work

TERA = 1e12


@pytest.fixture(scope="module")
def llava():
    return cost.measure(cost.llava_7b())


@pytest.fixture(scope="module")
def small():
    return cost.measure(cost.family_config("llava"))


def decoder(parts):
    return sum(parts[p].flops for p in PARTS[2:]) / TERA


def test_design_table(llava):
    """Section 6, to the digits that it gives."""
    made = report(llava, Setting())
    assert (made.coarse, made.fine, made.read, made.reading) == (576, 5184, 518, tuple(range(9, 32)))
    prefill = {row.name: round(decoder(row.prefill), 1) for row in made.rows}
    assert (prefill[COARSE], prefill[DENSE], prefill[FLEX]) == (8.4, 84.3, 9.2)

    def vision(name):
        parts = made.row(name).prefill
        return round((parts["tower"].flops + parts["projector"].flops) / TERA, 2)

    assert (vision(COARSE), vision(FLEX), vision(DENSE)) == (0.41, 4.06, 4.06)
    step = {row.name: decoder(row.step) for row in made.rows}
    assert round(step[COARSE], 4) == 0.0136
    assert round(step[OFFICIAL], 2) == 0.81
    # the design adds two rounded numbers; the readout logits, which it leaves out, are in ours
    assert step[FLEX] == pytest.approx(0.0138, abs=0.0001)
    assert round(made.row(CROSS).fine_kv_bytes / 1e9, 2) == 1.95
    assert round(made.row(COARSE).kv_bytes / 1e9, 2) == 0.34
    assert llava.weights.layers + llava.weights.head + 32000 * 4096 == 6738415616  # Llama-7B's parameters


def test_rows(small):
    setting = Setting(text=10, zoom=2, fraction=0.25, batch=3, dtype="float32")
    made = report(small, setting)
    assert (made.coarse, made.fine, made.read) == (16, 64, 16)
    rows = {row.name: row for row in made.rows}
    assert rows[FLEX].prefill["tower"].flops == 3 * 5 * small.encoder.tower_flops
    assert rows[FLEX].fine_kv_bytes == 3 * 16 * len(made.reading) * small.shape.kv_width * 4
    assert rows[OFFICIAL].fine_kv_bytes == rows[COARSE].fine_kv_bytes == 0
    assert rows[DENSE].kv_bytes == 3 * 90 * 4 * small.shape.kv_width * 4
    assert rows[CROSS].prefill["fine projection"].flops == 4 * rows[FLEX].prefill["fine projection"].flops
    one = report(small, replace(setting, batch=1))
    assert total(rows[FLEX].prefill).flops == 3 * total(one.row(FLEX).prefill).flops
    lazy = report(small, replace(setting, tiles=1)).row(FLEX)
    assert lazy.prefill["tower"].flops == 3 * 2 * small.encoder.tower_flops
    everything = report(small, replace(setting, fraction=1.0))
    assert everything.row(FLEX).prefill == everything.row(CROSS).prefill
    assert report(small, replace(setting, fraction=0.0)).row(FLEX).prefill["fine projection"] == Work()


def test_time_is_the_sum_of_parts(small):
    made = report(small, Setting())
    parts = made.row(FLEX).prefill
    machine = MACHINES["a100"]
    assert seconds(parts, machine) == sum(
        max(w.flops / machine.flops, w.bytes / machine.bytes_per_second) for w in parts.values()
    )


def test_claims(llava):
    """Each ratio from its own definition, and a verdict that follows from the numbers."""
    larger = cost.measure(cost.llava_7b(), side=448)
    assert larger.encoder.tokens == 1024
    found = cost_claims.claims(llava, larger, Setting())
    made = report(llava, Setting())
    flex, cross = (decoder(made.row(name).prefill) for name in (FLEX, CROSS))
    assert found[0].over_cross == pytest.approx(1 - flex / cross)
    params = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 1088
    square = 2 * 32 * 1088**2 * 4096
    head = 2 * 4096 * 32000
    assert found[0].over_dense == pytest.approx(1 - flex * TERA / (params + square + head), rel=1e-3)
    whole = {name: total(made.row(name).prefill).flops for name in (FLEX, CROSS)}
    assert found[1].over_cross == pytest.approx(1 - whole[FLEX] / whole[CROSS])
    assert abs(found[1].over_cross - 0.37) <= cost_claims.NEAR < abs(found[0].over_cross - 0.37)


def test_verdict():
    near, far = cost_claims.Claim("near", 0.38, 0.30), cost_claims.Claim("far", 0.5, 0.1)
    said = cost_claims.verdict([far, near])
    assert said.count("agrees within 2 points when counted as: near.") == 2
    assert said.endswith("One way of counting gives both.")
    said = cost_claims.verdict([far])
    assert (
        "The 448-pixel ratio agrees within 2 points under none of these; nearest: far, -21.0 points." in said
    )
    assert said.endswith("No way of counting here gives both.")


@pytest.mark.parametrize(
    "value, shown",
    [(0, "0 F"), (8.4e12, "8.40 TF"), (84.3e12, "84.3 TF"), (813e9, "813 GF"), (0.00665, "6.65 mF")],
)
def test_quantity(value, shown):
    assert cost_report.quantity(value, "F") == shown


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"zoom": 0}, "zoom must be an integer >= 1, got 0"),
        ({"text": -1}, "text must be an integer >= 0, got -1"),
        ({"fraction": 1.5}, r"fraction must lie in \[0, 1\], got 1.5"),
        ({"dtype": "int3"}, "dtype must be one of float32, bfloat16, float16, got 'int3'"),
        ({"tiles": 10}, r"tiles must be at most zoom \* zoom = 9, got 10"),
    ],
)
def test_setting_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        Setting(**changed)


def test_command(capsys):
    assert cli.main(["cost", "--family", "llava", "--zoom", "2", "--machine", "1e12:1e11", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in out["rows"]] == [COARSE, FLEX, OFFICIAL, CROSS, DENSE]
    assert out["tokens"] == {"text": 64, "coarse": 16, "fine": 64, "read": 6}
    assert out["setting"]["machine"]["flops"] == 1e12
    prefill = out["rows"][1]["prefill"]
    assert set(prefill) == {*PARTS, "total"}
    assert prefill["total"]["flops"] == sum(prefill[p]["flops"] for p in PARTS)
    assert out["claims"] == []


def test_command_text_and_markdown(capsys):
    assert cli.main(["cost", "--family", "qwen2", "--coarse", "20"]) == 0
    text = capsys.readouterr().out
    assert "64 text, 20 coarse, 180 fine tokens (zoom 3)" in text and "official scheme" in text
    assert cli.main(["cost", "--family", "qwen2", "--coarse", "20", "--markdown"]) == 0
    assert "| dense |" in capsys.readouterr().out


def test_command_from_a_folder(tmp_path, capsys):
    cost.family_config("llava").save_pretrained(tmp_path)
    assert cli.main(["cost", str(tmp_path), "--first-layer", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reading_layers"] == [3]


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "target: name a model"),
        (["gone"], "target must be one of llava-1.5-7b"),
        (["--family", "no-such"], "name must be one of"),
        (["--family", "qwen2"], "coarse: Qwen2ForCausalLM has no encoder that was measured"),
        (["--family", "llava", "--machine", "k80"], "machine must be one of"),
    ],
)
def test_command_refuses(given, message, capsys):
    assert cli.main(["cost", *given]) == 2
    assert message in capsys.readouterr().err


def test_command_writes_a_readme(tmp_path, monkeypatch, capsys):
    """With a small model in the preset's place, whose tower takes 448 pixels too."""

    def tiny():
        config = cost.family_config("llava")
        config.vision_config.patch_size, config.vision_config.image_size = 14, 56
        return config

    monkeypatch.setitem(cost.PRESETS, "llava-1.5-7b", tiny)
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n", encoding="utf-8")
    command = ["cost", "llava-1.5-7b", "--zoom", "2", "--readme"]
    assert cli.main(command) == 2
    assert "must hold the lines <!-- cost: measured -->" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == "before\n"
    readme.write_text("before\n{}\noutdated\n{}\nafter\n".format(*cost_claims.MARKERS), encoding="utf-8")
    assert cli.main(command) == 0
    text = readme.read_text(encoding="utf-8")
    assert (
        "outdated" not in text
        and text.startswith("before\n")
        and text.endswith("<!-- cost: end -->\nafter\n")
    )
    assert "`flexcore cost llava-1.5-7b --zoom 2`" in text
    assert "| the paper | 37% | 31% |" in text
