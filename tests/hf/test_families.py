"""The conformance matrix: the design's invariants on tiny models of every family, each with a control that differs.

A dozen families of different build run always, all of them with `-m slow`. Where a model differs from itself (cached
against uncached, alone against in a batch) by more than the design's tolerance, that difference, measured beside the
wrapped model's, takes its place.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import flexcore
from flexcore.hf import support
from flexcore.hf.families import Sample, families, family
from flexcore.positions import fine_positions

from .helpers import perturb, plain

TOLERANCE, CONTROL = 5e-5, 1e-3
NEW = 4
SAMPLES = [Sample(before=3, after=5, seed=1), Sample(before=6, after=3, seed=2)]
QUICK = [
    "llama",  # the reference case
    "gemma2",  # softcap, eager, sliding layers
    "gemma4_text",  # keys shared between layers, code that asks for the implementation's name
    "gpt_oss",  # attention sinks
    "deepseek_v3",  # latent attention: keys and values of different width
    "gpt2",  # fused Conv1D, no rotary positions
    "gpt_neox",  # fused and interleaved, partial rotary positions
    "stablelm",  # drops keyword arguments
    "llama4_text",  # complex rotary tables, chunked layers
    "qwen3_next",  # linear attention between
    "llava",
    "qwen2_5_vl",  # positions of three axes
    "idefics3",
    "gemma3",  # bidirectional attention within an image
]
REFUSED = {
    "falcon": "attention code of its own",
    "diffllama": "2 times in a forward pass",
    "mamba": "attention doesn't go through",
    "mistral-sliding": "0 of 4 attention layers can",
}
EVERY = [f.name for f in families() if f.installed()]
_known: dict[str, object] = {}


def cases(function):
    names = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in EVERY]
    return pytest.mark.parametrize("name", names)(function)


def build(name: str):
    """A fresh model of a supported family; a refused one skips the test, and must be refused unchanged.

    So does one that fails by itself in this version of transformers, as Llama 4 with pictures does in 5.24.
    """
    model = family(name).build()
    if name not in _known:
        before = picture(model)
        try:
            flexcore.unwrap(flexcore.wrap(model))
            _known[name] = None
        except flexcore.UnsupportedModelError as error:
            _known[name] = error
            assert len(str(error)) > 40
        assert picture(model) == before
        if _known[name] is None:
            try:
                logits(model, plain(example(name, model)))
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                assert name not in QUICK, "a family that everybody uses"
                _known[name] = f"the plain model fails: {error}"
            model = family(name).build()
    if _known[name] is not None:
        pytest.skip(str(_known[name])[:100])
    return model


def wrapped(name: str, model=None, **flex):
    model = build(name) if model is None else model
    return perturb(flexcore.wrap(model, flexcore.FlexConfig(**{"selector": "all", **flex})))


def example(name: str, model, samples=SAMPLES, **kwargs) -> dict:
    return family(name).example(model, samples, **kwargs)


def picture(model) -> tuple:
    """Everything about a model that wrapping could leave a trace in."""
    modules = list(model.named_modules())
    configs = [m.config for _, m in modules if hasattr(m, "config")]
    return (
        type(model),
        {n: (p.data_ptr(), p._version) for n, p in model.state_dict().items()},
        [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules],
        [c.to_json_string() for c in configs if hasattr(c, "to_json_string")],
        [(type(c._attn_implementation), str(c._attn_implementation)) for c in configs],
        [m.training for _, m in modules],
        sorted(vars(model)),
    )


def logits(model, inputs: dict, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def generate(model, inputs: dict, **kwargs):
    media = [90, 91, 92, 93, 94, 95, 96, 97, 98, 99]  # a random model may well answer with an image
    settings = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "suppress_tokens": [t for t in media if t < model.get_input_embeddings().weight.shape[0]],
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    return model.generate(**inputs, **{**settings, **kwargs})


def steps(out) -> torch.Tensor:
    return torch.stack(out.logits, dim=1)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def allowed(own: float) -> float:
    """The tolerance for a model that differs from itself by `own` without us; too large a one tests nothing."""
    if own > CONTROL:
        pytest.skip(f"the plain model itself differs by {own:.2g} here")
    return max(TOLERANCE, own)


def longer(name: str, inputs: dict, new: torch.Tensor) -> dict:
    """Unpadded inputs of one sample with an answer appended."""
    out = dict(inputs)
    out["input_ids"] = torch.cat([inputs["input_ids"], new[None]], dim=1)
    out["attention_mask"] = torch.ones_like(out["input_ids"])
    media = family(name).media
    if media is not None:
        out.update(media.more(out["input_ids"]))
    return out


def forced(name: str, model, inputs: dict, new: torch.Tensor) -> torch.Tensor:
    """Logits of an answer's tokens, teacher-forced, for one unpadded sample."""
    given = longer(name, inputs, new)
    prompt = inputs["input_ids"].shape[1]
    if "flex_streams" in given:
        mask = torch.zeros_like(given["input_ids"], dtype=torch.bool)
        mask[:, prompt - 1 :] = True
        given["readout_mask"] = mask
    return logits(model, given)[:, prompt - 1 : -1]


@cases
def test_i1_off_and_nothing_selected_are_bit_identical(name):
    model = build(name)
    inputs = example(name, model)
    before, answer = logits(model, plain(inputs)), generate(model, plain(inputs))
    state = picture(model)
    wrapped(name, model, selector="top_k", fraction=0.0)
    for given in (plain(inputs), inputs):
        assert torch.equal(logits(model, given), before)
        again = generate(model, given)
        assert torch.equal(again.sequences, answer.sequences)
        assert torch.equal(steps(again), steps(answer))
    flexcore.unwrap(model)
    assert picture(model) == state
    change = (logits(wrapped(name, model), inputs) - before).abs().amax(dim=-1)
    assert float(change[:, -1].min()) > CONTROL
    assert float((change * inputs["attention_mask"])[:, :-1].max()) < 1e-5


@cases
def test_i2_all_selected_equals_a_dense_softmax(name, monkeypatch):
    model = wrapped(name)
    inputs = example(name, model, [Sample(before=4, after=3, seed=5)])
    binding = model._flex_binding
    calls, seen = [], {}
    ours = ALL_ATTENTION_FUNCTIONS[str(binding.implementation)]

    def record(module, query, key, value, attention_mask, *args, **kwargs):
        out = ours(module, query, key, value, attention_mask, *args, **kwargs)
        kept = {k: kwargs.get(k) for k in ("scaling", "softcap", "s_aux")}
        calls.append((module, query, key, value, attention_mask, out[0].clone(), kept))
        return out

    hooks = []
    for layer in model.flex_config.layers:

        def note(module, args, kwargs, layer=layer):
            seen.setdefault(layer, (args, kwargs))

        attention = binding.sites[layer].attention
        hooks.append(attention.register_forward_pre_hook(note, with_kwargs=True))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, str(binding.implementation), record)
    tables = {}
    rotary = {s.rotary.module for s in binding.sites.values() if s.rotary is not None}
    for module in rotary:

        def keep(m, args, kwargs, out):
            tables.setdefault(m, []).append((args, kwargs, out))

        hooks.append(module.register_forward_hook(keep, with_kwargs=True))
    logits(model, inputs)
    stream = inputs["flex_streams"].samples[0][0]
    read = [c for c in calls if binding.layer_of(c[0]) in model.flex_config.layers]
    assert len(read) == len(model.flex_config.layers)
    for module, query, key, value, mask, out, kwargs in read:
        layer = binding.layer_of(module)
        calls.clear()
        fine_key, fine_value = dense_key_value(model, layer, stream, seen[layer], tables, calls)
        groups = query.shape[1] // key.shape[1]
        keys = torch.cat([key, fine_key], dim=2).double().repeat_interleave(groups, dim=1)
        values = torch.cat([value, fine_value], dim=2).double().repeat_interleave(groups, dim=1)
        scaling = query.shape[-1] ** -0.5 if kwargs["scaling"] is None else kwargs["scaling"]
        scores = (query[:, :, -1:].double() @ keys.transpose(2, 3)) * scaling
        if kwargs["softcap"] is not None:
            scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
        if mask is not None:
            row = mask[:, :, -1:, : key.shape[2]]
            row = torch.zeros(row.shape).masked_fill(~row, -math.inf) if row.dtype == torch.bool else row
            scores[..., : key.shape[2]] += row
        if kwargs["s_aux"] is not None:
            sink = kwargs["s_aux"].double().view(1, -1, 1, 1).expand(len(scores), -1, 1, 1)
            scores = torch.cat([scores, sink], dim=-1)
            values = torch.cat([values, torch.zeros_like(values[:, :, :1])], dim=2)
        expected = (scores.softmax(dim=-1) @ values).transpose(1, 2)
        assert gap(out[:, -1:].double(), expected) < TOLERANCE
    for hook in hooks:
        hook.remove()


def dense_key_value(model, layer, stream, call, tables, calls):
    """Fine keys and values of one layer: its real attention module, our weights in place of its own."""
    binding = model._flex_binding
    site, fine = binding.sites[layer], model.flex_fine[str(layer)]
    twin = copy.deepcopy(site.attention)
    for name in fine.names:
        own, new = twin.get_submodule(name), fine._modules[name.replace(".", "__")]
        if name not in fine.rows:
            own.load_state_dict(new.state_dict())
            continue
        with torch.no_grad():  # only key and value rows of a fused projection are ours
            weight = own.weight if isinstance(own, torch.nn.Linear) else own.weight.t()
            weight[fine.rows[name]] = new.weight
            if own.bias is not None:
                own.bias[fine.rows[name]] = new.bias
    grid = stream.grid
    tokens = grid.tokens(torch.arange(grid.n_regions)).flatten()
    tokens = tokens[tokens >= 0]
    features = stream.source.tensor[tokens][None]
    args, kwargs = call
    names = list(flexcore.hf.site.arguments(site.attention, args, kwargs))
    given = flexcore.hf.site.arguments(site.attention, args, kwargs)
    given = {k: v for k, v in given.items() if k != "flex_streams"}
    given[names[0]] = features
    used = (names[0], "position_ids", site.rotary.argument if site.rotary is not None else "")
    for key, value in given.items():  # what is of the sequence's length, or of its cache, means nothing here
        per_call = any(isinstance(t, torch.Tensor) for t in tree_leaves(value))
        if key not in used and (per_call or hasattr(value, "get_seq_length")):
            given[key] = None
    if site.needs_mask:
        given["attention_mask"] = torch.ones(1, 1, len(tokens), len(tokens), dtype=torch.bool)
    coarse = stream.coarse_positions
    if site.rotary is not None:
        for r_args, r_kwargs, out in tables[site.rotary.module]:
            # the very tables that the layer was given, made again at the fine tokens' positions
            if out is given[site.rotary.argument] or out[0] is given[site.rotary.argument][0]:
                r = flexcore.hf.site.arguments(site.rotary.module, r_args, r_kwargs)
        where = r[site.rotary.positions][..., :1, coarse]
        mode = "fractional" if where.ndim == 3 else "parent"
        r[site.rotary.positions] = fine_positions(where, grid, tokens, mode)
        given[site.rotary.argument] = site.rotary.module(**r)
        positions = r[site.rotary.positions]
    else:
        positions = coarse[grid.parents(tokens)][None]
    if "position_ids" in given:
        given["position_ids"] = positions
    with torch.no_grad():
        twin(**given)
    return calls[-1][2], calls[-1][3]


@cases
def test_i3_a_generated_batch_equals_single_runs(name):
    model = build(name)
    both = example(name, model)
    alone = [example(name, model, [sample]) for sample in SAMPLES]
    base, single = steps(generate(model, plain(both))), [generate(model, plain(a)) for a in alone]
    tolerance = allowed(max(gap(base[i], steps(s)[0]) for i, s in enumerate(single)))
    wrapped(name, model)
    out = generate(model, both)
    assert gap(steps(out), base) > CONTROL
    for i, inputs in enumerate(alone):
        assert gap(steps(out)[i], steps(generate(model, inputs))[0]) < tolerance


@cases
def test_i4_teacher_forcing_equals_decoding(name):
    model = build(name)
    inputs = example(name, model, SAMPLES[:1])
    answer = generate(model, plain(inputs))
    new = answer.sequences[0, -NEW:]
    tolerance = allowed(gap(forced(name, model, plain(inputs), new), steps(answer)))
    wrapped(name, model)
    answer = generate(model, inputs)
    new = answer.sequences[0, -NEW:]
    assert gap(forced(name, model, inputs, new), steps(answer)) < tolerance
    assert gap(forced(name, model, plain(inputs), new), steps(answer)) > CONTROL


@cases
def test_i5_beams_equal_each_beam_scored_alone(name):
    if name == "minimax":
        pytest.skip("MiniMaxCache doesn't reorder the states of linear attention")
    model = build(name)
    inputs = example(name, model, SAMPLES[:1])
    settings = {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.0, "output_scores": True}

    def differences(inputs: dict) -> tuple[float, float]:
        out = generate(model, inputs, **settings)
        found, controls = [], []
        for i in range(2):
            new = out.sequences[i, -NEW:]
            total = [
                forced(name, model, given, new).log_softmax(-1).gather(2, new[None, :, None]).sum()
                for given in (inputs, plain(inputs))
            ]
            found.append(abs(float(total[0] - out.sequences_scores[i])))
            controls.append(abs(float(total[1] - out.sequences_scores[i])))
        return max(found), max(controls)

    try:
        own = differences(plain(inputs))[0]
    except (ValueError, TypeError) as error:
        pytest.skip(f"the plain model's beam search fails: {error}")
    tolerance = allowed(own)
    wrapped(name, model)
    found, control = differences(inputs)
    assert found < tolerance
    assert control > CONTROL


@cases
def test_i9_save_load_wrap_again(name, tmp_path):
    model = wrapped(name)
    inputs = example(name, model)
    expected = logits(model, inputs)
    model.save_adapter_weights(tmp_path)
    other = flexcore.wrap(build(name), flexcore.hf.read_adapter_config(tmp_path)[0])
    assert gap(logits(other, inputs), expected) > CONTROL
    other.load_adapter_weights(tmp_path)
    assert torch.equal(logits(other, inputs), expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_unchanged(name):
    model = family(name).build()
    before = picture(model)
    with pytest.raises(flexcore.UnsupportedModelError, match=REFUSED[name]):
        flexcore.wrap(model)
    assert picture(model) == before


def test_every_family_of_the_quick_run_is_supported():
    for name in set(QUICK) & set(EVERY):
        build(name)
        assert _known[name] is None, _known[name]


def test_the_support_table_is_measured():
    rows = support.measure(["llama", "falcon", "qwen2_5_vl"], progress=False)
    assert [(r["name"], r["kind"], r["supported"]) for r in rows] == [
        ("falcon", "text", False),
        ("llama", "text", True),
        ("qwen2_5_vl", "multimodal", True),
    ]
    assert "attention code of its own" in rows[0]["reason"] and rows[1]["reason"] == ""
    table = support.table(rows)
    assert "| llama | text | yes |  |" in table and "1 of 2 text families work." in table
    with pytest.raises(ValueError, match="names must be among"):
        support.measure(["nothing"])
