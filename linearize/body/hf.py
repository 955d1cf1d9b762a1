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

from dataclasses import asdict, dataclass, field, fields
from functools import partial
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
    DynamicCache,
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
from transformers.cache_utils import DynamicLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import merge_with_config_defaults

from lowline.cola.drafts import ExactDrafts
from lowline.cola.hf import CoLAConfig, CoLAForCausalLM, CoLAModel
from lowline.cola.one_token import one_token
from lowline.cola.remote_code import SavesRemoteCode
from lowline.errors import LowlineError
from lowline.linearize.body.attention import LinearizedAttention, attend_token
from lowline.linearize.body.cache import LAYER_TYPE, LinearizedCache, MixerLayer
from lowline.linearize.body.packing import plan_packing
from lowline.linearize.body.reach import Reach, known_positions, placed, within
from lowline.linearize.mixers import MIXERS, build_mixer
from lowline.linearize.mixers.base import HeadShape, Mixer
from lowline.linearize.mixers.options import MixerOptions

FULL, SLIDING = "full_attention", "sliding_attention"  # transformers' names of layer types
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
        softmax_layer_types: for each layer, the type that the architecture gives its softmax
            attention: "full_attention" or "sliding_attention". None, as in directories of older
            versions: that of `layer_types`, or what the architecture's own fields say.
        layer_types: for each layer, what transformers' caches hold for it: `softmax_layer_types`,
            but `lowline.linearize.body.cache.LAYER_TYPE` where a mixer is. It is always derived.

    Raises:
        ValueError: another number of layers, an unknown mixer or option.
    """

    mixers: list[dict[str, Any]] = field(default_factory=list)
    teacher: str | None = None
    softmax_layer_types: list[str] | None = None
    layer_types: list[str] | None = None

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
        if self.softmax_layer_types is None:
            kind = FULL if getattr(self, "sliding_window", None) is None else SLIDING
            self.softmax_layer_types = self.layer_types or [kind] * self.num_hidden_layers
        types = self.softmax_layer_types
        if len(types) != self.num_hidden_layers or not {FULL, SLIDING}.issuperset(types):
            raise LowlineError(
                f"softmax_layer_types = {types}: give {FULL!r} or {SLIDING!r} for each of the "
                f"{self.num_hidden_layers} layers, or leave it out"
            )
        self.layer_types = list(types)
        for layer in self.converted_layers():
            self.layer_types[layer] = LAYER_TYPE

    def validate_layer_type(self) -> None:
        """Replace transformers' rule, which does not know the type of a layer with a mixer."""

    def _resolved(self, name: str, **options: Any) -> dict[str, Any]:
        """Return a mixer with all its options."""
        if name == SOFTMAX and not options:
            return {"name": SOFTMAX}
        with torch.device("meta"):  # finds every mistake at no cost
            build_mixer(name, options, self.head_shape(0))
        given = MIXERS[name][0](**options)
        if isinstance(given, MixerOptions):
            given.check_model(self.num_hidden_layers, self.head_shape(0).n_kv_heads)
        return {"name": name, **asdict(given)}

    def converted_layers(self) -> list[int]:
        """Return the layers that have a mixer."""
        return [layer for layer, m in enumerate(self.mixers) if m["name"] != SOFTMAX]

    @property
    def layers_block_type(self) -> list[str]:
        """The kind of each layer as vLLM asks for it."""
        return ["attention" if m["name"] == SOFTMAX else "mamba" for m in self.mixers]

    def softmax_window(self, layer: int) -> int | None:
        """Return the window of softmax attention in a layer, converted or not, or None."""
        assert self.softmax_layer_types is not None
        sliding = self.softmax_layer_types[layer] == SLIDING
        return getattr(self, "sliding_window", None) if sliding else None

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
        """Return a new mixer for a converted layer, with some of its options changed."""
        options = self.mixers[layer] | changes
        return build_mixer(options.pop("name"), options, self.head_shape(layer))


# -------------------------------------------------------------------------------------- models


class _Linearized(SavesRemoteCode):
    """What transformers must know of both models below: initial weights, and what they cannot do.

    Mixers begin as their constructors leave them, also where transformers builds on "meta".
    """

    config: LinearizedConfig
    _can_compile_fullgraph = False  # masks and documents decide in Python how tokens are packed
    _supports_attention_backend = False  # a backend that keeps keys and values would keep no states
    _supports_context_parallel = False

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


class _Body(_Linearized):
    """The decoder without a head: token ids [B, T] to hidden states [B, T, hidden_size]."""

    layers: nn.ModuleList
    rotary_emb: nn.Module
    masks_by_type: bool  # whether the architecture's forward pass looks masks up by layer type

    def __init__(self, config: LinearizedConfig) -> None:
        if str(config._attn_implementation).startswith("vllm"):
            raise LowlineError(
                "vLLM's Transformers backend keeps no states of mixers; serve this model with "
                "lowline's vLLM plugin: `lowline serve`, or model_impl='auto'"
            )
        super().__init__(config)
        for index in config.converted_layers():
            attention = self.layers[index].get_submodule("self_attn")
            mixed = LinearizedAttention(attention, config.build_mixer(index))
            self.layers[index].add_module("self_attn", mixed)
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
        all_tokens_real: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder; arguments are the architecture's.

        Args:
            all_tokens_real: whether it is known that no token of this call is padding, whatever
                came before. Otherwise an `attention_mask` is looked at, which waits for the device.
        """
        converted = self.config.converted_layers()
        if past_key_values is not None:
            if isinstance(past_key_values, LinearizedCache):
                past_key_values.attach(self)
            _check_cache(past_key_values, converted)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        reach = None if tokens is None else self.reach(seen + tokens.shape[1])
        if past_key_values is not None:
            x = one_token(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=placed(reach, position_ids, tokens, seen),
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                attend=partial(attend_token, reach=reach),
                layers=(DynamicLayer, MixerLayer),
                **kwargs,
            )
            if x is not None:
                return BaseModelOutputWithPast(x, past_key_values)
        packing = None
        if tokens is not None and converted:
            packing, position_ids = plan_packing(
                (tokens.shape[0], tokens.shape[1]),
                attention_mask,
                position_ids,
                kwargs.get("cu_seq_lens_q"),
                past_key_values,
                all_real=all_tokens_real,
            )
        documents = packing is not None and attention_mask is None
        if use_cache and past_key_values is None and not documents:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and packing is not None:
            for layer in converted:
                past_key_values.layers[layer].padded = True  # type: ignore[union-attr]
        return super().forward(
            input_ids=input_ids,
            attention_mask=self._masks(tokens, attention_mask, position_ids, past_key_values),
            position_ids=placed(reach, position_ids, tokens, seen),
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache and not documents,
            packing=packing,
            reach=reach,
            **kwargs,
        )

    def reach(self, length: int) -> Reach | None:
        """Return how positions are bounded in a text of so many tokens; None where they need not
        or cannot be.
        """
        known = known_positions(self.config)
        if known is None or length <= known:
            return None
        return Reach(known, self.rotary_emb.get_buffer("inv_freq"))

    def _masks(
        self,
        tokens: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> Any:
        """Return what the architecture takes as a mask: one, or one for each type of layer."""
        softmax = set(self.config.layer_types or ()) - {LAYER_TYPE}
        if not self.masks_by_type:
            # A mask of four dimensions is handed on as it is, and here no layer looks at it.
            return attention_mask if softmax else torch.empty(1, 1, 0, 0)
        makers = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
        masks = dict.fromkeys(self.config.layer_types or ())
        if tokens is not None:  # of which the shape, type and device matter here
            shaped = torch.empty(*tokens.shape[:2], 0, dtype=self.dtype, device=tokens.device)
            for kind in softmax:
                masks[kind] = makers[kind](
                    config=self.config,
                    inputs_embeds=shaped,
                    attention_mask=attention_mask,
                    past_key_values=cache,
                    position_ids=position_ids,
                )
        return masks


def _check_cache(cache: Cache, converted: list[int]) -> None:
    layers = cache.layers
    if any(n >= len(layers) or not isinstance(layers[n], MixerLayer) for n in converted):
        raise LowlineError(
            f"past_key_values is a {type(cache).__name__} without states for the layers that have "
            "mixers; give lowline.linearize.body.cache.LinearizedCache(model.config), "
            "DynamicCache(config=model.config), or None for a new one"
        )


class _CausalLM(ExactDrafts, _Linearized, GenerationMixin):  # type: ignore[misc]
    """The language model: token ids [B, T] to logits [B, T, vocab_size], and `generate`."""

    body_class: type[_Body]

    def __init__(self, config: LinearizedConfig) -> None:
        PreTrainedModel.__init__(self, config)  # not the architecture's, which builds its own body
        self.model = self.body_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Say that decoded tokens are no padding, so that nothing waits to look at their mask."""
        drafted = past_key_values is not None and past_key_values is self._drafted
        if drafted and self._seen and is_first_iteration:
            next_sequence_length = input_ids.shape[1] - self._seen
            is_first_iteration = False
        decodes = next_sequence_length == 1 and not is_first_iteration
        converted = self.config.converted_layers()
        known = decodes and past_key_values is not None and bool(converted)
        if known and not past_key_values.layers[converted[0]].padded:  # type: ignore[union-attr]
            attention_mask = None  # nor was any token of the prompt
        if drafted:
            wanted = input_ids.shape[1] > self._given if is_first_iteration else not decodes
            for layer in converted:  # without a draft there is nothing to take back
                past_key_values.layers[layer].record_past = wanted  # type: ignore[union-attr]
        theirs: Any = super()
        inputs = theirs.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return inputs | {"all_tokens_real": True} if known else inputs

    def _stop_recording(self, cache: Cache) -> None:
        super()._stop_recording(cache)
        reach = self.model.reach(cache.get_seq_length())
        with torch.no_grad():
            for layer in self.config.converted_layers():
                mixer = self.model.layers[layer].get_submodule("self_attn.mixer")
                cache.layers[layer].replay_kept(within(reach, mixer))  # type: ignore[union-attr]

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any) -> bool:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise LowlineError(
                f"cache_implementation = {generation_config.cache_implementation!r}; a linearized "
                "model has a cache of its own: leave it out"
            )
        theirs: Any = super()
        return theirs._prepare_cache_for_generation(generation_config, *args)


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
    by_type = "layer_types" in {f.name for f in fields(config)}
    new_body = derived(_Body, body, config_class=new_config, masks_by_type=by_type)
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
