"""Export and stitching hold a file, or a tensor, of a model and never the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.live_bytes import LiveBytes
from helpers.runs import make_run
from safetensors.torch import load_file
from torchtitan.config import TORCH_DTYPE_MAP
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowline.train.blockwise.job import Blocks, stitch
from lowline.train.config.load import to_toml
from lowline.train.config.run import (
    CheckpointConfig,
    EvaluationConfig,
    LoraConfig,
    MixerConfig,
    ModelConfig,
    RunConfig,
)
from lowline.train.hf import stream
from lowline.train.hf.export import export
from lowline.train.model.build import build_model_config
from lowline.train.model.names import to_hf_name
from lowline.train.model.parallelize import store_frozen
from lowline.train.objectives.transfer import TransferSection

MODEL = ModelConfig(dim=64, n_layers=24, n_heads=4, ffn_dim=512, vocab_size=4096)
MIXER = MixerConfig(name="lolcats", options={"window": 4})
SHARD = 1_000_000
LARGEST = 4096 * 64 * 4  # bytes of the embedding in fp32


def run_of(**sections) -> RunConfig:
    off = EvaluationConfig(enable=False)
    return make_run(model=MODEL, training=dict(seq_len=32), evaluation=off, **sections)


def save(run: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Write a step folder of a run whose parameters are all random; return them."""
    torch.manual_seed(0)
    body = build_model_config(run).build()
    store_frozen(body, TORCH_DTYPE_MAP[run.training.precision])
    weights = {n: torch.randn_like(w).mul_(0.1) for n, w in body.state_dict().items()}
    dcp.save(dict(weights), checkpoint_id=folder, no_dist=True)
    (folder / "config.toml").write_text(to_toml(run))
    return weights


def size(weights: dict[str, torch.Tensor]) -> int:
    return sum(w.numel() * 4 for w in weights.values())


def test_export_holds_one_file_of_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SHARD_BYTES", SHARD)
    run = run_of(lora=LoraConfig(rank=4, alpha=8.0), mixer=MIXER)
    weights = save(run, tmp_path / "checkpoint" / "step-1")
    with LiveBytes() as alive:
        out = export(tmp_path, tmp_path / "out", dtype="float32")
    # A file, or the embedding alone; beside it what DCP read, and W, B·A and their sum.
    assert alive.peak < max(SHARD, LARGEST) + 3 * LARGEST < size(weights) / 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 10 and {f.name for f in files} == set(index["weight_map"].values())
    found = {}
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or size(held) <= SHARD
        assert all(index["weight_map"][name] == file.name for name in held)
        found |= held
    assert index["metadata"]["total_size"] == size(found)
    merged = 0
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        module = name.removesuffix(".weight")
        if f"{module}.lora_a.weight" in weights:
            A, B = (weights[f"{module}.lora_{x}.weight"] for x in "ab")
            weight = weight + 2.0 * (B @ A)
            merged += 1
        assert torch.equal(found.pop(to_hf_name(name)), weight.float()), name
    assert merged == 4 * MODEL.n_layers and not found
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"].float())


def test_stitching_holds_one_tensor_of_a_model(tmp_path):
    before = run_of(lora=LoraConfig(rank=4))
    source = tmp_path / "before" / "checkpoint" / "step-1"
    weights = save(before, source)
    run = run_of(
        output=str(tmp_path / "stage"),
        mixer=MIXER,
        objective=TransferSection(),
        checkpoint=CheckpointConfig(initial_weights=str(source)),
    )
    runs, mixers = Blocks(size=8).runs(run), {}
    for of_block in runs.values():
        mixers |= {
            name: weight
            for name, weight in save(of_block, Path(of_block.output, "checkpoint/step-1")).items()
            if ".mixer." in name
        }
    with LiveBytes() as alive:
        folder = stitch(run, runs)
    assert alive.peak < 4 * LARGEST < size(weights) / 3
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in entries.items()}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    assert len(mixers) == 3 * MODEL.n_layers
    for name, weight in mixers.items():
        assert torch.equal(found.pop(name), weight), name
    for name in [name for name in weights if ".lora_" not in name]:
        wanted = weights[name]
        module = name.removesuffix(".weight")
        if f"{module}.lora_a.weight" in weights:
            A, B = (weights[f"{module}.lora_{x}.weight"] for x in "ab")
            wanted = (wanted + 4.0 * (B @ A)).to(wanted.dtype)
        assert torch.equal(found.pop(name), wanted), name
    assert not found


@pytest.mark.parametrize("source", ["bfloat16", "float32", None])
def test_an_export_has_the_dtype_of_what_was_converted(tmp_path, source):
    """Where frozen weights are stored in half precision and others are not."""
    small = replace(MODEL, n_layers=1)
    start = {}
    if source is not None:
        config = LlamaConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1,
                             num_attention_heads=2, intermediate_size=8)  # fmt: skip
        LlamaForCausalLM(config).to(getattr(torch, source)).save_pretrained(tmp_path / "source")
        start["checkpoint"] = CheckpointConfig(initial_weights=str(tmp_path / "source"))
    run = replace(run_of(mixer=MIXER, lora=LoraConfig(), **start), model=small)
    save(run, tmp_path / "checkpoint" / "step-1")
    out = export(tmp_path, tmp_path / "out")
    kinds = {weight.dtype for weight in load_file(out / "model.safetensors").values()}
    assert kinds == {getattr(torch, source or "float32")}
    assert json.loads((out / "config.json").read_text())["dtype"] == (source or "float32")


def test_an_export_has_the_one_dtype_of_a_checkpoint(tmp_path):
    run = replace(run_of(), model=replace(MODEL, n_layers=1))
    save(run, tmp_path / "checkpoint" / "step-1")
    out = export(tmp_path, tmp_path / "out")
    assert {w.dtype for w in load_file(out / "model.safetensors").values()} == {torch.float32}
