"""What `lowline bench kernels` times: functions without arguments, by name.

"sdpa" is torch's causal attention; "BACKEND KIND" is that backend's forward + backward, the kind a
gate of the recurrence, "delta" (with a gate per head: Gated DeltaNet), or "window"; steps of
decoding are separate functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lowline.tools.bench.timing import Cases

if TYPE_CHECKING:
    import torch

GATES = ("none", "scalar", "key", "value", "delta")
WINDOW = 64  # exact tokens
SINKS, SUMMARY = 4, 192  # of a step of slots and of rows: exact first tokens, and slots or rows
DRAFT = 4  # proposed tokens of a verify, to which the last accepted one comes
SCAN = (512, 16)  # channels, states a channel


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Where and how large: a batch of one, fp32 on a CPU, bf16 on a CUDA device."""

    device: str
    heads: int
    head_dim: int

    def randn(self, *shape: int) -> torch.Tensor:
        import torch

        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        return torch.randn(shape, device=self.device, dtype=dtype)


def training_cases(shape: Shape, names: Iterable[str], length: int) -> Cases:
    """Forward + backward of each name at a length; backends share the inputs of a kind."""
    inputs: dict[str, tuple[list[Any], torch.Tensor]] = {}

    def case(name: str) -> Callable[[], None]:
        backend, _, kind = name.partition(" ")
        if name == "sdpa":
            return attention_case(shape, length)
        if kind not in inputs:
            make: Any = window_inputs if kind == "window" else recurrence_inputs
            tensors = make(shape, length, kind)
            inputs[kind] = tensors, shape.randn(*tensors[2].shape)
        call = window_call(backend) if kind == "window" else recurrence_call(backend, kind)
        tensors, grad = inputs[kind]
        return forward_backward(call, grad, *(x for x in tensors if x is not None))

    return {name: case(name) for name in names}


def forward_backward(
    function: Callable[..., torch.Tensor], grad: torch.Tensor, *tensors: torch.Tensor
) -> Callable[[], None]:
    """Return a function that runs `function` on the tensors and takes the gradient of each."""
    import torch

    leaves = [x.detach().requires_grad_() for x in tensors]

    def run() -> None:
        torch.autograd.grad(function(*leaves), leaves, grad)

    return run


def attention_case(shape: Shape, length: int) -> Callable[[], None]:
    """Causal attention, in the layout in which it is fastest."""
    import torch.nn.functional as F

    q, k, v, grad = (shape.randn(1, shape.heads, length, shape.head_dim) for _ in range(4))
    return forward_backward(partial(F.scaled_dot_product_attention, is_causal=True), grad, q, k, v)


def recurrence_inputs(shape: Shape, length: int, kind: str) -> list[torch.Tensor | None]:
    """q, k, v, g and β."""
    import torch.nn.functional as F

    sizes = (1, length, shape.heads, shape.head_dim)
    q, k, v = (shape.randn(*sizes) for _ in range(3))
    g = beta = None
    if kind != "none":
        by_feature = kind in ("key", "value")
        g = F.logsigmoid(shape.randn(*sizes[: 4 if by_feature else 3]) + 3)
    if kind == "delta":
        k, beta = F.normalize(k, dim=-1), shape.randn(*sizes[:3]).sigmoid()
    return [q, k, v, g, beta]


def recurrence_call(backend: str, kind: str) -> Callable[..., torch.Tensor]:
    """Return the recurrence's outputs, of tensors in the order of `recurrence_inputs`, None left
    out.
    """
    from lowline.kernels.recurrence import gated_linear_recurrence

    options: Any = {"gate": "value" if kind == "value" else "key", "backend": backend}
    return lambda *tensors: gated_linear_recurrence(*tensors, **options)[0]


def window_inputs(shape: Shape, length: int, kind: str = "window") -> list[torch.Tensor]:
    """q, k, v and the features of q and k."""
    q, k, v, x, y = (shape.randn(1, length, shape.heads, shape.head_dim) for _ in range(5))
    return [q, k, v, x.softmax(-1), y.softmax(-1)]


def window_call(backend: str) -> Callable[..., torch.Tensor]:
    """Window-plus-linear attention's outputs, of `window_inputs`."""
    from lowline.kernels.window import window_linear_attention

    return lambda *tensors: window_linear_attention(*tensors, window=WINDOW, backend=backend)[0]


# ---------------------------------------------------------------------------------------- decode


def cache_case(shape: Shape, context: int) -> Callable[[], object]:
    """Return a token of attention over a cache: written into its place, then read with all
    before it.
    """
    import torch.nn.functional as F

    k_cache, v_cache = (shape.randn(1, shape.heads, context, shape.head_dim) for _ in range(2))
    q, k, v = (shape.randn(1, shape.heads, 1, shape.head_dim) for _ in range(3))

    def step() -> torch.Tensor:
        k_cache[:, :, -1:] = k
        v_cache[:, :, -1:] = v
        return F.scaled_dot_product_attention(q, k_cache, v_cache)

    return step


def step_case(shape: Shape, backend: str, kind: str, context: int) -> Callable[[], object]:
    """Return a token of the recurrence after `context` others."""
    from lowline.kernels.recurrence import gated_linear_recurrence, recurrence_step

    gate: Any = "value" if kind == "value" else "key"
    before = recurrence_inputs(shape, context, kind)
    _, state = gated_linear_recurrence(*before, gate=gate, backend="torch")  # type: ignore[arg-type]
    token = [None if x is None else x[:, 0] for x in recurrence_inputs(shape, 1, kind)]
    options: Any = {"state": state, "gate": gate, "backend": backend}
    return partial(recurrence_step, *token, **options)  # type: ignore[arg-type]


def verify_case(shape: Shape, backend: str) -> Callable[[], object]:
    """Return a call that verifies proposals by the recurrence, all of those before accepted."""
    import torch

    from lowline.kernels.recurrence import recurrence_verify

    block: list[Any] = recurrence_inputs(shape, DRAFT + 1, "scalar")
    state = torch.zeros(1, shape.heads, shape.head_dim, shape.head_dim, device=shape.device)
    options: Any = {"state": state, "backend": backend}
    _, pending = recurrence_verify(*block, **options)
    accepted = torch.tensor([DRAFT + 1], device=shape.device)
    return partial(recurrence_verify, *block, pending=pending, accepted_B=accepted, **options)


def window_step_case(shape: Shape, backend: str, context: int) -> Callable[[], object]:
    """Return a token of window-plus-linear attention after `context` others."""
    from lowline.kernels.window import window_linear_attention, window_linear_step

    _, state = window_linear_attention(
        *window_inputs(shape, context), window=WINDOW, backend="torch"
    )
    token = [x[:, 0] for x in window_inputs(shape, 1)]
    return partial(window_linear_step, *token, state=state, backend=backend)


def slots_step_case(shape: Shape, backend: str, context: int) -> Callable[[], object]:
    """Return a token of window-and-slots attention after `context` others."""
    import torch

    from lowline.kernels.slots import slot_window_attention, slot_window_step

    bias = torch.zeros(shape.heads, SUMMARY, device=shape.device)

    def inputs(length: int) -> tuple[Any, ...]:
        slot = torch.randint(SUMMARY, (1, length, shape.heads), device=shape.device)
        q, k, v = (shape.randn(1, length, shape.heads, shape.head_dim) for _ in range(3))
        return q, k, v, slot, bias

    _, state = slot_window_attention(*inputs(context), window=WINDOW, sinks=SINKS)
    q, k, v, slot, _ = inputs(1)
    token = (q[:, 0], k[:, 0], v[:, 0], slot[:, 0])
    return partial(slot_window_step, *token, bias, state=state, backend=backend)


def rows_step_case(shape: Shape, backend: str, context: int) -> Callable[[], object]:
    """Return a token of window-and-rows attention after `context` others."""
    from lowline.kernels.memory import row_memory_attention, row_memory_step

    how: Any = {"exact": SUMMARY, "block": 16, "horizon": 512}
    before, token = ([shape.randn(1, n, shape.heads, shape.head_dim) for _ in range(3)]
                     for n in (context, 1))  # fmt: skip
    _, state = row_memory_attention(*before, window=WINDOW, sinks=SINKS, **how)
    now = [x[:, 0] for x in token]
    return partial(row_memory_step, *now, state=state, backend=backend, **how)


# ------------------------------------------------------------------------------------------- scan


def scan_case(shape: Shape, backend: str, length: int) -> Callable[[], None]:
    """Forward + backward of the selective scan."""
    from lowline.kernels.scan import selective_scan

    channels, states = SCAN
    x, dt, b, c = (shape.randn(1, length, n) for n in (channels, channels, states, states))
    rates = -shape.randn(channels, states).exp()

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return selective_scan(*tensors, dt_softplus=True, backend=backend)[0]  # type: ignore

    return forward_backward(call, shape.randn(*x.shape), x, dt, rates, b, c)


def scan_bytes(shape: Shape, length: int) -> int:
    """Return what forward + backward must move.

    The forward reads x, dt, B, C and writes y; the backward reads those four and dy, and writes
    four gradients.
    """
    channels, states = SCAN
    return length * shape.randn(1).element_size() * (8 * channels + 6 * states)
