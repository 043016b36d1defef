"""Quantised bases: fine projections are plain, and start from the dequantised weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM

import flexcore
from flexcore.hf.quantised import is_quantised, plain_linear

from .helpers import KINDS, Sample, batch, forward, generate, make, perturb, plain

FLEX = {"first_layer": 1, "selector": "top_k", "fraction": 0.2}


class Int8Linear(nn.Module):
    """A weight-only quantised layer as packages write them: integers, scales, no function to undo it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def weights(self) -> torch.Tensor:
        return self.qweight.to(self.scale.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weights(), self.bias)


def replace_linears(model, new, skip: str = "lm_head"):
    """Put `new(linear)` in the place of every linear layer of the decoder."""
    for module in model.get_decoder().modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != skip:
                setattr(module, name, new(child))
    return model


def quantise(model, how: str):
    """A quantised model, its linear layers' weights as the package itself undoes them in hand."""
    if how == "unknown":
        return replace_linears(model, Int8Linear).eval()
    if how == "torchao":
        quantization = pytest.importorskip("torchao.quantization", reason="torchao isn't installed")
        quantization.quantize_(model.get_decoder(), quantization.Int8WeightOnlyConfig())
        return model
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")

    def eight(linear):
        out = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
        )
        out.load_state_dict(linear.state_dict())
        return out.to("cpu")

    def four(linear):
        dtype = linear.weight.dtype
        out = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype
        )
        out.load_state_dict(linear.state_dict())
        return out.to("cpu")

    try:
        return replace_linears(model, eight if how == "bnb8" else four).eval()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes can't quantise on this CPU: {error}")


HOW = ("unknown", "torchao", "bnb8", "bnb4")


def own_weight(module) -> torch.Tensor:
    """What the quantiser says its weight is."""
    if isinstance(module, Int8Linear):
        return module.weights()
    kind = type(module.weight).__name__
    if kind == "Params4bit":
        return (module(torch.eye(module.in_features, dtype=module.compute_dtype)) - module.bias).T
    if kind == "Int8Params":
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(module.weight, module.state)
    return module.weight.dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", HOW)
def test_fine_projections_start_from_dequantised_weights(how, dtype):
    model = quantise(make("llama", attention_bias=True).to(dtype), how)
    before = forward(model, plain(batch("llama", [Sample()])))
    flexcore.wrap(model, flexcore.FlexConfig(**FLEX))
    for layer in model.flex_config.layers:
        for name in ("k_proj", "v_proj"):
            base = model.model.layers[layer].self_attn.get_submodule(name)
            fine = model.flex_fine[str(layer)].get_submodule(name)
            assert is_quantised(base) and type(fine) is nn.Linear and not is_quantised(fine)
            assert fine.weight.dtype == dtype and fine.weight.requires_grad
            torch.testing.assert_close(fine.weight, own_weight(base).to(dtype), rtol=1e-2, atol=1e-6)
            assert torch.equal(fine.bias, base.bias) and fine.bias is not base.bias
    assert torch.equal(forward(model, plain(batch("llama", [Sample()]))), before)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_reads_and_trains(kind, how):
    model, inputs = quantise(make(kind), how), batch(kind, [Sample()])
    before = forward(model, plain(inputs))
    perturb(flexcore.wrap(model, flexcore.FlexConfig(**FLEX)))
    with_media = forward(model, inputs)
    assert with_media.isfinite().all() and (with_media[:, -1] - before[:, -1]).abs().max() > 1e-3
    assert torch.equal(with_media[:, :-1], before[:, :-1])
    generate(model, inputs, new=2)
    if how == "bnb4":
        return  # bitsandbytes' own 4-bit kernel for CPUs has no backward pass
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.flex_fine.requires_grad_(True)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.flex_fine.parameters())


def test_a_quantised_model_that_shares_its_own_projections():
    model, inputs = quantise(make("llama"), "torchao"), batch("llama", [Sample()])
    flexcore.wrap(model, flexcore.FlexConfig(share_kv_projections=True, fine_norm=True, **FLEX))
    copies = quantise(make("llama"), "torchao")
    flexcore.wrap(copies, flexcore.FlexConfig(fine_norm=True, **FLEX))
    torch.testing.assert_close(forward(model, inputs), forward(copies, inputs), rtol=0, atol=1e-4)
    assert len(generate(model, inputs, new=2)[0]) > 0


def test_adapter_weights_of_a_quantised_model(tmp_path):
    model, inputs = quantise(make("llama"), "torchao"), batch("llama", [Sample()])
    perturb(flexcore.wrap(model, flexcore.FlexConfig(**FLEX)))
    model.save_adapter_weights(tmp_path)
    other = flexcore.wrap(quantise(make("llama"), "torchao"), flexcore.FlexConfig(**FLEX))
    other.load_adapter_weights(tmp_path)
    assert torch.equal(forward(other, inputs), forward(model, inputs))


def test_a_quantised_checkpoint_comes_back_bit_for_bit(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao isn't installed")
    settings = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    make("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)
    model = perturb(flexcore.wrap(base, flexcore.FlexConfig(**FLEX)))
    model.save_pretrained(tmp_path / "saved")
    again = flexcore.from_pretrained(tmp_path / "saved")
    inputs = batch("llama", [Sample()])
    assert is_quantised(again.model.layers[3].self_attn.k_proj)
    assert torch.equal(forward(again, inputs), forward(model, inputs))


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_is_read_off_a_layer_of_an_unknown_kind(bias):
    linear = nn.Linear(37, 11, bias=bias)
    found = plain_linear(Int8Linear(linear).eval())
    assert torch.allclose(found.weight, Int8Linear(linear).weights(), atol=1e-6) and not found.training
    assert (found.bias is None) != bias
    if bias:
        assert torch.equal(found.bias, linear.bias)
    assert not is_quantised(linear) and not is_quantised(linear.half()) and is_quantised(Int8Linear(linear))


def test_a_layer_that_can_not_run_here_is_refused_unchanged():
    class Elsewhere(Int8Linear):
        def forward(self, x):
            if x.abs().sum() == x.shape[0] or not x.any():  # the unit vectors that weights are read off with
                raise RuntimeError("no kernel for this device")
            return super().forward(x)

    model = replace_linears(make("llama"), Elsewhere)
    with pytest.raises(
        flexcore.UnsupportedModelError, match=r"can't be read on cpu .no kernel for this device"
    ):
        flexcore.wrap(model)
    assert not flexcore.is_wrapped(model) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("how", ["unknown", "torchao"])
def test_adapters_on_a_quantised_base_are_merged_into_the_copies(how):
    peft = pytest.importorskip("peft", reason="peft isn't installed")
    model = quantise(make("llama"), how)
    if how == "unknown":  # peft knows its own list of layers only
        attention = model.model.layers[3].self_attn
        linear = nn.Linear(64, 32, bias=False)
        attention.k_proj = peft.tuners.lora.Linear(
            linear, "default", peft.LoraConfig(), r=8, init_lora_weights=False
        )
        attention.k_proj.base_layer = Int8Linear(linear)
        nn.init.normal_(attention.k_proj.lora_B["default"].weight)
    else:
        config = peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False, lora_dropout=0.5)
        model = peft.get_peft_model(model, config)
    flexcore.wrap(model.train(), flexcore.FlexConfig(**FLEX))
    layer = model.get_decoder().layers[3].self_attn.k_proj
    fine = model.flex_fine["3"].k_proj
    assert type(fine) is nn.Linear and layer.training
    x, base = torch.randn(5, 64), layer.get_base_layer()
    torch.testing.assert_close(fine(x), layer.eval()(x), rtol=1e-3, atol=1e-4)
    assert (layer(x) - base(x)).abs().max() > 1e-2
