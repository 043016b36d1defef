"""Parity with the official implementation: every golden case, every tensor in it.

`pytest tests/hf/test_golden.py --golden DIR` runs the cases found in DIR, by default those the repository carries. The
format is described in `tests/golden/README.md`; a case or tensor that this file can't check is a failure.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import flexcore
from flexcore.grid import OFFICIAL_LATTICE
from flexcore.hf.kv_cache import cache_argument
from flexcore.selection import SCORE_SCALE

CARRIED = Path(__file__).parents[1] / "golden"
EXACT = ("coarse_mask", "region_mask", "fine_mask", "tokens")
TOLERANCE = {"score": 5e-5, "rope_fine_cos": 1e-5, "rope_fine_sin": 1e-5, "loss": 1e-5}
DEFAULT_TOLERANCE = 5e-4
GRADIENT_TOLERANCE = 1e-4  # of the tensor's largest magnitude


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--golden")
    folder = CARRIED if folder is None else Path(folder)
    cases = sorted(folder.glob("*.json"))
    metafunc.parametrize("case", cases or [folder], ids=[c.stem for c in cases] or ["no cases"])


def test_golden(case: Path) -> None:
    assert case.suffix == ".json", f"no golden case in {case}"
    about = json.loads(case.read_text())
    tensors = load_file(case.with_suffix(".safetensors"))
    run = {"eval": run_eval, "train": run_train, "tiling": run_tiling}
    assert about["mode"] in run, f"don't know how to run mode {about['mode']!r}"
    found = run[about["mode"]](about, tensors)
    expected = {k.removeprefix("expected."): v for k, v in tensors.items() if k.startswith("expected.")}
    assert expected
    unchecked = sorted(set(expected) - set(found))
    assert not unchecked, f"nothing to compare these with: {unchecked}"
    problems = [
        p for name in sorted(expected) if (p := compare(name, found[name], expected[name], about, tensors))
    ]
    assert not problems, "\n".join(problems)


def compare(name: str, found: torch.Tensor, expected: torch.Tensor, about: dict, tensors: dict) -> str | None:
    tail = about.get("slim_tail_rows")
    if tail and re.match(r"(hidden\.|attn_output\.|final_norm|logits)", name):
        found = found[:, -tail:]
    if found.shape != expected.shape:
        return f"{name}: shape {list(found.shape)}, expected {list(expected.shape)}"
    kind = name.split(".")
    what = kind[1] if kind[0] == "decode" else kind[0]
    if what in EXACT:
        return (
            None
            if torch.equal(found, expected)
            else f"{name}: {int((found != expected).sum())} entries differ"
        )
    difference = (found.double() - expected.double()).abs()
    if what in ("hidden", "attn_output", "final_norm", "logits") and kind[0] != "decode" and found.ndim == 3:
        mask = tensors["input.attention_mask"].bool()
        difference = difference[mask[:, -tail:] if tail else mask]
    if not bool(found.isfinite().all()):
        return f"{name}: not finite"
    bound = TOLERANCE.get(what, DEFAULT_TOLERANCE)
    if what == "grad":
        bound = GRADIENT_TOLERANCE * float(expected.abs().max())
    worst = float(difference.max()) if difference.numel() else 0.0
    return None if worst <= bound else f"{name}: off by {worst:.2e}, tolerance {bound:.2e}"


class Case:
    """The case's Llama, wrapped in reference mode, with hooks that collect what the official code recorded."""

    def __init__(self, about: dict, tensors: dict) -> None:
        flex, config = about["flex"], dict(about["config"])
        assert flex["region_grid"] == OFFICIAL_LATTICE and flex["score_scale"] == SCORE_SCALE
        assert flex["first_fine_layer"] == flex["first_select_layer"] + 1
        theta = config.pop("rope_theta")
        config = LlamaConfig(**config, rope_parameters={"rope_type": "default", "rope_theta": theta})
        self.model = LlamaForCausalLM(config)
        self.inputs = {k.removeprefix("input."): v for k, v in tensors.items() if k.startswith("input.")}
        weights = {k: v for k, v in tensors.items() if k.split(".")[0] in ("model", "lm_head")}
        own = {k: v for k, v in weights.items() if "_hd." not in k}
        self.model.load_state_dict(own, strict=True)
        flexcore.wrap(
            self.model,
            flexcore.FlexConfig.reference(
                first_layer=flex["first_select_layer"], threshold=flex["threshold"]
            ),
        )
        self.names = {k: official_name(k) for k in weights if "_hd." in k}
        assert set(self.names.values()) == {f"flex_fine.{k}" for k in self.model.flex_fine.state_dict()}
        self.model.load_state_dict({**own, **{self.names[k]: weights[k] for k in self.names}}, strict=True)
        self.grids = []
        for width, height in self.inputs["ori_sizes"].tolist():
            size = None if width < 0 else (width, height)
            self.grids.append(flexcore.Grid.official(flex["coarse_grid"], flex["fine_grid"], size))
        self.flex = flex
        self.collected: dict[str, torch.Tensor] = {}
        decoder = self.model.model
        for i, layer in enumerate(decoder.layers):
            layer.register_forward_pre_hook(self.keep_input(f"hidden.{i}"), with_kwargs=True)
            layer.self_attn.o_proj.register_forward_hook(self.keep_output(f"attn_output.layer{i}"))
        decoder.norm.register_forward_pre_hook(
            self.keep_input(f"hidden.{len(decoder.layers)}"), with_kwargs=True
        )
        decoder.norm.register_forward_hook(self.keep_output("final_norm"))

    def keep_input(self, name: str):
        def hook(module, args, kwargs):
            self.collected[name] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook

    def keep_output(self, name: str):
        def hook(module, args, out):
            self.collected[name] = out.detach()

        return hook

    def streams(self, fine: torch.Tensor) -> flexcore.StreamBatch:
        samples = []
        for b, (start, stop) in enumerate(self.inputs["image_range"].tolist()):
            if start < 0:
                samples.append(())
                continue
            source = flexcore.TensorSource(fine[b], self.grids[b])
            samples.append((flexcore.FineStream(self.grids[b], torch.arange(start, stop), None, source),))
        return flexcore.StreamBatch(tuple(samples))

    def rope(self) -> dict[str, torch.Tensor]:
        from flexcore.positions import official_tables

        start, stop = next(r for r in self.inputs["image_range"].tolist() if r[0] >= 0)
        like = torch.zeros(1, dtype=torch.float32)
        cos, sin = self.model.model.rotary_emb(like, torch.arange(start, stop)[None])
        cos, sin = official_tables(cos[0], sin[0], self.grids[0])
        return {"rope_fine_cos": cos, "rope_fine_sin": sin}

    def selections(self, records) -> dict[str, torch.Tensor]:
        """Stacked score, coarse, region and fine masks of some records, in their order."""
        selector = self.model._flex_binding.selector
        out = defaultdict(list)
        for r in records:
            scores = r.scores[None]
            out["score"].append(scores.view(r.grid.coarse))
            out["coarse_mask"].append(selector.cells(selector.margins(scores, r.grid)).view(r.grid.coarse))
            out["region_mask"].append(r.regions.view(r.grid.region_shape))
            fine = torch.zeros(r.grid.n_fine, dtype=torch.bool)
            tokens = r.grid.tokens(r.regions.nonzero()[:, 0])
            fine[tokens[tokens >= 0]] = True
            out["fine_mask"].append(fine)
        return {k: torch.stack(v) for k, v in out.items()}


def official_name(name: str) -> str:
    """`model.layers.9.self_attn.k_proj_hd.weight` is `flex_fine.9.k_proj.weight` here."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.([kv]_proj)_hd\.(weight|bias)", name)
    assert match, f"don't know the official weight {name}"
    return "flex_fine.{}.{}.{}".format(*match.groups())


def run_eval(about: dict, tensors: dict) -> dict[str, torch.Tensor]:
    case = Case(about, tensors)
    model, inputs = case.model.eval(), case.inputs
    with torch.no_grad(), flexcore.trace(model) as trace:
        out = model(
            inputs_embeds=inputs["inputs_embeds"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            flex_streams=case.streams(inputs["fine_features"]),
            use_cache=True,
        )
    found = {**case.rope(), **case.collected, "logits": out.logits}
    for layer in trace.layers:
        for name, value in case.selections(trace.where(layer=layer)).items():
            found[f"{name}.layer{layer}"] = value
    if about["decode_steps"]:
        found.update(decode(case, out, about["decode_steps"]))
    return found


def decode(case: Case, out, steps: int) -> dict[str, torch.Tensor]:
    model, inputs = case.model, case.inputs
    tokens = [int(out.logits[0, -1].argmax())]
    mask, found = inputs["attention_mask"], defaultdict(list)
    for step in range(steps):
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        with torch.no_grad(), flexcore.trace(model) as trace:
            out = model(
                inputs_embeds=model.get_input_embeddings()(torch.tensor([[tokens[-1]]])),
                attention_mask=mask,
                position_ids=torch.tensor([[inputs["position_ids"].shape[1] + step]]),
                **cache_argument(model, out.past_key_values),
                use_cache=True,
            )
        tokens.append(int(out.logits[0, -1].argmax()))
        for name, value in {**case.collected, "logits": out.logits}.items():
            found[f"decode.{name}"].append(value[0, 0])
        for layer in trace.layers:
            for name, value in case.selections(trace.where(layer=layer)).items():
                found[f"decode.{name}.layer{layer}"].append(value[0])
    return {"decode.tokens": torch.tensor(tokens), **{k: torch.stack(v) for k, v in found.items()}}


def run_train(about: dict, tensors: dict) -> dict[str, torch.Tensor]:
    case = Case(about, tensors)
    model, inputs, flex = case.model.train(), case.inputs, case.flex
    fine = inputs["fine_features"].clone().requires_grad_()
    embeds = inputs["inputs_embeds"].clone().requires_grad_()
    alpha = model.flex_config.replace(alpha_warmup=flex["warmup"]).alpha(flex["step"])
    assert alpha == pytest.approx(flex["alpha"])
    with flexcore.trace(model) as trace:
        out = model(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            labels=inputs["labels"],
            flex_streams=case.streams(fine),
            alpha=alpha,
            use_cache=False,
        )
    out.loss.backward()
    found = {
        **case.rope(),
        **case.collected,
        "logits": out.logits.detach(),
        "loss": out.loss.detach().reshape(1),
    }
    found["grad.fine_features"], found["grad.inputs_embeds"] = fine.grad, embeds.grad
    back = {v: k for k, v in case.names.items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"grad.{back.get(name, name)}"] = parameter.grad
    counts: dict[int, int] = defaultdict(int)
    for sample, first, last in inputs["answer_ranges"].tolist():
        if first < 1:  # nothing precedes the run: the official code ignores it
            continue
        for layer in trace.layers:
            rows = [r for r in trace.where(layer=layer, sample=sample) if first - 1 <= r.position <= last - 1]
            assert [r.position for r in rows] == list(range(first - 1, last))
            for name, value in case.selections(rows).items():
                found[f"{name}.layer{layer}.sample{sample}.range{counts[sample]}"] = value
        counts[sample] += 1
    return found


def run_tiling(about: dict, tensors: dict) -> dict[str, torch.Tensor]:
    from flexcore_adapters.tiling import cut_tiles, downscale, paste_tiles

    images, zoom, patch = tensors["input.images"], about["zoom"], about["patch"]

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        patches = torch.nn.functional.unfold(pixels, patch, stride=patch).transpose(1, 2)
        return torch.tanh(patches @ tensors["input.toy_weight"] + tensors["input.toy_pos"])

    tiles = cut_tiles(images, zoom, zoom)
    low = downscale(images, about["lowres"])
    return {
        "tiles": tiles,
        "fine_features": paste_tiles(encode(tiles), zoom, zoom),
        "lowres_images": low,
        "coarse_features": encode(low),
    }
