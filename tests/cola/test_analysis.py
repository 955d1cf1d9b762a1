"""Effective rank: the definition, and that a model is watched where it claims to be."""

import json
import os
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from helpers import forked, runs
from helpers.processes import FOR_HELPERS
from helpers.runs import make_run
from transformers import GPT2Config, GPT2LMHeadModel

from lowline.cola.analysis import ActivationRanks, effective_rank, projections
from lowline.train.hf.config import config_to_hf
from lowline.train.hf.weights import to_hf_names

RANK, LAYERS = 24, 2
HERE = Path(__file__).parent
LEAVES = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")


def run_config(rank=RANK, **cola):
    return make_run(
        model=dict(dim=64, n_layers=LAYERS, n_kv_heads=2, ffn_dim=96, vocab_size=128),
        training=dict(seq_len=32, global_batch_size=4),
        cola=dict(rank=rank, **cola),
    )


def build(rank=RANK, **cola):
    return runs.build(run_config(rank, **cola))


@pytest.fixture
def tokens_BL():
    return torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(1))


def measured(model, tokens, which="bottleneck", **options):
    with torch.no_grad(), ActivationRanks(model, which, **options) as seen:
        model(tokens)
    return seen.ranks()


# -------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("alpha", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("shape", [(200, 30), (20, 30)])
def test_effective_rank_is_that_of_the_singular_values(shape, alpha):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * torch.arange(1, 31) ** -1.5
    energy = torch.linalg.svdvals(x.double()) ** 2
    expected = next(k for k in range(1, 31) if energy[:k].sum() / energy.sum() >= alpha)
    assert effective_rank(x.double().T @ x.double(), alpha) == expected


def test_energy_is_the_square_of_the_singular_value():
    # σ = 3, 1, 1: σ₁ holds 9/11 = 0.818 of the energy, but only 3/5 of the plain sum.
    gram = torch.diag(torch.tensor([9.0, 1.0, 1.0]))
    assert effective_rank(gram, 0.8) == 1
    assert effective_rank(gram, 0.82) == 2
    assert effective_rank(gram, 0.95) == 3


def test_effective_rank_reaches_alpha_and_not_more():
    gram = torch.diag(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64))
    assert effective_rank(gram, 0.75) == 2
    assert effective_rank(gram, 0.75 + 1e-9) == 3


def test_effective_rank_of_nothing_and_of_any_scale():
    gram = torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.1], dtype=torch.float64))
    assert effective_rank(torch.zeros(4, 4)) == 0
    assert effective_rank(gram * 1e-200) == effective_rank(gram * 1e200) == effective_rank(gram)


@pytest.mark.parametrize(
    ("gram", "alpha", "message"),
    [
        (torch.eye(3), 1.0, r"alpha = 1\.0"),
        (torch.eye(3), 0.0, r"alpha = 0\.0"),
        (torch.ones(3, 4), 0.9, r"\(3, 4\)"),
        (torch.full((2, 2), float("nan")), 0.9, "inf or nan"),
    ],
)
def test_effective_rank_refuses(gram, alpha, message):
    with pytest.raises(ValueError, match=message):
        effective_rank(gram, alpha)


# ------------------------------------------------------------------------------- what is watched


def test_every_bottleneck_of_the_training_body_is_watched(tokens_BL):
    model = build()
    ranks = measured(model, tokens_BL)
    where = [f"attention.qkv_linear.{n}" for n in LEAVES[:3]] + ["attention.wo"]
    where += [f"feed_forward.{n}" for n in LEAVES[4:]]
    assert set(ranks) == {f"layers.{i}.{name}" for i in range(LAYERS) for name in where}
    # Against z taken from A itself, through an SVD of all tokens.
    z = {}
    for name, module in projections(model).items():
        module.A.register_forward_hook(lambda _, args, out, name=name: z.update({name: out}))
    with torch.no_grad():
        model(tokens_BL)
    for name, rank in ranks.items():
        energy = torch.linalg.svdvals(z[name].flatten(0, 1).double()) ** 2
        share = energy.cumsum(0) / energy.sum()
        assert share[rank - 1] >= 0.95 and (rank == 1 or share[rank - 2] < 0.95)
        assert 1 < rank <= RANK


def test_a_collapsed_bottleneck_is_seen(tokens_BL):
    model = build()
    A = projections(model)["layers.1.feed_forward.w3"].A
    with torch.no_grad():
        A.weight.copy_(torch.randn(RANK, 2) @ torch.randn(2, A.in_features))
    ranks = measured(model, tokens_BL)
    assert ranks["layers.1.feed_forward.w3"] <= 2 < ranks["layers.1.feed_forward.w1"]


def test_memory_policy_and_grouping_change_nothing(tokens_BL):
    plain = measured(build(), tokens_BL)
    assert measured(build(memory="cola-m"), tokens_BL) == plain
    assert measured(build(grouped=True), tokens_BL) == plain
    assert measured(build(grouped=True, memory="cola-m"), tokens_BL) == plain


def test_recomputation_in_a_backward_pass_changes_nothing(tokens_BL):
    model = build(memory="cola-m")
    with ActivationRanks(model) as seen:
        model(tokens_BL).sum().backward()
    assert seen.ranks() == measured(model, tokens_BL)


def test_hugging_face_body_gives_the_same_ranks(tokens_BL):
    from transformers import AutoModelForCausalLM

    import lowline.cola.hf  # noqa: F401  (registers cola_llama)

    run, model = run_config(), build()
    body = AutoModelForCausalLM.from_config(config_to_hf(run.model, run.cola, max_seq_len=32))
    body.load_state_dict(to_hf_names(model.state_dict(), tied=False))
    for which in ("bottleneck", "output"):
        ours, theirs = measured(model, tokens_BL, which), measured(body, tokens_BL, which)
        assert theirs["model.layers.1.mlp.down_proj"] == ours["layers.1.feed_forward.w2"]
        assert len(theirs) == 7 * LAYERS and sorted(theirs.values()) == sorted(ours.values())
    assert measured(body, tokens_BL, "input")["model.layers.0.self_attn.q_proj"] <= 64


def test_dense_outputs_and_inputs(tokens_BL):
    model = build(rank=0)
    with torch.no_grad(), ActivationRanks(model, "output") as out:
        model(tokens_BL)
    with torch.no_grad(), ActivationRanks(model, "input") as into:
        model(tokens_BL)
    assert out.widths()["layers.0.feed_forward.w1"] == 96
    assert into.widths()["layers.0.feed_forward.w1"] == 64
    assert out.widths()["layers.0.feed_forward.w2"] == 64
    ranks = into.ranks()
    assert ranks["layers.0.feed_forward.w1"] == ranks["layers.0.feed_forward.w3"]
    assert all(0 < r <= out.widths()[n] for n, r in out.ranks().items())
    assert len(ranks) == 7 * LAYERS
    assert not any("lm_head" in name or "embed" in name for name in ranks)


def test_batches_add_up(tokens_BL):
    model = build()
    with torch.no_grad(), ActivationRanks(model) as seen:
        for row in tokens_BL:
            model(row[None])
    assert seen.ranks() == measured(model, tokens_BL)


def test_bfloat16_is_measured_in_float64(tokens_BL):
    model = build().bfloat16()
    with torch.no_grad(), ActivationRanks(model) as seen:
        model(tokens_BL)
    assert {gram.dtype for gram in seen.grams.values()} == {torch.float64}
    exact = measured(build(), tokens_BL)
    assert all(abs(rank - exact[name]) <= 1 for name, rank in seen.ranks().items())


def test_only_the_named_are_watched(tokens_BL):
    name = "layers.1.attention.wo"
    assert measured(build(), tokens_BL, names=[name]) == {name: measured(build(), tokens_BL)[name]}


def test_nothing_is_left_behind(tokens_BL):
    model = build()
    before = model(tokens_BL)
    for which in ("bottleneck", "input", "output"):
        with pytest.raises(RuntimeError, match="stop"), ActivationRanks(model, which) as seen:
            raise RuntimeError("stop")
        model(tokens_BL)
        assert not seen.grams
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "expand" not in vars(module)
    assert torch.equal(model(tokens_BL), before)


def test_compiled_blocks_are_measured_eagerly(tokens_BL):
    expected = measured(build(), tokens_BL)
    model, compilations = build(), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    for block in model.layers.values():
        block.compile(backend=backend)
    with torch.no_grad():
        model(tokens_BL)
        count = len(compilations)
        assert count > 0
        with ActivationRanks(model) as seen:
            model(tokens_BL)
        model(tokens_BL)
    assert seen.ranks() == expected
    assert len(compilations) == count  # neither traced while watched nor compiled anew after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "weights"}, "choose from bottleneck, input, output"),
        ({"names": ["layers.9.attention.wo"]}, "no projection 'layers.9.attention.wo'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        ActivationRanks(build(), **options)


def test_a_dense_model_has_no_bottleneck():
    with pytest.raises(ValueError, match='dense ones "input" and "output"'):
        ActivationRanks(build(rank=0))
    with pytest.raises(ValueError, match="nothing to watch"):
        ActivationRanks(nn.Linear(2, 2), "output")
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)
    with pytest.raises(ValueError, match="nothing to watch"):
        ActivationRanks(GPT2LMHeadModel(config), "output")  # its layers have Conv1D


def test_what_did_not_run_is_reported(tokens_BL):
    model = build(grouped=True)
    with ActivationRanks(model) as seen:
        pass
    with pytest.raises(ValueError, match="never appeared"):
        seen.ranks()
    with pytest.raises(ValueError, match="cola.grouped"):
        measured(model, tokens_BL, "input")  # q, k, v, gate, up run as grouped GEMMs


# ------------------------------------------------------------------------------- several processes

TWO_PROCESSES = """
    import torch, torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from lowline.cola.analysis import ActivationRanks, _whole_rows
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.trainer import Trainer
    from helpers.ranks import fork_ranks
    from lowline.train.model.build import build_model_config
    from lowline.train.model.parallelize import parallelize
    from test_analysis import build, measured, run_config

    def main():
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        mesh = init_device_mesh("cpu", (2,))
        tokens = torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(1))
        expected = measured(build(), tokens)

        # Each process sees half of the tokens; their sums make the whole.
        model = build()
        with torch.no_grad(), ActivationRanks(model) as seen:
            model(tokens[2 * rank : 2 * rank + 2])
        assert seen.ranks(group=mesh.get_group()) == expected
        assert seen.ranks(group=mesh.get_group()) == expected  # asking again does not add again
        assert seen.ranks() != expected

        # An activation split by tokens stays local, one split by features is made whole.
        x = torch.arange(32.0).view(2, 4, 4)
        assert torch.equal(_whole_rows(distribute_tensor(x, mesh, [Shard(1)])), x.chunk(2, 1)[rank])
        assert torch.equal(_whole_rows(distribute_tensor(x, mesh, [Shard(2)])), x)
        assert torch.equal(_whole_rows(distribute_tensor(x, mesh, [Replicate()])), x)
        assert torch.equal(_whole_rows(DTensor.from_local(x, mesh, [Partial()])), 2 * x)

        # Tensor parallelism: o's and down's bottlenecks are split by tokens, the others are whole.
        parallelism = ParallelismConfig(tensor_parallel_degree=2, spmd_backend="partial_dtensor")
        training = TrainingConfig(seq_len=32, mixed_precision_param="float32")
        set_spmd_backend("partial_dtensor")
        config = build_model_config(run_config())
        config.update_from_config(config=Trainer.Config(parallelism=parallelism, training=training))
        split = config.build()
        parallelize(
            split, parallel_dims=ParallelDims.from_config(parallelism, 2), training=training,
            parallelism=parallelism, compile_config=CompileConfig(), ac_config=None, dump_folder="",
        )
        torch.manual_seed(0)
        with torch.no_grad():
            split.init_states()
        with torch.no_grad(), ActivationRanks(split) as seen:
            split(tokens)
        found = seen.ranks(group=mesh.get_group())
        assert all(abs(found[name] - expected[name]) <= 1 for name in expected), (found, expected)
        print("ok", rank, flush=True)
        dist.destroy_process_group()

    fork_ranks(main, processes=2)
"""


def test_two_processes(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent)))}
    result = forked.run([str(script)], env=FOR_HELPERS | paths)
    assert result.returncode == 0, result.stderr[-9000:]
    assert result.stdout.count("ok") == 2


# ------------------------------------------------------------------------------- lowline inspect


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny CoLA model and the embedded tokenizer as a Hugging Face directory."""
    from transformers import AutoModelForCausalLM

    import lowline.cola.hf  # noqa: F401  (registers cola_llama)
    from lowline.train.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("exported")
    tokenizer = load_tokenizer("embedded")
    run = run_config()
    config = config_to_hf(run.model, run.cola, max_seq_len=64)
    config.vocab_size = len(tokenizer.hf)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.hf.save_pretrained(folder)
    return str(folder)


def test_inspect_rank(exported, tmp_path, capsys, monkeypatch):
    from lowline.tools.commands import inspect_rank as command

    text = tmp_path / "text.txt"
    text.write_text("A list is a sequence of objects, a tuple cannot change. " * 40)
    options = dict(text=text, tokens=300, seq_len=64)
    report, plot = tmp_path / "out" / "rank.json", tmp_path / "rank.png"
    ranks = command.inspect_rank(exported, **options, json=report, plot=plot)
    assert [(r.layer, r.projection, r.width) for r in ranks[:7]] == [
        (0, "q_proj", 64), (0, "k_proj", 32), (0, "v_proj", 32), (0, "o_proj", 64),
        (0, "gate_proj", 96), (0, "up_proj", 96), (0, "down_proj", 64),
    ]  # fmt: skip
    assert all(0 < r.rank <= RANK for r in ranks)  # B has r columns
    saved = json.loads(report.read_text())
    assert saved["tokens"] == 300 and saved["alpha"] == 0.95 and saved["which"] == "output"
    assert saved["projections"][0] == vars(ranks[0])
    assert plot.read_bytes().startswith(b"\x89PNG") and len(plot.read_bytes()) > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "rank.png", "text.txt"]
    printed, errors = capsys.readouterr()
    assert "Loading weights" not in errors
    assert max(map(len, printed.splitlines()[:7])) <= 80 and "│" not in printed
    first = ranks[0]
    assert f" {first.rank} {first.rank / 64:.0%} " in printed
    assert "gate_proj" in printed and "until about --tokens 384" in printed
    # In several passes over the text, for want of memory: the same.
    monkeypatch.setattr(command, "GRAM_BYTES", 8 * 64**2)
    assert command.inspect_rank(exported, **options) == ranks
    into = command.inspect_rank(exported, **options, which="input")
    assert [r.width for r in into[:7]] == [64] * 6 + [96]
    assert len({r.rank for r in into[:3]}) == 1  # q, k and v read one input
    z = command.inspect_rank(exported, **options, which="bottleneck", alpha=0.5)
    assert {r.width for r in z} == {RANK} and all(r.rank < RANK for r in z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens = 0"),
        ({"seq_len": 0}, "seq_len = 0"),
        ({"alpha": 1.5}, r"alpha = 1\.5"),
        ({"plot": Path("rank.gif")}, r"rank\.gif"),
        ({"text": Path("no-such-text")}, "no-such-text"),
        ({"tokens": 10**6, "text": Path(__file__)}, "the text has .* tokens; give more text"),
    ],
)
def test_inspect_rank_refuses(exported, options, message):
    from lowline.tools.commands.inspect_rank import inspect_rank

    with pytest.raises(ValueError, match=message):
        inspect_rank(exported, **options)


def test_inspect_rank_without_a_model(tmp_path):
    from lowline.tools.commands.inspect_rank import inspect_rank

    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ValueError, match="lowline export"):
        inspect_rank(str(tmp_path))
