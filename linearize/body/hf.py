"""Converted checkpoints as `transformers` models: "linearized_llama", "linearized_qwen3", …

transformers' own Llama, Mistral, Qwen2 or Qwen3, or lowline's "cola_llama", in whose chosen layers
a mixer (`lowline.linearize.mixers`) stands between the projections where softmax attention stood.
A weight that was there before keeps its name, so that what is not converted loads unchanged; a
mixer's own lie below `model.layers.N.self_attn.mixer`. Layers that stay softmax are transformers',
windows, masks and attention implementations included.

Mixers know no masks: padding is left out around them, and packed documents kept apart
(`lowline.linearize.body.packing`). Attention's output at padding is 0. A mask of tokens by tokens
is made only where a softmax layer needs one. transformers' sliding windows, in softmax layers that
have one, count padding that stands between a row's tokens; padding at its ends changes nothing.

Importing this module registers the models with transformers' `Auto*` classes; `import lowline` sees
to that.

Left out: tensor and pipeline parallel plans; attention weights (`output_attentions`) and their
dropout in converted layers, where there are none.
"""

from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults

from lowline.cola.hf import CoLAConfig, CoLAForCausalLM, CoLAModel
from lowline.errors import LowlineError
from lowline.linearize.body.attention import LinearizedAttention
from lowline.linearize.body.cache import LinearizedCache
from lowline.linearize.body.packing import plan_packing
from lowline.linearize.mixers import MIXERS, build_mixer
from lowline.linearize.mixers.base import HeadShape, Mixer

SOFTMAX = "softmax"  # the mixer of a layer that is left as it was
PREFIX = "linearized_"  # of `model_type`

# -------------------------------------------------------------------------------------- config


if TYPE_CHECKING:  # each architecture's configuration joins in below; all have what Llama's has
    from transformers import LlamaConfig as _Architecture
else:
    _Architecture = object


@dataclass(kw_only=True, repr=False, eq=False)
class LinearizedConfig(_Architecture):
    """What a converted model's configuration has beside its architecture's.

    Args:
        mixers: for each layer, `{"name": name, **options}`: a name from
            `lowline.linearize.mixers.MIXERS` with that mixer's options, or "softmax". Options left
            out get their defaults, which are then written to config.json. Empty: softmax in all.
        teacher: the hub id, directory or GGUF file that was converted, if it is known.

    Raises:
        ValueError: another number of layers, an unknown mixer or option.
    """

    mixers: list[dict[str, Any]] = field(default_factory=list)
    teacher: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        mixers = self.mixers or [{"name": SOFTMAX}] * self.num_hidden_layers
        if len(mixers) != self.num_hidden_layers:
            raise LowlineError(
                f"mixers has {len(mixers)} entries, the model {self.num_hidden_layers} layers: "
                "name one for each layer, 'softmax' where it stays"
            )
        kinds = {str(mixer): mixer for mixer in mixers}
        resolved = {kind: self._resolved(**mixer) for kind, mixer in kinds.items()}
        self.mixers = [dict(resolved[str(mixer)]) for mixer in mixers]

    def _resolved(self, name: str, **options: Any) -> dict[str, Any]:
        """A mixer with all its options."""
        if name == SOFTMAX and not options:
            return {"name": SOFTMAX}
        with torch.device("meta"):  # finds every mistake at no cost
            build_mixer(name, options, self.head_shape(0))
        return {"name": name, **asdict(MIXERS[name][0](**options))}

    def converted_layers(self) -> list[int]:
        """The layers that have a mixer."""
        return [layer for layer, m in enumerate(self.mixers) if m["name"] != SOFTMAX]

    def head_shape(self, layer: int) -> HeadShape:
        return HeadShape(
            hidden_size=self.hidden_size,
            n_heads=self.num_attention_heads,
            n_kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=getattr(self, "head_dim", None)
            or self.hidden_size // self.num_attention_heads,
            layer=layer,
        )

    def build_mixer(self, layer: int, **changes: Any) -> Mixer:
        """A new mixer for a converted layer, with some of its options changed."""
        options = self.mixers[layer] | changes
        return build_mixer(options.pop("name"), options, self.head_shape(layer))


# -------------------------------------------------------------------------------------- models


class _Initialized(PreTrainedModel):
    """Mixers begin as their constructors leave them, also where transformers builds on "meta"."""

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Outside transformers' tree it passes over modules without weights of their own, which is
        # what LinearizedAttention is, lest it overwrite loaded ones. `init.copy_` never does.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearizedAttention):  # after the modules in it
            new = self.config.build_mixer(module.layer_idx)
            ours, theirs = (chain(m.parameters(), m.buffers()) for m in (module.mixer, new))
            for weight, value in zip(ours, theirs, strict=True):
                init.copy_(weight, value)


class _Body(_Initialized):
    """The decoder without a head: token ids [B, T] to hidden states [B, T, hidden_size]."""

    config: LinearizedConfig
    layers: nn.ModuleList

    def __init__(self, config: LinearizedConfig) -> None:
        super().__init__(config)
        for index in config.converted_layers():
            attention = self.layers[index].get_submodule("self_attn")
            mixed = LinearizedAttention(attention, config.build_mixer(index))
            self.layers[index].add_module("self_attn", mixed)
        self.softmax_stays = len(config.converted_layers()) < config.num_hidden_layers
        self.post_init()

    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if past_key_values is not None and not isinstance(past_key_values, LinearizedCache):
            raise LowlineError(
                f"past_key_values is a {type(past_key_values).__name__}; a linearized model needs "
                "lowline.linearize.body.cache.LinearizedCache(model.config), or None for a new one"
            )
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        packing = None
        if tokens is not None and self.config.converted_layers():
            packing, position_ids = plan_packing(
                (tokens.shape[0], tokens.shape[1]),
                attention_mask,
                position_ids,
                kwargs.get("cu_seq_lens_q"),
                past_key_values,
            )
        documents = packing is not None and attention_mask is None
        if use_cache and past_key_values is None and not documents:
            past_key_values = LinearizedCache(self.config)
        if not self.softmax_stays:
            # transformers hands on a mask of four dimensions as it is, and here nobody looks at it
            attention_mask = torch.empty(1, 1, 0, 0)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache and not documents,
            packing=packing,
            **kwargs,
        )


class _CausalLM(_Initialized):
    """The language model: token ids [B, T] to logits [B, T, vocab_size], and `generate`."""

    config: LinearizedConfig
    body_class: type[_Body]

    def __init__(self, config: LinearizedConfig) -> None:
        PreTrainedModel.__init__(self, config)  # not the architecture's, which builds its own body
        self.model = self.body_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            theirs: Any = super()
            return theirs._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise LowlineError(
                f"cache_implementation = {generation_config.cache_implementation!r}; a linearized "
                "model has a cache of its own: leave it out"
            )
        model_kwargs["past_key_values"] = cache = LinearizedCache(self.config)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return None


class Family(NamedTuple):
    """The classes of one converted architecture."""

    config: type[LinearizedConfig]
    body: type[_Body]
    causal_lm: type[_CausalLM]


def _family(config: Any, body: Any, causal_lm: Any) -> Family:
    def derived(ours: type, theirs: type, **namespace: Any) -> Any:
        namespace |= {"__module__": __name__, "__doc__": ours.__doc__}
        return type(f"Linearized{theirs.__name__}", (ours, theirs), namespace)

    new_config = strict(
        derived(
            LinearizedConfig,
            config,
            model_type=PREFIX + config.model_type,
            base_model_tp_plan={},
            base_model_pp_plan={},
        )
    )
    new_body = derived(_Body, body, config_class=new_config)
    new_causal_lm = derived(_CausalLM, causal_lm, config_class=new_config, body_class=new_body)
    return Family(new_config, new_body, new_causal_lm)


FAMILIES: dict[str, Family] = {
    config.model_type: _family(config, body, causal_lm)
    for config, body, causal_lm in (
        (LlamaConfig, LlamaModel, LlamaForCausalLM),
        (MistralConfig, MistralModel, MistralForCausalLM),
        (Qwen2Config, Qwen2Model, Qwen2ForCausalLM),
        (Qwen3Config, Qwen3Model, Qwen3ForCausalLM),
        (CoLAConfig, CoLAModel, CoLAForCausalLM),
    )
}
"""The converted classes by their teacher's `model_type`: `FAMILIES["llama"].causal_lm`."""

for _made in FAMILIES.values():
    globals().update({made.__name__: made for made in _made})  # where pickle looks for them
    AutoConfig.register(_made.config.model_type, _made.config, exist_ok=True)
    AutoModel.register(_made.config, _made.body, exist_ok=True)
    AutoModelForCausalLM.register(_made.config, _made.causal_lm, exist_ok=True)
