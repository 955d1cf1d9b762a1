"""CoLA inside torchtitan's Llama: the converter, the block, and CoLA-M.

`ColaConverter` replaces the `Linear.Config` nodes of torchtitan's own Llama by low-rank ones and
its block by `ColaBlock`. The block computes the same thing as torchtitan's,

    h = x + o(attention(q, k, v)(norm(x)))        y = h + down(σ_m(gate(norm(h))) ⊙ up(norm(h))),

cut at the bottleneck pre-activations z = A·x into pieces, each a function of what is kept:

    piece                                keeps               recomputed in the backward pass
    norm, A_q A_k A_v                    x (d wide)          norm
    σ, B_q B_k B_v, RoPE, attention, A_o z_q z_k z_v (3r)    σ, B_q B_k B_v, RoPE, attention
    σ, B_o, + x                          z_o (r)             σ
    norm, A_gate A_up                    h (d wide)          norm
    σ, B_gate B_up, σ_m, ⊙, A_down       z_gate z_up (2r)    σ, B_gate B_up, σ_m, ⊙
    σ, B_down, + h                       z_down (r)          σ

CoLA-M checkpoints every piece; CoLA runs the same pieces plainly. The graph is the same, so the
gradients are equal to the last bit in a deterministic precision. No A runs twice: torch stops a
recomputation at the last tensor the backward pass needs, which is the input of the closing GEMM,
and where several A's close a piece their outputs, which are kept anyway, stand in for the earlier.

For n tokens that keeps 2nd + 7nr elements per layer and recomputes 6nrd + 4nr·ffn FLOPs besides the
attention. At r = d/4 and ffn = 2.69d (tests/cola/test_cola_memory.py counts them):

                                kept between the passes     recomputed
    CoLA                        24.3nd on a CPU             nothing
    CoLA-M                      3.75nd                      16.75ndr + attention
    a checkpoint a block        1nd                         38.1ndr + attention
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torchtitan.models.common import Linear
from torchtitan.models.common.attention import BaseQKVLinear, GQAttention, local_head_split
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module

from lowline.cola.low_rank import ACTIVATIONS, INITS, LowRankLinear, init_std
from lowline.cola.projections import MLP_IN, PROJECTIONS, QKV, ProjectionName
from lowline.cola.sharded import init_unsharded
from lowline.cola.variants import Crossing, variant_of
from lowline.kernels.low_rank import grouped_linear

Memory = Literal["cola", "cola-m"]
Carried = tuple[torch.Tensor, ...]
_PLACE = {name: place for place, name in enumerate(PROJECTIONS)}

_keeping_gemms = partial(
    create_selective_checkpoint_contexts,
    [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
)


class TitanLowRankLinear(LowRankLinear, Module):
    """`LowRankLinear` as a torchtitan module; A and B are torchtitan `Linear`s."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        A: Linear.Config
        B: Linear.Config
        activation: str = "silu"
        variant: str = "cola"
        gated: bool = False

        @property
        def in_features(self) -> int:
            return self.A.in_features

        @property
        def out_features(self) -> int:
            return self.B.out_features

    def __init__(self, config: Config) -> None:
        super(LowRankLinear, self).__init__()
        A, B, c = config.A.build(), config.B.build(), config
        self._set_factors(A, B, c.activation, c.variant, c.gated)

    def _init_self_parameters(self) -> None:
        """Set the gate; A and B have initializers, which draw alike however they are sharded."""
        if self.gate is not None:
            nn.init.ones_(self.gate)

    def _plus(self, linear: nn.Linear, x: torch.Tensor, term: torch.Tensor | None) -> torch.Tensor:
        """Return linear(x) + term as one product, which makes the sum alone: the CoLA-M of variants
        keeps what products make.
        """
        if term is None:
            return linear(x)
        if linear.bias is not None:
            term = term + linear.bias
        flat = torch.addmm(term.flatten(0, -2), x.flatten(0, -2), linear.weight.t())
        return flat.view(term.shape)


class ColaQKVLinear(BaseQKVLinear):
    """q, k and v projections with a configuration each (torchtitan's shares one for k and v)."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseQKVLinear.Config):
        wq: Module.Config
        wk: Module.Config
        wv: Module.Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.wq = config.wq.build()
        self.wk = config.wk.build()
        self.wv = config.wv.build()

    def forward(self, x_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (local_head_split(w(x_BLD), self.head_dim) for w in (self.wq, self.wk, self.wv))
        return q, k, v


class GroupedEntry(Module):
    """x -> [A_1; A_2; ...]·x as one GEMM, over the projections' own weights (no parameters)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__()

    def forward(self, input: torch.Tensor, entries: Sequence[nn.Linear]) -> torch.Tensor:
        return grouped_linear(input, [a.weight for a in entries], [a.bias for a in entries])


class ColaBlock(Llama3TransformerBlock):
    """torchtitan's Llama block, cut at the bottlenecks; see the module's table."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3TransformerBlock.Config):
        mlp_activation: str = "silu"
        memory: Memory = "cola"
        crosses: Crossing | None = None  # what goes from a layer to the next
        sends: bool = False
        qkv_entry: GroupedEntry.Config | None = None
        mlp_entry: GroupedEntry.Config | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.mlp_activation = ACTIVATIONS[config.mlp_activation]
        self.memory = config.memory
        self.crosses = config.crosses
        self.sends = config.sends
        self.qkv_entry = config.qkv_entry.build() if config.qkv_entry else None
        self.mlp_entry = config.mlp_entry.build() if config.mlp_entry else None

    def forward(
        self,
        x_BLD: torch.Tensor,
        attention_masks: Any = None,
        positions: torch.Tensor | None = None,
        previous: Carried | None = None,
    ) -> Any:
        """Return the block's output, and where it `sends` what the next layer gets as `previous`:
        z or y of its projections, in the order of `PROJECTIONS`.
        """
        run = _recomputed if self.memory == "cola-m" and torch.is_grad_enabled() else _plain

        def of(kind: Crossing, *names: ProjectionName) -> Carried:
            if previous is None or self.crosses != kind:
                return ()
            return tuple(previous[_PLACE[name]] for name in names)

        keep_y = self.crosses == "output"  # the next layer's gates need it
        z_qkv = run(
            self._enter_attention,
            x_BLD,
            *of("latent", *QKV),
            keep_gemms=self.qkv_entry is None,
        )
        attend = partial(self._attend, attention_masks, positions)
        z_o, *y_qkv = run(
            attend, *z_qkv, *of("output", *QKV), *of("latent", "o"), keep_gemms=keep_y
        )
        h_BLD, *y_o = run(self._leave_attention, x_BLD, z_o, *of("output", "o"))
        z_mlp = run(
            self._enter_mlp,
            h_BLD,
            *of("latent", *MLP_IN),
            keep_gemms=self.mlp_entry is None,
        )
        z_down, *y_mlp = run(
            self._mlp, *z_mlp, *of("output", *MLP_IN), *of("latent", "down"), keep_gemms=keep_y
        )
        out_BLD, *y_down = run(self._leave_mlp, h_BLD, z_down, *of("output", "down"))
        if not self.sends:
            return out_BLD
        latent = (*z_qkv, z_o, *z_mlp, z_down)
        return out_BLD, (*y_qkv, *y_o, *y_mlp, *y_down) if keep_y else latent

    def _sent(self, *outputs: torch.Tensor) -> Carried:
        return outputs if self.crosses == "output" else ()

    def _enter_attention(self, x_BLD: torch.Tensor, *previous: torch.Tensor) -> Carried:
        qkv = self.attention.qkv_linear
        x_BLD = self.attention_norm(x_BLD)
        return _enter((qkv.wq, qkv.wk, qkv.wv), x_BLD, self.qkv_entry, previous)

    def _attend(
        self,
        attention_masks: Any,
        positions: torch.Tensor | None,
        z_q: torch.Tensor,
        z_k: torch.Tensor,
        z_v: torch.Tensor,
        *previous: torch.Tensor,
    ) -> Carried:
        a, qkv = self.attention, self.attention.qkv_linear
        output = previous if self.crosses == "output" else ()
        before_q, before_k, before_v = output or [None] * 3
        # v, q, k: the order in which lowline.cola.accounting counts selective checkpoints.
        y_v = _expand(qkv.wv, z_v, before_v)
        y_q = _expand(qkv.wq, z_q, before_q)
        y_k = _expand(qkv.wk, z_k, before_k)
        q_BLNH, k_BLNH, v_BLNH = (local_head_split(y, qkv.head_dim) for y in (y_q, y_k, y_v))
        if a.q_norm is not None and a.k_norm is not None:
            q_BLNH, k_BLNH = a.q_norm(q_BLNH), a.k_norm(k_BLNH)
        out_BLNH = self._mix(attention_masks, positions, q_BLNH, k_BLNH, v_BLNH)
        out_BLD = out_BLNH.contiguous().flatten(2)
        latent = previous if self.crosses == "latent" else ()
        return *_enter((a.wo,), out_BLD, None, latent), *self._sent(y_q, y_k, y_v)

    def _mix(
        self,
        attention_masks: Any,
        positions: torch.Tensor | None,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
    ) -> torch.Tensor:
        """Return the attention itself, of normalized q and k before the rotary embedding."""
        a = self.attention
        q_BLNH, k_BLNH = a.rope(q_BLNH, k_BLNH, positions)
        return a.inner_attention(
            q_BLNH,
            k_BLNH,
            v_BLNH,
            attention_masks=attention_masks,
            scale=a.scaling,
            enable_gqa=a.enable_gqa,
        )

    def _leave_attention(
        self, x_BLD: torch.Tensor, z_o: torch.Tensor, *previous: torch.Tensor
    ) -> Carried:
        y_o = _expand(self.attention.wo, z_o, *previous)
        return x_BLD + y_o, *self._sent(y_o)

    def _enter_mlp(self, h_BLD: torch.Tensor, *previous: torch.Tensor) -> Carried:
        mlp = self.feed_forward
        return _enter((mlp.w1, mlp.w3), self.ffn_norm(h_BLD), self.mlp_entry, previous)

    def _mlp(self, z_gate: torch.Tensor, z_up: torch.Tensor, *previous: torch.Tensor) -> Carried:
        mlp = self.feed_forward
        output = previous if self.crosses == "output" else ()
        before_gate, before_up = output or [None] * 2
        y_gate, y_up = _expand(mlp.w1, z_gate, before_gate), _expand(mlp.w3, z_up, before_up)
        inner = self.mlp_activation(y_gate) * y_up
        latent = previous if self.crosses == "latent" else ()
        return *_enter((mlp.w2,), inner, None, latent), *self._sent(y_gate, y_up)

    def _leave_mlp(
        self, h_BLD: torch.Tensor, z_down: torch.Tensor, *previous: torch.Tensor
    ) -> Carried:
        y_down = _expand(self.feed_forward.w2, z_down, *previous)
        return h_BLD + y_down, *self._sent(y_down)


def _plain(piece: Callable, *kept: torch.Tensor, keep_gemms: bool = False) -> Any:
    return piece(*kept)


def _recomputed(piece: Callable, *kept: torch.Tensor, keep_gemms: bool = False) -> Any:
    """Run a piece so that the backward pass finds only its arguments and recomputes the rest.

    `keep_gemms`: the piece's GEMMs make nothing but its results, so none of them is run again.
    """
    options: dict[str, Any] = {"context_fn": _keeping_gemms} if keep_gemms else {}
    return checkpoint(piece, *kept, use_reentrant=False, preserve_rng_state=False, **options)


def _enter(
    projections: tuple[nn.Module, ...],
    x: torch.Tensor,
    grouped: GroupedEntry | None,
    previous: Carried,
) -> Carried:
    """Return z of each low-rank projection, and the output of a dense one, which has no bottleneck.

    Args:
        previous: of each projection, what its z gets from the layer before; empty for nothing.
    """
    before = previous or [None] * len(projections)
    if grouped is None:
        return tuple(
            p.enter(x, b) if isinstance(p, LowRankLinear) else p(x)
            for p, b in zip(projections, before, strict=True)
        )
    low_rank = [p for p in projections if isinstance(p, LowRankLinear)]  # all of them are
    terms = [p.latent_term(b) for p, b in zip(low_rank, before, strict=True)]
    entries = [p.A for p in low_rank]
    z = grouped(x, entries).split([entry.out_features for entry in entries], dim=-1)
    return tuple(z_i if t is None else z_i + t for z_i, t in zip(z, terms, strict=True))


def _expand(
    projection: nn.Module, z: torch.Tensor, previous: torch.Tensor | None = None
) -> torch.Tensor:
    """B·σ(z) with the variant's term; a dense projection is already complete."""
    return projection.expand(z, previous) if isinstance(projection, LowRankLinear) else z


class ColaConverter(ModelConfigConverter):
    """Turns the blocks of torchtitan's Llama into `ColaBlock`s with low-rank projections."""

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        ranks: dict[str, int]  # by projection; 0 = dense
        activation: str = "silu"
        bias: bool = False
        init: str = "published"
        variant: str = "cola"
        mlp_activation: str = "silu"
        memory: Memory = "cola"
        grouped: bool = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model_config: Module.Config) -> Module.Config:
        """Replace every block in place and return the same root."""
        layers = model_config.layers  # type: ignore[attr-defined]
        last = len(layers) - 1
        layers[:] = [self._convert_block(block, n, n == last) for n, block in enumerate(layers)]
        return model_config

    def _convert_block(
        self, block: Llama3TransformerBlock.Config, layer: int, last: bool
    ) -> ColaBlock.Config:
        c, variant = self.config, variant_of(self.config.variant)
        ranks = dict.fromkeys(c.ranks, 0) if variant.first_dense and not layer else c.ranks
        attention, mlp = block.attention, block.feed_forward
        assert isinstance(attention, GQAttention.Config) and isinstance(mlp, FeedForward.Config)
        qkv = attention.qkv_linear
        dense = dict(
            zip(
                PROJECTIONS,
                (qkv.wq, qkv.wkv, qkv.wkv, attention.wo, mlp.w1, mlp.w3, mlp.w2),
                strict=True,
            )
        )
        new = {
            name: self._convert_linear(linear, ranks[name], gated=layer > 0)
            for name, linear in dense.items()
        }
        return ColaBlock.Config(
            attention_norm=block.attention_norm,
            ffn_norm=block.ffn_norm,
            attention=replace(
                attention,
                qkv_linear=ColaQKVLinear.Config(
                    head_dim=qkv.head_dim, wq=new["q"], wk=new["k"], wv=new["v"]
                ),
                wo=new["o"],
            ),
            feed_forward=FeedForward.Config(w1=new["gate"], w3=new["up"], w2=new["down"]),
            mlp_activation=c.mlp_activation,
            memory=c.memory,
            crosses=variant.crosses,
            sends=variant.crosses is not None and not last,
            qkv_entry=self._group(ranks, *QKV),
            mlp_entry=self._group(ranks, *MLP_IN),
        )

    def _group(self, ranks: dict[str, int], *names: str) -> GroupedEntry.Config | None:
        """Return one GEMM for these projections' A's, where each of them has one."""
        low_rank = all(ranks[name] > 0 for name in names)
        return GroupedEntry.Config() if self.config.grouped and low_rank else None

    def _convert_linear(self, linear: Linear.Config, rank: int, gated: bool) -> Module.Config:
        if rank == 0:
            return linear
        c = self.config
        std = init_std(linear.in_features, linear.out_features, rank)
        first, second = (
            {"weight": init_unsharded(partial(INITS[init], std=std)), "bias": nn.init.zeros_}
            for init in ("published", c.init)
        )
        return TitanLowRankLinear.Config(
            A=Linear.Config(
                in_features=linear.in_features, out_features=rank, bias=c.bias, param_init=first
            ),
            B=Linear.Config(
                in_features=rank, out_features=linear.out_features, bias=c.bias, param_init=second
            ),
            activation=c.activation,
            variant=c.variant,
            gated=gated,
        )
