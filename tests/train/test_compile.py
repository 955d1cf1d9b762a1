"""torch.compile of every block, as torchtitan does it, for CoLA and CoLA-M."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from helpers.runs import build, make_run
from torchtitan.config import CompileConfig, ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.distributed.compile import apply_compile

from lowline.train.model.attention import document_mask

pytestmark = pytest.mark.slow

DIM, LENGTH, BATCH = 64, 32, 2


def built(memory: str, grouped: bool) -> nn.Module:
    run = make_run(
        model=dict(dim=DIM, ffn_dim=176, vocab_size=64),
        training=dict(seq_len=LENGTH, global_batch_size=BATCH),
        cola=dict(rank=16, memory=memory, grouped=grouped),
    )
    return build(run)


def compile_blocks(model: nn.Module, backend: str) -> None:
    """torchtitan's own way: each block with fullgraph=True, so a graph break is an error."""
    dims = ParallelDims.from_config(ParallelismConfig(spmd_backend="partial_dtensor"), 1)
    apply_compile(
        model, compile_config=CompileConfig(enable=True, backend=backend), parallel_dims=dims
    )


def step(model: nn.Module, documents: bool) -> tuple[list[torch.Tensor], float]:
    """Output and gradients of the blocks, and the elements kept in between in nd a layer."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, LENGTH, DIM, generator=generator).requires_grad_()
    positions = torch.arange(LENGTH)
    if documents:
        positions = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])
    positions = positions.expand(BATCH, -1)
    mask = document_mask(positions, x.dtype)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = x
        for layer in model.layers.values():
            y = layer(y, mask, positions)
    others = [*model.parameters(), *model.buffers(), y, positions]
    for tensor in others if mask is None else [*others, mask]:
        kept.pop(tensor.untyped_storage()._cdata, None)
    y.square().mean().backward()
    gradients = [p.grad for p in model.layers.parameters()]
    return [y.detach(), x.grad, *gradients], sum(kept.values()) / 4 / (BATCH * LENGTH * DIM) / 2


def assert_near(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert e.norm() > 0
        # Fused kernels round elsewhere: some fp32 roundings of 1.2e-7.
        assert (a - e).norm() / e.norm() < 1e-5


@pytest.fixture(autouse=True)
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nothing compiled before, and no file of a run that was killed while it compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "memory, grouped, backend",
    [
        ("cola", False, "aot_eager"),
        ("cola", True, "aot_eager"),
        ("cola-m", False, "aot_eager"),
        ("cola-m", True, "aot_eager"),
        ("cola", True, "inductor"),
        ("cola-m", True, "inductor"),
    ],
)
def test_compiled_blocks_equal_eager_ones(memory: str, grouped: bool, backend: str) -> None:
    expected, eager = step(built(memory, grouped), True)
    model = built(memory, grouped)
    compile_blocks(model, backend)
    actual, compiled = step(model, True)
    assert_near(actual, expected)
    if memory == "cola-m":  # the compiler chooses anew what to keep, at the same boundaries
        assert eager == 3.75
        assert compiled < 5
    else:
        assert compiled > 12


@pytest.mark.parametrize("memory", ["cola", "cola-m"])
@pytest.mark.parametrize("variant", ["dlr", "lax", "cr-net"])
def test_variants_compile(variant: str, memory: str) -> None:
    run = make_run(
        model=dict(dim=DIM, ffn_dim=176, vocab_size=64),
        training=dict(seq_len=LENGTH, global_batch_size=BATCH),
        cola=dict(rank=16, memory=memory, variant=variant),
    )
    eager, compiled = build(run), build(run)
    compile_blocks(compiled, "aot_eager")
    tokens = torch.randint(64, (BATCH, LENGTH))
    results = []
    for model in (eager, compiled):
        logits = model(tokens)
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert_near(*results)


def test_whole_block_checkpointing_compiles() -> None:
    expected, _ = step(built("cola", True), True)
    model = built("cola", True)
    FullAC.Config().build().apply(model)
    compile_blocks(model, "aot_eager")
    actual, kept = step(model, True)
    assert_near(actual, expected)
    assert kept < 1.5
