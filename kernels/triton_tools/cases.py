"""One way in which a Triton kernel is launched, written down so that it can be compiled anywhere.

A module `triton_*.py` of an op lists the shapes it promises to run well as `AOT_CASES`, beside its
kernels; `lowline.kernels.triton_tools.aot` finds the lists and compiles what they name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One specialisation of a kernel.

    Args:
        kernel: the `@triton.jit` function.
        shape: what the table calls this case ("bf16, D 128, w 64").
        types: the type of each argument that is no constant: "*bf16", "*fp32", "i32", "fp32".
        constants: the value of each `tl.constexpr` argument, and of each argument launched as
            None or 1, which Triton makes constant too.
        num_warps, num_stages: as at the launch.
        div16: the integer arguments that are multiples of 16 in this case. Pointers always are.
            A launch finds this out by itself; compiled without it, loads are scalar and spill.
        tensor_cores: the products of this case must run on tensor cores. False for a kernel
            without a product, and for fp32 inputs, which are multiplied in full precision.
    """

    kernel: Any
    shape: str
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    div16: tuple[str, ...] = ()
    tensor_cores: bool = True

    def __post_init__(self) -> None:
        names = set(self.kernel.arg_names)
        given = set(self.types) | set(self.constants)
        if names != given:
            raise ValueError(
                f"{self.kernel.__name__} [{self.shape}]: no type or constant for"
                f" {sorted(names - given)}, and no argument called {sorted(given - names)}"
            )
        if not set(self.div16) <= set(self.types):
            raise ValueError(
                f"{self.kernel.__name__} [{self.shape}]: div16 names"
                f" {sorted(set(self.div16) - set(self.types))}, which have no type"
            )
