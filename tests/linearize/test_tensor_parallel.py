"""Models with mixers and LoRA over two tensor-parallel ranks equal the same models on one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
from helpers import forked
from helpers.processes import FOR_HELPERS, TESTS

from lowline.linearize.mixers import MIXERS
from lowline.train.config.load import ConfigError, load_config

BASE = TESTS.parent / "configs" / "demo_dense.toml"
CASES = (*MIXERS, "lora", "lora beside a mixer", "qk_norm", "low-rank")
QUICK = ("gated_deltanet", "lolcats", "mamba2", "memory", "lora beside a mixer", "low-rank")
LEARNED = ("gated_deltanet", "hedgehog", "kda", "lolcats", "low-rank", "mamba1", "mamba2",
           "qk_norm", "retention", "slots", "t2r")  # fmt: skip
# Sums run in another order than on one rank: fp32 roundings, 1.2e-7 each. Rectified features (t2r)
# cancel most, to 2e-5 where measured.
TOLERANCE = 1e-4


def marked(cases: Iterable[str]) -> list[Any]:
    return [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in cases]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What two ranks report of a case and of those that run with it."""

    @cache
    def run(quick: bool) -> dict[str, Any]:
        report = tmp_path_factory.mktemp("two") / "report.json"
        names = [case for case in CASES if (case in QUICK) == quick]
        worker = TESTS / "workers" / "parallel_stages.py"
        run = forked.run([str(worker), str(report), *names], env=FOR_HELPERS, timeout=600)
        assert run.returncode == 0, run.stderr[-4000:]
        return json.loads(report.read_text())

    return lambda case: run(case in QUICK)


def assert_equals_one_rank(result: dict[str, Any]) -> None:
    assert result["init"], "initial values differ from one rank"
    assert result["loss"] < 1e-6
    wrong = {name: e for name, e in result["gradients"].items() if not e < TOLERANCE}
    assert not wrong
    assert len(result["gradients"]) == result["trained"]


@pytest.mark.parametrize("case", marked(CASES))
def test_next_token_equals_one_rank(two: Callable[[str], dict[str, Any]], case: str) -> None:
    assert_equals_one_rank(two(case)["next-token"][case])


@pytest.mark.parametrize("case", marked(LEARNED))
def test_transfer_equals_one_rank(two: Callable[[str], dict[str, Any]], case: str) -> None:
    found = two(case)
    assert found["transfer"].keys() == found["next-token"].keys() & set(LEARNED)
    assert_equals_one_rank(found["transfer"][case])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (('--mixer.name="kda"', "--mixer.options={conv = 4}"), "mixer 'kda'.*cannot be split"),
        (
            (
                *('--mixer.name="hedgehog"', '--objective.kind="transfer"'),
                "--objective.attention_weight=0.5",
            ),
            "attention_weight = 0.5 with parallelism.tensor_parallel = 2",
        ),
        (("--lora.rank=4", "--parallelism.pipeline_parallel=2"), "pipeline_parallel = 2 with lora"),
    ],
)
def test_what_cannot_be_split_is_refused(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(BASE, ["--parallelism.tensor_parallel=2", *keys])
