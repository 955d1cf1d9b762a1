"""The model card (README.md) of a Hugging Face directory, in the Hub's format.

Its header names what the Hub shows and filters by: the license (the base model's, where that is
known), the base model, the data set and scores. Nothing in a card says where files lay on the
machine that made the model: of a local path the last part is kept.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from transformers import PreTrainedConfig

from lowline.cola.hf import CoLAConfig
from lowline.files import write_text
from lowline.linearize.body.hf import LinearizedConfig

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CARD = "README.md"
TEXT = """# {name}

A {kind} language model with {parameters:.2f}M parameters, {made}.

- model type: {hf.model_type}
- layers {hf.num_hidden_layers}, width {hf.hidden_size}, feed-forward {hf.intermediate_size}, \
heads {hf.num_attention_heads} (key/value {hf.num_key_value_heads})
- vocabulary {hf.vocab_size}, context {hf.max_position_embeddings} tokens
{details}
```python
{first}from transformers import pipeline

print(pipeline("text-generation", {name!r})("The", max_new_tokens=32))
```
{without}"""
RUN = """
The run's configuration:

```toml
{toml}```
"""
WITHOUT_IMPORT = """
Where lowline is installed, `trust_remote_code=True` does what the import does, for harnesses and
servers, too. PEFT's LoRA takes `target_modules="all-linear"`.
"""


def model_card(
    name: str,
    hf: PreTrainedConfig,
    parameters: int,
    *,
    made: str,
    base_model: str | None = None,
    data_set: str | None = None,
    toml: str | None = None,
) -> str:
    """Return the card of a model: what it is, how to load it, and the run that made it.

    Args:
        name: of the model.
        hf: its configuration.
        parameters: how many it has.
        made: where it comes from, such as "step-3 of a lowline run".
        base_model: the hub id, directory or GGUF file that it was made from.
        data_set: the hub id of the text that it was trained on.
        toml: the configuration of the run.
    """
    kind = "low-rank (CoLA)" if isinstance(hf, CoLAConfig) else "dense"
    details = ""
    if isinstance(hf, CoLAConfig):
        details += f"- ranks: {json.dumps(hf.ranks)}, activation {hf.bottleneck_activation}\n"
    if isinstance(hf, LinearizedConfig) and (converted := hf.converted_layers()):
        kind = f"linearized, {kind}"
        for mixer in {str(hf.mixers[layer]): hf.mixers[layer] for layer in converted}.values():
            options = {key: value for key, value in mixer.items() if key != "name"}
            layers = ", ".join(str(n) for n in converted if hf.mixers[n] == mixer)
            details += f"- mixer: {mixer['name']} {json.dumps(options)} in layers {layers}\n"
    first = f"import lowline  # pip install lowline; registers {hf.model_type}\n" if details else ""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lowline", hf.model_type],
        license=license_of(base_model) if base_model else None,
        base_model=base_model if base_model and is_hub_id(base_model) else None,
        datasets=[data_set] if data_set and is_hub_id(data_set) else None,
    )
    text = TEXT.format(
        name=name,
        kind=kind,
        parameters=parameters / 1e6,
        made=made,
        hf=hf,
        details=details,
        first=first,
        without=WITHOUT_IMPORT if details else "",
    )
    run = RUN.format(toml=toml) if toml else ""
    return f"---\n{data.to_yaml()}\n---\n{text}{run}"


def add_to_card(folder: Path, *, results: Path | None = None, source: str | None = None) -> None:
    """Add scores, and the model that was converted, to the header of a directory's card.

    Args:
        folder: a Hugging Face directory; one without a card is left alone.
        results: results.json of `lowline evaluate`, of which the scores of `folder` are taken.
        source: the hub id, directory or GGUF file that was converted.
    """
    path = folder / CARD
    if not path.is_file():
        return
    card = ModelCard.load(path)
    if source is not None and card.data.license is None:
        card.data.license = license_of(source)
    if source is not None and is_hub_id(source):
        card.data.base_model = source
    if results is not None and results.is_file():
        records = json.loads(results.read_text(encoding="utf-8"))["records"]
        scores = [s for r in records if r["label"] == folder.name for s in _scores(r)]
        if scores:
            card.data.model_name, card.data.eval_results = folder.name, scores
    write_text(path, str(card))


def _scores(record: dict[str, Any]) -> list[EvalResult]:
    """Return a record's numbers in the Hub's format; of perplexity that of the longest rows."""
    task, scores = record["task"], record["scores"]
    if task == "perplexity":
        longest = max(scores, key=lambda score: score["context"])
        named = {f"perplexity@{longest['context']}": longest["perplexity"]}
    elif isinstance(scores, dict):
        named = {key.removesuffix(",none"): value for key, value in scores.items()}
    else:
        return []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=name,
            metric_value=value,
        )
        for name, value in named.items()
        if isinstance(value, float)
    ]


def license_of(source: str) -> str | None:
    """Return the license that a model's own card names, without asking a server; None if unknown.

    Args:
        source: a directory, or a hub id whose card was loaded before.
    """
    card: Any = Path(source) / CARD
    if is_hub_id(source):
        card = try_to_load_from_cache(source, CARD)
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    return ModelCard.load(card).data.license


def is_hub_id(source: str) -> bool:
    """Return whether a source is a model or data set of the Hub, as opposed to a file or
    directory.
    """
    local = Path(source).exists() or source.endswith((".gguf", ".jsonl", ".txt", ".parquet"))
    return HUB_ID.fullmatch(source) is not None and not local


def without_paths(value: Any) -> Any:
    """Return a table in which paths that say where something lay are cut to their last part."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str) and re.match(r"/|~|\.\.|[A-Za-z]:[/\\]", value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value
