"""Models with mixers and LoRA over two processes against the same on one.

    python tests/workers/parallel_stages.py REPORT.json NAME...

Tensor parallel over both. Every rank also holds the whole model and compares initial values, loss
and every gradient, of next-token prediction and of a transfer. The assertions are in
tests/linearize/test_tensor_parallel.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from helpers.ranks import fork_ranks
from helpers.runs import build
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.distributed.utils import set_spmd_backend
from workers.parallel_model import batch, full, laid_out, relative, run_config

from lowline.linearize.titan import Transfer
from lowline.train.config.run import LoraConfig, MixerConfig, RunConfig
from lowline.train.objectives.transfer import TransferSection

GQA = {"n_kv_heads": 2}
WINDOW = {"window": 4, "sinks": 1}
MIXERS: dict[str, dict[str, Any]] = {
    "gated_deltanet": WINDOW,
    "hedgehog": {"features": 4},
    "kda": {**WINDOW, "state_heads": "kv"},
    "liger_gla": {"window": 4},
    "liger_gsa": {"window": 4},
    "liger_hgrn2": {"window": 4},
    "lolcats": {"window": 4, "features": 4},
    "mamba1": {},
    "mamba2": {},
    "memory": {**WINDOW, "exact": 2, "merged": 2, "block": 2},
    "retention": WINDOW,
    "sink_window": WINDOW,
    "slots": {**WINDOW, "slots": 3},
    "t2r": {"features": 4},
}
LORA = LoraConfig(rank=3, projections=["q", "k", "v", "o", "gate", "down"])


def runs() -> dict[str, RunConfig]:
    dense = run_config(GQA, {"rank": 0})
    found = {
        name: replace(dense, mixer=MixerConfig(name=name, options=options))
        for name, options in MIXERS.items()
    }
    lolcats = found["lolcats"].mixer
    found["lora"] = replace(dense, lora=LORA)
    found["lora beside a mixer"] = replace(dense, lora=LORA, mixer=replace(lolcats, layers=[1]))
    found["qk_norm"] = replace(run_config({**GQA, "qk_norm": True}, {"rank": 0}), mixer=lolcats)
    found["low-rank"] = replace(run_config(GQA, {"rank": 8}), mixer=found["kda"].mixer)
    return found


def scramble(model: nn.Module, whole: nn.Module) -> None:
    """Give the parameters that begin at 0 something to do, the same in both models."""
    from lowline.cola.sharded import set_full_tensor

    generator = torch.Generator().manual_seed(3)
    originals = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mixer." in name or ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                originals[name].add_(0.3 * noise)
                set_full_tensor(parameter, originals[name])


def step(model: nn.Module, kind: str) -> torch.Tensor:
    tokens, labels, positions = batch()
    if kind == "next-token":
        return cross_entropy_loss(model(tokens, positions), labels)
    counted = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4)) < 0.7
    transfer = Transfer(counted)
    with torch.no_grad():
        model(tokens, positions, transfer=transfer)
    return torch.stack(transfer.losses).sum()


def compare(run: RunConfig, kind: str) -> dict[str, Any]:
    if kind == "transfer":
        run = replace(run, objective=TransferSection())
    whole, parts = (
        build(run),
        laid_out(run, dist.get_world_size(), mixers_apart=kind == "transfer"),
    )
    originals = dict(whole.named_parameters())
    init = all(torch.equal(full(p.detach()), originals[n]) for n, p in parts.named_parameters())
    scramble(parts, whole)
    losses = [step(model, kind) for model in (whole, parts)]
    for loss in losses:
        loss.backward()
    trained = {n: p for n, p in parts.named_parameters() if p.requires_grad}
    return {
        "init": init,
        "loss": abs(losses[1].item() - losses[0].item()) / losses[0].item(),
        "gradients": {
            name: relative(full(p.grad), originals[name].grad)
            for name, p in trained.items()
            if originals[name].grad is not None and originals[name].grad.norm() > 0
        },
        "trained": len(trained),
    }


def main(report: str, *names: str) -> None:
    dist.init_process_group("gloo")
    set_spmd_backend("partial_dtensor")
    torch.set_num_threads(1)
    result: dict[str, Any] = {"next-token": {}, "transfer": {}}
    made = runs()
    for name, run in ((name, made[name]) for name in names):
        result["next-token"][name] = compare(run, "next-token")
        learns = run.mixer is not None and run.mixer_options().learns
        if learns and run.lora is None:
            result["transfer"][name] = compare(run, "transfer")
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    fork_ranks(main, *sys.argv[1:], processes=2)
