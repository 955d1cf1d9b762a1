"""Low-rank Llamas as a `transformers` model: `model_type` "cola_llama".

Transformers' own Llama, each `nn.Linear` of the seven projections exchanged for `LowRankLinear`,

    y = B · σ(A · x)        (CoLA, arXiv 2502.10940, section 3)

where its rank is not 0, or a variant of it (`lowline.cola.variants`). What a variant has cross
layers is in a `Crossing`, which a forward pass hands to its layers. Attention, RoPE, KV cache,
masks, generation and saving are transformers'.
The weights carry transformers' names, with `.A` and `.B` below a low-rank projection:
`model.layers.0.self_attn.q_proj.A.weight`.

Both published MLPs are one field: `hidden_act="silu"` keeps SwiGLU's non-linearity,
`hidden_act="linear"` leaves only the bottleneck's, `down(gate(x) * up(x))`.

Importing this module registers the model with transformers' `Auto*` classes; `import lowline` sees
to that (`lowline._register`), and a saved model brings a file that does
(`lowline.cola.remote_code`).

Left out: tensor and pipeline parallel plans (train with `lowline.train`, which has them), and
ranks that differ from layer to layer.
"""

from contextlib import ExitStack
from dataclasses import field
from functools import partial
from typing import Any, get_args

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from lowline.cola.drafts import ExactDrafts
from lowline.cola.low_rank import ACTIVATIONS, LowRankLinear, init_std
from lowline.cola.one_token import one_token, softmax
from lowline.cola.pivoted import PivotedLinear
from lowline.cola.projections import PROJECTIONS
from lowline.cola.remote_code import SavesRemoteCode
from lowline.cola.variants import Name as Variant
from lowline.cola.variants import variant_of
from lowline.errors import LowlineError


@strict
class CoLAConfig(LlamaConfig):
    """A `LlamaConfig` and what makes it low-rank.

    Args:
        ranks: rank of each projection by its name (q, k, v, o, gate, up, down); 0, or a name left
            out, is a dense projection.
        bottleneck_activation: the σ between A and B: "silu", "gelu", "relu" or "identity".
        bottleneck_bias: whether A and B carry a bias.
        variant: "cola", "cr-net" (whose first layer is dense) or "lax"; "dlr" is saved as "cola".
        qk_norm: an RMSNorm over each head of q and of k before RoPE, as Qwen3 has it.
        pivoted: whether low-rank layers are stored with pivots (`lowline.cola.pivoted`).

    Raises:
        StrictDataclassError: (transformers' own) an unknown projection or activation, a rank
            below 0, heads that do not divide, a value of another type.
    """

    model_type = "cola_llama"
    base_model_tp_plan = {}
    base_model_pp_plan = {}

    ranks: dict[str, int] = field(default_factory=dict)
    bottleneck_activation: str = "silu"
    bottleneck_bias: bool = False
    variant: str = "cola"
    qk_norm: bool = False
    pivoted: bool = False

    def __post_init__(self, **kwargs):
        self.ranks = {name: self.ranks.get(name, 0) for name in PROJECTIONS} | self.ranks
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Replace Llama's rule that the heads divide `hidden_size`: here `head_dim` is free."""
        unknown = sorted(set(self.ranks) - set(PROJECTIONS))
        if unknown:
            raise LowlineError(
                f"ranks names the projections {unknown}; allowed are {list(PROJECTIONS)}."
            )
        negative = {name: rank for name, rank in self.ranks.items() if rank < 0}
        if negative:
            raise LowlineError(f"ranks has {negative}: a rank is at least 1, or 0 for dense.")
        if self.bottleneck_activation not in ACTIVATIONS:
            raise LowlineError(
                f"bottleneck_activation = {self.bottleneck_activation!r}; "
                f"allowed are {sorted(ACTIVATIONS)}."
            )
        allowed = [v for v in get_args(Variant) if not variant_of(v).folds]
        if self.variant not in allowed:
            raise LowlineError(f"variant = {self.variant!r}; allowed are {allowed}.")
        if self.pivoted and (self.bottleneck_activation, self.variant) != ("identity", "cola"):
            raise LowlineError(
                'pivoted = True needs bottleneck_activation = "identity", no variant.'
            )
        assert self.num_key_value_heads is not None  # filled in by __post_init__
        if self.num_attention_heads % self.num_key_value_heads:
            raise LowlineError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}."
            )


class Crossing:
    """What the layers of one forward pass hand on, by layer and projection."""

    def __init__(self) -> None:
        self.sent: dict[tuple[int, str], torch.Tensor] = {}

    def take(self, layer: int, name: str) -> torch.Tensor | None:
        """Return what a layer has sent; without gradients nobody needs it again."""
        # With gradients the layer after it may be run again, by gradient checkpointing.
        found = self.sent.get((layer, name))
        if not torch.is_grad_enabled():
            self.sent.pop((layer, name), None)
        return found


class CrossingLinear(LowRankLinear):
    """A low-rank layer in whose variant something crosses layers; its block says what came."""

    previous: torch.Tensor | None = None
    sent: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        came, latent = self.previous, self.variant.crosses == "latent"
        if came is not None:
            came = came.to(x.device)
        z = self.enter(x, came if latent else None)
        y = self.expand(z, None if latent else came)
        self.sent = z if latent else y
        return y


class CoLADecoderLayer(LlamaDecoderLayer):
    """Llama's block, its projections low-rank where `config.ranks` has them."""

    def __init__(self, config: CoLAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        variant = variant_of(config.variant)
        if config.qk_norm:
            self.self_attn = Qwen3Attention(config, layer_idx)  # type: ignore
        for name, projection in PROJECTIONS.items():
            rank = 0 if variant.first_dense and not layer_idx else config.ranks[name]
            dense = self.get_submodule(projection.hf)
            assert isinstance(dense, nn.Linear)
            if rank and config.pivoted:
                pivoted = PivotedLinear(
                    dense.in_features, dense.out_features, rank, bias=config.bottleneck_bias
                )
                self.set_submodule(projection.hf, pivoted)
            elif rank:
                low_rank = (CrossingLinear if variant.crosses else LowRankLinear)(
                    dense.in_features,
                    dense.out_features,
                    rank,
                    activation=config.bottleneck_activation,
                    bias=config.bottleneck_bias,
                    variant=config.variant,
                    gated=layer_idx > 0,
                )
                self.set_submodule(projection.hf, low_rank)

    def forward(self, *args: Any, crossing: Crossing | None = None, **kwargs: Any) -> torch.Tensor:
        """Return what Llama's block returns; what crosses layers passes through `crossing`."""
        if crossing is None:
            return super().forward(*args, **kwargs)
        named = {name: self.get_submodule(p.hf) for name, p in PROJECTIONS.items()}
        with ExitStack() as watched:
            for name, module in named.items():
                if isinstance(module, CrossingLinear):
                    module.previous = crossing.take(self.layer_idx - 1, name)
                else:  # dense, in a first layer: its output crosses
                    hook = partial(_send, crossing, (self.layer_idx, name))
                    watched.callback(module.register_forward_hook(hook).remove)
            out = super().forward(*args, **kwargs)
        for name, module in named.items():
            if isinstance(module, CrossingLinear):
                assert module.sent is not None
                crossing.sent[self.layer_idx, name] = module.sent
                module.previous = module.sent = None
        return out


def _send(
    crossing: Crossing, place: tuple[int, str], module: nn.Module, args: Any, y: torch.Tensor
) -> None:
    crossing.sent[place] = y


class CoLAPreTrainedModel(SavesRemoteCode, LlamaPreTrainedModel):
    """What transformers' machinery must know of both models below."""

    config: CoLAConfig
    _no_split_modules = ["CoLADecoderLayer"]
    _can_record_outputs = {
        "hidden_states": CoLADecoderLayer,
        "attentions": [LlamaAttention, Qwen3Attention],
    }

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Outside transformers' tree it passes over modules without weights of their own, which is
        # what LowRankLinear is, lest it overwrite loaded ones. `init.normal_` below never does.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Give A and B the paper's init and the rest transformers' N(0, `initializer_range`)."""
        super()._init_weights(module)
        if isinstance(module, LowRankLinear):  # after its children: a parent's turn comes last
            std = init_std(module.in_features, module.out_features, module.rank)
            init.normal_(module.A.weight, std=std)
            init.normal_(module.B.weight, std=std)
            if module.gate is not None:
                init.ones_(module.gate)


class CoLAModel(CoLAPreTrainedModel, LlamaModel):
    """The decoder without a head: token ids [B, T] to hidden states [B, T, hidden_size]."""

    def __init__(self, config: CoLAConfig):
        # Not LlamaModel's: it would build every dense projection first.
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            CoLADecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what LlamaModel returns; one token more on a CPU takes two calls per block."""
        if (
            not args
            and (x := one_token(self, **kwargs, attend=softmax, layers=(DynamicLayer,))) is not None
        ):
            return BaseModelOutputWithPast(x, kwargs["past_key_values"])
        if variant_of(self.config.variant).crosses:
            kwargs["crossing"] = Crossing()
        return super().forward(*args, **kwargs)


class CoLAForCausalLM(ExactDrafts, CoLAPreTrainedModel, LlamaForCausalLM):  # type: ignore[misc]
    """The language model: token ids [B, T] to logits [B, T, vocab_size], and `generate`."""

    def __init__(self, config: CoLAConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = CoLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(CoLAConfig.model_type, CoLAConfig, exist_ok=True)
AutoModel.register(CoLAConfig, CoLAModel, exist_ok=True)
AutoModelForCausalLM.register(CoLAConfig, CoLAForCausalLM, exist_ok=True)
