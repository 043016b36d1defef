"""What two processes run in the distributed tests; started by `accelerate launch`, results land in a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from flexcore.hf.training import freeze_base

from .helpers import Sample, batch, generate, wrapped
from .test_training import training_inputs
from .training_runs import trainer

# the second process has text only; both have the same number of answer tokens, so the mean of losses is the loss
HALVES = ([Sample(after=8)], [Sample(grids=[], seed=2, before=40, after=10)])


def inputs(rank: int) -> dict:
    return training_inputs("llama", HALVES[rank])


def model_to_train():
    model = wrapped("llama", layers=4)
    freeze_base(model)
    return model


def sharded(model):
    """Sharded as accelerate would: the decoder layers, then the rest. (It takes FSDP on accelerators only.)"""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def main(mode: str, folder: str) -> None:
    from accelerate import Accelerator

    torch.set_num_threads(1)
    if mode == "trainer":
        run = trainer(folder, warmup=True, max_steps=3, per_device_train_batch_size=1)
        run.train()
        if run.is_world_process_zero():
            torch.save({n: p.detach() for n, p in run.model.named_parameters()}, Path(folder) / "trainer.pt")
        return
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    model = model_to_train().train()
    if mode == "fsdp2-checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = accelerator.prepare(model) if mode == "ddp" else sharded(model)
    loss = model(**inputs(rank), use_cache=False).loss
    accelerator.backward(loss)
    out = {
        "loss": accelerator.reduce(loss.detach(), "mean"),
        "grads": {
            n.removeprefix("module."): whole(p.grad) for n, p in model.named_parameters() if p.requires_grad
        },
    }
    if mode == "fsdp2":
        out["generated"] = generate(model.eval(), batch("llama", [Sample(seed=rank)]))
    torch.save(out, Path(folder) / f"{mode}-{rank}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
