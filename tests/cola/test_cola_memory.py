"""CoLA-M is CoLA to the last bit, keeps 3.75nd elements a layer and recomputes 16.7ndr FLOPs.

Units: n tokens, d model dimension, r rank; "kept" counts elements alive between the forward and the
backward pass, the layer's input included, in nd a layer; recomputation counts the GEMMs that the
backward pass runs beyond CoLA's, in ndr a layer, and attention's own products apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn as nn
from helpers.runs import build, make_run
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from lowline.train.config.run import RunConfig
from lowline.train.model.build import build_model_config

# name: d, ffn, rank, heads
PUBLISHED = {
    "60m": (512, 1376, 128, 8),
    "350m": (1024, 2736, 256, 16),
    "1b": (2048, 5461, 512, 32),
    "7b": (4096, 11008, 1024, 32),
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "gelu, bias": ({}, {"activation": "gelu", "bias": True}),
    "relu, identity mlp": ({"mlp_activation": "identity"}, {"activation": "relu"}),
    "linear bottleneck": ({}, {"activation": "identity"}),
    "gqa": ({"n_kv_heads": 2}, {}),
    "qk_norm, head_dim": ({"qk_norm": True, "head_dim": 24}, {}),
    "ranks": ({}, {"rank": dict(q=3, k=5, v=7, o=9, gate=11, up=13, down=32)}),
    "tied": ({"tie_embeddings": True}, {}),
    "dlr": ({}, {"variant": "dlr"}),
    "lax": ({"n_layers": 3}, {"variant": "lax"}),
    "lax, bias, ranks": (
        {"n_kv_heads": 2},
        {"variant": "lax", "bias": True, "rank": dict(q=3, k=5, v=7, o=9, gate=11, up=13, down=32)},
    ),
    "cr-net": ({"n_layers": 3}, {"variant": "cr-net"}),
    "cr-net, silu": ({"n_kv_heads": 2}, {"variant": "cr-net", "activation": "silu"}),
}


def run_config(
    shape: tuple[int, int, int, int],
    memory: str = "cola",
    grouped: bool = False,
    length: int = 16,
    model: dict[str, Any] | None = None,
    cola: dict[str, Any] | None = None,
) -> RunConfig:
    dim, ffn, rank, heads = shape
    return make_run(
        model=dict(dim=dim, n_heads=heads, ffn_dim=ffn, vocab_size=64) | (model or {}),
        training=dict(seq_len=length),
        cola={"rank": rank, "memory": memory, "grouped": grouped} | (cola or {}),
    )


def step(model: nn.Module, documents: bool, length: int) -> dict[str, torch.Tensor]:
    """Logits, loss and every gradient of one batch; document ends at 5 and 6 where asked."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(64, (2, length + 1), generator=generator)
    positions = torch.arange(length)
    if documents:
        positions = torch.cat([torch.arange(5), torch.arange(1), torch.arange(length - 6)])
    logits = model(tokens[:, :-1], positions.expand(2, -1))
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    return {"logits": logits.detach(), "loss": loss.detach()} | gradients  # type: ignore[return-value]


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ------------------------------------------------------------------------------ the same gradients


@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("grouped", [False, True], ids=["separate", "grouped"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cola_m_equals_cola_bit_for_bit(variant: str, grouped: bool, documents: bool) -> None:
    model, cola = VARIANTS[variant]
    runs = [
        run_config((32, 88, 8, 4), memory, grouped, model=model, cola=cola)
        for memory in ("cola", "cola-m")
    ]
    assert_same_bits(*(step(build(run), documents, 16) for run in runs))


@pytest.mark.parametrize("grouped", [False, True], ids=["separate", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape, length", [((48, 136, 5, 2), 7), ((64, 172, 16, 8), 33), ((512, 1376, 128, 8), 64)]
)
def test_cola_m_equals_cola_at_other_shapes(
    shape: tuple[int, int, int, int], length: int, dtype: torch.dtype, grouped: bool
) -> None:
    runs = [run_config(shape, memory, grouped, length) for memory in ("cola", "cola-m")]
    assert_same_bits(*(step(build(run, dtype=dtype), True, length) for run in runs))


def test_one_checkpoint_serves_all_memory_policies() -> None:
    source = build(run_config((32, 88, 8, 4)))
    expected = step(source, True, 16)
    with torch.no_grad():
        state = {name: t.clone() for name, t in source.state_dict().items()}
    for memory, grouped in (("cola-m", False), ("cola", True), ("cola-m", True)):
        model = build_model_config(run_config((32, 88, 8, 4), memory, grouped)).build()
        with torch.no_grad():
            model.init_states()
        assert list(model.state_dict()) == list(state)
        model.load_state_dict(state)
        actual = step(model, True, 16)
        torch.testing.assert_close(actual["logits"], expected["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", [FullAC, SelectiveAC], ids=["full", "selective"])
@pytest.mark.parametrize("grouped", [False, True], ids=["separate", "grouped"])
def test_torchtitans_checkpointing_gives_the_same_gradients(policy: Any, grouped: bool) -> None:
    run = run_config((32, 88, 8, 4), grouped=grouped)
    expected = step(build(run), True, 16)
    model = build(run)
    policy.Config().build().apply(model)
    actual = step(model, True, 16)
    actual = {name.replace("_checkpoint_wrapped_module.", ""): t for name, t in actual.items()}
    assert_same_bits(actual, expected)


def test_without_gradients_nothing_is_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(run_config((32, 88, 8, 4), "cola-m", True))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("checkpoint was called")

    monkeypatch.setattr("lowline.cola.block.checkpoint", refuse)
    monkeypatch.setattr("lowline.kernels.low_rank.grouped.checkpoint", refuse)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with torch.no_grad():
        model(tokens)
    with pytest.raises(AssertionError, match="checkpoint was called"):
        model(tokens)


# ---------------------------------------------------------------------------------- memory and work


class Storages(TorchDispatchMode):
    """Remembers, without keeping it alive, every storage that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> dict[int, int]:
        """Return bytes of every storage still held, by its address."""
        return {k: size for k, (ref, size) in self.made.items() if not ref.expired()}


def measure(
    run: RunConfig, device: str, wrap: Callable[[nn.Module], Any] | None = None
) -> dict[str, float]:
    """Return what two layers keep (by living storages, and by saved-tensor hooks) and compute."""
    with torch.device(device):
        model = build_model_config(run).build()
    if device != "meta":
        with torch.no_grad():
            model.init_states()
    if wrap is not None:
        wrap(model)
    dim, length, layers = run.model.dim, run.training.seq_len, run.model.n_layers
    x = torch.randn(2, length, dim, device=device, requires_grad=True)
    held = [t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())]
    hooked: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        hooked[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with Storages() as storages, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = x
            for layer in model.layers.values():
                y = layer(y, None, None)
        forward = dict(counter.get_flop_counts()["Global"])
        alive = storages.alive() | {x.untyped_storage()._cdata: x.untyped_storage().nbytes()}
        ignored = {*held, y.untyped_storage()._cdata}  # y is the next layer's to keep
        y.sum().backward()
        total = dict(counter.get_flop_counts()["Global"])

    def backward(name: str) -> float:
        operators = (
            (torch.ops.aten.mm, torch.ops.aten.addmm)
            if name == "gemm"
            else (
                torch.ops.aten.bmm,
                torch.ops.aten.baddbmm,
            )
        )
        return sum(total.get(o, 0) - forward.get(o, 0) for o in operators) / layers

    def kept(sizes: dict[int, int]) -> float:
        return (
            sum(s for k, s in sizes.items() if k not in ignored) / 4 / (2 * length * dim) / layers
        )

    return {
        "alive": kept(alive),
        "hooked": kept(hooked),
        "gemm": backward("gemm"),
        "attention": backward("attention"),
    }


@pytest.mark.parametrize(
    ("size", "grouped"),
    [
        *(("60m", False), ("7b", True)),
        *(pytest.param(n, g, marks=pytest.mark.slow) for n in PUBLISHED for g in (False, True)),
    ],
)
def test_cola_m_at_the_published_shapes(size: str, grouped: bool) -> None:
    """Kept <= 3.75nd, recomputed <= 17ndr: exactly what the docstring of the block derives.

    Keeping v in every second layer would recompute 1ndr less and keep 0.5nd more; it took 2 % off
    a step's time, within the machine's noise (docs/dev/log.md), so v is recomputed as q and k are.
    """
    dim, ffn, rank, _ = PUBLISHED[size]
    length = 64
    tokens = 2 * length
    run = run_config(PUBLISHED[size], "cola-m", grouped, length)
    plain = measure(replace(run, cola=replace(run.cola, memory="cola")), "meta")
    lean = measure(run, "meta")
    assert lean["alive"] == lean["hooked"] == 2 + 7 * rank / dim <= 3.75
    recomputed = (lean["gemm"] - plain["gemm"]) / (tokens * dim * rank)
    # B of q, k and v, of gate and up; 2 FLOPs a multiply-add.
    assert recomputed == pytest.approx(2 * (3 + 2 * ffn / dim)) and recomputed <= 17
    # The two products of attention, once more (the meta device's kernel computes both triangles).
    assert lean["attention"] - plain["attention"] == 4 * tokens * length * dim


def test_the_counts_hold_on_a_real_device() -> None:
    run = run_config(PUBLISHED["60m"], "cola-m", True, 64)
    real, meta = measure(run, "cpu"), measure(run, "meta")
    assert real["alive"] == meta["alive"] == 3.75
    assert real["gemm"] == meta["gemm"]


def test_what_cola_and_whole_block_checkpointing_cost() -> None:
    """Beside it: CoLA keeps 24.3nd; whole-block checkpointing 1nd, for 38ndr more work."""
    run = run_config(PUBLISHED["60m"], length=64)
    plain = measure(run, "cpu")
    # x, h and each one's norm twice, q, k, v, attention: 10d; 4 ffn; z and σ(z): 14r; scraps.
    assert plain["alive"] == pytest.approx(10 + 4 * 1376 / 512 + 14 / 4, abs=0.05)
    weights = 128 * (11 * 512 + 3 * 1376)  # of a layer; 2 FLOPs for each and token, twice
    assert plain["gemm"] == 4 * 128 * weights
    whole = measure(run, "cpu", lambda model: FullAC.Config().build().apply(model))
    assert whole["alive"] == 1
    assert whole["gemm"] - plain["gemm"] == 2 * 128 * weights  # 38.1ndr: the whole forward pass


def test_grouping_keeps_no_stack_of_weights() -> None:
    separate = measure(run_config(PUBLISHED["60m"], length=64), "cpu")
    grouped = measure(run_config(PUBLISHED["60m"], grouped=True, length=64), "cpu")
    assert grouped["alive"] == pytest.approx(separate["alive"], abs=1e-6)
    assert grouped["gemm"] == separate["gemm"]
