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
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowline.errors import LowlineError
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
        if _is_file(name):
            _read_task(name)
    try:
        theirs = _tasks_of(names)
    except ImportError as error:
        raise LowlineError(
            f"task {names[0]!r} is not one of {', '.join(known_here)}; other tasks need lm-eval "
            f"({error}): pip install lm-eval"
        ) from None
    for name in names:
        if not _is_file(name) and name not in theirs.all_tasks:
            near = difflib.get_close_matches(name, [*known_here, *theirs.all_tasks], n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise LowlineError(
                f"task {name!r} is not one of {', '.join(known_here)}, nor of lm-eval's{hint}"
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
        if _is_file(self.task):
            settings["yaml"] = digest([Path(self.task).read_text(encoding="utf-8")])
        return settings | {"examples": EXAMPLES.get(self.task), "lm_eval": lm_eval.__version__}

    @cached_property
    def tokens(self) -> int:
        return 0  # lm-eval shows its own progress

    def __call__(self, model: PreTrainedModel, advance: Advance) -> dict[str, float]:
        """Return every number that lm-eval reports of the task or group, by its name there."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size)
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=[_read_task(self.task) if _is_file(self.task) else self.task],
            task_manager=_tasks_of([self.task]),
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


def _is_file(task: str) -> bool:
    return task.endswith(".yaml")


def _tasks_of(names: Sequence[str]) -> Any:
    """lm-eval's TaskManager; where one of its own is named, it takes many seconds to list them."""
    return _task_manager(not all(map(_is_file, names)))


@lru_cache
def _task_manager(include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _read_task(path: str) -> dict[str, Any]:
    try:
        task = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LowlineError(f"task {path}: no YAML without functions of its own: {error}") from None
    if not isinstance(task, dict) or "task" not in task:
        raise LowlineError(f"task {path}: it names no task; lm-eval's format begins `task: NAME`")
    return task
