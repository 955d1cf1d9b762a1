"""`lowline bench decode` on a tiny model: what it writes, and that cases do what they time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import forked
from helpers.models import architecture, scrambled
from transformers import AutoModelForCausalLM

from lowline.linearize.body.cache import LinearizedCache, state_bytes
from lowline.linearize.convert import convert, load_teacher, save
from lowline.linearize.evaluation.rows import rows_of
from lowline.tools.bench import decode as bench
from lowline.tools.bench.llama import as_q8_0
from lowline.tools.cli import main
from lowline.train.data.tokenizer import load_tokenizer

KEYS = 3 * 2 * 2 * 16 * 4  # bytes per token: layers, K and V, heads, features, float32
OPTIONS = {"window": 8, "sinks": 4, "backend": "torch"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    config = architecture("llama")
    tokenizer = load_tokenizer("embedded").hf
    config.vocab_size = len(tokenizer)
    save(scrambled(AutoModelForCausalLM.from_config(config)), tokenizer, folder / "original")
    model = convert(folder / "original", mixer="lolcats", options=OPTIONS)
    save(model, tokenizer, folder / "converted")
    return folder


def setup_of(folder: Path, new: int = 3) -> bench.Setup:
    rows = rows_of(str(folder / "converted"), teacher=None, dtype=torch.float32)
    return bench.Setup(
        model=rows[4].load(), teacher=rows[0].load(), teacher_config=rows[0].config, new=new,
        repeats=1, device="cpu", tell=lambda what: None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    done = forked.run(
        ["-m", "lowline.tools.cli", "bench", "decode",
         str(folder / "converted"), "--contexts", "64", "16", "40", "--batch", "2", "1",
         "--prompt", "24", "--new", "3", "--repeats", "2", "--max-gb", "0.00008",
         "--json", str(out / "decode.json"), "--plot", str(out / "decode.png")],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stderr
    return json.loads((out / "decode.json").read_text()), done.stdout, out / "decode.png"


def test_what_is_written(run, folder):
    report, printed, plot = run
    assert printed.endswith(f"numbers: {plot.with_suffix('.json')}\nplot: {plot}\n")
    assert list(report) == ["machine", "setup", "decode", "prefill"]
    assert list(report["decode"]) == ["1", "2"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    states = state_bytes(load_teacher(folder / "converted").config)
    for rows, entry in report["decode"].items():
        assert entry["short"] == 16 and list(entry["contexts"]) == ["16", "40", "64"]
        for context, found in entry["contexts"].items():
            keys = int(rows) * int(context) * KEYS
            fits = keys <= 0.00008e9
            held = {"converted": int(rows) * states} | ({"teacher": keys} if fits else {})
            assert found["bytes"] == held
            names = {"converted"} | ({"teacher", "teacher, static"} if fits else set())
            assert set(found["speedup"]) == names - {"converted"}
            assert set(found["seconds"]) == names | (
                set() if context == "16" else {"converted @ 16"}
            )
            for name, timing in found["seconds"].items():
                assert len(timing["walls"]) == 2 and 0 < timing["wall_min"] <= timing["wall"], name
            if fits:
                pairs = zip(
                    found["seconds"]["teacher"]["walls"], found["seconds"]["converted"]["walls"],
                    strict=True,
                )  # fmt: skip
                ratios = sorted(theirs / ours for theirs, ours in pairs)
                assert found["speedup"]["teacher"]["wall"] == pytest.approx(sum(ratios) / 2)
    assert "64" in report["decode"]["1"]["contexts"] and "-" in printed  # left out, and shown so
    prefill = report["prefill"]
    assert prefill["tokens"] == 24 and set(prefill["seconds"]) == {"teacher", "converted"}
    assert "prefill of 24 tokens" in printed


@torch.no_grad()
def test_contexts_are_read_and_do_not_share_memory(folder):
    setup = setup_of(folder)
    states = bench.read_contexts(setup, (16, 40))
    for context, cache in states.items():
        assert cache.get_seq_length() == context
        ids = bench.random_ids(setup, 40)[:, :context]
        expected = setup.model(ids, use_cache=True).past_key_values
        token = torch.ones(2, 1, dtype=torch.long)
        ours = setup.model(token, past_key_values=bench.state_of(cache, 2)).logits
        theirs = setup.model(token[:1], past_key_values=expected).logits
        torch.testing.assert_close(ours, theirs.expand_as(ours), rtol=1e-4, atol=1e-4)
        assert cache.get_seq_length() == context  # a copy was used


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_teachers_cache_holds_the_context_again_after_each_turn(folder, static):
    setup = setup_of(folder)
    cache = bench.random_keys(setup, 20, 2, static=static)
    assert int(cache.get_seq_length()) == 20
    keys = cache.layers[1].keys[:, :, :20].clone()
    seen: list[int] = []
    forward = setup.teacher.forward

    def counted(*args, past_key_values, **how):
        seen.append(int(past_key_values.get_seq_length()))
        return forward(*args, past_key_values=past_key_values, **how)

    setup.teacher.forward = counted  # type: ignore[method-assign]
    call = bench.decode_case(setup, cache, 2)
    call()
    call()
    assert seen == [20, 21, 22] * 2
    assert int(cache.get_seq_length()) == 20
    assert torch.equal(cache.layers[1].keys[:, :, :20], keys)


@torch.no_grad()
def test_static_and_growing_caches_say_the_same(folder):
    """So that the two are times of the same work."""
    setup = setup_of(folder)
    ids, said = bench.random_ids(setup, 12), []
    for static in (False, True):
        torch.manual_seed(0)
        cache = bench.random_keys(setup, 20, 1, static=static)
        said.append(setup.teacher(ids[:, :1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)


def test_the_converted_model_runs_on_its_state(folder):
    setup = setup_of(folder)
    cache = LinearizedCache(setup.model.config)
    bench.decode_case(setup, cache, 2)()
    assert cache.get_seq_length() == 3


def test_lookup_measures_what_generate_does(folder, tmp_path, capsys):
    (tmp_path / "twice.txt").write_text("one two three one two three one two")
    report = bench.bench_decode(
        str(folder / "converted"), part=("lookup",), prompts=(tmp_path / "twice.txt",),
        proposed=3, new=6, repeats=1,
    )  # fmt: skip
    found = report["lookup"]["prompts"]["twice"]
    assert list(report) == ["machine", "setup", "lookup"]
    assert found["same_tokens"] == 6 == round(found["steps"] * found["tokens_per_step"])
    plain, drafted = (found["seconds"][name]["walls"] for name in ("plain", "lookup"))
    assert found["speedup"]["wall"] == pytest.approx(plain[0] / drafted[0])
    printed = capsys.readouterr().out
    assert "prompt lookup, 3 tokens proposed" in printed and "6 of 6" in printed
    itself = str(folder / "converted")  # which is always right
    report = bench.bench_decode(
        itself, part=("lookup",), prompts=(tmp_path / "twice.txt",), proposed=2, draft=itself,
        new=6, repeats=1,
    )  # fmt: skip
    found = report["lookup"]["prompts"]["twice"]
    assert found["same_tokens"] == 6 and found["steps"] == 3  # one unsure token ends each draft
    assert found["seconds"].keys() == {"plain", "draft"}
    assert "a draft model, 2 tokens proposed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--part", "lookup"], "part lookup needs a text to continue; give --prompts FILE"),
        (["--part", "lookup", "--prompts", "none.txt"], "none.txt is no file with text"),
        (["--part", "llama"], "part llama compares with llama.cpp on a GGUF file of the teacher"),
        (["--weights", "int8", "--dtype", "bfloat16"], "int8 computes in float32, not bfloat16"),
        (["--contexts", "0"], "contexts = (0,); one or more, each at least 1"),
        (["--batch", "0"], "batch = (0,)"),
        (["--new", "0"], "new = 0; at least 1"),
        (["--plot", "a.txt"], "a.txt; its name must end in .png, .pdf or .svg"),
        (["--part", "prefill", "--plot", "a.png"], "only the part decode is drawn"),
        (["--teacher", "."], ".: cannot be loaded"),
    ],
)
def test_mistakes_are_told(folder, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)  # an empty directory
    assert main(["bench", "decode", str(folder / "converted"), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_model_that_was_not_converted_is_refused(folder, capsys):
    assert main(["bench", "decode", str(folder / "original")]) == 2
    assert "has no converted layers" in capsys.readouterr().err


def test_a_gguf_files_matrices_become_q8_0(tmp_path):
    gguf = pytest.importorskip("gguf")
    made = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    made.add_array("tokenizer.ggml.tokens", ["a", "b"])
    made.add_uint32("llama.block_count", 1)
    matrix, norm = torch.randn(4, 64).numpy(), torch.randn(64).numpy()
    q4 = gguf.GGMLQuantizationType.Q4_1
    made.add_tensor("m", gguf.quants.quantize(matrix, q4), raw_dtype=q4)
    made.add_tensor("n", norm)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    (tmp_path / "out").mkdir()
    found = gguf.GGUFReader(as_q8_0(tmp_path / "a.gguf", tmp_path / "out"))
    assert found.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert found.fields["llama.block_count"].contents() == 1
    m, n = found.tensors
    assert m.tensor_type == gguf.GGMLQuantizationType.Q8_0 and (n.data == norm).all()
    before = gguf.quants.dequantize(gguf.quants.quantize(matrix, q4), q4)
    after = gguf.quants.dequantize(m.data, m.tensor_type)
    assert 0 < abs(after - before).max() <= abs(before).max() / 127
