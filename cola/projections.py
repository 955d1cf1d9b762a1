"""The seven projections of a Llama block: one table, from which every other list of them is made.

    name    training body               Hugging Face            input -> output   tensor parallel
    q       attention.qkv_linear.wq     self_attn.q_proj        model -> query    output features
    k       attention.qkv_linear.wk     self_attn.k_proj        model -> key      output features
    v       attention.qkv_linear.wv     self_attn.v_proj        model -> key      output features
    o       attention.wo                self_attn.o_proj        query -> model    input features
    gate    feed_forward.w1             mlp.gate_proj           model -> ffn      output features
    up      feed_forward.w3             mlp.up_proj             model -> ffn      output features
    down    feed_forward.w2             mlp.down_proj           ffn -> model      input features

This module imports no torch: configurations are checked by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Width = Literal["model", "query", "key", "ffn"]
ProjectionName = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """One projection of a block.

    Args:
        titan: its path below a layer of the training body.
        hf: its path below a layer of a Hugging Face Llama.
        role: "attention" or "mlp".
        fan_in, fan_out: the widths of its input and output.
        split: which features tensor parallelism splits: "output" (rows of the weight) or "input"
            (columns).
    """

    titan: str
    hf: str
    role: Literal["attention", "mlp"]
    fan_in: Width
    fan_out: Width

    @property
    def split(self) -> Literal["output", "input"]:
        return "output" if self.fan_in == "model" else "input"

    @property
    def titan_leaf(self) -> str:
        """Return the last part of its name in the training body: "wq", ..."""
        return self.titan.rpartition(".")[2]

    @property
    def hf_leaf(self) -> str:
        """Return the last part of its name in Hugging Face's body: "q_proj", ..."""
        return self.hf.rpartition(".")[2]


def _attention(titan: str, hf: str, fan_in: Width, fan_out: Width) -> Projection:
    return Projection(
        titan=f"attention.{titan}",
        hf=f"self_attn.{hf}",
        role="attention",
        fan_in=fan_in,
        fan_out=fan_out,
    )


def _mlp(titan: str, hf: str, fan_in: Width, fan_out: Width) -> Projection:
    return Projection(
        titan=f"feed_forward.{titan}", hf=f"mlp.{hf}", role="mlp", fan_in=fan_in, fan_out=fan_out
    )


PROJECTIONS: dict[ProjectionName, Projection] = {
    "q": _attention("qkv_linear.wq", "q_proj", "model", "query"),
    "k": _attention("qkv_linear.wk", "k_proj", "model", "key"),
    "v": _attention("qkv_linear.wv", "v_proj", "model", "key"),
    "o": _attention("wo", "o_proj", "query", "model"),
    "gate": _mlp("w1", "gate_proj", "model", "ffn"),
    "up": _mlp("w3", "up_proj", "model", "ffn"),
    "down": _mlp("w2", "down_proj", "ffn", "model"),
}

ATTENTION = tuple(name for name, p in PROJECTIONS.items() if p.role == "attention")
QKV = tuple(name for name in ATTENTION if PROJECTIONS[name].fan_in == "model")
MLP_IN = tuple(n for n, p in PROJECTIONS.items() if p.role == "mlp" and p.fan_in == "model")


def projection_shapes(*, dim: int, query: int, key: int, ffn: int) -> dict[str, tuple[int, int]]:
    """Return (in, out) features of every projection of a model of these widths.

    Args:
        dim: the model dimension.
        query: query heads times head dimension.
        key: key/value heads times head dimension.
        ffn: the feed-forward width.
    """
    widths = {"model": dim, "query": query, "key": key, "ffn": ffn}
    return {name: (widths[p.fan_in], widths[p.fan_out]) for name, p in PROJECTIONS.items()}
