"""Three steps of a sharded run, each compared with plain torch optimizers on gathered tensors.

    python tests/workers/engine_on_two_ranks.py CONFIG KEY=VALUE...

Prints, as JSON on rank 0: the number of microbatches and of each step's reduce-scatters, and by
optimizer its parameters and their largest difference from the reference's.
"""

from __future__ import annotations

import json
import sys
from unittest import mock

import torch
import torch.distributed as dist
from helpers.ranks import fork_ranks

from lowline.train.config.load import load_config
from lowline.train.engine.lora_muon import LoRAMuon
from lowline.train.engine.titan_compat import prepare

STEPS = 3


def main(config: str, *overrides: str) -> None:
    from lowline.train.engine.trainer import trainer_config

    trainer = trainer_config(load_config(config, overrides), 2).build()
    batches = trainer.batch_generator(trainer.dataloader)
    named = dict(trainer.model_parts[0].named_parameters())
    copies = {n: p.full_tensor().detach().clone().requires_grad_() for n, p in named.items()}
    references = [_reference(optimizer, copies) for optimizer in trainer.optimizers]
    report = {
        "microbatches": trainer.gradient_accumulation_steps,
        "reduce_scatters": [],
        "differences": {type(o).__name__: [] for o in trainer.optimizers},
        "parameters": {
            type(o).__name__: [n for g in o.param_groups for n in g["param_names"]]
            for o in trainer.optimizers
        },
    }
    real = dist.reduce_scatter_single
    for _ in range(STEPS):
        for ours, reference in zip(trainer.optimizers, references, strict=True):
            for theirs, group in zip(reference.param_groups, ours.param_groups, strict=True):
                theirs["lr"] = group["lr"]
        trainer.step += 1
        with mock.patch("torch.distributed.reduce_scatter_single", side_effect=real) as counted:
            trainer.train_step(batches)
        report["reduce_scatters"].append(counted.call_count)
        for name, copy in copies.items():
            copy.grad = named[name].grad.full_tensor()  # clipped already
        for ours, reference in zip(trainer.optimizers, references, strict=True):
            # In fp32, as ours on a CPU; torch's Muon rounds to bf16 on every device.
            with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
                reference.step()
            names = [n for group in ours.param_groups for n in group["param_names"]]
            worst = max(float((named[n].full_tensor() - copies[n]).abs().max()) for n in names)
            report["differences"][type(ours).__name__].append(worst)
    if dist.get_rank() == 0:
        print(json.dumps(report))
    dist.destroy_process_group()


def _reference(ours: torch.optim.Optimizer, copies: dict) -> torch.optim.Optimizer:
    """torch's own optimizer, one tensor at a time, with the same options on whole copies."""
    (group,) = ours.param_groups
    parameters = [copies[name] for name in group["param_names"]]
    options = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
    if isinstance(ours, LoRAMuon):  # on unsharded tensors
        named = {"params": parameters, "param_names": group["param_names"]}
        return LoRAMuon([named], **options, momentum=group["momentum"])
    if isinstance(ours, torch.optim.Muon):
        options |= {"momentum": group["momentum"], "adjust_lr_fn": "match_rms_adamw"}
        return torch.optim.Muon(parameters, **options)
    options |= {"betas": group["betas"], "eps": group["eps"]}
    return torch.optim.AdamW(parameters, foreach=False, fused=False, **options)


if __name__ == "__main__":
    prepare()
    import lowline.train.engine.trainer  # noqa: F401  (once, for both ranks)

    fork_ranks(main, *sys.argv[1:], processes=2)
