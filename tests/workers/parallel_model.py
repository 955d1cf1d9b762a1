"""The CoLA Llama laid out over processes against the same model on one.

    python tests/workers/parallel_model.py PROCESSES REPORT.json CASES

Two processes: tensor parallel and FSDP2, of the shapes in CASES, {"tensor": [...], "data": [...],
"traffic": [...]} as JSON. Four: FSDP2 over two times tensor parallel over two, of all shapes.
Every rank also holds the whole model, seeded alike, and compares: initial values, logits, loss,
gradients, and for tensor parallelism the collectives inside a block. Rank 0 writes what it measured
to REPORT.json; the assertions are in tests/cola/test_tensor_parallel.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from helpers.ranks import fork_ranks
from helpers.runs import build, make_run
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import set_spmd_backend

from lowline.train.config.run import RunConfig
from lowline.train.model.build import build_model_config
from lowline.train.model.parallelize import parallelize

DIM, FFN, VOCAB, LENGTH, BATCH = 32, 88, 96, 16, 2
MIX = {"q": 8, "k": 4, "o": 12, "up": 8, "down": 6}  # v and gate dense
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {"rank": 0}),
    "cola": ({}, {"rank": 8}),
    "cola-m": ({}, {"rank": 8, "memory": "cola-m"}),
    "grouped": ({}, {"rank": 8, "grouped": True}),
    "cola-m grouped": ({}, {"rank": 8, "memory": "cola-m", "grouped": True}),
    "dense mix": ({"mlp_activation": "identity"}, {"rank": MIX}),
    "qk_norm": ({"qk_norm": True}, {"rank": 8}),
    "gqa, bias": ({"n_kv_heads": 2}, {"rank": 8, "bias": True, "activation": "gelu"}),
    "tied": ({"tie_embeddings": True}, {"rank": 8}),
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    name: ({"n_layers": 3}, {"rank": 8, "variant": name, "memory": "cola-m"})
    for name in ("dlr", "lax", "cr-net")
}


def run_config(model: dict[str, Any], cola: dict[str, Any]) -> RunConfig:
    shape = {"dim": DIM, "ffn_dim": FFN, "vocab_size": VOCAB}
    size = {"seq_len": LENGTH, "global_batch_size": BATCH}
    return make_run(model=shape | model, training=size, cola=cola)


def laid_out(
    run: RunConfig, tensor: int, precision: str = "float32", mixers_apart: bool = False
) -> nn.Module:
    """Return the model over all processes: `tensor`-way tensor parallel, FSDP over the rest."""
    layout = ParallelismConfig(tensor_parallel_degree=tensor, spmd_backend="partial_dtensor")
    dims = ParallelDims.from_config(layout, dist.get_world_size())
    dims.build_mesh()
    config = build_model_config(run)
    config.update_from_config(config=SimpleNamespace(parallelism=layout))
    with torch.device("meta"):
        model = config.build()
    parallelize(
        model,
        parallel_dims=dims,
        training=TrainingConfig(mixed_precision_param=precision),
        parallelism=layout,
        compile_config=CompileConfig(enable=False),
        ac_config=None,
        dump_folder="",
        mixers_apart=mixers_apart,
    )
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_states()
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, labels and the positions of packed documents: the same on every process."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(BATCH, -1)
    return tokens[:, :-1], tokens[:, 1:], positions


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def shards_differ(parameter: nn.Parameter) -> bool:
    """Return whether each process of a data-parallel mesh holds values of its own."""
    local = parameter.detach().to_local()
    shards = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, local)
    return not torch.equal(shards[0], shards[1])


class Collectives(TorchDispatchMode):
    """Elements of activations put into each collective by this rank, and how wide they are."""

    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")

    def __init__(self) -> None:
        super().__init__()
        self.widths: set[int] = set()
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes back with the local tensors
        name = func._opname
        if name in self.names and args[0].ndim == 3:  # weight gradients have fewer dimensions
            self.widths.add(args[0].shape[-1])
            self.elements[name] = self.elements.get(name, 0) + args[0].numel()
        return func(*args, **(kwargs or {}))


def compare(run: RunConfig, tensor: int, precision: str = "float32") -> dict[str, Any]:
    """Relative errors of everything against one process."""
    whole, parts = build(run), laid_out(run, tensor, precision)
    tokens, labels, positions = batch()
    result: dict[str, Any] = {}
    originals = dict(whole.named_parameters())
    result["init"] = all(
        torch.equal(full(p.detach()), originals[name].detach())
        for name, p in parts.named_parameters()
    )
    result["dtypes"] = sorted({str(p.dtype) for p in parts.parameters()})
    result["shards differ"] = all(shards_differ(p) for p in parts.parameters() if p.ndim == 2)
    logits = whole(tokens, positions)
    loss = cross_entropy_loss(logits, labels)
    loss.backward()

    data_ranks, data_rank = dist.get_world_size() // tensor, dist.get_rank() // tensor
    mine = slice(data_rank * BATCH // data_ranks, (data_rank + 1) * BATCH // data_ranks)
    logits_part = parts(tokens[mine], positions[mine])
    loss_part = cross_entropy_loss(logits_part, labels[mine])
    loss_part.backward()
    summed = loss_part.detach().clone()
    dist.all_reduce(summed)
    result["logits"] = relative(full(logits_part.detach()).float(), logits[mine].detach())
    result["logits dtype"] = str(logits_part.dtype)
    result["loss"] = abs(summed.item() / tensor - loss.item()) / loss.item()
    result["gradient dtypes"] = sorted({str(p.grad.dtype) for p in parts.parameters()})
    result["gradients"] = {
        name: relative(full(p.grad), originals[name].grad) for name, p in parts.named_parameters()
    }
    return result


def traffic(run: RunConfig) -> dict[str, Any]:
    """Return what the second block of a tensor-parallel model sends."""
    block = laid_out(run, dist.get_world_size()).layers["1"]
    mesh = block.attention_norm.weight.device_mesh
    x = torch.randn(BATCH, LENGTH, DIM, generator=torch.Generator().manual_seed(2))
    x_part = distribute_tensor(x, mesh["tp"], [Shard(1)])
    x_part.requires_grad_()
    with Collectives() as forward:
        y = block(x_part)
    with Collectives() as backward:
        y.backward(torch.ones_like(y))
    return {
        "forward": forward.elements,
        "backward": backward.elements,
        "widths": sorted(forward.widths | backward.widths),
    }


def main(report: str, cases: str) -> None:
    dist.init_process_group("gloo")
    set_spmd_backend("partial_dtensor")
    torch.set_num_threads(1)
    shapes = SHAPES | VARIANTS
    if dist.get_world_size() == 4:
        result = {"both": {name: compare(run_config(*s), 2) for name, s in SHAPES.items()}}
    else:
        of = {
            kind: {n: run_config(*shapes[n]) for n in ns} for kind, ns in json.loads(cases).items()
        }
        result = {
            "tensor": {name: compare(run, 2) for name, run in of["tensor"].items()},
            "data": {name: compare(run, 1) for name, run in of["data"].items()},
            "bfloat16": compare(run_config(*SHAPES["cola-m grouped"]), 1, "bfloat16"),
            "traffic": {name: traffic(run) for name, run in of["traffic"].items()},
        }
    if dist.get_rank() == 0:
        Path(report).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    fork_ranks(main, *sys.argv[2:], processes=int(sys.argv[1]))
