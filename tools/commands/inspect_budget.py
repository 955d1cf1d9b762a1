"""`lowline inspect budget`: how many tokens each key and value head of a model needs.

    lowline inspect budget HuggingFaceTB/SmolLM2-135M --text articles.txt > memory.toml

Prints a [mixer] table for `lowline linearize`: the mixer `memory`, whose window and rows differ by
head, with no more bytes in all than a window of so many tokens in every head. No training; a
forward and a backward pass per text, and the costs of `lowline.linearize.budget`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.errors import LowlineError
from lowline.hub import check_source

if TYPE_CHECKING:
    from lowline.linearize.budget import Text
    from lowline.linearize.evaluation.second_copy import SecondCopy

SINKS, STRIDE, LENGTH_BYTES = 4, 8, 8
WEIGHT = 0.3  # of strings that come twice beside running text
STRING = 32  # tokens
NEVER = 1e9  # the cost of what is not to be chosen


def inspect_budget(
    checkpoint: str,
    *,
    text: Path | None = None,
    tokens: int = 258,
    rows: int = 1,
    seq_len: tuple[int, ...] = (2048,),
    copies: int = 2,
    distances: tuple[int, ...] | None = None,
    far: int = 0,
    window: int = 64,
    horizon: int = 512,
    cache_dtype: str = "auto",
) -> str:
    """Measure how many tokens each head needs, and print a [mixer] table with that budget.

    Args:
        checkpoint: A Hugging Face directory, a hub id, or a GGUF file of a model with softmax
            attention.
        text: A UTF-8 text like what the model is for; default: English documentation of Python.
        tokens: The window of every head that holds as many bytes as the budget, in fp32.
        rows: How many stretches of the text, of each length, to measure on.
        seq_len: Tokens in each; the longest window or number of rows is less. Of several lengths
            the mean cost per token counts by the inverse of the length. Time grows with its square.
        copies: Random strings that come twice, of each distance.
        distances: Between the two, in tokens; default: half of the least seq_len, at most 512.
            They say which heads copy.
        far: So many heads get the longest window, below the largest seq_len: those without which
            strings are copied worst, measured one by one. What is asked for once, long after it
            was read, is in no row, since rows keep what is looked at; few heads find it.
        window: The window of heads with rows.
        horizon: Tokens after which attention received has faded; see the mixer's options.
        cache_dtype: "int8" for keys and values of 8 bits, of which nearly four times as many are
            as many bytes; else "auto".

    Returns:
        The option `budget`.

    Raises:
        LowlineError: no such model or text, a model with a window or mixers, or a number out of
            its range.
    """
    shortest, longest = min(seq_len, default=0), max(seq_len, default=0)
    distances = (min(shortest // 2, 512),) if distances is None else distances
    for name, value, least in (
        ("tokens", tokens, 1), ("rows", rows, 1), ("seq_len", shortest, 256),
        ("distances", min(distances, default=STRING), STRING), ("far", far, 0),
        ("copies", copies, 1 if far else 0),
    ):  # fmt: skip
        if value < least:
            raise LowlineError(f"{name} = {value}; at least {least}")
    check_source(checkpoint)
    import torch

    from lowline.linearize.body.cache import state_bytes
    from lowline.linearize.body.hf import LinearizedConfig
    from lowline.linearize.budget import allocate, budget_text, head_costs, sizes_up_to
    from lowline.linearize.convert import linearized_config
    from lowline.linearize.mixers.options import MemoryOptions
    from lowline.linearize.source import load_config
    from lowline.tools.commands.inspect_rank import load_model, read_text, token_rows

    if isinstance(load_config(checkpoint), LinearizedConfig):
        raise LowlineError(f"{checkpoint} was converted before; give the model it was made from")
    options = MemoryOptions(window=window, sinks=SINKS, horizon=horizon, cache_dtype=cache_dtype)
    documents = read_text(text)
    model, tokenizer = load_model(checkpoint)
    total = rows * sum(seq_len)
    (ids,) = token_rows(tokenizer, documents, total, seq_len=total)
    sizes = sizes_up_to(longest, window)
    parts = ids[0].split([rows * length for length in seq_len])
    kinds = [
        (f"{length} tokens of text", _stretches(part, length), (shortest / length) ** 2)
        for part, length in zip(parts, seq_len, strict=True)
    ]
    for distance in distances:
        strings = _copies(tokenizer, ids[0], distance, copies)
        kinds.append((f"strings after {distance} tokens", strings, WEIGHT))
    heads = _copying_heads(model, tokenizer, ids[0], distances, copies, window, far)
    found = []
    for kind, texts, weight in kinds:
        for n, one in enumerate(texts):
            print(f"measuring {kind} {n + 1} of {len(texts)}", file=sys.stderr, flush=True)
            costs = head_costs(model, one, sizes, options)
            found.append(weight / len(texts) * costs)
    costs_NS = torch.stack(found).sum(0).flatten(0, 1)
    L, G = found[0].shape[:2]
    whole = max(n for n, (_, e) in enumerate(sizes) if not e)
    costs_NS[heads] = NEVER
    costs_NS[heads, whole] = 0

    def held(size: tuple[int, int], cache_dtype: str) -> int:
        """Return the bytes of a model whose heads all have one size."""
        budget = budget_text([0] * (L * G), [size], G)
        given = {"sinks": SINKS, "budget": budget, "cache_dtype": cache_dtype}
        config = linearized_config(model.config, mixer="memory", options=given)
        return state_bytes(config, dtype=torch.float32)

    # A head has a length of its own where no other head of its layer has its size.
    bytes_S = torch.tensor([held(size, cache_dtype) for size in sizes]) / (L * G) + LENGTH_BYTES
    chosen = allocate(costs_NS, bytes_S, held((tokens, 0), "auto"))
    if any(chosen[head] != whole for head in heads):
        raise LowlineError(f"far = {far}: so few bytes do not hold their windows; give more tokens")
    budget = budget_text(chosen, sizes, G)
    print(f'[mixer]\nname = "memory"\noptions.sinks = {SINKS}\noptions.horizon = {horizon}')
    if cache_dtype != "auto":
        print(f'options.cache_dtype = "{cache_dtype}"')
    print(f'options.budget = "{budget}"')
    return budget


def _copying_heads(
    model: Any, tokenizer: Any, ids_T: Any, distances: Any, copies: int, window: int, far: int
) -> list[int]:
    """Return the heads whose narrow window costs most on the second copies of strings."""
    import torch

    from lowline.linearize.body.hf import SOFTMAX
    from lowline.linearize.convert import linearized_config
    from lowline.linearize.layer_choice import measure_layers

    config = linearized_config(model.config, mixer=SOFTMAX, layers="none")
    L, G = config.num_hidden_layers, config.head_shape(0).n_kv_heads
    if far > L * G:
        raise LowlineError(f"far = {far}; the model has {L * G} key and value heads")
    if not far:
        return []
    strings = _strings(tokenizer, ids_T, distances, copies)
    found = []
    for g in range(G):
        print(f"measuring head {g + 1} of {G} of each layer", file=sys.stderr, flush=True)
        sizes = ", ".join(str(window if n == g else len(ids_T)) for n in range(G))
        options = {"sinks": SINKS, "budget": "; ".join([sizes] * L)}
        how: Any = dict(copies=strings, rows_NT=ids_T[None, :STRING], advance=lambda _: None)
        costs = measure_layers(model, mixer="memory", options=options, **how)
        found.append([cost["recall"] for cost in costs])
    recall_N = torch.tensor(found).T.flatten()
    heads: list[int] = recall_N.topk(far).indices.tolist()
    named = ", ".join(f"({n // G}, {n % G}) {recall_N[n]:.2f}" for n in heads)
    print(f"copying, (layer, head) and nats without it: {named}", file=sys.stderr)
    return heads


def _stretches(ids_T: Any, seq_len: int) -> list[Text]:
    import torch

    from lowline.linearize.budget import Text

    scored = torch.arange(seq_len // 4, seq_len - 1)
    return [Text(ids=row, scored=scored, stride=STRIDE) for row in ids_T.split(seq_len)]


def _strings(tokenizer: Any, ids_T: Any, distances: tuple[int, ...], samples: int) -> SecondCopy:
    from lowline.linearize.evaluation.second_copy import SecondCopy

    return SecondCopy.of(
        tokenizer, distances=distances, samples=samples, seed=0, batch_tokens=0,
        filler=ids_T.tolist(),
    )  # fmt: skip


def _copies(tokenizer: Any, ids_T: Any, distance: int, samples: int) -> list[Text]:
    """Return strings of random tokens that come twice, the text before and between them."""
    import torch

    from lowline.linearize.budget import Text

    if not samples:
        return []
    strings = _strings(tokenizer, ids_T, (distance,), samples)
    rows = strings.sequences(distance)
    scored = torch.arange(rows.shape[1] - strings.length, rows.shape[1] - 1)
    return [Text(ids=row, scored=scored, drawn=False) for row in rows]
