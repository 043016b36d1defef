"""The selection loss in wrapped models: against a naive Llama, off at no cost, and in a Trainer with exploration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import flexcore
from flexcore.hf.training import Exploration, freeze_base

from .helpers import GRID, WIDE, Sample, batch, embeddings, forward, plain, twin, wrapped
from .test_training import MIXED, gradients, training_inputs
from .training_runs import Questions, trainer

WEIGHT = 0.3


def pair(kind: str, **flex):
    """The same model with and without the loss."""
    return wrapped(kind, selection_loss=WEIGHT, **flex).train(), wrapped(kind, **flex).train()


def naive_loss(model, embeds: Tensor, streams, rows: list[int]) -> Tensor:
    """The selection loss of one unpadded sample from whole attention maps, written from its definition."""
    config, flex = model.config.get_text_config(), model.flex_config
    decoder, selector = model.get_decoder(), model._flex_binding.selector
    n_heads, n_kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length, groups = len(embeds), config.num_attention_heads // config.num_key_value_heads
    causal = torch.full((length, length), -math.inf).triu(1)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2) / width)
        angle = (positions[:, None].float() * frequency).repeat(1, 2)
        half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
        return x * angle.cos() + half * angle.sin()

    def heads(x: Tensor, linear, n: int) -> Tensor:
        return linear(x).view(len(x), n, width).transpose(0, 1)

    hidden, before, terms = embeds, None, []
    for index, layer in enumerate(decoder.layers):
        x = norm(hidden, layer.input_layernorm.weight)
        at = torch.arange(length)
        q = rotate(heads(x, layer.self_attn.q_proj, n_heads), at)
        k = rotate(heads(x, layer.self_attn.k_proj, n_kv), at).repeat_interleave(groups, 0)
        v = heads(x, layer.self_attn.v_proj, n_kv).repeat_interleave(groups, 0)
        logits = q @ k.transpose(1, 2) / math.sqrt(width) + causal
        out = (logits.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)
        if index in flex.layers:
            fine, of_rows = model.flex_fine[str(index)], []
            for r in rows:
                total, keys, values, visible, owner = 0.0, [k], [v], [logits[:, r]], []
                for m, stream in enumerate(streams):
                    for region in before[r, m][1].nonzero()[:, 0].tolist():
                        tokens = stream.grid.tokens(torch.tensor([region])).flatten()
                        tokens = tokens[tokens >= 0]
                        tokens = tokens[stream.valid[tokens]]
                        features = stream.source.tensor[tokens]
                        places = stream.coarse_positions[stream.grid.parents(tokens)]
                        kf = rotate(heads(features, fine.k_proj, n_kv), places).repeat_interleave(groups, 0)
                        keys.append(kf)
                        values.append(heads(features, fine.v_proj, n_kv).repeat_interleave(groups, 0))
                        visible.append((q[:, r, None] @ kf.transpose(1, 2))[:, 0] / math.sqrt(width))
                        owner.append((m, region))
                p = torch.cat(visible, dim=-1).softmax(-1)
                joint = (p[:, None] @ torch.cat(values, dim=1))[:, 0].reshape(-1)
                out = torch.cat([out[:r], joint[None], out[r + 1 :]])
                parts = p.split([part.shape[1] for part in visible], dim=-1)[1:]
                got = {o: part.sum(-1).mean().detach() for o, part in zip(owner, parts, strict=True)}
                for m in range(len(streams)):
                    pooled = before[r, m][0]
                    mine = [region for o, region in owner if o == m]
                    if mine:
                        share = pooled[mine] / pooled[mine].sum()
                        total = total - sum(got[m, reg] * share[i].log() for i, reg in enumerate(mine))
                of_rows.append(torch.as_tensor(total))
            terms.append(torch.stack(of_rows).mean())
        if index >= flex.first_layer:
            before = {}
            for r in rows:
                p = logits[:, r].softmax(-1).sum(0)
                for m, stream in enumerate(streams):
                    scores = p[stream.coarse_positions]
                    key = torch.tensor([[index, r - int(stream.coarse_positions[0])]])
                    chosen = selector.select(scores[None], stream.grid, stream.selectable, key)[0]
                    before[r, m] = (stream.grid.pool(scores), chosen)
        hidden = hidden + layer.self_attn.o_proj(out)
        hidden = hidden + layer.mlp(norm(hidden, layer.post_attention_layernorm.weight))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("grids", [[GRID], [GRID, WIDE]], ids=["one", "two-with-margins"])
def test_loss_and_gradients_equal_a_naive_llama(grids):
    taught, untaught = pair("llama")
    inputs = training_inputs("llama", [Sample(grids=grids, after=7)])
    rows = (inputs["labels"][0, 1:] != -100).nonzero()[:, 0].tolist()
    streams = inputs["flex_streams"].samples[0]
    naive = twin(untaught)
    expected = naive_loss(naive, embeddings(naive, inputs)[0], streams, rows)
    extra = taught(**inputs).loss - untaught(**inputs).loss
    assert float(extra) == pytest.approx(WEIGHT * float(expected), rel=1e-4) and float(expected) > 1e-2

    with_loss, without = gradients(taught, inputs), gradients(untaught, inputs)
    naive.zero_grad(set_to_none=True)
    # the same embeddings, as leaves of the naive model's graph
    embeds = naive.get_input_embeddings()(inputs["input_ids"])[0]
    (WEIGHT * naive_loss(naive, embeds, streams, rows)).backward()
    reached = 0
    for name, parameter in naive.named_parameters():
        found = with_loss[name] - without[name] if name in with_loss else torch.zeros_like(parameter)
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(found, wanted, atol=2e-5), name
        reached += float(wanted.abs().max()) > 1e-4
    assert reached > 10


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_a_batch_is_the_mean_over_rows_and_logits_stay_the_same(kind):
    taught, untaught = pair(kind)
    inputs = training_inputs(kind)
    out, other = taught(**inputs), untaught(**inputs)
    assert torch.equal(out.logits, other.logits)
    whole = float(out.loss - other.loss)
    alone = []
    for sample in MIXED[:2]:
        one = training_inputs(kind, [sample])
        alone.append(float(taught(**one).loss - untaught(**one).loss))
    assert whole == pytest.approx(sum(alone) / 2, rel=1e-3) and min(alone) > 1e-3
    as_tuple = taught(**inputs, return_dict=False)
    assert float(as_tuple[0]) == pytest.approx(float(out.loss), rel=1e-6)


def test_outside_of_training_it_does_nothing(monkeypatch):
    from flexcore.hf import teaching

    taught, untaught = pair("llama")
    inputs = training_inputs("llama")
    calls = []
    real = teaching.cell_scores
    monkeypatch.setattr(teaching, "cell_scores", lambda *a, **k: calls.append(1) or real(*a, **k))
    unlabelled = {k: v for k, v in inputs.items() if k != "labels"}
    untaught(**inputs)
    taught(**unlabelled)
    taught(**plain(inputs))
    with torch.no_grad():
        assert float(taught(**inputs).loss) == float(untaught(**inputs).loss)
    assert float(taught.eval()(**inputs).loss) == float(untaught.eval()(**inputs).loss)
    assert not calls
    taught.train()(**inputs)
    assert calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    taught, _ = pair("llama")
    inputs = training_inputs("llama")
    expected = gradients(taught, inputs, use_cache=False)
    taught.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        with pytest.raises(ValueError, match=r"use_reentrant must be False .* for a selection_loss"):
            gradients(taught, inputs, use_cache=False)
        return
    found = gradients(taught, inputs, use_cache=False)
    assert set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in expected)


def test_it_raises_the_score_of_what_is_read():
    taught, _ = pair("llama", selector="all")
    for name, parameter in taught.named_parameters():
        parameter.requires_grad_(".q_proj" in name)
    inputs = training_inputs("llama", [Sample(after=8)], answers=1)
    optimizer = torch.optim.SGD([p for p in taught.parameters() if p.requires_grad], lr=0.3)
    untaught = wrapped("llama", selector="all").train()
    gains = []
    for _ in range(15):
        untaught.load_state_dict(taught.state_dict())
        extra = taught(**inputs).loss - untaught(**inputs).loss.detach()
        optimizer.zero_grad()
        extra.backward()
        optimizer.step()
        gains.append(float(extra))
    assert gains[-1] < 0.97 * gains[0]


# ---------------------------------------------------------------------- exploration


class Watch(TrainerCallback):
    """How many regions were read in each step, and what the share was."""

    def __init__(self, exploration: Exploration):
        self.exploration = exploration
        self.shares: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.shares.append(self.exploration.share)


def test_exploration_anneals_in_a_trainer_and_leaves_no_trace(tmp_path):
    exploration = Exploration(anneal=0.5, floor=0.2)
    watch = Watch(exploration)
    model = wrapped("llama", layers=4, selection_loss=WEIGHT)
    freeze_base(model)
    selector = model._flex_binding.selector
    questions = Questions()
    run = trainer(
        tmp_path, model, callbacks=[exploration, watch], eval=questions, eval_strategy="steps", eval_steps=3
    )
    run.train()
    assert watch.shares == pytest.approx([1.0, 1 - 0.8 / 3, 1 - 1.6 / 3, 0.2, 0.2, 0.2])
    assert model._flex_binding.selector is selector
    inputs = batch("llama", [Sample()])
    again = wrapped("llama", layers=4)
    again.load_state_dict(model.state_dict())
    assert torch.equal(forward(model.eval(), inputs), forward(again, inputs))


def test_gradient_accumulation_equals_a_larger_batch(tmp_path):
    """Trainer adds accumulated batches up, so each must be over the answer tokens of all of them."""
    found = {}
    for weight, size, steps in ((WEIGHT, 4, 1), (WEIGHT, 2, 2), (WEIGHT, 1, 4), (0.0, 4, 1)):
        run = trainer(
            tmp_path,
            wrapped("llama", layers=4, selection_loss=weight),
            max_steps=2,
            learning_rate=1e-3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        run.train()
        found[weight, size] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert found[WEIGHT, 2] == pytest.approx(found[WEIGHT, 4], abs=1e-3)
    assert found[WEIGHT, 1] == pytest.approx(found[WEIGHT, 4], abs=1e-3)
    assert found[WEIGHT, 4][0] - found[0.0, 4][0] > 1e-2


def test_a_first_step_reads_everything(tmp_path):
    found = []
    for selector in ("top_k", "all"):
        model = wrapped("llama", layers=4, selector=selector)
        freeze_base(model)
        run = trainer(tmp_path / selector, model, callbacks=[Exploration()], max_steps=1)
        run.train()
        found.append(run.state.log_history[0]["loss"])
    assert found[0] == found[1]
    model = wrapped("llama", layers=4)
    freeze_base(model)
    run = trainer(tmp_path / "without", model, max_steps=1)
    run.train()
    assert run.state.log_history[0]["loss"] != found[0]


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"floor must be in \[0, 1\], got 1.5"):
        Exploration(floor=1.5)
    model = flexcore.unwrap(wrapped("llama", layers=4))
    with pytest.raises(flexcore.errors.WrapStateError, match="isn't wrapped"):
        trainer(tmp_path, model, callbacks=[Exploration()]).train()
