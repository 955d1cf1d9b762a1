"""The predicted memory of a device against models that are really sharded, and steps really taken.

Both run under torch's fake process group, which is any number of ranks in one process; the work is
done by this file run as a script, since a process has one process group.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import forked
from helpers.built import build_parts, check_by_building, fake_process_group
from helpers.live_bytes import LiveBytes
from helpers.processes import FOR_HELPERS
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import cross_entropy_loss

from lowline.train.config.load import load_config
from lowline.train.config.run import RunConfig
from lowline.train.cost.dry_run import dry_run, human_bytes, print_dry_run
from lowline.train.cost.memory import stage_memory
from lowline.train.objectives.next_token import Batch

LOW_RANK = ["--cola.rank=32"]
COLA_M = [*LOW_RANK, "--cola.memory=cola-m"]
TP2, TP4 = ("--parallelism.tensor_parallel=2", "--parallelism.tensor_parallel=4")
MIXER = ['--mixer.name="lolcats"', '--mixer.layers="0, 2"', "--mixer.options={features = 20}"]
REPLICATED = "--parallelism.data_parallel_replicate=2"

# (configuration, world size, overrides)
BUILT = {
    "7B on 8": ("cola_7b", 8, []),
    "7B on 64": ("cola_7b", 64, []),
    "7B full rank on 64, tensor parallel": ("dense_7b", 64, [TP4, REPLICATED]),
    "7B on 64, tensor parallel": ("colam_7b", 64, [TP4]),
    "1B on 12: rows that do not divide": (
        "cola_1b",
        12,
        [TP2, "--training.global_batch_size=96", "--training.local_batch_size=8"],
    ),
    "7B on 16, pipeline": ("cola_7b", 16, ["--parallelism.pipeline_parallel=4"]),
    "tied, one process": ("demo_cola", 1, ["--model.tie_embeddings=true", "--cola.bias=true"]),
    "transfer on 2": ("demo_dense", 2, [*MIXER, '--objective.kind="transfer"']),
    "LoRA beside mixers on 2": ("demo_dense", 2, [*MIXER, "--lora.rank=6"]),
    "transfer in bf16 on 2": (
        "demo_dense",
        2,
        [*MIXER, '--objective.kind="transfer"', '--training.precision="bfloat16"'],
    ),
    "LoRA in bf16 on 2": ("demo_dense", 2, ["--lora.rank=6", '--training.precision="bfloat16"']),
    "attention trains, biases": (
        "demo_dense",
        2,
        [
            "--model.qkv_bias=true",
            '--objective.trainable="attention"',
            '--objective.frozen=["q", "k"]',
        ],
    ),
    "mixers between low-rank projections": ("demo_cola", 1, MIXER),
}

# (world size, microbatches, overrides of `small`)
MEASURED: dict[str, tuple[int, int, list[str]]] = {
    "dense": (1, 1, []),
    "dense, accumulated": (1, 2, []),
    "dense, loss the largest": (1, 1, ["--model.vocab_size=4096"]),
    "dense, whole block": (1, 1, ['--activation_checkpoint="full"']),
    "dense, selective": (1, 1, ['--activation_checkpoint="selective"']),
    "cola": (1, 1, LOW_RANK),
    "cola-m": (1, 1, COLA_M),
    "dense on 8": (8, 1, []),
    "dense on 8, accumulated, bf16": (8, 2, ['--training.precision="bfloat16"']),
    "cola on 8, whole block": (8, 1, [*LOW_RANK, '--activation_checkpoint="full"']),
    "cola-m on 8, bf16": (8, 1, [*COLA_M, '--training.precision="bfloat16"']),
    "cola on 8, replicated": (8, 2, [*LOW_RANK, REPLICATED, '--training.precision="bfloat16"']),
    "dense on 8, tensor parallel": (8, 1, [TP2]),
    "cola on 8, tensor parallel": (8, 1, [*LOW_RANK, TP2]),
    # Twelve blocks, of which no more than a few may be gathered at once.
    "transfer on 2, bf16": (
        2,
        1,
        [
            '--mixer.name="lolcats"',
            "--mixer.options={features = 16}",
            '--objective.kind="transfer"',
            '--training.precision="bfloat16"',
            "--model.n_layers=12",
            "--model.ffn_dim=4096",
        ],
    ),
}
QUICK = [
    "transfer on 2, bf16",
    "dense, accumulated",
    "cola",
    "cola-m on 8, bf16",
    "cola on 8, tensor parallel",
]
QUICK_BUILT = [
    "7B on 8",
    "7B full rank on 64, tensor parallel",
    "1B on 12: rows that do not divide",
    "7B on 16, pipeline",
    "tied, one process",
    "LoRA beside mixers on 2",
    "transfer in bf16 on 2",
    "attention trains, biases",
]
SHALLOW = ["--model.n_layers=4"]
ROWS, SEQ_LEN = 4, 64
CONFIGS = Path(__file__).parents[2] / "configs"


def built_run(case: str, more: Sequence[str] = ()) -> tuple[RunConfig, int]:
    name, world_size, overrides = BUILT[case]
    return load_config(CONFIGS / f"{name}.toml", [*overrides, *more]), world_size


def small_run(case: str) -> tuple[RunConfig, int, int]:
    world_size, microbatches, overrides = MEASURED[case]
    shard = world_size // (2 if TP2 in overrides else 1)
    keys = {
        "model.dim": 128,
        "model.n_layers": 4,
        "model.n_heads": 4,
        "model.ffn_dim": 352,
        "model.vocab_size": 512,
        "training.steps": 2,
        "training.seq_len": SEQ_LEN,
        "training.global_batch_size": ROWS * microbatches * shard,
        "training.local_batch_size": ROWS,
        "training.precision": '"float32"',
        "optimizer.lr": 1e-3,
    }
    run = load_config(None, [f"--{key}={value}" for key, value in keys.items()] + overrides)
    return run, world_size, microbatches


def run_as_script(
    build: Sequence[str] = (), overrides: Sequence[str] = (), measure: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what a process of its own finds: {"built": {case: ...}, "measured": {case: ...}}."""
    arguments = json.dumps([build, overrides, measure])
    done = forked.run([__file__, arguments], env=FOR_HELPERS, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module", name="found")
def _found() -> dict[str, Any]:
    return run_as_script(build=QUICK_BUILT, overrides=SHALLOW, measure=QUICK)


def assert_built_as_predicted(run: RunConfig, world_size: int, built: list[dict]) -> None:
    """Byte for byte, on the first rank of every pipeline stage."""
    assert len(built) == run.parallelism.pipeline_parallel
    for pp_rank, held in enumerate(built):
        memory = stage_memory(run, world_size, "cuda", pp_rank)
        assert memory.weights == held["weights"]
        assert memory.optimizer == held["optimizer"] == 2 * held["gradients"]
        assert (held["gradients"] == held["weights"]) == (run.trainable() == "all")


@pytest.mark.parametrize("case", QUICK_BUILT)
def test_shards_are_those_of_the_model_really_sharded(case: str, found: dict[str, Any]) -> None:
    assert_built_as_predicted(*built_run(case, SHALLOW), found["built"][case])


@pytest.mark.slow
@pytest.mark.parametrize("case", BUILT)
def test_shards_at_full_depth(case: str) -> None:
    found = run_as_script(build=[case])
    assert_built_as_predicted(*built_run(case), found["built"][case])


def assert_peak_as_predicted(case: str, measured: dict[str, int]) -> None:
    run, world_size, _ = small_run(case)
    memory = dry_run(run, world_size, "cpu").memory
    assert memory.peak == pytest.approx(measured["peak"], rel=0.10)
    assert memory.weights + memory.tables == measured["before"]


@pytest.mark.parametrize("case", QUICK)
def test_peak_is_what_a_step_reaches(case: str, found: dict[str, Any]) -> None:
    assert_peak_as_predicted(case, found["measured"][case])


@pytest.mark.slow
def test_peak_in_every_layout() -> None:
    measured = run_as_script(measure=list(MEASURED))["measured"]
    for case in MEASURED:
        assert_peak_as_predicted(case, measured[case])


def test_whole_gradients_while_accumulating() -> None:
    """FSDP leaves gradients unsharded between microbatches, and the prediction says so."""
    run = load_config(CONFIGS / "dense_7b.toml")
    memory = dry_run(run, 8, "cuda").memory
    assert memory.gradients == 8 * memory.weights
    run = load_config(CONFIGS / "dense_7b.toml", ["--training.local_batch_size=64"])
    memory = dry_run(run, 8, "cuda").memory
    assert memory.gradients == memory.weights


def test_pipeline_keeps_as_many_microbatches_as_are_in_flight() -> None:
    overrides = ["--parallelism.pipeline_parallel=4"]
    one_by_one = load_config(CONFIGS / "cola_7b.toml", overrides)
    saved = [stage_memory(one_by_one, 8, "cuda", rank).activations for rank in range(4)]
    assert saved[0] > saved[1] > saved[2]
    gpipe = load_config(
        CONFIGS / "cola_7b.toml", [*overrides, "--parallelism.pipeline_schedule=GPipe"]
    )
    assert stage_memory(gpipe, 8, "cuda", 2).activations > saved[2]


def test_muon_keeps_one_momentum_of_the_factors() -> None:
    run = load_config(CONFIGS / "cola_60m.toml")
    muon = load_config(CONFIGS / "cola_60m.toml", ["--optimizer.name=muon"])
    difference = dry_run(run, 1).memory.optimizer - dry_run(muon, 1).memory.optimizer
    assert difference == 4 * dry_run(run, 1).parameters.low_rank


def test_report_in_plain_text() -> None:
    out = io.StringIO()
    print_dry_run(load_config(CONFIGS / "cola_60m.toml"), 8, out=out)
    lines = dict(
        line.strip().split(": ", 1) for line in out.getvalue().splitlines() if ": " in line
    )
    assert lines["parameters"] == "42,770,944"
    assert lines["low-rank"] == "9,994,240"
    assert lines["tokens per step"] == "131,072"
    assert lines["weights (fp32)"] == human_bytes(42770944 / 8 * 4)
    assert lines["microbatches per step and data-parallel rank"] == "2"


def test_layout_that_does_not_fit() -> None:
    run = load_config(CONFIGS / "cola_60m.toml")
    with pytest.raises(ValueError, match="global_batch_size = 512 .*6 data-parallel"):
        dry_run(run, 6)
    run = load_config(CONFIGS / "cola_60m.toml", ["--parallelism.data_parallel_shard=4"])
    with pytest.raises(ValueError, match="does not make 8 process"):
        dry_run(run, 8)


def test_human_bytes() -> None:
    assert human_bytes(512) == "512 B"
    assert human_bytes(1536) == "1.5 KiB"
    assert human_bytes(3 * 1024**4) == "3 TiB"


def build(cases: list[str], more: list[str]) -> dict[str, Any]:
    found = {}
    for case in cases:
        run, world_size = built_run(case, more)
        stages = run.parallelism.pipeline_parallel
        held = [check_by_building(run, world_size, r * world_size // stages) for r in range(stages)]
        found[case] = [dataclasses.asdict(h) for h in held]
    return found


def token_loss(
    logits: torch.Tensor, labels: torch.Tensor, valid_tokens: torch.Tensor
) -> tuple[torch.Tensor, dict]:
    return cross_entropy_loss(logits, labels) / valid_tokens, {}


def measure(run: RunConfig, world_size: int, microbatches: int) -> dict[str, int]:
    """Return bytes before, and the most within, a second training step of one rank."""
    with fake_process_group(world_size):
        (model,) = build_parts(run, world_size)
        model.to_empty(device="cpu")
        with torch.no_grad():
            model.init_weights(buffer_device=None)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True
        )
        of_trainer = types.SimpleNamespace(loss_fn=token_loss, model_parts=[model])
        objective = run.objective.build(run, of_trainer)
        tokens = torch.randint(0, run.model.vocab_size, (ROWS, SEQ_LEN))
        positions = torch.arange(SEQ_LEN // 2).repeat(ROWS, 2)
        with LiveBytes(count=[*model.parameters(), *model.buffers()]) as alive:
            before = alive.now()
            for _ in range(2):
                alive.peak = 0
                for i in range(microbatches):
                    if isinstance(model, FSDPModule):
                        model.set_requires_gradient_sync(i == microbatches - 1)
                    inputs = Batch(tokens, tokens, {"positions": positions})
                    objective.loss(model, inputs, torch.tensor(1.0)).backward()
                optimizer.step()
                optimizer.zero_grad()
            return {"before": before, "peak": alive.peak}


if __name__ == "__main__":
    to_build, more, to_measure = json.loads(sys.argv[1])
    measured = {case: measure(*small_run(case)) for case in to_measure}
    print(json.dumps({"built": build(to_build, more), "measured": measured}))
