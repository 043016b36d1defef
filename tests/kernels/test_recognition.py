"""Which layers the projection kernel may stand in for: those whose own code is Llama's formula, found by trying."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flexcore
from flexcore.hf import projection
from flexcore.hf.families import families
from flexcore.hf.site import rotary_tables
from flexcore.hf.tiny import tiny_llama
from tests.kernels.helpers import gap

twin = pytest.importorskip("flexcore.kernels.gather_project_rotate", exc_type=ImportError)


def plain(model: Any) -> list[bool]:
    """Layer by layer, whether its keys and values are two linear maps and Llama's rotation."""
    flexcore.wrap(model)
    binding = model._flex_binding
    out = []
    for layer in binding.reads_from:
        replaced = binding.fine.at(layer).modules_by_name()
        assert {"k_proj", "v_proj"} <= set(replaced)
        site, features = binding.sites[layer], torch.zeros(1, 1, binding.width)
        cos, _ = rotary_tables(site.rotary, features, torch.zeros(1, 1))
        out.append(projection._makes_like_llama(site, replaced, features, cos.shape[-1]))
    return out


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "seed_oss"])
def test_plain_families(family: str) -> None:
    found = next(f for f in families() if f.name == family)
    assert all(plain(found.build()))


@pytest.mark.parametrize(
    "family",
    ["qwen3", "cohere", "glm", "phi", "olmo2", "smollm3"],
    ids=["key-norm", "interleaved", "partial-interleaved", "partial", "wide-norm", "no-rotation"],
)
def test_families_with_anything_else(family: str) -> None:
    found = next(f for f in families() if f.name == family)
    assert not all(plain(found.build()))


def test_clamped_projections_are_noticed() -> None:
    """OLMo's `clip_qkv` shows on large features only."""
    from transformers import OlmoConfig, OlmoForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert all(plain(OlmoForCausalLM(OlmoConfig(**sizes)).eval()))
    assert not any(plain(OlmoForCausalLM(OlmoConfig(**sizes, clip_qkv=50.0)).eval()))


def test_hooks_are_left_alone() -> None:
    linear = torch.nn.Linear(4, 4)
    assert not projection._hooked(linear)
    handle = linear.register_forward_hook(lambda *_: None)
    assert projection._hooked(linear)
    handle.remove()
    linear.forward = lambda x: x  # type: ignore[method-assign]
    assert projection._hooked(linear)


def test_the_cpu_path_is_the_shadow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a GPU nothing is tried at all."""
    monkeypatch.setattr(projection, "_makes_like_llama", None)
    model = tiny_llama(layers=3)
    flexcore.wrap(model)
    site = model._flex_binding.sites[2]
    replaced = model._flex_binding.fine.at(2).modules_by_name()
    key, _ = projection.shadow_key_value(site, replaced, torch.randn(1, 3, 64), torch.arange(3)[None])
    assert key.shape[2] == 3


def test_the_twin_is_llamas_rotation() -> None:
    """Against transformers' own code, so that kernel and twin aren't wrong together."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    features, key_weight, value_weight = torch.randn(7, 10), torch.randn(24, 10), torch.randn(24, 10)
    bias, cos, sin = torch.randn(24), torch.randn(7, 8), torch.randn(7, 8)
    key, value = twin.gather_project_rotate_reference(
        features, key_weight, value_weight, cos, sin, 3, key_bias=bias, value_bias=bias
    )
    flat = (features @ key_weight.t() + bias).unflatten(1, (3, 8)).transpose(0, 1)[None]
    _, expected = apply_rotary_pos_emb(flat, flat, cos[None], sin[None])
    assert gap(key, expected[0].transpose(0, 1)) < 1e-5
    assert gap(value.flatten(1), features @ value_weight.t() + bias) < 1e-5
