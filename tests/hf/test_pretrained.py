"""save_pretrained and from_pretrained of wrapped models: one folder that the stock class reads too."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlavaForConditionalGeneration

import flexcore
from flexcore.hf.checkpoint import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, read_adapter_config

from .helpers import Sample, batch, forward, make, perturb, plain, wrapped


def names(folder) -> dict[str, str]:
    """Every tensor of a checkpoint and the file that holds it."""
    out = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            out.update(dict.fromkeys(file.keys(), path.name))
    return out


@pytest.mark.parametrize("kind", ["llama", "llava"])
@pytest.mark.parametrize("shard", ["50GB", "100KB"], ids=["whole", "sharded"])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, kind, shard):
    model, inputs = wrapped(kind), batch(kind, [Sample()])
    model.save_pretrained(tmp_path, max_shard_size=shard)
    held = names(tmp_path)
    assert {f"flex_fine.{n}" for n in model.flex_fine.state_dict()} <= set(held)
    assert (len(set(held.values())) > 2) == (shard == "100KB")
    assert not (tmp_path / WEIGHTS_NAME).exists()
    again = flexcore.from_pretrained(tmp_path)
    assert type(again).__name__ == type(model).__name__ and not again.training
    assert again.flex_config == model.flex_config
    assert torch.equal(forward(again, inputs), forward(model, inputs))
    assert "flex" not in repr(again.__dict__.get("_keys_to_ignore_on_load_unexpected"))
    # and once more, from what was loaded
    again.save_pretrained(tmp_path / "again")
    third = type(model).from_pretrained(tmp_path / "again")
    assert flexcore.is_wrapped(third) and torch.equal(forward(third, inputs), forward(model, inputs))


@contextmanager
def heard():
    """What transformers says in its log."""
    said: list[str] = []
    handler, log = logging.Handler(), logging.getLogger("transformers")
    handler.emit = lambda record: said.append(record.getMessage())
    level = log.level
    log.setLevel(logging.WARNING)
    log.addHandler(handler)
    try:
        yield said
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def test_the_stock_class_reads_the_folder_with_a_warning(tmp_path):
    model, inputs = wrapped("llava"), plain(batch("llava", [Sample()]))
    model.save_pretrained(tmp_path)
    about = (tmp_path / "config.json").read_text()
    assert json.loads(about)["architectures"] == ["LlavaForConditionalGeneration"]
    assert "flex" not in about and "attn_implementation" not in about
    with heard() as said:
        stock = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert "flex_fine" in "".join(said)
    assert type(stock) is LlavaForConditionalGeneration and not hasattr(stock, "flex_fine")
    assert torch.equal(forward(stock, inputs), forward(model, inputs))
    with heard() as said:
        flexcore.from_pretrained(tmp_path)
    assert "flex_fine" not in "".join(said)


def test_keywords_pass_through_and_dtypes_are_kept(tmp_path):
    model = wrapped("llama", model=make("llama").to(torch.bfloat16))
    model.flex_fine.to(torch.float32)  # trained in a higher precision than the base
    model.save_pretrained(tmp_path)
    again = flexcore.from_pretrained(tmp_path, attn_implementation="eager", device_map="cpu")
    assert again.dtype == torch.bfloat16 and again._flex_binding.base == "eager"
    assert {p.dtype for p in again.flex_fine.parameters()} == {torch.float32}
    for name, tensor in model.flex_fine.state_dict().items():
        assert torch.equal(again.flex_fine.state_dict()[name], tensor)
    other = flexcore.from_pretrained(tmp_path, AutoModelForCausalLM, dtype=torch.float16)
    assert {p.dtype for p in other.parameters()} == {torch.float16}


def test_tied_weights_stay_tied(tmp_path):
    model = wrapped("llama", model=make("llama", tie_word_embeddings=True))
    inputs = batch("llama", [Sample()])
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in names(tmp_path)
    again = flexcore.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(forward(again, inputs), forward(model, inputs))


def test_a_checkpoint_without_fine_weights(tmp_path):
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"holds no {CONFIG_NAME}"):
        flexcore.from_pretrained(tmp_path)
    model = flexcore.from_pretrained(tmp_path, config=flexcore.FlexConfig(first_layer=2))
    assert model.flex_config.layers == (3, 4, 5)
    assert torch.equal(model.flex_fine["3"].k_proj.weight, model.model.layers[3].self_attn.k_proj.weight)
    # someone saved the plain model over a wrapped one
    folder = tmp_path / "over"
    wrapped("llama").save_pretrained(folder)
    make("llama").save_pretrained(folder)
    with pytest.raises(flexcore.WeightsMismatchError, match=r"no fine weights for layers \[2, 3, 4, 5\]"):
        flexcore.from_pretrained(folder)
    assert flexcore.is_wrapped(flexcore.from_pretrained(folder, config=read_adapter_config(folder)[0]))


def test_another_config_with_the_saved_weights(tmp_path):
    model = wrapped("llama")
    model.save_pretrained(tmp_path)
    config = read_adapter_config(tmp_path)[0].replace(selector="all")
    again = flexcore.from_pretrained(tmp_path, config=config)
    assert again.flex_config.selector == "all"
    assert torch.equal(again.flex_fine["3"].v_proj.weight, model.flex_fine["3"].v_proj.weight)
    with pytest.raises(flexcore.WeightsMismatchError, match=r"layers must match: saved for \[2, 3, 4, 5\]"):
        flexcore.from_pretrained(tmp_path, config=flexcore.FlexConfig(first_layer=3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"first_layer": 1}}, "config must be a FlexConfig, got dict"),
        ({"model_class": 3}, "model_class must be a transformers model class, got 3"),
        ({"output_loading_info": True}, "output_loading_info must be left out"),
    ],
)
def test_arguments_of_the_wrong_kind(tmp_path, arguments, message):
    wrapped("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        flexcore.from_pretrained(tmp_path, **arguments)


def test_a_folder_that_is_not_there(tmp_path):
    for path in (tmp_path / "none", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            flexcore.from_pretrained(path)


def test_a_model_that_is_partly_on_disk(tmp_path):
    model, inputs = wrapped("llama"), batch("llama", [Sample()])
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    places = {n: "cpu" for n, _ in make("llama").model.named_children()}
    places = {f"model.{n}": p for n, p in places.items() if n != "layers"} | {"lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i in (2, 3) else "cpu" for i in range(6)}
    again = flexcore.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert again.model.layers[3].self_attn.k_proj.weight.device.type == "meta"
    assert torch.equal(forward(again, inputs), forward(model, inputs))
    again.save_pretrained(tmp_path / "again")
    again.save_adapter_weights(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / WEIGHTS_NAME)
    assert all(torch.equal(t, model.flex_fine.state_dict()[n]) for n, t in saved.items())
    third = flexcore.from_pretrained(tmp_path / "again")
    assert torch.equal(forward(third, inputs), forward(model, inputs))


def test_an_architecture_nobody_knows(tmp_path):
    wrapped("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["Nonesuch"]}))
    with pytest.raises(ValueError, match="got 'Nonesuch'; pass model_class"):
        flexcore.from_pretrained(tmp_path)
    assert flexcore.is_wrapped(flexcore.from_pretrained(tmp_path, LlamaForCausalLM))


def test_fine_weights_that_are_not_in_the_checkpoint_get_a_file_of_their_own(tmp_path):
    model, inputs = wrapped("llama"), batch("llama", [Sample()])
    # what a library does that saves its own idea of the state
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("flex_fine")}
    model.save_pretrained(tmp_path, state_dict=own)
    assert set(load_file(tmp_path / WEIGHTS_NAME)) == set(model.flex_fine.state_dict())
    assert torch.equal(forward(flexcore.from_pretrained(tmp_path), inputs), forward(model, inputs))
    perturb(model, seed=5)
    model.save_pretrained(tmp_path)  # a later save must not be shadowed by the file
    assert not (tmp_path / WEIGHTS_NAME).exists()
    assert torch.equal(forward(flexcore.from_pretrained(tmp_path), inputs), forward(model, inputs))


def test_only_the_main_process_writes(tmp_path):
    model = wrapped("llama")
    model.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a" / CONFIG_NAME).exists()
    model.save_adapter_weights(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()


def test_a_variant_and_a_subfolder(tmp_path):
    model, inputs = wrapped("llama"), batch("llama", [Sample()])
    model.save_pretrained(tmp_path / "inner", variant="fp32", max_shard_size="200KB")
    again = flexcore.from_pretrained(tmp_path, subfolder="inner", variant="fp32")
    assert torch.equal(forward(again, inputs), forward(model, inputs))


def test_the_upload_of_save_pretrained_includes_the_config(tmp_path, monkeypatch):
    model, seen = wrapped("llama"), []
    base = type(model)._flex_base
    monkeypatch.setattr(
        base,
        "_upload_modified_files",
        lambda self, folder, *a, **k: seen.append((tmp_path / CONFIG_NAME).is_file()),
    )
    model._upload_modified_files(tmp_path, "someone/something", {})
    assert seen == [True]


def test_the_model_card(tmp_path):
    model = wrapped("llama")
    model.config._name_or_path = "someone/some-model"
    model.save_adapter_weights(tmp_path)
    card = (tmp_path / CARD_NAME).read_text()
    front = card.split("---")[1]
    assert "library_name: flexcore" in front and 'base_model: "someone/some-model"' in front
    parameters = sum(p.numel() for p in model.flex_fine.parameters())
    assert f"{parameters:,} parameters: fine K/V projections of layers 2-5." in card
    for name, value in model.flex_config.to_dict().items():
        assert f"| `{name}` | `{json.dumps(value)}` |" in card
    code = card.split("```python")[1].split("```")[0]
    other = make("llama")
    exec(code, {"model": other, "folder": tmp_path})  # the card's own lines
    inputs = batch("llama", [Sample()])
    assert torch.equal(forward(other, inputs), forward(model, inputs))


def test_a_readme_of_the_users_is_left_alone_and_paths_stay_private(tmp_path):
    model = wrapped("llama")
    model.config._name_or_path = str(tmp_path)
    (tmp_path / CARD_NAME).write_text("mine")
    model.save_adapter_weights(tmp_path)
    assert (tmp_path / CARD_NAME).read_text() == "mine"
    model.save_adapter_weights(tmp_path / "other")
    card = (tmp_path / "other" / CARD_NAME).read_text()
    assert str(tmp_path) not in card and "base_model" not in card and "LlamaForCausalLM" in card


def test_damaged_fine_weights_are_named(tmp_path):
    model = wrapped("llama")
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = load_file(weights)
    short = {k: v for k, v in whole.items() if k != "flex_fine.3.k_proj.weight"}
    save_file(short, weights, metadata={"format": "pt"})
    with pytest.raises(flexcore.WeightsMismatchError, match=r"missing \['3.k_proj.weight'\]"):
        flexcore.from_pretrained(tmp_path)
