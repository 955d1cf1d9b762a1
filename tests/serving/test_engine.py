"""What vLLM does with states: keeps those of beginnings, gives them up, serves many at once."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-serve")

import torch
from helpers.serving import BUDGET, answers, engine, greedy, prompts, served_model

from lowline.linearize.body.cache import state_layouts
from lowline.linearize.serving.checks import page_bytes

MIXERS = ("slots", "memory", "memory, budget", "gated_deltanet", "liger_gsa", "mamba2")


def saved(folder: Path, mixer: str | None, layers: str = "all", name: str = "llama"):
    mixer, _, budget = mixer.partition(", ") if mixer else (None, "", "")
    model = served_model(mixer, layers, name, options=BUDGET if budget else None)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("mixer", "layers"), [*((m, "all") for m in MIXERS), ("slots", "0, 2")])
def test_prompts_that_begin_alike_share_a_state(mixer: str, layers: str, tmp_path: Path) -> None:
    """A second round of requests finds the states of the first, and answers alike."""
    model = saved(tmp_path, mixer, layers)
    (start,) = prompts((280,))
    asked = [start + ids for ids in prompts((1, 7, 40, 90), seed=1)]
    expected = greedy(model, asked)
    settings = {"enable_prefix_caching": True, "max_num_batched_tokens": 160}
    with engine(tmp_path, **settings) as made:
        assert answers(made, asked) == expected
        assert answers(made, asked) == expected
        assert cached_tokens(made, asked) > 2 * len(asked) * 100


def test_pages_hold_what_the_states_of_a_request_have(tmp_path: Path) -> None:
    """Layers' states have 3 sizes; where a layer stays softmax each page has the largest."""
    memory, budget = 2**24, {"mixer": "memory", "options": BUDGET}
    for layers in ("all", "all but 1"):
        config = served_model(**budget, layers=layers).config
        folder = tmp_path / layers
        served_model(**budget, layers=layers).save_pretrained(folder)
        layouts = state_layouts(config, torch.float32)
        sizes = [layout.page_bytes for layout in layouts.values()]
        with engine(folder, kv_cache_memory_bytes=memory) as made:
            held = made.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        if layers == "all":
            assert len(set(sizes)) > 1 and page_bytes(config, layouts) < max(sizes)
            assert abs(memory // held.num_blocks - sum(sizes)) < 64 * len(sizes) + sum(sizes) / 100
        else:
            assert page_bytes(config, layouts) == max(sizes)
            assert memory // held.num_blocks >= max(sizes)


def cached_tokens(made, asked) -> int:
    from vllm import SamplingParams

    given = [{"prompt_token_ids": ids} for ids in asked]
    how = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    return sum(out.num_cached_tokens for out in made.generate(given, how, use_tqdm=False))


@pytest.mark.parametrize("mixer", ["slots", "memory"])
def test_requests_that_are_given_up_begin_again(mixer: str, tmp_path: Path) -> None:
    """Ten times a running request loses its pages, and the state that it had is not found again."""
    model = saved(tmp_path, mixer, "0, 2")
    asked = prompts((60, 64, 70, 90))
    expected = greedy(model, asked, 40)
    with engine(tmp_path) as made:
        core = made.llm_engine.engine_core.engine_core
        scheduler, step, taken = core.scheduler, core.scheduler.schedule, [0]

        def schedule(*args, **how):
            running = scheduler.running
            if taken[0] < 10 and len(running) > 1 and running[-1].num_output_tokens % 3 == 2:
                scheduler._preempt_request(running.pop(), 0.0)
                taken[0] += 1
            return step(*args, **how)

        scheduler.schedule = schedule
        assert answers(made, asked, 40) == expected
        assert taken[0] == 10


@pytest.mark.parametrize("mixer", ["slots", "gated_deltanet", None])
def test_bfloat16_is_as_near_as_the_softmax_model(mixer: str | None, tmp_path: Path) -> None:
    """Log-probabilities of a long prompt's answer beside transformers' in bfloat16 and in fp32.

    Greedy answers differ where two tokens are nearly as likely; of vLLM's own Llama too.
    """
    from vllm import SamplingParams

    model = saved(tmp_path, mixer)
    (asked,) = prompts((200,))
    with torch.no_grad():
        exact = model(torch.tensor([asked])).logits[0, -1].log_softmax(-1)
        theirs = model.bfloat16()(torch.tensor([asked])).logits[0, -1].float().log_softmax(-1)
    how = SamplingParams(temperature=0, max_tokens=1, detokenize=False, logprobs=len(exact))
    with engine(tmp_path, dtype="bfloat16", max_logprobs=len(exact)) as made:
        (out,) = made.generate([{"prompt_token_ids": asked}], how, use_tqdm=False)
    (found,) = out.outputs[0].logprobs
    ours = torch.tensor([found[token].logprob for token in range(len(exact))])
    ours_error, their_error = ((x - exact).norm() / exact.norm() for x in (ours, theirs))
    print(f"{mixer}: relative error {ours_error:.4f}, of transformers {their_error:.4f}")
    assert ours_error < 0.05 and ours_error < 2 * their_error + 0.005
