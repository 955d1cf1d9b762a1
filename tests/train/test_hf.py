"""Hugging Face in and out: equal logits, names, saving, generation, and what is refused."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from helpers import forked
from helpers.models import LLAMA3 as HF_LLAMA3
from helpers.models import error, scrambled, tokens
from helpers.runs import build, make_run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    pipeline,
)

from lowline.cola.hf import CoLAConfig, CoLAForCausalLM
from lowline.linearize.source import hf_shapes
from lowline.train.config.run import (
    ColaConfig,
    ModelConfig,
    RopeScaling,
    RunConfig,
)
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.hf import config as hf_config
from lowline.train.hf import weights as train_hf
from lowline.train.model import names as hf_names

SEQ_LEN = 32
ALL = {"q": 8, "k": 6, "v": 7, "o": 8, "gate": 12, "up": 9, "down": 10}
SHAPE = dict(dim=32, n_layers=2, n_heads=4, ffn_dim=48, vocab_size=97)
LLAMA3 = RopeScaling(kind="llama3", factor=4.0, original_max_seq_len=16)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=16)

TRAINING_MODELS = {
    "llama": ({}, {}),
    "llama, GQA, tied": ({"n_kv_heads": 2, "tie_embeddings": True}, {}),
    "llama 3.1": ({"n_kv_heads": 2, "rope_theta": 500000.0, "rope_scaling": LLAMA3}, {}),
    "yarn": ({"rope_scaling": YARN}, {}),
    "head_dim": ({"n_heads": 5, "head_dim": 10}, {}),
    "qk_norm": ({"n_kv_heads": 2, "head_dim": 16, "qk_norm": True}, {}),
    "biases": ({"n_kv_heads": 2, "qkv_bias": True}, {}),
    "biases, head_dim, tied": ({"head_dim": 10, "qkv_bias": True, "tie_embeddings": True}, {}),
    "cola": ({}, {"rank": 8}),
    "cola, no outer SiLU": ({"mlp_activation": "identity"}, {"rank": 0.25}),
    "cola, GQA": ({"n_kv_heads": 2}, {"rank": ALL}),
    "cola, dense mix": ({"n_kv_heads": 1}, {"rank": {"q": 8, "down": 16}}),
    "cola, tied": ({"tie_embeddings": True, "mlp_activation": "identity"}, {"rank": 8}),
    "cola, grouped CoLA-M": ({}, {"rank": 8, "memory": "cola-m", "grouped": True}),
    "cola, relu, bias": ({"norm_eps": 1e-3}, {"rank": 8, "activation": "relu", "bias": True}),
    "cola, qk_norm": (
        {"n_kv_heads": 2, "head_dim": 10, "qk_norm": True, "rope_scaling": LLAMA3},
        {"rank": 8, "activation": "gelu"},
    ),
}
HF_SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
HF_MODELS = {
    "llama": LlamaConfig(**HF_SHAPE),
    "llama, tied, head_dim": LlamaConfig(**HF_SHAPE, tie_word_embeddings=True, head_dim=16),
    "llama 3.1": LlamaConfig(**HF_SHAPE, rope_parameters=HF_LLAMA3 | {"rope_theta": 500000.0}),
    "mistral": MistralConfig(**HF_SHAPE, sliding_window=None),
    "mistral, wide window": MistralConfig(**HF_SHAPE, sliding_window=48),
    "qwen2": Qwen2Config(**HF_SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**HF_SHAPE, head_dim=16),
    "cola": CoLAConfig(**HF_SHAPE, ranks=ALL, hidden_act="linear"),
    "cola, dense mix": CoLAConfig(
        **HF_SHAPE, ranks={"up": 9}, qk_norm=True, bottleneck_bias=True, head_dim=10
    ),
}


def run_of(model: ModelConfig, cola: ColaConfig) -> RunConfig:
    return make_run(model=model, cola=cola, training=dict(seq_len=SEQ_LEN))


def training_body(model: ModelConfig, cola: ColaConfig) -> torch.nn.Module:
    return scrambled(build(run_of(model, cola)))


@torch.no_grad()
def relative_error(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    ids = tokens(length=SEQ_LEN)
    return error(ours(ids), theirs(ids).logits)


@pytest.fixture(scope="module")
def cola_model() -> CoLAForCausalLM:
    config = CoLAConfig(**HF_SHAPE | {"vocab_size": 4096}, ranks=ALL, hidden_act="linear")
    return scrambled(CoLAForCausalLM(config))


# ---------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("name", TRAINING_MODELS)
def test_trained_model_has_equal_logits_in_transformers(name):
    shape, low_rank = TRAINING_MODELS[name]
    model, cola = ModelConfig(**SHAPE | shape), ColaConfig(**low_rank)
    body = training_body(model, cola)
    config = hf_config.config_to_hf(model, cola, max_seq_len=64)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    weights = hf_names.to_hf_names(body.state_dict(), tied=model.tie_embeddings)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert missing == (["lm_head.weight"] if model.tie_embeddings else []) and not unexpected
    assert relative_error(body, theirs) <= 1e-5
    back = run_of(*hf_config.config_from_hf(config))
    assert back.ranks() == run_of(model, cola).ranks()
    assert back.model.projection_shapes() == model.projection_shapes()


@pytest.mark.parametrize("name", HF_MODELS)
def test_hugging_face_model_has_equal_logits_in_training(name, tmp_path):
    theirs = scrambled(AutoModelForCausalLM.from_config(HF_MODELS[name]))
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    model, cola = hf_config.config_from_hf(tmp_path)
    body = build(run_of(model, cola))
    body.load_state_dict(train_hf.load_hf_state_dict(tmp_path), strict=True)
    assert relative_error(body, theirs) <= 1e-5


def test_rope_scaling_is_felt_at_this_length():
    plain = training_body(ModelConfig(**SHAPE), ColaConfig())
    ids = tokens(length=SEQ_LEN)
    for scaling in (LLAMA3, YARN):
        scaled = training_body(ModelConfig(**SHAPE, rope_scaling=scaling), ColaConfig())
        assert (plain(ids) - scaled(ids)).abs().max() > 1e-2


@pytest.mark.parametrize("name", HF_MODELS)
def test_config_goes_there_and_back(name):
    model, cola = hf_config.config_from_hf(HF_MODELS[name])
    back = hf_config.config_from_hf(hf_config.config_to_hf(model, cola, max_seq_len=1))
    assert back == (model, cola)


def test_dense_models_need_no_lowline():
    def model_type(**shape):
        model = ModelConfig(**SHAPE | shape)
        return hf_config.config_to_hf(model, ColaConfig(), max_seq_len=64).model_type

    assert model_type() == "llama"
    assert model_type(qk_norm=True, head_dim=16) == "qwen3"
    assert model_type(qkv_bias=True) == "qwen2"
    assert model_type(n_heads=5, head_dim=10) == "mistral"


def test_sliding_window_bounds_the_context():
    narrow = MistralConfig(**HF_SHAPE, sliding_window=48)
    assert hf_config.config_from_hf(narrow)[0].max_seq_len == 48
    assert hf_config.config_from_hf(HF_MODELS["mistral"])[0].max_seq_len == 64


def test_every_name_goes_there_and_back():
    for config in HF_MODELS.values():
        for name in hf_shapes(config):
            assert hf_names.to_hf_name(hf_names.from_hf_name(name)) == name
    for name in ("layers.0.attention.wqkv.weight", "rope.cache", "layers.x.ffn_norm.weight"):
        with pytest.raises(ValueError, match=name):
            hf_names.to_hf_name(name)
    with pytest.raises(ValueError, match="mlp.experts"):
        hf_names.from_hf_name("model.layers.0.mlp.experts.0.weight")


# ------------------------------------------------------------------------ the transformers model


def test_saved_model_gives_the_same_logits_bit_for_bit_in_a_new_process(cola_model, tmp_path):
    cola_model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    program = (
        "import sys, torch, lowline\n"
        "from transformers import AutoModel, AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "base = AutoModel.from_pretrained(sys.argv[1])\n"
        "ids = torch.load(sys.argv[2], weights_only=True)\n"
        "with torch.no_grad():\n"
        "    logits, hidden = model(ids).logits, base(ids).last_hidden_state\n"
        "torch.save((logits, hidden, type(model).__name__), sys.argv[3])\n"
    )
    ids, out = tokens(length=SEQ_LEN, vocab=4096), tmp_path / "out.pt"
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [str(tmp_path / "model"), str(tmp_path / "ids.pt"), str(out)]
    forked.run(["-c", program, *arguments]).check_returncode()
    logits, hidden, kind = torch.load(out, weights_only=True)
    with torch.no_grad():
        assert torch.equal(logits, cola_model(ids).logits)
        assert torch.equal(hidden, cola_model.model(ids).last_hidden_state)
    assert kind == "CoLAForCausalLM"


@pytest.mark.parametrize(
    "first", ["transformers", pytest.param("lowline.cola.hf", marks=pytest.mark.slow)]
)
def test_importing_lowline_is_light_and_registers_whatever_comes_first(first):
    program = (
        "import sys, lowline\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        f"import {first}, transformers\n"
        "small = dict(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=0)\n"
        "config = transformers.AutoConfig.for_model('cola_llama', **small)\n"
        "model = transformers.AutoModelForCausalLM.from_config(config)\n"
        "assert type(model).__name__ == 'CoLAForCausalLM'\n"
        "assert not any('lowline' in type(f).__module__ for f in sys.meta_path)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


def test_loads_in_another_dtype(cola_model, tmp_path):
    cola_model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.lm_head.weight, cola_model.lm_head.weight.bfloat16())


def test_greedy_generation_is_the_argmax_of_full_forwards(cola_model):
    ids = expected = tokens(rows=1, length=7, vocab=4096)
    with torch.no_grad():
        for _ in range(12):
            following = cola_model(expected, use_cache=False).logits[:, -1].argmax(-1)
            expected = torch.cat([expected, following[:, None]], dim=-1)
    for use_cache in (True, False):
        assert torch.equal(generate(cola_model, ids, use_cache=use_cache), expected)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "top_p": 0.9}])
def test_beams_and_samples_do_not_depend_on_the_cache(cola_model, how):
    ids, results = tokens(rows=2, length=7, vocab=4096), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(generate(cola_model, ids, use_cache=use_cache, **how))
    assert torch.equal(*results)
    greedy = generate(cola_model, ids)
    assert not torch.equal(results[0], greedy)


def test_left_padded_batch_generates_as_its_rows_alone(cola_model):
    rows = [tokens(1, length, vocab=4096)[0] for length in (5, 9, 3)]
    ids = torch.stack([torch.cat([torch.zeros(9 - len(r), dtype=torch.long), r]) for r in rows])
    mask = torch.stack([(torch.arange(9) >= 9 - len(r)).long() for r in rows])
    together = generate(cola_model, ids, attention_mask=mask)
    for row, out in zip(rows, together, strict=True):
        assert torch.equal(generate(cola_model, row[None])[0, len(row) :], out[9:])


def generate(model, ids, **how):
    how = {"do_sample": False, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12} | how
    return model.generate(ids, **how, eos_token_id=None, pad_token_id=0)


def test_pipeline(cola_model, tmp_path):
    tokenizer = load_tokenizer("embedded").hf
    cola_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt, how = "A list is", {"max_new_tokens": 8, "do_sample": False}
    (answer,) = pipeline("text-generation", model=str(tmp_path))(prompt, **how)
    inputs = tokenizer(prompt, return_tensors="pt")
    expected = tokenizer.decode(cola_model.generate(**inputs, **how)[0], skip_special_tokens=True)
    assert answer["generated_text"] == expected and expected.startswith(prompt)


def test_gradient_checkpointing_changes_no_gradient(cola_model):
    ids = tokens(length=SEQ_LEN, vocab=4096)
    cola_model.train()

    def gradients():
        cola_model.zero_grad()
        cola_model(ids, labels=ids, use_cache=False).loss.backward()
        return [weight.grad.clone() for weight in cola_model.parameters()]

    plain = gradients()
    cola_model.gradient_checkpointing_enable()
    recomputed = gradients()
    cola_model.gradient_checkpointing_disable()
    cola_model.eval()
    assert all(g.abs().max() > 0 for g in plain)
    assert all(map(torch.equal, plain, recomputed))


@pytest.mark.parametrize("name", ["cola", "cola, dense mix"])
def test_hidden_states_and_attentions_come_out(name):
    model = AutoModel.from_config(HF_MODELS[name], attn_implementation="eager").eval()
    out = model(tokens(length=SEQ_LEN), output_hidden_states=True, output_attentions=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, SEQ_LEN, 32)] * 3
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, SEQ_LEN, SEQ_LEN)] * 2


def test_initialization_is_the_published_one():
    torch.manual_seed(0)
    shape = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=1, vocab_size=512)
    ranks = dict.fromkeys(ALL, 64) | {"v": 0}
    model = CoLAForCausalLM(CoLAConfig(**shape, num_attention_heads=4, ranks=ranks))
    layer = model.model.layers[0]
    for low_rank, n_in, n_out in (
        (layer.self_attn.q_proj, 256, 256),
        (layer.mlp.gate_proj, 256, 688),
        (layer.mlp.down_proj, 688, 256),
    ):
        published = 64**-0.25 * (n_in + n_out) ** -0.25
        for factor in (low_rank.A, low_rank.B):
            assert factor.weight.std().item() == pytest.approx(published, rel=0.02)
            assert abs(factor.weight.mean().item()) < published / 50
    for weight in (model.model.embed_tokens, layer.self_attn.v_proj, model.lm_head):
        assert weight.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"ranks": {"query": 8}}, "query.*allowed are"),
        ({"ranks": {"q": -1}}, "'q': -1"),
        ({"bottleneck_activation": "tanh"}, "tanh.*identity"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4"),
    ],
)
def test_impossible_configurations_are_refused(wrong, words):
    with pytest.raises(Exception, match=words):
        CoLAConfig(**HF_SHAPE | wrong)


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "config, words",
    [
        (LlamaConfig(**HF_SHAPE, attention_bias=True), "attention_bias = True"),
        (LlamaConfig(**HF_SHAPE, mlp_bias=True), "mlp_bias = True"),
        (LlamaConfig(**HF_SHAPE, attention_dropout=0.1), "attention_dropout = 0.1"),
        (LlamaConfig(**HF_SHAPE, hidden_act="gelu"), "hidden_act = 'gelu'.*silu"),
        (
            LlamaConfig(**HF_SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0}),
            "rope_type = 'linear'.*llama3",
        ),
        (
            LlamaConfig(
                **HF_SHAPE,
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            ),
            "attention_factor = None.*1.0",
        ),
        (
            Qwen3Config(**HF_SHAPE, use_sliding_window=True, max_window_layers=1),
            "layer_types = .*sliding_attention",
        ),
        (Qwen3Config(**HF_SHAPE, attention_bias=True), "attention_bias = True"),
        (
            LlamaConfig(**HF_SHAPE, quantization_config={"quant_method": "gptq", "bits": 4}),
            "quantization_config = 'gptq'",
        ),
    ],
    ids=lambda value: value.model_type if not isinstance(value, str) else "",
)
def test_models_that_do_not_train_here_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        hf_config.config_from_hf(config)


def test_other_architectures_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type = 'gpt2'.*mistral, qwen2, qwen3, cola_llama"):
        hf_config.config_from_hf(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such file or directory"):
        hf_config.config_from_hf(tmp_path / "nowhere")


def test_weights_that_do_not_fit_are_named_with_both_shapes(tmp_path):
    AutoModelForCausalLM.from_config(HF_MODELS["cola"]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    q_A = "model.layers.1.self_attn.q_proj.A.weight"

    def refused(changed, words):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words):
            train_hf.load_hf_state_dict(tmp_path)

    refused({k: v for k, v in weights.items() if k != q_A}, rf"{q_A} is missing, .*\(8, 32\)")
    refused(weights | {q_A: torch.zeros(5, 32)}, rf"{q_A} is \(5, 32\), expected \(8, 32\)")
    refused(weights | {"stray": torch.zeros(3)}, r"stray \(3,\) is unexpected")
    refused({q_A: weights[q_A].clone()}, r"; and \d+ more")
    save_file(
        weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)},
        file,
        metadata={"format": "pt"},
    )
    assert train_hf.load_hf_state_dict(tmp_path).keys() == {
        hf_names.from_hf_name(name) for name in weights
    }


def test_only_safetensors_beside_the_index_are_read(tmp_path):
    HF_MODELS["llama"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file.*save_pretrained"):
        train_hf.load_hf_state_dict(tmp_path)
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not the name of a file beside it"):
        train_hf.load_hf_state_dict(tmp_path)


def test_another_model_than_the_runs_is_refused_key_by_key(tmp_path):
    AutoModelForCausalLM.from_config(HF_MODELS["cola"]).save_pretrained(tmp_path)
    model, cola = hf_config.config_from_hf(tmp_path)
    elsewhere = dataclasses.replace(model, max_seq_len=17, attention="sdpa")
    train_hf.check_same_model(tmp_path, elsewhere, dataclasses.replace(cola, memory="cola-m"))
    with pytest.raises(ValueError, match=r"model.ffn_dim = 64 \(run\), 48 \(checkpoint\)"):
        train_hf.check_same_model(tmp_path, dataclasses.replace(model, ffn_dim=64), cola)
    with pytest.raises(ValueError, match="cola.rank = .*cola.activation"):
        train_hf.check_same_model(tmp_path, model, ColaConfig())
    save_file({"stray": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model.embed_tokens.weight is missing, expected \(97, 32\)"
    ):
        train_hf.check_same_model(tmp_path, model, cola)
