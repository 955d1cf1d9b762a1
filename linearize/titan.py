"""Mixers inside torchtitan's Llama: the converter, and the attention layer that holds one.

`MixerConverter` exchanges the attention of the chosen layers for `MixerAttention`, in torchtitan's
own block or in CoLA's (after `lowline.cola.block.ColaConverter`). Projections, norms of q and k,
and their names stay, so that weights go in and out by renaming; the mixer's lie below `.mixer`. It
is called as transformers' body calls it (`lowline.linearize.mixers.base`).

In a transfer (LoLCATs' first stage, arXiv 2410.10254, section 3.1) such a layer gives softmax
attention's output, made of the same q, k and v, and the mixer's only enters a loss:

    o* = softmax(q·kᵀ / √D) v  is passed on,   o = mixer(q, k, v)  is compared with it.

The mixer alone has a graph; whoever calls the model turns gradients off around it.

With tensor parallelism a rank has some of the heads: the projections split them as torchtitan
does, and the mixer runs on local tensors with its own part of the parameters. The layer's input,
and a parameter that belongs to no head, all ranks have; their gradients are summed.

Shapes: B batch, L sequence length, N heads, H head dimension, D model dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.func import functional_call
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import GQAttention
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module

from lowline.cola.block import Carried, ColaBlock
from lowline.cola.sharded import set_full_tensor
from lowline.linearize.losses import transfer_loss, weight_loss
from lowline.linearize.mixers import HeadShape, Mixer, build_mixer
from lowline.linearize.mixers.fitting import Sample


@dataclass(eq=False)
class Transfer:
    """A forward pass in which mixers learn from softmax attention.

    `losses` gets a (B,) of each converted layer, in the order of the layers.
    """

    counted: torch.Tensor  # (B, L) bool: the tokens that count
    learns: bool = True  # whether the losses have a graph
    weight_loss: float = 0.0  # how much attention weights count beside outputs
    take_keys: Callable[[torch.Tensor], None] | None = None
    """Where given, it gets each converted layer's keys (B, L, N, H), in the order of the layers,
    and mixers do nothing."""
    take_sample: Callable[[Sample], None] | None = None
    """Where given, it gets each converted layer's tokens and softmax outputs, in that order, and
    mixers do nothing."""
    losses: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class MixerInputs:
    """What a mixer's layer takes where others take an attention mask."""

    cu_seqlens: torch.Tensor | None = None  # bounds of documents in the flattened batch
    softmax_mask: Any = None  # what its softmax attention takes, in a transfer
    transfer: Transfer | None = None


def document_bounds(positions_BL: torch.Tensor) -> torch.Tensor | None:
    """cu_seqlens of the documents in a flattened batch; each starts where its position is 0.

    None where every row is a single document: then rows are sequences.
    """
    starts_BL = positions_BL == 0
    if not bool(starts_BL[:, 1:].any()):
        return None
    starts_BL = F.pad(starts_BL[:, 1:], (1, 0), value=True)  # a row never continues another's
    return F.pad(starts_BL.flatten().nonzero()[:, 0], (0, 1), value=starts_BL.numel())


class MixerAttention(GQAttention):
    """torchtitan's attention with a mixer in the place of softmax(q·k)·v."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        mixer: str
        options: dict[str, Any]
        layer: int

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.mixer = self._new_mixer()
        self._heads: DeviceMesh | None = None  # over which they are split

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """Split the layer as its configuration says, and the mixer by its heads."""
        super().parallelize(parallel_dims)
        if parallel_dims.tp_enabled:
            self._heads = parallel_dims.get_mesh("tp")
            split_heads(self.mixer, self._heads)

    def _new_mixer(self) -> Any:
        c = self.config
        shape = HeadShape(
            hidden_size=c.dim,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            layer=c.layer,
        )
        return build_mixer(c.mixer, c.options, shape)

    @torch.no_grad()
    def _init_self_parameters(self) -> None:
        """Initialize the mixer as its constructor leaves it, the same on every rank.

        What is random there depends on the seed and the layer, not on what was drawn before.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(torch.initial_seed() + self.config.layer)
            new = self._new_mixer().state_dict()
        for name, weight in self.mixer.state_dict().items():
            set_full_tensor(weight, new[name])

    @torch.no_grad()
    def draw_projections(self) -> None:
        """Give q, k, v and o random matrices, the same on every rank."""
        generator = torch.Generator().manual_seed(torch.initial_seed() + self.config.layer)
        for name, weight in self.named_parameters():
            if not name.startswith("mixer.") and weight.dim() > 1:
                value = torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
                set_full_tensor(weight, value)

    @torch.no_grad()
    def fitted(self, sample: Sample) -> dict[str, torch.Tensor]:
        """Return full values of the mixer's parameters, fitted to softmax attention's outputs."""
        with torch.random.fork_rng(devices=[]):
            mixer = self._new_mixer().to(sample.q.device)
        for name, weight in self.mixer.named_parameters():
            full = weight.full_tensor() if isinstance(weight, DTensor) else weight
            mixer.get_parameter(name).copy_(full)
        exact = (t.float() for t in sample[:-1])
        values = mixer.fit(Sample._make([*exact, sample.cu_seqlens]))
        return {name: value.detach().clone() for name, value in values.items()}

    def forward(
        self,
        x_BLD: torch.Tensor,
        attention_masks: MixerInputs,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q_BLNH, k_BLNH, v_BLNH = self.qkv_linear(x_BLD)
        if self.q_norm is not None and self.k_norm is not None:
            q_BLNH, k_BLNH = self.q_norm(q_BLNH), self.k_norm(k_BLNH)
        out_BLNH = self.mix(attention_masks, positions, x_BLD, q_BLNH, k_BLNH, v_BLNH)
        return self.wo(out_BLNH.contiguous().flatten(2))

    def mix(
        self,
        inputs: MixerInputs,
        positions: torch.Tensor | None,
        x_BLD: torch.Tensor,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
    ) -> torch.Tensor:
        """Return the mixer's output, or in a transfer softmax attention's.

        Args:
            x_BLD: the layer's normalized input.
            q_BLNH, k_BLNH, v_BLNH: its projections, before the rotary embedding.
        """
        transfer, qkv = inputs.transfer, (q_BLNH, k_BLNH, v_BLNH)
        if transfer is None:
            return self._mixed(inputs, positions, x_BLD, *qkv)
        softmax_BLNH = self._softmax(inputs, positions, *qkv)
        if transfer.take_keys is not None:
            transfer.take_keys(k_BLNH.full_tensor() if isinstance(k_BLNH, DTensor) else k_BLNH)
            return softmax_BLNH
        if transfer.take_sample is not None:
            tensors = self._inputs_of_mixer(inputs, positions, x_BLD, *qkv)
            wanted = softmax_BLNH.reshape(*tensors[0].shape[:2], *softmax_BLNH.shape[2:])
            transfer.take_sample(Sample._make([*tensors, wanted, inputs.cu_seqlens]))
            return softmax_BLNH
        with torch.set_grad_enabled(transfer.learns):
            out_BLNH = self._mixed(inputs, positions, x_BLD, *qkv)
            loss_B = self._transfer_loss(out_BLNH, softmax_BLNH, transfer.counted)
            if transfer.weight_loss:
                loss_B = loss_B + transfer.weight_loss * self._weight_loss(
                    inputs, positions, x_BLD, *qkv
                )
            transfer.losses.append(loss_B)
        return softmax_BLNH

    def _transfer_loss(
        self, out_BLNH: torch.Tensor, softmax_BLNH: torch.Tensor, counted_BL: torch.Tensor
    ) -> torch.Tensor:
        if self._heads is None:
            return transfer_loss(out_BLNH, softmax_BLNH, counted_BL)
        assert isinstance(out_BLNH, DTensor) and isinstance(softmax_BLNH, DTensor)
        local, group = (out_BLNH.to_local(), softmax_BLNH.to_local()), self._heads.get_group()
        return transfer_loss(*local, counted_BL, total=lambda x: SumOverRanks.apply(x, group))

    def _weight_loss(
        self,
        inputs: MixerInputs,
        positions: torch.Tensor | None,
        x_BLD: torch.Tensor,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
    ) -> torch.Tensor:
        """Return `weight_loss`'s mean over tokens: with one-hot values the outputs are weights."""
        assert inputs.transfer is not None
        counted_BL = inputs.transfer.counted
        length, width = x_BLD.shape[1], v_BLNH.shape[-1]
        one_hot_LS = F.pad(torch.eye(length, dtype=x_BLD.dtype, device=x_BLD.device), (0, width))
        total_B = torch.zeros(len(x_BLD), device=x_BLD.device)
        for start in range(0, length, width):
            value_LH = one_hot_LS[:, start : start + width]
            value_BLNH = value_LH[None, :, None].expand_as(v_BLNH).contiguous()
            with torch.no_grad():
                target = self._softmax(inputs, positions, q_BLNH, k_BLNH, value_BLNH)
            weights = self._mixed(inputs, positions, x_BLD, q_BLNH, k_BLNH, value_BLNH)
            total_B = total_B + weight_loss(weights, target, counted_BL)
        return total_B / counted_BL.sum(1).clamp(min=1)

    def _inputs_of_mixer(
        self,
        inputs: MixerInputs,
        positions: torch.Tensor | None,
        x_BLD: torch.Tensor,
        *qkv_BLNH: torch.Tensor,
        table_L2H: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Return q, k, v, x, cos and sin, of packed documents as a batch of one."""
        table_L2H = self.rope.cache if table_L2H is None else table_L2H
        rope = table_L2H[: x_BLD.shape[1]][None] if positions is None else table_L2H[positions]
        tensors = [*qkv_BLNH, x_BLD, *rope.chunk(2, -1)]
        if inputs.cu_seqlens is not None:  # row after row
            tensors = [tensor.flatten(0, 1)[None] for tensor in tensors]
        return tensors

    def _mixed(
        self,
        inputs: MixerInputs,
        positions: torch.Tensor | None,
        x_BLD: torch.Tensor,
        *qkv_BLNH: torch.Tensor,
    ) -> torch.Tensor:
        table_L2H = self.rope.cache
        if self._heads is not None:
            everywhere = [Replicate()]
            shards: Any = (x_BLD, *qkv_BLNH, table_L2H)  # DTensors
            x_BLD = (
                shards[0].redistribute(placements=everywhere).to_local(grad_placements=[Partial()])
            )
            qkv_BLNH = tuple(t.to_local() for t in shards[1:-1])
            table_L2H = shards[-1].to_local()
        q, k, v, x, cos, sin = self._inputs_of_mixer(
            inputs, positions, x_BLD, *qkv_BLNH, table_L2H=table_L2H
        )
        out, _ = self.mixer(q, k, v, rope=(cos, sin), x_BTE=x, cu_seqlens=inputs.cu_seqlens)
        out = out.reshape(qkv_BLNH[0].shape)
        if self._heads is None:
            return out
        return DTensor.from_local(out, self._heads, [Shard(2)], run_check=False)

    def _softmax(
        self,
        inputs: MixerInputs,
        positions: torch.Tensor | None,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
    ) -> torch.Tensor:
        q_BLNH, k_BLNH = self.rope(q_BLNH, k_BLNH, positions)
        return self.inner_attention(
            q_BLNH,
            k_BLNH,
            v_BLNH,
            attention_masks=inputs.softmax_mask,
            scale=self.scaling,
            enable_gqa=self.enable_gqa,
        )


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over ranks, which all of them go on with alike.

    Each computes the same loss of it, so the gradient of its own term is that of the sum.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


def split_heads(mixer: Mixer, mesh: DeviceMesh) -> None:
    """Leave each rank its part of a mixer's parameters, with which `forward` then computes."""
    assert mixer.options.splits
    for name, parameter in list(mixer.named_parameters()):
        placement = Replicate() if name in mixer.whole else Shard(0)
        path, _, leaf = name.rpartition(".")
        part = nn.Parameter(distribute_tensor(parameter, mesh, [placement]))
        part.requires_grad_(parameter.requires_grad)
        mixer.get_submodule(path).register_parameter(leaf, part)
    mixer.part = mesh.get_local_rank(), mesh.size()
    body = _OnLocalTensors(mixer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        # FSDP's hooks, which lie around this function, have gathered the parameters by now.
        parameters = {f"mixer.{n}": _local(p) for n, p in mixer.named_parameters()}
        return functional_call(body, parameters, args, kwargs)

    mixer.forward = forward  # type: ignore[method-assign]


class _OnLocalTensors(nn.Module):
    """A mixer as its class computes it: `functional_call` changes its parameters meanwhile."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.mixer).forward(self.mixer, *args, **kwargs)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    assert isinstance(parameter, DTensor)
    of_all = [Partial() if p.is_replicate() else p for p in parameter.placements]
    return parameter.to_local(grad_placements=of_all)


class MixerColaBlock(ColaBlock):
    """CoLA's block around a mixer, which takes the normalized input beside q, k and v."""

    @dataclass(kw_only=True, slots=True)
    class Config(ColaBlock.Config):
        pass

    def forward(
        self,
        x_BLD: torch.Tensor,
        attention_masks: Any = None,
        positions: torch.Tensor | None = None,
        previous: Carried | None = None,
    ) -> Any:
        return super().forward(x_BLD, (attention_masks, x_BLD), positions, previous)

    def _mix(
        self,
        attention_masks: Any,
        positions: torch.Tensor | None,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
    ) -> torch.Tensor:
        inputs, x_BLD = attention_masks
        x_BLD = self.attention_norm(x_BLD)
        return self.attention.mix(inputs, positions, x_BLD, q_BLNH, k_BLNH, v_BLNH)


class MixerConverter(ModelConfigConverter):
    """Puts a mixer into the chosen layers of torchtitan's Llama, made low-rank before or not."""

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        mixer: str  # a name of lowline.linearize.mixers.MIXERS
        options: dict[str, Any]
        layers: Sequence[int]

    def __init__(self, config: Config) -> None:
        self.config = config

    def convert(self, model_config: Module.Config) -> Module.Config:
        """Exchange the chosen layers' attention in place and return the same root."""
        c = self.config
        blocks = model_config.layers  # type: ignore[attr-defined]
        for layer in c.layers:
            attention = MixerAttention.Config(
                **_fields(blocks[layer].attention), mixer=c.mixer, options=c.options, layer=layer
            )
            if isinstance(blocks[layer], ColaBlock.Config):
                blocks[layer] = MixerColaBlock.Config(**_fields(blocks[layer]))
            blocks[layer].attention = attention
        return model_config


def _fields(config: Module.Config) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.init}
