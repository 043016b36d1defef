"""import_official_checkpoint: a synthetic checkpoint of the released layout reproduces the golden numbers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
)

import flexcore
from flexcore.hf import import_official_checkpoint

from .test_golden import CARRIED, Case, compare

VOCABULARY = 48
SHARDS = 3


def golden(name: str = "p01_eval_square_g12") -> tuple[dict, dict]:
    about = json.loads((CARRIED / f"{name}.json").read_text())
    return about, load_file(CARRIED / f"{name}.safetensors")


def tower(folder: Path, cls=CLIPVisionModel) -> CLIPVisionConfig:
    """A tiny CLIP, saved as the hub has it: alone, or with its text half."""
    torch.manual_seed(3)
    fields = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
        "projection_dim": 8,
    }
    config = CLIPVisionConfig(**fields)
    if cls is CLIPModel:
        text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        cls(CLIPConfig(vision_config=fields, text_config={**text, "vocab_size": 9})).save_pretrained(folder)
    else:
        cls(config).save_pretrained(folder)
    return config


def weights(about: dict, tensors: dict) -> dict[str, torch.Tensor]:
    """The golden model's weights as the official code stores them: fine projections in every layer."""
    generator = torch.Generator().manual_seed(1)
    out = {k: v for k, v in tensors.items() if k.split(".")[0] in ("model", "lm_head")}
    width = about["config"]["hidden_size"]
    for layer in range(about["config"]["num_hidden_layers"]):
        for name in ("k_proj_hd", "v_proj_hd"):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            if key not in out:
                out[key] = torch.randn(width, width, generator=generator)
        out[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    for index, shape in ((0, (width, 16)), (2, (width, width))):
        out[f"model.mm_projector.{index}.weight"] = torch.randn(shape, generator=generator)
        out[f"model.mm_projector.{index}.bias"] = torch.randn(width, generator=generator)
    return out


def write(folder: Path, state: dict[str, torch.Tensor], kind: str) -> None:
    """Shards and their index, or one file."""
    names = sorted(state)
    if kind in ("safetensors", "bin"):
        suffix = {"safetensors": "safetensors", "bin": "bin"}[kind]
        stem = "model" if kind == "safetensors" else "pytorch_model"
        where = {n: f"{stem}-{i % SHARDS + 1:05}-of-{SHARDS:05}.{suffix}" for i, n in enumerate(names)}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        where = dict.fromkeys(names, "model.safetensors" if kind == "one" else "pytorch_model.bin")
    for file in set(where.values()):
        part = {n: state[n].clone().contiguous() for n in names if where[n] == file}
        if file.endswith(".safetensors"):
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization=kind != "old")


def checkpoint(folder: Path, kind: str = "safetensors", change=None, **fields) -> dict[str, torch.Tensor]:
    """A whole checkpoint of the official layout made of a golden case; `change` may edit its tensors."""
    about, tensors = golden()
    folder.mkdir(parents=True, exist_ok=True)
    tower(folder / "clip")
    own = {k: v for k, v in about["config"].items() if k != "head_dim"}
    config = {
        **own,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": "clip",
        "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "zoom_ratio": 3,
        "lowres_size": 24,
        "highres_size": 72,
        "threshold": about["flex"]["threshold"],
        "torch_dtype": "float32",
        "pad_token_id": 0,
        **fields,
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = weights(about, tensors)
    if change is not None:
        change(state)
    write(folder, state, kind)
    return state


@pytest.mark.parametrize("kind", ["safetensors", "bin", "one", "old"])
def test_the_imported_model_reproduces_the_golden_numbers(tmp_path, kind, caplog):
    about, tensors = golden()
    checkpoint(tmp_path, kind)
    with caplog.at_level(logging.INFO, logger="flexcore"):
        model = import_official_checkpoint(tmp_path)
    assert "dropped k_proj_hd and v_proj_hd of layers 0-8," in caplog.text
    assert type(model)._flex_base is LlavaForConditionalGeneration and not model.training
    assert model.flex_config.layers == (9, 10, 11) and model.flex_config.positions == "official"
    shutil.rmtree(tmp_path)  # what was read is the model's own
    case = Case(about, tensors)
    inputs = case.inputs
    with torch.no_grad():
        out = model(
            inputs_embeds=inputs["inputs_embeds"],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"],
            flex_streams=case.streams(inputs["fine_features"]),
        )
    logits, expected = out.logits[..., :VOCABULARY], tensors["expected.logits"]
    problem = compare("logits", logits, expected, about, tensors)
    assert problem is None, problem


def test_the_image_token_and_the_tower(tmp_path):
    state = checkpoint(tmp_path)
    config = tower(tmp_path / "clip")
    model = import_official_checkpoint(tmp_path, threshold=12)
    assert model.flex_config.threshold == 12 and model.flex_config.regions == "official"
    assert (
        model.config.image_token_id == VOCABULARY and model.config.text_config.pad_token_id == VOCABULARY + 1
    )
    assert model.config.vision_feature_layer == -2
    assert model.config.vision_feature_select_strategy == "default"
    table = model.get_input_embeddings().weight
    assert len(table) == 64 == model.config.text_config.vocab_size and model.lm_head.weight.shape[0] == 64
    old = state["model.embed_tokens.weight"]
    assert torch.equal(table[:VOCABULARY], old)
    assert torch.allclose(table[VOCABULARY:], old.mean(0).expand(16, -1), atol=1e-6)
    assert model.generation_config.eos_token_id == model.config.text_config.eos_token_id
    # an image passes through the stock code: tower, projector, splice
    cells = (config.image_size // config.patch_size) ** 2
    pixels = torch.randn(1, 3, config.image_size, config.image_size)
    with torch.no_grad():
        features = CLIPVisionModel.from_pretrained(tmp_path / "clip")(pixels, output_hidden_states=True)
        patches = features.hidden_states[-2][:, 1:]
        first = nn.functional.linear(
            patches, *(state[f"model.mm_projector.0.{k}"] for k in ("weight", "bias"))
        )
        second = (state[f"model.mm_projector.2.{k}"] for k in ("weight", "bias"))
        expected = nn.functional.linear(nn.functional.gelu(first), *second)
        found = model.get_image_features(pixels, return_dict=True).pooler_output
        ids = torch.tensor([[1, *[VOCABULARY] * cells, 5, 6]])
        logits = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert logits.isfinite().all() and int(logits.argmax(-1).max()) < VOCABULARY


@pytest.mark.parametrize("kind", ["whole CLIP", "inside", "elsewhere"])
def test_where_the_tower_may_be(tmp_path, kind):
    folder = tmp_path / "checkpoint"
    if kind == "whole CLIP":
        checkpoint(folder)
        shutil.rmtree(folder / "clip")
        tower(folder / "clip", CLIPModel)
        expected = load_file(folder / "clip" / "model.safetensors")
        expected = expected["vision_model.embeddings.class_embedding"]
    elif (
        kind == "inside"
    ):  # a tower that was trained along is in the checkpoint, under the names of old versions

        def change(state):
            own = {n: t + 1 for n, t in load_file(folder / "clip" / "model.safetensors").items()}
            for name, tensor in own.items():
                name = name.removeprefix("vision_model.")
                state[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor

        state = checkpoint(folder, change=change)
        (folder / "clip" / "model.safetensors").unlink()
        expected = state["model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"]
    else:
        checkpoint(folder, mm_vision_tower="some/where")
        shutil.move(folder / "clip", tmp_path / "tower")
        expected = load_file(tmp_path / "tower" / "model.safetensors")
        expected = next(t for n, t in expected.items() if n.endswith("embeddings.class_embedding"))
        with pytest.raises(FileNotFoundError, match=r"the vision tower 'some/where' .mm_vision_tower"):
            import_official_checkpoint(folder)
    given = {"vision_tower": tmp_path / "tower"} if kind == "elsewhere" else {}
    model = import_official_checkpoint(folder, **given)
    found = next(p for n, p in model.named_parameters() if n.endswith("embeddings.class_embedding"))
    assert torch.equal(found, expected)


def test_half_precision_and_saving_again(tmp_path):
    checkpoint(tmp_path / "official", torch_dtype="float16")
    model = import_official_checkpoint(tmp_path / "official")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    model = import_official_checkpoint(tmp_path / "official", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "ours")
    again = flexcore.from_pretrained(tmp_path / "ours")
    assert again.flex_config == model.flex_config
    state = model.state_dict()
    assert set(state) == set(again.state_dict())
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())


def drop(*names):
    return lambda state: [state.pop(n) for n in names]


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (
            drop("model.layers.9.self_attn.k_proj_hd.weight", "model.norm.weight"),
            {},
            r"missing \['model.layers.9.self_attn.k_proj_hd.weight', 'model.norm.weight'\], unexpected \[\]",
        ),
        (lambda s: s.update({"model.zest": torch.ones(1)}), {}, r"missing \[\], unexpected \['model.zest'\]"),
        (
            lambda s: s.update({"model.vision_tower.vision_tower.zest": torch.ones(1)}),
            {},
            "unexpected 'model.vision_tower.vision_tower.zest' for the vision tower",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(31)}),
            {},
            r"model.norm.weight: shape must be \[32\], got \[31\]",
        ),
        (None, {"vocab_size": 40}, r"model.embed_tokens.weight: shape must be \[40, 32\], got \[48, 32\]"),
        (None, {"mm_projector_type": "linear"}, "mm_projector_type must be 'mlp2x_gelu'"),
        (None, {"mm_use_im_start_end": True}, "mm_use_im_start_end must be False"),
        (None, {"mm_hidden_size": 17}, "mm_hidden_size must be the vision tower's 16"),
        (None, {"highres_size": 70}, "highres_size must be zoom_ratio . lowres_size = 72"),
        (None, {"mm_vision_tower": None}, "mm_vision_tower must name a CLIP model"),
        (None, {"torch_dtype": "float99"}, "torch_dtype must be a torch dtype's name"),
        (None, {"num_hidden_layers": 9}, "has 9 layers, got 8"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(tmp_path, change, fields, message):
    checkpoint(tmp_path, change=change, **fields)
    with pytest.raises(ValueError, match=message):
        import_official_checkpoint(tmp_path)


def test_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        import_official_checkpoint(tmp_path)
    checkpoint(tmp_path)
    shard = next(tmp_path.glob("model-00002*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(flexcore.WeightsMismatchError, match="must be a safetensors file"):
        import_official_checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003.safetensors is missing"):
        import_official_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))
    with pytest.raises(flexcore.WeightsMismatchError, match="a shard must be a file beside it"):
        import_official_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors, pytorch_model.bin"):
        import_official_checkpoint(tmp_path)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


def test_a_bin_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path, "onebin")
    torch.save({"model.norm.weight": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(flexcore.WeightsMismatchError, match="must hold tensors and nothing else"):
        import_official_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_other_layers_may_be_asked_for(tmp_path):
    state = checkpoint(tmp_path)
    model = import_official_checkpoint(tmp_path, first_layer=3, layers=(5, 7))
    assert model.flex_config.layers == (5, 7)
    assert torch.equal(model.flex_fine["5"].k_proj.weight, state["model.layers.5.self_attn.k_proj_hd.weight"])
    model = import_official_checkpoint(tmp_path, share_kv_projections=True)
    assert model.flex_config.layers == (9, 10, 11) and not list(model.flex_fine.parameters())
    with pytest.raises(TypeError, match="zest"):
        import_official_checkpoint(tmp_path, zest=1)
