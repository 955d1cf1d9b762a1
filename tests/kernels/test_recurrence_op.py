"""What holds of the recurrence whichever backend runs: its errors, its heads, its sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.kernels import relative_error

from lowline.kernels.recurrence import gated_linear_recurrence

FP64 = torch.float64
BACKENDS = ("reference", "torch")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=FP64)


def inputs(B: int = 2, T: int = 70, Q: int = 4, H: int = 2, K: int = 8, V: int = 6) -> dict:
    return {"q_BTQK": normal(B, T, Q, K), "k_BTHK": normal(B, T, H, K),
            "v_BTHV": normal(B, T, H, V), "g": -normal(B, T, H, K).abs()}  # fmt: skip


WRONG = {
    "q, k and v are": {"q_BTQK": normal(2, 70, 8)},
    "k is": {"v_BTHV": normal(2, 69, 2, 6)},
    "unlike batch, time or features": {"q_BTQK": normal(2, 70, 4, 9)},
    "3 query heads are no multiple of the 2": {"q_BTQK": normal(2, 70, 3, 8)},
    "3 key heads and 2 value heads": {"k_BTHK": normal(2, 70, 3, 8)},
    "use one floating type": {"v_BTHV": normal(2, 70, 2, 6).float()},
    "choose from 'key', 'value'": {"gate": "query"},
    "g is .2, 70, 2, 5.": {"g": -normal(2, 70, 2, 5).abs()},
    "it is .2, 70, 2. or .2, 70, 2, 6.": {"gate": "value"},
    "a value gate has no normaliser": {
        "gate": "value", "g": -normal(2, 70, 2, 6).abs(), "normalize": True},
    "not per value": {
        "gate": "value", "g": -normal(2, 70, 2, 6).abs(), "beta_BTH": normal(2, 70, 2)},
    "beta is .2, 70., not .2, 70, 2.": {"beta_BTH": normal(2, 70)},
    "the delta rule has no normaliser": {"beta_BTH": normal(2, 70, 2), "normalize": True},
    "this batch is 2": {"cu_seqlens": torch.tensor([0, 70])},
    "initial_state is .2, 2, 8, 6., not .2, 2, 8, 7.": {
        "initial_state": normal(2, 2, 8, 6), "normalize": True},
    "choose from auto, reference, torch": {"backend": "fast"},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_errors_say_what_is_wrong(message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        gated_linear_recurrence(**{**inputs(), **WRONG[message]})
    assert str(raised.value).startswith("gated_linear_recurrence: ")


@pytest.mark.parametrize("bounds", [[0, 71], [1, 70], [0, 40, 30, 70]])
def test_bounds_of_packed_sequences(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="it rises from 0 to T = 70"):
        gated_linear_recurrence(**inputs(B=1), cu_seqlens=torch.tensor(bounds))


@pytest.mark.parametrize("bounds", [torch.tensor([0.0, 70.0]), torch.tensor([0])])
def test_packed_sequences_are_a_vector_of_integers(bounds: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="a vector of at least two integers"):
        gated_linear_recurrence(**inputs(B=1), cu_seqlens=bounds)


def run(backend: str, tensors: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Outputs, state and gradients of a fixed loss."""
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items() if x is not None}
    o, state = gated_linear_recurrence(**leaves, backend=backend, **options)
    loss = (o * normal(*o.shape)).sum() + (state * normal(*state.shape)).sum()
    return [o, state, *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("delta", [False, True])
def test_shared_states_are_repeated_keys_and_values(backend: str, delta: bool) -> None:
    few = inputs()
    if delta:
        few["k_BTHK"] = torch.nn.functional.normalize(few["k_BTHK"], dim=-1)
        few["beta_BTH"] = normal(2, 70, 2).sigmoid()
    many = {n: x if n == "q_BTQK" else x.repeat_interleave(2, 2) for n, x in few.items()}
    o_few, _ = gated_linear_recurrence(**few, backend=backend)
    o_many, _ = gated_linear_recurrence(**many, backend=backend)
    assert relative_error(o_few, o_many) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_or_values_share_heads(backend: str) -> None:
    tensors = inputs(H=2)
    tensors["k_BTHK"] = normal(2, 70, 1, 8)
    repeated = {**tensors, "k_BTHK": tensors["k_BTHK"].expand(-1, -1, 2, -1)}
    o, state = gated_linear_recurrence(**tensors, backend=backend)
    exact, exact_state = gated_linear_recurrence(**repeated, backend=backend)
    assert relative_error(o, exact) < 1e-12 and relative_error(state, exact_state) < 1e-12
    tensors = {**inputs(H=2), "v_BTHV": normal(2, 70, 1, 6)}
    repeated = {**tensors, "v_BTHV": tensors["v_BTHV"].expand(-1, -1, 2, -1)}
    o, _ = gated_linear_recurrence(**tensors, backend=backend)
    exact, _ = gated_linear_recurrence(**repeated, backend=backend)
    assert relative_error(o, exact) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_normaliser_is_the_sum_of_the_weights(backend: str) -> None:
    """Linear attention as softmax attention writes it: weights over their sum, times V."""
    tensors = {n: x.abs() for n, x in inputs(Q=2).items() if n != "g"}
    q, k, v = (x.transpose(1, 2) for x in tensors.values())
    weights = (q @ k.mT).tril()
    exact = 0.7 * (weights / weights.sum(-1, keepdim=True)) @ v
    o, state = gated_linear_recurrence(**tensors, normalize=True, scale=0.7, backend=backend)
    assert relative_error(o, exact.transpose(1, 2)) < 1e-10
    assert relative_error(state[..., -1], k.sum(2)) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("delta", [False, True])
def test_packed_sequences_are_each_alone(backend: str, delta: bool) -> None:
    tensors = inputs(B=1, T=90)
    tensors["initial_state"] = normal(4, 2, 8, 6)
    if delta:
        tensors["k_BTHK"] = torch.nn.functional.normalize(tensors["k_BTHK"], dim=-1)
        tensors["beta_BTH"] = normal(1, 90, 2).sigmoid()
    bounds = [0, 0, 66, 67, 90]
    o, state = gated_linear_recurrence(
        **tensors, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), backend=backend
    )
    for n in range(4):
        start, end = bounds[n : n + 2]
        alone = {name: x[:, start:end] for name, x in tensors.items() if name != "initial_state"}
        o_n, state_n = gated_linear_recurrence(
            **alone, initial_state=tensors["initial_state"][n : n + 1], backend=backend
        )
        if end > start:
            assert relative_error(o[:, start:end], o_n) < 1e-12
        assert relative_error(state[n : n + 1], state_n) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("at", [1, 64, 69])
def test_a_split_sequence_is_the_whole(backend: str, normalize: bool, at: int) -> None:
    tensors = inputs()
    if normalize:
        tensors = {**tensors, "q_BTQK": tensors["q_BTQK"].abs(), "k_BTHK": tensors["k_BTHK"].abs()}
    whole, end = gated_linear_recurrence(**tensors, normalize=normalize, backend=backend)
    first = {n: x[:, :at] for n, x in tensors.items()}
    rest = {n: x[:, at:] for n, x in tensors.items()}
    o, state = gated_linear_recurrence(**first, normalize=normalize, backend=backend)
    o_rest, state = gated_linear_recurrence(
        **rest, normalize=normalize, initial_state=state, backend=backend
    )
    assert relative_error(torch.cat([o, o_rest], 1), whole) < 1e-10
    assert relative_error(state, end) < 1e-10


def test_no_tokens_leave_the_state() -> None:
    state = normal(2, 2, 8, 6)
    for backend in BACKENDS:
        o, after = gated_linear_recurrence(**inputs(T=0), initial_state=state, backend=backend)
        assert o.shape == (2, 0, 4, 6) and after.equal(state)
