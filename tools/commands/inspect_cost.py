"""What one model shape costs: full rank, CoLA, CoLA-M and block checkpointing side by side.

lowline inspect cost configs/cola_1b.toml [--model.dim=1024] [--json costs.json]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowline.command_line import Keys
from lowline.tools.show import print_table, wide_console, write_report

if TYPE_CHECKING:
    from lowline.cola.accounting import Policy, Shape

DEFAULT_RANK = 0.25  # of dim, for a configuration that has no rank of its own: the published ratio

LEGEND = """\
GFLOPs: forward + backward; recomputed: GFLOPs that the backward pass repeats;
saved: activations kept for the backward pass; weights + AdamW: in fp32, on all
devices together; checkpointed: only the input of each block is kept"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One line of the table; FLOPs and saved bytes are a token's."""

    name: str
    parameters: int
    low_rank_parameters: int
    flops: int  # forward + backward
    recomputed_flops: int
    saved_bytes: float
    state_bytes: int  # weights and AdamW's two moments in fp32, over all devices


def costs(config: str, overrides: Sequence[str] = ()) -> list[Cost]:
    """Costs of a configuration's shape in each variant, on a GPU in the run's precision.

    Raises:
        ConfigError: an unreadable file, or a key or value that is not allowed.
    """
    from lowline.cola.accounting import (
        flops_per_token,
        parameters,
        recomputed_flops_per_token,
        saved_by_model,
    )
    from lowline.cola.projections import PROJECTIONS
    from lowline.train.config.load import load_config
    from lowline.train.cost.memory import FP32, itemsize_of, shape_of

    run = load_config(config, overrides)
    shape, seq_len = shape_of(run), run.training.seq_len
    dense = dataclasses.replace(
        shape, ranks=dict.fromkeys(PROJECTIONS, 0), mlp_activation="silu", bias=False
    )
    low_rank = shape
    if not shape.low_rank:
        rank = round(DEFAULT_RANK * shape.dim)
        ranks = {name: min(rank, *sizes) for name, sizes in shape.projections.items()}
        low_rank = dataclasses.replace(shape, ranks=ranks, qkv_bias=False)
    variants: list[tuple[str, Shape, Policy]] = [
        ("full rank", dense, "all"),
        ("full rank, whole-block checkpointing", dense, "full"),
        ("CoLA", low_rank, "all"),
        ("CoLA, whole-block checkpointing", low_rank, "full"),
    ]
    if all(low_rank.ranks.values()):  # CoLA-M has no place for dense projections
        variants.append(("CoLA-M", low_rank, "cola-m"))
    return [
        Cost(
            name=name,
            parameters=parameters(s).total,
            low_rank_parameters=parameters(s).low_rank,
            flops=flops_per_token(s, seq_len),
            recomputed_flops=recomputed_flops_per_token(s, seq_len, policy),
            saved_bytes=saved_by_model(s, policy).bytes(itemsize_of(run)),
            state_bytes=3 * FP32 * parameters(s).total,
        )
        for name, s, policy in variants
    ]


def inspect_cost(
    config: str,
    *,
    json: Path | None = None,
    overrides: Keys = (),
) -> None:
    """Print parameters, FLOPs and memory of a configuration's shape in every variant.

    A configuration without a rank is shown at a quarter of its dim; `--model.dim=1024` and the like
    change its keys.

    Args:
        config: A TOML file, or the name of one that `lowline configs` lists.
        json: A file for the numbers.
        overrides: Keys of the configuration.

    Raises:
        ConfigError: an unreadable file, or a key or value that is not allowed.
    """
    from lowline.train.config.shipped import find_config

    found = costs(str(find_config(config)), overrides)
    columns = ("", "params\n(M)", "low-rank\n(M)", "GFLOPs\n/ token", "recomputed\n/ token",
               "saved KiB\n/ token", "weights +\nAdamW, GiB")  # fmt: skip
    rows = {
        cost.name.replace(", whole-block checkpointing", ",\ncheckpointed"): [
            f"{cost.parameters / 1e6:,.2f}",
            f"{cost.low_rank_parameters / 1e6:,.2f}",
            f"{cost.flops / 1e9:,.3f}",
            f"{cost.recomputed_flops / 1e9:,.3f}",
            f"{cost.saved_bytes / 1024:,.1f}",
            f"{cost.state_bytes / 1024**3:,.2f}",
        ]
        for cost in found
    }
    print_table(wide_console(), config, columns, rows)
    print(LEGEND)
    write_report([dataclasses.asdict(cost) for cost in found], json)
