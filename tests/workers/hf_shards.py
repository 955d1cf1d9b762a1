"""hf_shards.py HF_DIRECTORY OUTPUT: an FSDP model loads it through the adapter and saves DCP."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.ranks import fork_ranks
from helpers.runs import make_run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowline.train.hf.config import config_from_hf
from lowline.train.hf.weights import LlamaStateDictAdapter
from lowline.train.model.build import build_model_config


def main(source: str, output: str) -> None:
    dist.init_process_group("gloo")
    model, cola = config_from_hf(source)
    run = make_run(model=model, cola=cola, training=dict(seq_len=32, global_batch_size=2))
    config = build_model_config(run)
    body = config.build()
    mesh = init_device_mesh("cpu", (2,))
    for layer in body.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(body, mesh=mesh)
    with torch.no_grad():
        body.init_states()
    adapter = LlamaStateDictAdapter(config, None)
    state = adapter.to_hf(body.state_dict())
    dcp.load(state, storage_reader=adapter.get_hf_storage_reader(source))
    body.load_state_dict(adapter.from_hf(state))
    shards = [w.to_local().numel() for w in body.parameters()]
    assert sum(shards) < sum(w.numel() for w in body.parameters())
    assert all(w.dtype == torch.float32 for w in body.parameters())
    dcp.save(body.state_dict(), checkpoint_id=Path(output) / "checkpoint" / "step-1")
    dist.destroy_process_group()


if __name__ == "__main__":
    fork_ranks(main, *sys.argv[1:], processes=2)
