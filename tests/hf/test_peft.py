"""LoRA and `modules_to_save` of peft, put on a wrapped model or there before it is wrapped."""

from __future__ import annotations

import pytest
import torch
from packaging import version
from transformers.integrations.peft import MIN_PEFT_VERSION

import flexcore
from flexcore.hf.training import AlphaWarmup

from .helpers import KINDS, WIDE, Sample, batch, forward, generate, make, perturb, plain, wrapped
from .test_training import training_inputs
from .training_runs import trainer

peft = pytest.importorskip("peft", reason="peft isn't installed")

TARGETS = {
    "base and fine": {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    "fine only": {"target_modules": r".*flex_fine\.\d+\.k_proj"},
    "base, fine saved": {"target_modules": r".*self_attn\.(q|k)_proj", "modules_to_save": ["flex_fine"]},
    "one layer saved": {"target_modules": ["q_proj"], "modules_to_save": ["flex_fine.3"]},
}


def lora(**kwargs):
    # init_lora_weights=False: LoRA that starts as nothing would hide bugs
    return peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **kwargs)


def media(kind: str) -> dict:
    return batch(kind, [Sample(), Sample(grids=[WIDE], seed=1)])


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_on_a_wrapped_model(kind, target):
    inputs, model = media(kind), wrapped(kind)
    before = forward(model, inputs)
    model = peft.get_peft_model(model, lora(**TARGETS[target]))
    fine = {n: p for n, p in trainable(model).items() if "flex_fine" in n}
    assert fine
    model.train()(**training_inputs(kind), use_cache=False).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in fine.values())
    model.eval()
    with torch.no_grad():
        for parameter in fine.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    after = forward(model, inputs)
    with model.disable_adapter():
        assert torch.equal(forward(model, inputs), before)
    assert float((after - before).abs().max()) > 1e-2
    answer = generate(model, inputs)
    assert torch.equal(answer, generate(model, inputs, use_cache=False))
    assert not torch.equal(answer, generate(model, plain(inputs)))
    merged = model.merge_and_unload()
    assert not any("lora" in n or "original" in n for n, _ in merged.named_parameters())
    assert float((forward(merged, inputs) - after).abs().max()) < 5e-5
    flexcore.unwrap(merged)


@pytest.mark.parametrize("kind", KINDS)
def test_wrapping_a_peft_model_copies_merged_weights(kind):
    inputs = media(kind)
    model = peft.get_peft_model(make(kind), lora(target_modules=["q_proj", "k_proj", "v_proj"]))
    off = forward(model, plain(inputs))
    config = flexcore.FlexConfig(first_layer=1, selector="top_k", fraction=0.2)
    assert flexcore.wrap(model, config) is model and flexcore.is_wrapped(model)
    inner = model.get_base_model()
    fine = {n: m for n, m in inner.flex_fine.named_modules() if n.endswith("_proj")}
    assert fine and {type(m) for m in fine.values()} == {torch.nn.Linear}
    for layer in inner.flex_config.layers:
        own = inner.get_decoder().layers[layer].self_attn.k_proj
        merged = own.base_layer.weight + own.get_delta_weight("default")
        assert torch.allclose(fine[f"{layer}.k_proj"].weight, merged, rtol=0, atol=1e-6)
    perturb(inner)
    assert torch.equal(forward(model, plain(inputs)), off)
    on = forward(model, inputs)
    assert float((on - off).abs().max()) > 1e-3
    assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))
    assert not torch.equal(generate(model, inputs), generate(model, plain(inputs)))
    flexcore.unwrap(model)
    assert not flexcore.is_wrapped(model) and torch.equal(forward(model, plain(inputs)), off)


@pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION),
    reason=f"this transformers takes adapters of its own from peft {MIN_PEFT_VERSION} on only",
)
def test_adapters_of_transformers_itself():
    inputs, model = media("llama"), wrapped("llama")
    before = forward(model, inputs)
    model.add_adapter(lora(target_modules=["q_proj"]))
    assert float((forward(model, inputs) - before).abs().max()) > 1e-2
    assert torch.equal(generate(model, inputs), generate(model, inputs, use_cache=False))
    model.disable_adapters()
    assert torch.equal(forward(model, inputs), before)


def test_a_kept_cache_notices_that_other_fine_weights_are_active():
    inputs = media("llama")
    model = peft.get_peft_model(
        wrapped("llama"), lora(target_modules=["q_proj"], modules_to_save=["flex_fine"])
    )
    versions = []
    for _ in range(2):
        binding = model._flex_binding.follow(model.get_base_model())
        versions.append(binding.weights_version())
        model.base_model.disable_adapter_layers()
    assert versions[0] != versions[1]
    assert forward(model, inputs).isfinite().all()


def test_a_trainer_trains_lora_and_fine_projections(tmp_path):
    model = wrapped("llama", layers=4)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["flex_fine"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    run = trainer(tmp_path, model, warmup=True, gradient_checkpointing=True, max_steps=4)
    assert any(isinstance(c, AlphaWarmup) for c in run.callback_handler.callbacks)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trainable(model)) and any("lora_B" in n for n in changed)
    assert all(".modules_to_save." in n for n in changed if "flex_fine" in n)
    # what peft saves of it, put on a fresh wrapped model
    model.eval().save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(wrapped("llama", layers=4), tmp_path / "lora")
    # checkpointing has switched the cache off, so other kernels may run
    assert float((forward(again, media("llama")) - forward(model, media("llama"))).abs().max()) < 5e-5
