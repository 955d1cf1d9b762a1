"""The compile check's cases of the gated linear recurrence: its own launches, recorded.

The passes run on tensors without data, with a `run` that writes a launch down where `on_device`
would start it; so the table shows what is launched, at the shapes this op promises to run well.
Those are bf16: fp32 inputs are multiplied in full precision, without tensor cores, and some of
their kernels spill; that path is for checking, not for speed. So do those of the delta rule with
K = 256.
"""

from __future__ import annotations

from typing import Any

import torch

from lowline.kernels.recurrence.triton.backend import backward, forward, step
from lowline.kernels.recurrence.triton.launch import OPTIONS
from lowline.kernels.triton_tools import Case

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    int: "i32",
    float: "fp32",
}
# (dtype, K, V, gate, delta, groups, packed)
_SHAPES = [
    (torch.bfloat16, 64, 64, "none", False, 1, False),
    (torch.bfloat16, 64, 65, "none", False, 1, False),  # with a normaliser
    (torch.bfloat16, 128, 128, "scalar", False, 4, True),
    (torch.bfloat16, 128, 128, "key", False, 4, True),
    (torch.bfloat16, 128, 128, "value", False, 1, False),
    (torch.bfloat16, 128, 128, "scalar", True, 1, True),
    (torch.bfloat16, 128, 128, "key", True, 1, False),
]


def record(
    dtype: torch.dtype, K: int, V: int, gate: str, delta: bool, groups: int, packed: bool
) -> list[Case]:
    """Every launch of a forward, a backward and a decode step at one shape."""
    cases: list[Case] = []
    shape = f"{'bf16' if dtype == torch.bfloat16 else 'fp32'}, K {K}, V {V}, {gate} gate"
    shape += ", delta" * delta + ", GQA" * (groups > 1) + ", packed" * packed

    def run(kernel: Any, grid: Any, arguments: tuple[Any, ...], **constants: Any) -> None:
        types: dict[str, str] = {}
        for name, value in zip(kernel.arg_names, arguments, strict=False):
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value)
            if value is None or (kind is int and value == 1):
                constants[name] = value
            else:
                types[name] = _TYPES[kind]
        aligned = tuple(n for n in types if n.startswith("stride"))
        cases.append(
            Case(
                kernel=kernel,
                shape=shape,
                types=types,
                constants=constants,
                div16=aligned if K % 16 == V % 16 == 0 else (),
                tensor_cores=dtype == torch.bfloat16
                and kernel.__name__ not in ("cumulate_kernel", "step_kernel"),
                **OPTIONS,
            )
        )

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    T, H = 4096, 8
    q, k, v = empty(1, T, H * groups, K), empty(1, T, H, K), empty(1, T, H, V)
    features = {"none": None, "scalar": (), "key": (K,), "value": (V,)}[gate]
    g = None if features is None else empty(1, T, H, *features)
    beta = empty(1, T, H) if delta else None
    state = torch.empty(1 + packed, H, K, V, device="meta")
    cu_seqlens = torch.empty(3, dtype=torch.int64, device="meta") if packed else None
    side = "value" if gate == "value" else "key"
    inputs = (q, k, v, g, beta, state, cu_seqlens, side, 0.5)
    o, final = forward(*inputs, run)
    backward(o, final, *inputs, run)
    g, beta = (None if x is None else x[:, 0] for x in (g, beta))
    step(q[:, 0], k[:, 0], v[:, 0], g, beta, state[:1], side, 0.5, run)
    return cases


def _distinct(cases: list[Case]) -> list[Case]:
    """Without launches that compile to the same code."""
    seen: dict[Any, Case] = {}
    for case in cases:
        seen.setdefault((case.kernel.__name__, str(case.types), str(case.constants)), case)
    return list(seen.values())


AOT_CASES = _distinct([case for shape in _SHAPES for case in record(*shape)])
