"""Model cards: a header for the Hub, and nothing of the machine that made the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lowline.linearize.card import add_to_card, is_hub_id, license_of, without_paths
from lowline.train.config.load import load_config, to_toml
from lowline.train.hf.card import model_card
from lowline.train.hf.config import config_to_hf

ARGUMENTS = (
    "--model.dim=16",
    "--model.n_layers=2",
    "--model.n_heads=2",
    "--model.ffn_dim=24",
    "--cola.rank=4",
)


def card_of(*arguments: str, base_model: str | None = None) -> str:
    run = load_config(SHIPPED, [*ARGUMENTS, *arguments])
    hf = config_to_hf(run.model, run.cola, run.mixer, max_seq_len=64)
    return model_card("mine", run, hf, 1_234_567, "step-3", base_model)


SHIPPED = str(Path(__file__).parents[2] / "configs" / "demo_cola.toml")


def test_header_names_base_model_license_and_data(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: llama3\n---\n# A model\n")
    monkeypatch.setattr(
        "lowline.linearize.card.try_to_load_from_cache",
        lambda repo, name: str(readme) if repo == "meta/llama" else None,
    )
    hub = ("--data.dataset=hub", "--data.path=allenai/c4", "--data.name=en")
    card = ModelCard(card_of(*hub, "--evaluation.enable=false", base_model="meta/llama"))
    data = card.data
    assert (data.license, data.base_model, data.datasets) == (
        "llama3",
        "meta/llama",
        ["allenai/c4"],
    )
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.tags == ["lowline", "cola_llama"]
    assert "1.23M parameters, step-3" in card.text and "trust_remote_code=True" in card.text
    assert license_of(str(tmp_path)) == "llama3" and license_of("other/llama") is None


def test_no_local_path_is_told(tmp_path):
    secret = str(tmp_path)
    card = card_of(
        "--data.dataset=files",
        f"--data.path={secret}/corpus.jsonl",
        f"--output={secret}/out",
        f"--checkpoint.initial_weights={secret}/start",
        "--evaluation.enable=false",
        base_model=secret,
    )
    assert secret not in card and tmp_path.name not in card.replace("corpus", "")
    for kept in ('"corpus.jsonl"', '"out"', '"start"'):
        assert kept in card
    assert ModelCard(card).data.base_model is None
    paths = {
        "a": ["C:\\x\\y.gguf", "~/m/n", "../up"],
        "b": "HuggingFaceTB/Smol",
        "c": "outputs/run",
    }
    assert without_paths(paths) == paths | {"a": ["y.gguf", "n", "up"]}


def test_configuration_in_the_card_is_the_run(tmp_path):
    toml = card_of().split("```toml\n")[1].split("```")[0]
    (tmp_path / "again.toml").write_text(toml)
    again = load_config(tmp_path / "again.toml")
    assert to_toml(again) == to_toml(load_config(SHIPPED, ARGUMENTS))


@pytest.mark.parametrize(
    "source, hub",
    [("meta/llama-3.1", True), ("tests/train", False), ("a/b/c", False), ("x/y.gguf", False)],
)
def test_hub_ids(source, hub, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert is_hub_id(source) == hub


def test_scores_of_the_report_are_added(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text(card_of())
    perplexity = [{"context": c, "perplexity": p, "loss": 1.0} for c, p in ((64, 9.0), (512, 8.5))]
    records = [
        {"label": label, "task": task, "scores": scores, "settings": {}, "identity": {}}
        for label, task, scores in (
            ("model", "perplexity", perplexity),
            ("model", "piqa", {"acc": 0.625, "acc_norm": 0.5}),
            ("model", "passkey", [{"distance": 3}]),
            ("teacher", "perplexity", [{"context": 512, "perplexity": 7.0}]),
        )
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"records": records}))
    add_to_card(folder, results=results, source="meta/llama")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "meta/llama"
    scores = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    expected = {("perplexity", "perplexity@512"): 8.5}
    assert scores == expected | {("piqa", "acc"): 0.625, ("piqa", "acc_norm"): 0.5}
    assert "```toml" in card.text
    add_to_card(tmp_path, source="meta/llama")  # a directory without a card
    assert {path.name for path in tmp_path.iterdir()} == {"model", "results.json"}
