"""The cost of a training step: FLOPs against those that torch counts, parameters against a model's own."""

from __future__ import annotations

import pytest
import torch

import flexcore
from flexcore.hf.cost import measure
from flexcore.hf.cost_report import Setting
from flexcore.hf.tiny import tiny_llava
from flexcore.hf.training_cost import Parameters, TrainingSetting, main, training_cost
from flexcore.hf.training_groups import lora, train_only
from flexcore.roofline import Work

TEXT, ANSWER, LAYERS = 40, 8, 4


@pytest.fixture(scope="module")
def measured():
    model = tiny_llava(layers=LAYERS)[0]
    found = measure(model.config, first_layer=1)
    return found, Parameters.of(model.config, found)


def made(measured, **changes):
    seen = {"text": TEXT, "zoom": 2, "fraction": 1.0, "dtype": "float32", **changes.pop("seen", {})}
    return training_cost(*measured, TrainingSetting(Setting(**seen), answer=ANSWER, **changes))


@pytest.mark.parametrize("trains", ["fine", "fine-and-projector", "lora", "all-but-tower", "all"])
def test_parameters_that_train(measured, trains):
    model = flexcore.wrap(tiny_llava(layers=LAYERS)[0], flexcore.FlexConfig(first_layer=1))
    total = sum(p.numel() for p in model.parameters())
    assert measured[1].total == total
    if trains == "lora":
        pytest.importorskip("peft", reason="peft isn't installed")
        model = lora(model, 4)
    else:
        train_only(model, trains)
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = made(measured, trains=trains, rank=4, weights="float32")
    assert found.trained == expected
    memory = found.memory
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (
        4 * total,
        4 * expected,
        8 * expected,
    )


def test_a_projector_that_trains_costs_its_gradients(measured):
    fine, more, paper = (made(measured, trains=t) for t in ("fine", "fine-and-projector", "all-but-tower"))
    view = measured[0].encoder.projector_flops
    assert more.parts["projector"].flops - fine.parts["projector"].flops == view > 0
    assert more.parts["projector"] == paper.parts["projector"] and more.parts["tower"] == fine.parts["tower"]
    # the gradient goes down through all layers, and no weight there has one
    assert fine.parts["decoder"].flops < more.parts["decoder"].flops < paper.parts["decoder"].flops


def test_a_tower_that_takes_smaller_pictures_costs_less(measured):
    config = tiny_llava(layers=LAYERS)[0].config
    less = measure(config, first_layer=1, side=24)
    assert less.encoder.tokens == 9 and measured[0].encoder.tokens == 36
    assert less.encoder.tower_flops < measured[0].encoder.tower_flops / 3
    found = Parameters.of(config, less, side=24)
    # the table of positions is the tower's
    assert (found.text, found.projector, found.fine) == tuple(
        getattr(measured[1], name) for name in ("text", "projector", "fine")
    )
    assert found.tower < measured[1].tower


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trains", ["fine", "all-but-tower"])
def test_flops_are_those_that_torch_counts(measured, trains, checkpointing):
    """The decoder without media, forward and backward, as torch's own counter sees it."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_llava(layers=LAYERS)[0]
    model.set_attn_implementation("eager")
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    n = TEXT + 36
    model.requires_grad_(trains != "fine")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    embeds = torch.randn(1, n, 64)
    if trains == "fine":
        # what the fine projections of the first reading layer hand on
        hook = decoder.layers[2].self_attn.register_forward_hook(
            lambda m, args, out: (out[0] + torch.zeros(64, requires_grad=True), *out[1:])
        )
    with FlopCounterMode(display=False) as counter:
        loss = head(decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state).sum()
        loss.backward()
    if trains == "fine":
        hook.remove()
    part = made(measured, trains=trains, checkpointing=checkpointing).parts["decoder"]
    # eager attention multiplies the whole square, of which half is masked; layer 2's lower half takes part in neither
    assert part.flops == pytest.approx(counter.get_total_flops(), rel=0.12)
    assert part.flops > 1.5 * made(measured, trains=trains).parts["decoder"].flops / 2


def test_what_grows_with_what(measured):
    base = made(measured)
    assert made(measured, accumulate=3, devices=2).flops == 6 * base.flops
    assert made(measured, seen={"batch": 2}).flops == 2 * base.flops
    sharded = made(measured, devices=4, sharded=True)
    assert [sharded.memory[n] for n in ("weights", "gradients")] == [
        base.memory[n] // 4 for n in ("weights", "gradients")
    ]
    less = made(measured, checkpointing=True)
    assert less.memory["activations"] < base.memory["activations"] and less.flops > base.flops
    # beside 16-bit weights the optimizer keeps its own copy
    half = made(measured, weights="float16")
    assert half.memory["optimizer"] == 12 * half.trained
    # a row reads a hundredth, eight rows at most eight of them
    few = made(measured, seen={"fraction": 0.01})
    assert few.projected == ANSWER * round(0.01 * few.fine) < base.projected == base.fine
    assert (
        few.parts["fine projection"].flops * base.projected
        == base.parts["fine projection"].flops * few.projected
    )
    slow = made(measured, seen={"machine": flexcore.roofline.Machine("slow", 1.0, 1e30)})
    assert slow.seconds == pytest.approx(slow.flops)
    assert isinstance(slow.optimizer, Work) and "100 steps: at least" in slow.text(100)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trains": "none"}, "trains must be one of fine, fine-and-projector, lora, all-but-tower, all, got"),
        ({"answer": 0}, "answer must be an integer >= 1, got 0"),
        ({"answer": 65}, "answer must be at most text=64"),
        ({"devices": True}, "devices must be an integer >= 1, got True"),
        ({"weights": "int8"}, "weights must be one of"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingSetting(**changes)


def test_the_command(tmp_path, capsys):
    tiny_llava(layers=LAYERS)[0].config.save_pretrained(tmp_path)
    main([str(tmp_path), "--trains", "lora", "--devices", "2", "--steps", "10", "--machine", "h100"])
    out = capsys.readouterr().out
    assert "H100 SXM" in out and "(lora)" in out and "10 steps: at least" in out
