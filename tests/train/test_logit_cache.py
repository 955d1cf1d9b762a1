"""A teacher's top-k tokens on disk: the loss they give, and runs that write and find them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import training

from lowline.linearize.losses import distillation_loss, top_k_distillation_loss
from lowline.train.config.load import load_config
from lowline.train.objectives import distill as objectives
from lowline.train.objectives.logit_cache import LogitCache, top_k_of

V = 50


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(2, 7, V, generator=torch.Generator().manual_seed(seed))


def labels() -> torch.Tensor:
    found = torch.zeros(2, 7, dtype=torch.int64)
    found[1, 3:] = -100
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_loss_and_gradient(k, temperature):
    """Against the divergence of the merged distributions in fp64; all of it where k = V - 1."""
    teacher, student = logits(0), logits(1).requires_grad_()
    log_p, ids = top_k_of(teacher, torch.nn.Identity(), k, temperature, chunks=3)
    assert log_p.dtype == torch.float16 and log_p.shape == (2, 7, k + 1) and ids.shape == (2, 7, k)
    loss = top_k_distillation_loss(student, log_p, ids, labels(), temperature)

    p = (teacher.double() / temperature).softmax(-1)
    best = p.topk(k, -1).indices
    assert torch.equal(best, ids)
    exact = student.detach().double().requires_grad_()
    q = (exact / temperature).softmax(-1)

    def merged(x):
        chosen = x.gather(-1, best)
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)

    kl = (merged(p) * (merged(p).log() - merged(q).log())).sum(-1)
    expected = temperature**2 * kl[labels() == 0].sum()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    ours = torch.autograd.grad(loss, student)[0]
    theirs = torch.autograd.grad(expected, exact)[0]
    assert (ours - theirs).abs().max() <= 2e-3 * theirs.abs().max()
    full = distillation_loss(student, teacher, labels(), temperature)
    assert loss <= full * 1.001
    if k == V - 1:
        assert loss.item() == pytest.approx(full.item(), rel=1e-3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return training.save_teacher(tmp_path_factory.mktemp("teacher") / "dense")


def arguments(teacher: Path, cache: Path, *more: str) -> tuple[str, ...]:
    small = ("--training.global_batch_size=2", "--evaluation.max_tokens=384")
    how = (f"--objective.logit_cache={cache}", "--objective.top_k=16")
    return training.distilled(teacher, *small, *how, *more)


@pytest.fixture(scope="module")
def first(teacher, tmp_path_factory) -> tuple[Path, Path]:
    """A run that wrote a cache, and the cache."""
    folder = tmp_path_factory.mktemp("first")
    assert training.train_here(folder / "run", *arguments(teacher, folder / "cache")) == 0
    return folder / "run", folder / "cache"


def without_teacher(monkeypatch):
    def build(*_):
        raise AssertionError("a teacher was built")

    monkeypatch.setattr(objectives, "build_teacher", build)


def test_a_second_run_needs_no_teacher(teacher, first, tmp_path, monkeypatch):
    """Its losses are the first one's bit for bit; also where it was killed and goes on."""
    run, cache = first
    files = sorted(cache.glob("??/*.safetensors"))
    assert len(files) >= 12 * 2  # a row of each step, and the held-out ones
    saved = load_config(run / "config.toml")
    predicted = saved.objective.disk_bytes(saved) / (12 * 2 + 384 // 64)
    assert all(predicted < path.stat().st_size < predicted + 512 for path in files)
    without_teacher(monkeypatch)
    given = arguments(teacher, cache)
    assert training.train_here(tmp_path / "second", *given) == 0
    assert training.curve(tmp_path / "second") == training.curve(run)
    training.cut(run, tmp_path / "cut", 8)
    assert training.train_here(tmp_path / "cut", *given) == 0
    assert training.curve(tmp_path / "cut") == training.curve(run)
    small = arguments(teacher, cache, "--training.local_batch_size=1")
    assert training.train_here(tmp_path / "small", *small) == 0
    assert training.losses(tmp_path / "small") == pytest.approx(training.losses(run), rel=1e-4)
    assert sorted(cache.glob("??/*.safetensors")) == files


def test_what_is_missing_is_written_again(teacher, first, tmp_path):
    run, cache = first
    shutil.copytree(cache, tmp_path / "cache")
    files = sorted((tmp_path / "cache").glob("??/*.safetensors"))
    before = [path.read_bytes() for path in files]
    for path in files[::3]:
        path.unlink()
    assert training.train_here(tmp_path / "again", *arguments(teacher, tmp_path / "cache")) == 0
    assert training.curve(tmp_path / "again") == training.curve(run)
    assert [path.read_bytes() for path in files] == before
    assert sorted((tmp_path / "cache").glob("??/*")) == files


@pytest.mark.slow  # torchrun
def test_two_ranks_are_one(teacher, first, tmp_path):
    """They write what one rank writes, also where a rank lacks what the other has."""
    run, cache = first
    shutil.copytree(cache, tmp_path / "cache")
    files = sorted((tmp_path / "cache").glob("??/*.safetensors"))
    for path in files[: len(files) // 2]:
        path.unlink()
    given = arguments(teacher, tmp_path / "cache")
    done = training.launch(tmp_path / "two", *given, processes=2)
    assert done.returncode == 0, done.stderr
    assert training.losses(tmp_path / "two") == pytest.approx(training.losses(run), rel=1e-4)
    assert sorted((tmp_path / "cache").glob("??/*")) == files


def test_a_damaged_file(teacher, first, tmp_path):
    _, cache = first
    shutil.copytree(cache, tmp_path / "cache")
    held = LogitCache(tmp_path / "cache", teacher, 16, 1.0)
    ids, positions = torch.arange(64)[None], torch.arange(64)[None]
    assert held.read(ids, positions) is None
    made = top_k_of(torch.randn(1, 64, V), torch.nn.Identity(), 16, 1.0, 1)
    held.write(ids, positions, made)
    found = held.read(ids, positions)
    assert all(torch.equal(a, b) for a, b in zip(found, made, strict=True))
    assert held.read(ids, positions.flip(1)) is None
    (path,) = held._paths(ids, positions)
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path.name} .*; remove it"):
            held.read(ids, positions)


def test_refusals(teacher, first, tmp_path, capsys, monkeypatch):
    """Each before anything is trained."""
    _, cache = first

    def refused(*given: str) -> str:
        assert training.train_here(tmp_path / "run", *given) == 2
        return capsys.readouterr().err

    given = arguments(teacher, cache)
    assert "'top_k': 16" in refused(*given, "--objective.top_k=32")
    assert "choose another folder" in refused(*given, "--objective.temperature=2")
    plain = tuple(g for g in given if "logit_cache" not in g)
    assert "top_k = 16 without a logit_cache" in refused(*plain)
    empty = arguments(teacher, tmp_path / "new")
    assert "of a vocabulary of 4096" in refused(*empty, "--objective.top_k=4096")
    damaged = tmp_path / "damaged" / "manifest.json"
    damaged.parent.mkdir()
    damaged.write_text('{"teacher":')
    assert f"{damaged} is damaged" in refused(*arguments(teacher, damaged.parent))
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("lowline.train.objectives.logit_cache.shutil.disk_usage", lambda _: usage)
    empty += ("--training.global_batch_size=8",)
    assert "the logits take up to 0.001 GB more, 0.000 GB are free" in refused(*empty)
    assert not (tmp_path / "run").exists()


def test_rest_of_the_vocabulary_is_one():
    """A student that moves mass among tokens outside the k learns nothing from it."""
    teacher, student = logits(0), logits(1)
    log_p, ids = top_k_of(teacher, torch.nn.Identity(), 5, 1.0, 1)
    outside = torch.ones_like(student).scatter(-1, ids, 0.0).bool()
    order = torch.rand_like(student).masked_fill(~outside, 2).argsort(-1)
    moved = student.clone()
    places = outside.nonzero().view(2, 7, -1, 3)[..., 2]
    moved.scatter_(-1, places, student.gather(-1, order[..., : places.shape[-1]]))
    assert not torch.equal(moved, student)
    a, b = (top_k_distillation_loss(x, log_p, ids, labels()) for x in (student, moved))
    torch.testing.assert_close(a, b)
    p, q = F.softmax(student, -1), F.softmax(moved, -1)
    torch.testing.assert_close(p.gather(-1, ids), q.gather(-1, ids))
