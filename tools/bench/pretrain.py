"""`lowline bench pretrain`: what low rank saves in time, against what it saves in FLOPs.

    lowline bench pretrain --shape 1b --tokens 512 --repeats 9 --json bench.json

Blocks: forward + backward of a few blocks on the CPU in fp32 as full rank, CoLA and CoLA-M, and the
latter two with the A matrices of one input as one GEMM. Trainer: a step of the demo's CoLA model in
the trainer, loading of data included, against a plain PyTorch loop over batches in memory.

The cases take turns, and a ratio is the median of the turns' ratios (`lowline.tools.bench.timing`).
The machine's limits are measured in the same turns: its fp32 GEMM rate at the blocks' widest
product and at their narrowest, and its copy bandwidth. FLOPs are those of
`lowline.cola.accounting`; recomputation is time and no useful FLOP.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowline.errors import LowlineError
from lowline.tools.bench.timing import (
    at_least_one,
    copy_case,
    copy_rate,
    interleave,
    machine,
    ratio,
    threads_of_operators,
)
from lowline.tools.show import print_table, wide_console, write_report

if TYPE_CHECKING:
    from lowline.train.config.run import RunConfig

ShapeName = Literal["60m", "130m", "350m", "1b", "7b"]
Part = Literal["blocks", "trainer", "all"]

BLOCKS = {  # name: configuration and overrides
    "dense": ("dense_{}", []),
    "cola": ("cola_{}", []),
    "cola-m": ("colam_{}", []),
    "cola grouped": ("cola_{}", ["--cola.grouped=true"]),
    "cola-m grouped": ("colam_{}", ["--cola.grouped=true"]),
}


def bench_pretrain(
    *,
    part: Part = "all",
    shape: ShapeName = "1b",
    tokens: int = 512,
    layers: int = 2,
    repeats: int = 7,
    threads: int = 1,
    json: Path | None = None,
) -> dict[str, Any]:
    """Measure blocks (dense, CoLA, CoLA-M) and the trainer's overhead on this CPU.

    Args:
        part: The blocks, the trainer, or all.
        shape: A published size; its blocks are built.
        tokens: Tokens per step of the blocks, a multiple of 256, a sequence of the recipe.
        layers: Number of blocks.
        repeats: Turns; medians are over these.
        threads: Threads per operator.
        json: A file for the numbers.

    Returns:
        What `json` holds: "machine", and of each part the timings in seconds and the ratios.

    Raises:
        ValueError: a number that is not positive, or tokens that do not fill sequences.
    """
    at_least_one(layers=layers, repeats=repeats, threads=threads)
    with threads_of_operators(threads):
        report: dict[str, Any] = {"machine": machine(threads)}
        if part != "trainer":
            report["blocks"] = bench_blocks(shape, tokens, layers, repeats)
            print_blocks(report["blocks"], threads)
        if part != "blocks":
            report["trainer"] = bench_trainer(repeats)
            print_trainer(report["trainer"])
    write_report(report, json)
    return report


# ---------------------------------------------------------------------------------------- blocks


def bench_blocks(shape: ShapeName, tokens: int, layers: int, repeats: int) -> dict[str, Any]:
    """Measure the time forward + backward of the same blocks in every way of `BLOCKS`."""
    import torch

    from lowline.cola.accounting import flops_per_token
    from lowline.train.cost.memory import shape_of

    runs = {name: load_run(config.format(shape), *overrides, f"--model.n_layers={layers}",
                           "--training.precision=float32", "--model.attention=sdpa")
            for name, (config, overrides) in BLOCKS.items()}  # fmt: skip
    length = runs["dense"].training.seq_len
    if tokens < 1 or tokens % length:
        raise LowlineError(f"tokens = {tokens}; a multiple of the {length} tokens of a sequence")
    dim, ffn = runs["dense"].model.dim, runs["dense"].model.ffn_dim
    rank = runs["cola"].ranks()["gate"]
    x_BLD = torch.randn(tokens // length, length, dim)
    cases = {name: block_step(run, x_BLD) for name, run in runs.items()}
    timings = interleave(cases | limits(tokens, dim, ffn, rank), repeats)
    head = 6 * runs["dense"].model.vocab_size * dim  # not among the blocks
    flops = {n: tokens * (flops_per_token(shape_of(r), length) - head) for n, r in runs.items()}
    rates = {
        "gemm, wide": 2 * tokens * dim * ffn / timings["gemm, wide"].wall,
        "gemm, narrow": 2 * tokens * dim * rank / timings["gemm, narrow"].wall,
    }
    return {
        "shape": shape,
        "layers": layers,
        "tokens": tokens,
        "repeats": repeats,
        "flops": flops,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "gemm_flops_per_second": rates,
        "copy_bytes_per_second": copy_rate(timings["copy"]),
        "flop_ratio": flops["dense"] / flops["cola"],
        "speedup": {name: ratio(timings["dense"], timings[name]) for name in runs},
        "cola_m_over_cola": ratio(timings["cola-m"], timings["cola"]),
    }


def block_step(run: RunConfig, x_BLD: Any) -> Callable[[], None]:
    """Return a function that runs forward + backward through the blocks of `run`.

    Gradients are reallocated each time, as after `zero_grad`, and the input has one too.
    """
    import torch

    from lowline.train.engine.titan_compat import prepare

    prepare()
    from lowline.train.model.build import build_model_config

    blocks: Any = torch.nn.ModuleList(layer.build() for layer in build_model_config(run).layers)
    torch.manual_seed(0)
    with torch.no_grad():
        for block in blocks:
            block.init_states()

    def step() -> None:
        blocks.zero_grad(set_to_none=True)
        h_BLD = x_BLD.detach().requires_grad_()
        for block in blocks:
            h_BLD = block(h_BLD, None, None)
        h_BLD.backward(x_BLD)

    return step


def limits(tokens: int, dim: int, ffn: int, rank: int) -> dict[str, Callable[[], object]]:
    """Return what bounds the blocks: products as wide and as narrow as theirs, and a copy."""
    import torch

    x, wide, narrow = torch.randn(tokens, dim), torch.randn(ffn, dim), torch.randn(rank, dim)
    return {
        "gemm, wide": lambda: x @ wide.T,
        "gemm, narrow": lambda: x @ narrow.T,
        "copy": copy_case(),
    }


# --------------------------------------------------------------------------------------- trainer


def bench_trainer(repeats: int, *overrides: str) -> dict[str, Any]:
    """Measure the time per step of the demo's CoLA model in the trainer and in a bare loop, in one
    process.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        run = load_run(
            "demo_cola", *overrides, f"--output={folder}", "--checkpoint.enable=false",
            "--evaluation.enable=false", "--metrics.log_every=1000000",
        )  # fmt: skip
        trained, trainer = trainer_step(run, stack)
        model, batch = trainer.model_parts[0], next(iter(trainer.dataloader))
        timings = interleave({"bare": bare_step(run, batch), "trainer": trained}, repeats)
        parameters = sum(p.numel() for p in model.parameters())
    return {
        "config": "demo_cola",
        "parameters": parameters,
        "tokens": run.training.global_batch_size * run.training.seq_len,
        "repeats": repeats,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "trainer_over_bare": ratio(timings["trainer"], timings["bare"]),
    }


def trainer_step(run: RunConfig, stack: ExitStack) -> tuple[Callable[[], None], Any]:
    """Return a function that trains one step, data loading included; and the trainer it drives.

    What closes the trainer and sets the environment back goes onto the stack.
    """
    import torch.distributed as dist

    from lowline.train.engine.group import single_process_defaults
    from lowline.train.engine.titan_compat import prepare

    environment = dict(os.environ)
    stack.callback(os.environ.update, environment)  # called last: after clear
    stack.callback(os.environ.clear)
    single_process_defaults()
    prepare()
    from lowline.train.engine.trainer import trainer_config

    trainer = trainer_config(run, 1).build()
    stack.callback(dist.destroy_process_group)
    stack.callback(trainer.close)
    batches = trainer.batch_generator(trainer.dataloader)

    def step() -> None:
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(batches)

    return step, trainer


def built_model(run: RunConfig) -> Any:
    """Return a run's model with its first weights."""
    import torch

    from lowline.train.engine.titan_compat import prepare

    prepare()
    from lowline.train.model.build import build_model_config

    model = build_model_config(run).build()
    with torch.no_grad():
        model.init_states()
    return model


def random_batch(run: RunConfig) -> tuple[dict[str, Any], Any]:
    """Return inputs and labels of random tokens, as many sequences as a step of the run has."""
    import torch

    shape = run.training.global_batch_size, run.training.seq_len
    tokens = torch.randint(run.model.vocab_size, shape)
    positions = torch.arange(run.training.seq_len).expand(shape).contiguous()
    return {"input": tokens, "positions": positions}, tokens


def model_step(model: Any, batch: Any) -> Callable[[], None]:
    """Return a function that runs forward + backward of a model on one batch."""
    import torch.nn.functional as F

    inputs, labels = batch

    def step() -> None:
        model.zero_grad()
        logits = model(inputs["input"], positions=inputs["positions"])
        F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()

    return step


def bare_step(run: RunConfig, batch: Any) -> Callable[[], None]:
    """Return the same training step in plain PyTorch: one batch in memory, AdamW, clipping, a
    schedule.
    """
    import torch

    model, o = built_model(run), run.optimizer
    backward = model_step(model, batch)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay,
        fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step() -> None:
        backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.training.max_norm)
        optimizer.step()
        schedule.step()

    return step


def load_run(name: str, *overrides: str) -> RunConfig:
    """Return a configuration that comes with lowline, with some keys changed."""
    from lowline.train.config.load import load_config

    with as_file(files("lowline.configs") / f"{name}.toml") as path:
        return load_config(path, overrides)


# ----------------------------------------------------------------------------------------- tables


def print_blocks(result: dict[str, Any], threads: int) -> None:
    """Print the blocks' times and rates, then the ratios that matter and the machine's limits."""
    console = wide_console()
    peak = result["gemm_flops_per_second"]["gemm, wide"]
    columns = ("", "wall ms", "min ms", "cpu ms", "GFLOP", "GFLOP/s", "of GEMM", "speed-up")
    rows = {}
    for name, flops in result["flops"].items():
        t = result["seconds"][name]
        rate = flops / t["wall"]
        rows[name] = [
            *(f"{1e3 * t[key]:.0f}" for key in ("wall", "wall_min", "cpu")),
            f"{flops / 1e9:.1f}", f"{rate / 1e9:.0f}", f"{rate / peak:.0%}",
            f"{result['speedup'][name]['wall']:.2f}",
        ]  # fmt: skip
    title = (
        f"{result['layers']} block(s) of {result['shape']}, {result['tokens']} tokens, fp32, "
        f"{threads} thread(s), forward + backward, medians of {result['repeats']}"
    )
    print_table(console, title, columns, rows)
    rates = result["gemm_flops_per_second"]
    console.print(
        "limits of this machine, measured in the same turns: "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
        + f", copy {result['copy_bytes_per_second'] / 1e9:.1f} GB/s; of GEMM: of the wide product"
    )
    kinds = ("wall", "wall_min", "cpu")
    cola, flop_ratio, more = (
        result["speedup"]["cola"], result["flop_ratio"], result["cola_m_over_cola"],
    )  # fmt: skip
    console.print(
        f"CoLA has 1/{flop_ratio:.2f} of dense's FLOPs; its speed-up over dense: "
        + ", ".join(f"{kind} {cola[kind]:.2f}x" for kind in kinds)
        + "; that is "
        + ", ".join(f"{cola[kind] / flop_ratio:.0%}" for kind in kinds)
        + " of what the FLOPs would give"
    )
    console.print("CoLA-M's time over CoLA's: " + ", ".join(f"{k} {more[k]:.2f}x" for k in kinds))


def print_trainer(result: dict[str, Any]) -> None:
    """Print the two steps' times and their ratio."""
    console = wide_console()
    console.print(
        f"a step of {result['config']} ({result['parameters'] / 1e6:.1f}M parameters, "
        f"{result['tokens']} tokens), medians of {result['repeats']}:"
    )
    for name, t in result["seconds"].items():
        console.print(
            f"  {name:8} wall {1e3 * t['wall']:.0f} ms, min {1e3 * t['wall_min']:.0f} ms, "
            f"cpu {1e3 * t['cpu']:.0f} ms"
        )
    over = result["trainer_over_bare"]
    console.print("trainer over bare: " + ", ".join(f"{k} {v:.3f}" for k, v in over.items()))
