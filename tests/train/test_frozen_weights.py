"""What a run does not train is stored in the precision that it computes in, and nothing changes."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import training

from lowline.train.config.folder import saved_steps

BF16 = '--training.precision="bfloat16"'
TRANSFER = (*training.MIXER, BF16, '--objective.kind="transfer"', "--optimizer.lr=0.1")
LORA = (*training.MIXER, BF16, "--lora.rank=4", "--optimizer.lr=0.1")
SHORT = (  # a CPU computes bfloat16 slowly
    *("--training.steps=6", "--checkpoint.every=3", "--evaluation.every=3"),
    *("--training.global_batch_size=2", "--evaluation.max_tokens=256"),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return training.save_teacher(tmp_path_factory.mktemp("teacher") / "dense")


def stored_dtypes(output: Path) -> dict[str, torch.dtype]:
    """Return the dtype of every parameter in a run's newest checkpoint."""
    folder = output / "checkpoint"
    reader = dcp.FileSystemReader(folder / f"step-{saved_steps(folder)[-1]}")
    stored = reader.read_metadata().state_dict_metadata
    kinds = ("layers.", "tok_embeddings.", "norm.", "lm_head.")
    return {name: t.properties.dtype for name, t in stored.items() if name.startswith(kinds)}


def everything_in_fp32():
    return mock.patch("lowline.train.model.parallelize.store_frozen")


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    """A run from the teacher's weights; of the same arguments, the same one."""

    @cache
    def run(*arguments: str, in_fp32: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("trained") / "run"
        weights = f"--checkpoint.initial_weights={teacher}"  # `arguments` may name others
        with everything_in_fp32() if in_fp32 else nullcontext():
            assert training.train_here(folder, weights, *arguments, *SHORT) == 0
        return folder

    return run


@pytest.mark.parametrize("arguments", [TRANSFER, LORA], ids=["transfer", "lora"])
def test_losses_are_those_with_frozen_weights_in_fp32(trained, arguments):
    half, full = trained(*arguments), trained(*arguments, in_fp32=True)
    assert training.curve(half) == training.curve(full)
    assert set(stored_dtypes(full).values()) == {torch.float32}
    for name, dtype in stored_dtypes(half).items():
        trains = ".mixer." in name or ".lora_" in name
        assert dtype == (torch.float32 if trains else torch.bfloat16), name


def test_random_frozen_weights_are_those_of_fp32_rounded(tmp_path):
    """Also what is drawn after them is the same, and so every loss."""
    assert training.train_here(tmp_path / "half", *LORA, *SHORT) == 0
    with everything_in_fp32():
        assert training.train_here(tmp_path / "full", *LORA, *SHORT) == 0
    assert training.curve(tmp_path / "half") == training.curve(tmp_path / "full")


def test_a_checkpoint_with_frozen_weights_in_fp32_resumes(trained, teacher, tmp_path):
    whole = trained(*TRANSFER, in_fp32=True)
    training.cut(whole, tmp_path / "cut", 3)
    arguments = (f"--checkpoint.initial_weights={teacher}", *TRANSFER, *SHORT)
    assert training.train_here(tmp_path / "cut", *arguments) == 0
    assert training.curve(tmp_path / "cut") == training.curve(whole)
    assert torch.bfloat16 in stored_dtypes(tmp_path / "cut").values()


def test_what_a_stage_merged_into_frozen_weights_is_rounded_once(trained):
    """LoRA's factors come in fp32, so the next stage begins with W + B·A in fp32, rounded."""
    lora = trained(*LORA)
    second = (f"--checkpoint.initial_weights={lora / 'checkpoint' / 'step-6'}", *TRANSFER)
    assert training.curve(trained(*second)) == training.curve(trained(*second, in_fp32=True))


def test_in_fp32_nothing_is_stored_otherwise(trained):
    run = trained(*TRANSFER, '--training.precision="float32"')
    assert set(stored_dtypes(run).values()) == {torch.float32}
