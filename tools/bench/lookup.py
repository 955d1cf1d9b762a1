"""The part "lookup" of `lowline bench decode`: generation with and without proposed tokens.

    lowline bench decode converted/ --part lookup --prompts edit.txt summary.txt --new 64
    lowline bench decode converted/ --part lookup --draft smaller/ --prompts free.txt --proposed 3

Each file is a message, or a text where the tokenizer has no chat template. It is read once; what
takes turns is transformers' greedy `generate` of `new` tokens after it, without and with
`prompt_lookup_num_tokens`, or a smaller model as `assistant_model`.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.errors import LowlineError
from lowline.tools.bench.timing import a_token, ratio
from lowline.tools.show import print_table

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from lowline.tools.bench.decode import Setup

PLAIN, LOOKUP, DRAFT = "plain", "lookup", "draft"


def check_prompts(prompts: tuple[Path, ...]) -> None:
    if not prompts:
        raise LowlineError("part lookup needs a text to continue; give --prompts FILE ...")
    for path in prompts:
        if not path.is_file() or not path.read_text(encoding="utf-8").strip():
            raise LowlineError(f"prompts: {path} is no file with text")


def lookup(
    setup: Setup, tokenizer: Any, prompts: tuple[Path, ...], k: int, draft: Any = None
) -> dict[str, Any]:
    """Measure each prompt; seconds are per token.

    Args:
        draft: the model that proposes k tokens; None for lookup.
    """
    from lowline.train.data.template import render_question

    name, how = LOOKUP, {"prompt_lookup_num_tokens": k}
    if draft is not None:
        name, how = DRAFT, {"assistant_model": draft}
        draft.generation_config.num_assistant_tokens = k
    found: dict[str, Any] = {"by": name, "proposed": k, "tokens": setup.new, "prompts": {}}
    for path in prompts:
        text, template = path.read_text(encoding="utf-8"), tokenizer.chat_template
        if template is not None:
            text = render_question(tokenizer, text)
        ids = tokenizer(text, add_special_tokens=template is None, return_tensors="pt")["input_ids"]
        ids = ids.to(setup.device)
        cases = {PLAIN: _Case(setup, ids), name: _Case(setup, ids, **how)}
        timings = setup.run(f"prompt {path.name}", {**cases})
        plain, drafted = (case.made for case in cases.values())
        steps = len(cases[name].counts)
        found["prompts"][path.stem] = {
            "prompt_tokens": ids.shape[1],
            "seconds": {of: asdict(a_token(t, setup.new)) for of, t in timings.items()},
            "speedup": ratio(timings[PLAIN], timings[name]),
            "steps": steps,
            "tokens_per_step": setup.new / steps,
            "same_tokens": int((plain == drafted).cumprod(0).sum()),
        }
    return found


class _Case:
    """Generates after a prompt that was read once; `counts` are the tokens of the last call's
    steps.
    """

    def __init__(self, setup: Setup, ids: torch.Tensor, **how: Any) -> None:
        from lowline.linearize.body.cache import LinearizedCache

        model: Any = setup.model
        self.model = model
        self.ids, self.how, self.new = ids, how, setup.new
        self.read = LinearizedCache(model.config)
        self.model(ids[:, :-1], past_key_values=self.read, logits_to_keep=1)

    def __call__(self) -> None:
        self.counts: list[int] = []
        made = self.model.generate(
            self.ids,
            past_key_values=copy.deepcopy(self.read),
            do_sample=False,
            max_new_tokens=self.new,
            eos_token_id=None,
            pad_token_id=0,
            streamer=self,
            **self.how,
        )
        self.made, self.counts = made[0, -self.new :], self.counts[1:]

    def put(self, tokens: Any) -> None:
        self.counts.append(tokens.numel())

    def end(self) -> None:
        """Do nothing; streamers have it."""


def print_lookup(console: Console, report: dict[str, Any]) -> None:
    """Print tokens per second, their ratio and the tokens of a step, one column per prompt."""
    clock, found = report["setup"]["clock"], report["lookup"]
    of_prompts = found["prompts"].values()
    rows = {
        f"{name}, tokens/s": [f"{1 / x['seconds'][name][clock]:.1f}" for x in of_prompts]
        for name in (PLAIN, found["by"])
    }
    rows["speed-up"] = [f"{x['speedup'][clock]:.2f}x" for x in of_prompts]
    rows["tokens per step"] = [f"{x['tokens_per_step']:.2f}" for x in of_prompts]
    rows["equal tokens"] = [f"{x['same_tokens']} of {found['tokens']}" for x in of_prompts]
    title = (
        f"{'prompt lookup' if found['by'] == LOOKUP else 'a draft model'}, "
        f"{found['proposed']} tokens proposed, medians of "
        f"{report['setup']['repeats']}, {clock} time"
    )
    console.print()
    print_table(console, title, ["prompt", *found["prompts"]], rows)
