"""A transfer block by block: the inputs of every block, and the run that trains one.

`write_inputs` makes what `lowline.train.blockwise.store` describes of a stage: the tokens of
exactly the steps that a run of the full model would take, in its order, and then block after block
the hidden states, one block's weights in memory at a time. `lowline.train.blockwise.job.block_run`
is the run that trains a block with them.

Block b's loss is its layers' part of the mean over all layers
(`lowline.train.objectives.transfer`), its mixers begin as they would there, so each parameter gets
the gradient it would get in a run of the full model. Two things differ: gradients are clipped by a
block's norm instead of the full model's, and hidden states are rounded to what is stored, which in
bf16 changes nothing where `training.precision` is bfloat16.

Left out: writing inputs on several devices; held-out text, for which a block has no logits.

Shapes: S steps per file, B sequences per step, T tokens per sequence, D model dimension.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools import utils

from lowline.errors import LowlineError
from lowline.fingerprint import fingerprint
from lowline.linearize.titan import document_bounds
from lowline.train.blockwise.job import inputs_folder, stored_inputs
from lowline.train.blockwise.store import (
    DTYPES,
    TOKENS,
    Manifest,
    Series,
    check_space,
)
from lowline.train.config.load import changes
from lowline.train.config.objective import default_objective
from lowline.train.config.run import RunConfig
from lowline.train.config.tables import leaves
from lowline.train.data import lane_config
from lowline.train.data.tokenizer import TextTokenizer, load_tokenizer
from lowline.train.engine.checkpoint import load_initial
from lowline.train.hf.weights import LlamaStateDictAdapter
from lowline.train.model.attention import Bounds, DocumentSDPA
from lowline.train.model.build import Llama, build_model_config, keep_layers

Say = Callable[[str], None]
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # a step's (input, positions) to hidden


@torch.no_grad()
def write_inputs(
    run: RunConfig, *, block_size: int, dtype: str, rows: int, say: Say = print
) -> Manifest:
    """Write the inputs of every block of a stage, or what is missing of them.

    Args:
        run: the stage, with `checkpoint.initial_weights`.
        block_size: layers a block.
        dtype: of the stored hidden states, "bfloat16" or "float32".
        rows: sequences that a block takes at once.
        say: gets a line of what is done.

    Raises:
        ValueError: there are inputs of something else, or a file is damaged; the disk is too small.
        OSError: the disk is full or cannot be written; what is complete is kept.
    """
    tokenizer = load_tokenizer(run.tokenizer)
    folder = inputs_folder(run)
    manifest = stored_inputs(run, block_size, dtype, **_origin(run, tokenizer))
    if (folder / "manifest.json").is_file():
        before = Manifest.load(folder)
        now, held = manifest.origin["weights"], str(before.origin.get("weights"))
        if held == fingerprint(Path(str(run.checkpoint.initial_weights)), like=held):
            before = replace(before, origin=before.origin | {"weights": now})
        if changed := changes(_decisions(before), _decisions(manifest)):
            raise LowlineError(
                f"{folder} was written with {'; '.join(changed)}. Set it back, or remove that "
                "folder and the blocks beside it"
            )
        manifest = before
    folder.mkdir(parents=True, exist_ok=True)
    missing = check_space(folder, manifest)
    manifest.save(folder)
    say(
        f"inputs   of {len(manifest.blocks)} blocks in {dtype}: {manifest.bytes / 1e9:,.3f} GB, "
        f"{missing / 1e9:,.3f} GB of them still to be written to {folder}"
    )
    if manifest.steps is None:
        manifest = replace(manifest, steps=_write_tokens(run, tokenizer, manifest, folder))
        manifest.save(folder)
    for block, layers in enumerate(manifest.blocks):
        series = Series.of_block(folder, block)
        if wanted := [number for number in range(manifest.shards) if not series.has(number)]:
            say(f"inputs   of block {block}, layers {layers[0]} to {layers[-1]}")
            step = _layers(run, manifest.blocks[block - 1], rows) if block else _embedding(run)
            for number in wanted:
                _write_hidden(folder, block, number, step, DTYPES[dtype])
            del step  # it holds the weights
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
    return manifest


def _origin(run: RunConfig, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Return what decides the inputs beside their sizes, but not how attention is computed."""
    assert run.checkpoint.initial_weights is not None
    tables = {name: dataclasses.asdict(getattr(run, name)) for name in ("model", "data")}
    for idle in (("model", "attention"), ("model", "max_seq_len"), ("data", "num_workers")):
        del tables[idle[0]][idle[1]]
    if tables["data"]["on_bad_row"] == "error":  # a key that inputs of version 0.1.0 do not have
        del tables["data"]["on_bad_row"]
    spelled = f"{tokenizer.hf.backend_tokenizer.to_str()}{tokenizer.hf.chat_template}"
    tree = {
        **tables,
        "cola": {"rank": run.ranks(), "activation": run.cola.sigma, "bias": run.cola.bias},
        "training": {"seed": run.training.seed, "precision": run.training.precision},
        "weights": fingerprint(Path(run.checkpoint.initial_weights)),
        "tokenizer": hashlib.sha256(spelled.encode()).hexdigest()[:16],
    }
    return json.loads(json.dumps(dict(leaves(tree))))


def _decisions(manifest: Manifest) -> dict[str, Any]:
    """Return what inputs of the same numbers have in common, by the keys that set it."""
    return manifest.origin | {
        "model.n_layers": manifest.n_layers,
        "model.dim": manifest.dim,
        "training.global_batch_size": manifest.rows,
        "training.seq_len": manifest.seq_len,
        "training.steps": manifest.asked_steps,
        "--block-size": manifest.block_size,
        "--inputs-dtype": manifest.dtype,
    }


def _write_tokens(
    run: RunConfig, tokenizer: TextTokenizer, manifest: Manifest, folder: Path
) -> int:
    """Write the batches of every step; returns how many steps there are."""
    rows, seq_len = manifest.rows, manifest.seq_len
    loader = lane_config(run).build(
        dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=seq_len, local_batch_size=rows
    )
    series, a_shard, steps = Series(folder / TOKENS), manifest.steps_per_shard, 0
    held: list[dict[str, torch.Tensor]] = []
    for inputs, labels_BT in islice(loader, manifest.asked_steps):
        if run.data.epochs is not None and loader.exhausted:
            break
        held.append({**inputs, "labels": labels_BT})
        steps += 1
        if len(held) == a_shard:
            _write_batches(series, (steps - 1) // a_shard, held)
            held = []
    if held:
        _write_batches(series, steps // a_shard, held)
    return steps


def _write_batches(series: Series, number: int, held: list[dict[str, torch.Tensor]]) -> None:
    if not series.has(number):
        series.write(number, {key: torch.stack([b[key] for b in held]).int() for key in held[0]})


def _write_hidden(folder: Path, block: int, number: int, step: Step, dtype: torch.dtype) -> None:
    """Write a file of a block's inputs: what `step` makes of the block before, or of the tokens."""
    tokens = Series(folder / TOKENS)
    source = Series.of_block(folder, block - 1) if block else tokens
    with source.open(number) as file:
        before_S = file.get_tensor("hidden" if block else "input")
    with tokens.open(number) as file:
        positions_SBT = file.get_tensor("positions").long()
    made = [step(x, p).to(dtype) for x, p in zip(before_S, positions_SBT, strict=True)]
    Series.of_block(folder, block).write(number, {"hidden": torch.stack(made)})


def _embedding(run: RunConfig) -> Step:
    """Map the tokens of a step to the hidden states before the first layer."""
    weight_VD = torch.empty(
        run.model.vocab_size, run.model.dim, dtype=TORCH_DTYPE_MAP[run.training.precision]
    )
    _load(run, {"tok_embeddings.weight": weight_VD})
    return lambda input_BT, positions_BT: F.embedding(input_BT.long(), weight_VD)


def _layers(run: RunConfig, layers: range, rows: int) -> Step:
    """Hidden states of a step before some layers to those after them, in softmax attention."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dtype = TORCH_DTYPE_MAP[run.training.precision]
    teacher = replace(
        run,
        model=replace(run.model, max_seq_len=None),  # as far as the sequences go
        mixer=None,
        objective=default_objective(),
        optimizer=replace(run.optimizer, mixer_lr=None),
        evaluation=replace(run.evaluation, enable=False),
    )
    config = build_model_config(teacher)
    keep_layers(config, layers)
    with torch.device("meta"), utils.set_default_dtype(dtype):
        model = config.build()
    model.to_empty(device=device)
    model.init_weights()  # for the rotary tables
    weights = model.state_dict()
    for layer in layers:
        _load(run, {n: w for n, w in weights.items() if n.startswith(f"layers.{layer}.")})
    model.eval()

    def step(hidden_BTD: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        parts = zip(hidden_BTD.split(rows), positions_BT.to(device).split(rows), strict=True)
        return torch.cat([_through(model, h.to(device, dtype), p).cpu() for h, p in parts])

    return step


def _through(model: Llama, hidden_BTD: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
    """Softmax attention as a transfer computes it, document by document."""
    attention = model.config.first_attention
    assert attention is not None
    if isinstance(attention.inner_attention, DocumentSDPA.Config):
        bounds = document_bounds(positions_BT)
        masks: Any = None if bounds is None else Bounds.of(bounds)
    else:
        masks = model.get_attention_masks(positions=positions_BT)
    return model(hidden_BTD, positions=positions_BT, attention_masks=masks)


def _load(run: RunConfig, weights: dict[str, torch.Tensor]) -> None:
    """Fill tensors with the weights of their names that the stage begins with.

    They come in fp32, so that adapters are merged before anything is rounded.
    """
    assert run.checkpoint.initial_weights is not None
    config = build_model_config(run)
    keep_layers(config, run.layers())  # which ties nothing: weights are asked for by name
    adapter = LlamaStateDictAdapter(config, None)
    exact = {name: torch.empty(weight.shape) for name, weight in weights.items()}
    source = run.checkpoint.initial_weights
    for name, weight in load_initial(exact, source, adapter, no_dist=True).items():
        weights[name].copy_(weight)
