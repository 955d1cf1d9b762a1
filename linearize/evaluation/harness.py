"""Tasks of EleutherAI's lm-evaluation-harness, through its Python API.

A task is one of its names (piqa, arc_easy, arc_challenge, hellaswag, winogrande, mmlu, …), whose
data come from the Hugging Face hub, or a YAML file of its task format, whose data may be files.
`mmlu` shows five examples, as it is usually reported; all others as many as they say themselves.

lm-eval is not installed with lowline: `pip install lm-eval`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowline.linearize.evaluation.measure import Advance, digest

EXAMPLES = {"mmlu": 5}
METRICS = ("acc", "acc_norm")  # those that a table shows


def check_tasks(names: Sequence[str], known_here: Sequence[str]) -> None:
    """Raise ValueError for tasks that are neither lm-eval's nor files, or if it is not installed.

    Args:
        names: what is to be run by lm-eval.
        known_here: other names, for the message.
    """
    for name in names:
        if name.endswith(".yaml"):
            _read_task(name)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError(
            f"task {names[0]!r} is none of {', '.join(known_here)}; the tasks of lm-eval need it: "
            "pip install lm-eval"
        ) from None
    theirs = TaskManager().all_tasks
    for name in names:
        if not name.endswith(".yaml") and name not in theirs:
            near = difflib.get_close_matches(name, [*known_here, *theirs], n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(
                f"task {name!r} is none of {', '.join(known_here)}, and none of lm-eval's{hint}"
            )


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """One task, or group of tasks, of lm-eval.

    Args:
        task: its name, or a YAML file.
        tokenizer: the models'.
        limit: the first so many items of each task; None for all.
        batch_size: items that go through the model together.
        seed: of the choice of examples.
    """

    task: str
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    limit: int | None
    batch_size: int
    seed: int

    @cached_property
    def settings(self) -> dict[str, Any]:
        import lm_eval

        settings: dict[str, Any] = {"limit": self.limit, "seed": self.seed}
        if self.task.endswith(".yaml"):
            settings["yaml"] = digest([Path(self.task).read_text(encoding="utf-8")])
        return settings | {"examples": EXAMPLES.get(self.task), "lm_eval": lm_eval.__version__}

    @cached_property
    def tokens(self) -> int:
        return 0  # lm-eval shows its own progress

    def __call__(self, model: PreTrainedModel, advance: Advance) -> dict[str, float]:
        """Every number that lm-eval reports of the task or group, by its name there."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size)
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=[self._task()],
            num_fewshot=EXAMPLES.get(self.task),
            limit=self.limit,
            random_seed=self.seed,
            numpy_random_seed=self.seed,
            torch_random_seed=self.seed,
            fewshot_random_seed=self.seed,
            log_samples=False,
        )
        of_task = next(iter(found["results"].values()))
        if self.task in found["results"]:
            of_task = found["results"][self.task]
        return {
            name.removesuffix(",none"): float(value)
            for name, value in of_task.items()
            if isinstance(value, int | float)
        }

    def _task(self) -> str | dict[str, Any]:
        return _read_task(self.task) if self.task.endswith(".yaml") else self.task


def _read_task(path: str) -> dict[str, Any]:
    try:
        task = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"task {path}: no YAML without functions of its own: {error}") from None
    if not isinstance(task, dict) or "task" not in task:
        raise ValueError(f"task {path}: it names no task; lm-eval's format begins `task: NAME`")
    return task
