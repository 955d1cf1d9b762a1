"""`lowline bench serve`: models under vLLM beside each other, many requests at once.

    lowline bench serve teacher/ converted/ --batch 1 8 32 --contexts 1024 8192 --memory 2

decode    tokens per second of all requests together, once every one has read its context
first     seconds from the start to the first token of all of them, their contexts read
fits      requests of this length that the memory holds, by vLLM's own count
held      memory / fits: bytes of a request

Each model is measured in a process of its own, one after the other; prompts are random tokens. Of a
batch that does not fit, the rate is left out.

With `--shared` prompts are alike but for their last token, and one is read before the others, which
find what it left (vLLM's prefix caching): many long contexts cost as much as one. States are
copied, so that each request still has its own; keys and values are not, so that softmax reads the
same ones for all requests, from the processor's cache: that is to its advantage.
"""

from __future__ import annotations

import json as text
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lowline.command_line import DType
from lowline.errors import LowlineError
from lowline.linearize.serving.checks import check_environment, check_folder
from lowline.tools.bench.timing import at_least_one, machine
from lowline.tools.show import print_table, wide_console, write_report


def bench_serve(
    models: tuple[str, ...],
    *,
    contexts: tuple[int, ...] = (1024,),
    batch: tuple[int, ...] = (1, 8, 32),
    new: int = 16,
    memory: float = 2.0,
    dtype: DType = "float32",
    shared: bool = False,
    json: Path | None = None,
) -> dict[str, Any]:
    """Measure throughput, time to the first token and memory of models served by vLLM.

    Args:
        models: Hugging Face directories; the first is what the others are compared with.
        contexts: Tokens of each request's prompt.
        batch: Requests at once.
        new: Tokens of each request that are timed.
        memory: GiB of states, keys and values.
        dtype: The type that is computed in.
        shared: Give all requests the same context but for the last token, read once.
        json: A file for the numbers.

    Returns:
        What `json` holds: "machine", and of each model and context what was measured.

    Raises:
        ValueError: no vLLM, no such model, or a number out of its range.
    """
    at_least_one(new=new)
    for name, numbers in (("contexts", contexts), ("batch", batch)):
        if not numbers or min(numbers) < 1:
            raise LowlineError(f"{name} = {numbers}; one or more, each at least 1")
    if not models:
        raise LowlineError("models is empty; give a directory or more")
    for model in models:
        check_folder(model)
    check_environment()
    import torch

    threads = torch.get_num_threads()
    report: dict[str, Any] = {"machine": machine(threads), "models": {m: {} for m in models}}
    for context in contexts:
        for model in models:
            task = {"model": model, "context": context, "batch": batch, "new": new,
                    "memory": int(memory * 2**30), "dtype": dtype, "shared": shared}  # fmt: skip
            line = [sys.executable, "-m", "lowline.tools.bench.serve", text.dumps(task)]
            done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise LowlineError(f"{model} at {context} tokens: vLLM ended with an error (above)")
            report["models"][model][str(context)] = text.loads(done.stdout.splitlines()[-1])
    show(report, contexts, batch, memory)
    write_report(report, json)
    return report


def show(
    report: dict[str, Any], contexts: tuple[int, ...], batch: tuple[int, ...], memory: float
) -> None:
    """Print a table for each context."""
    columns = ["", *(f"{n} at once" for n in batch), "first token", f"fit {memory:g} GiB", "held"]
    for context in contexts:
        rows = {}
        for model, found in report["models"].items():
            entry = found[str(context)]
            rates = [entry["rates"].get(str(n)) for n in batch]
            rows[Path(model).name] = [
                *("–" if rate is None else f"{rate['cpu']:.1f}" for rate in rates),
                f"{entry['rates'][str(batch[0])]['first_cpu']:.2f} s",
                f"{entry['fits']:.0f}",
                f"{entry['held'] / 1e6:.2f} MB",
            ]
        title = f"{context} tokens of context: tokens per second of the processor"
        print_table(wide_console(), title, columns, rows)


def measure(
    *,
    model: str,
    context: int,
    batch: list[int],
    new: int,
    memory: int,
    dtype: str,
    shared: bool,
) -> dict[str, Any]:
    """Return what one model does at one context."""
    import torch
    from transformers import AutoConfig

    from lowline.linearize.serving.offline import Engine

    vocab = AutoConfig.from_pretrained(model, trust_remote_code=False).vocab_size
    steps = max(batch) * (1 if shared else -(-context // 1024))  # first requests decode meanwhile
    length = context + new + 1 + steps
    engine = Engine(
        model, dtype=dtype, memory=memory, max_requests=max(batch), max_model_len=length,
        enable_prefix_caching=shared,
    )  # fmt: skip
    fits, block = _capacity(engine.llm.llm_engine)
    generator = torch.Generator().manual_seed(0)
    rates = {}
    if shared:
        context = (context - 1) // block * block + 1  # all but the last token are found
        start = torch.randint(0, vocab, (1, context), generator=generator)
        alone = _rate(engine.llm.llm_engine, start.tolist(), 1, length - context)
    for count in batch:
        if count > fits and not shared:
            continue
        prompts = torch.randint(0, vocab, (count, context), generator=generator)
        if shared:
            prompts[:, :-1] = start[:, :-1]
        rate = _rate(engine.llm.llm_engine, prompts.tolist(), new, length - context)
        rates[str(count)] = rate | ({"first_cpu": alone["first_cpu"]} if shared else {})
    return {"rates": rates, "fits": fits, "held": memory / fits, "context": context}


def _capacity(engine: Any) -> tuple[float, int]:
    """Return how many requests fit without prefix caching, and after how many tokens vLLM keeps a
    state.
    """
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    scheduler = engine.engine_core.engine_core.scheduler
    cache, mode = (
        scheduler.vllm_config.cache_config,
        scheduler.vllm_config.cache_config.mamba_cache_mode,
    )
    cache.mamba_cache_mode = "none"
    fits = get_max_concurrency_for_kv_cache_config(scheduler.vllm_config, scheduler.kv_cache_config)
    cache.mamba_cache_mode = mode
    return fits, max(g.kv_cache_spec.block_size for g in scheduler.kv_cache_config.kv_cache_groups)


def _rate(engine: Any, prompts: list[list[int]], new: int, most: int) -> dict[str, float]:
    """Return tokens per second of all requests, and when each had a token."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True, detokenize=False)
    for n, ids in enumerate(prompts):
        engine.add_request(str(n), {"prompt_token_ids": ids}, how)
    counts: dict[str, int] = {}

    def run(until: Any) -> tuple[float, float, int]:
        wall, cpu, before = time.perf_counter(), time.process_time(), sum(counts.values())
        while not until():
            for out in engine.step():
                counts[out.request_id] = len(out.outputs[0].token_ids)
        made = sum(counts.values()) - before
        return time.perf_counter() - wall, time.process_time() - cpu, made

    first, first_cpu, _ = run(lambda: len(counts) == len(prompts))
    goal = max(counts.values()) + new
    wall, cpu, made = run(lambda: max(counts.values()) >= min(goal, most))
    engine.abort_request(list(counts))
    while engine.has_unfinished_requests():
        engine.step()
    return {"wall": made / wall, "cpu": made / cpu, "first": first, "first_cpu": first_cpu}


if __name__ == "__main__":
    print(text.dumps(measure(**text.loads(sys.argv[1]))))
