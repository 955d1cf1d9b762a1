"""Operators that torch.compile can call, with their derivatives, from four functions each.

An op is described by a NamedTuple of its arguments, tensors with a gradient first:

    class Call(NamedTuple):
        x: Tensor
        bias: Tensor | None
        lengths: Tensor | None
        silu: bool

    op = define("lowline::name", Call, forward, outputs, backward, gradients=2, returns=1)
    y = op(Call(x, bias, None, True))

which registers `lowline::name` and `lowline::name_backward`, their shapes without data, and
autograd. A second derivative raises: the backward operator has none. On a CPU, where nothing is
traced, the functions are called without the dispatch of an operator, which would cost time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
}


def records(*given: Any) -> bool:
    """Return whether autograd records what is computed from these tensors and other values."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)


def define(
    name: str,
    Call: type[Any],
    forward: Callable[[Any], tuple[Tensor, ...]],
    outputs: Callable[[Any], tuple[Tensor, ...]],
    backward: Callable[[tuple[Tensor, ...], tuple[Tensor, ...], Any], Sequence[Tensor | None]],
    *,
    gradients: int,
    returns: int,
    differentiable: int | None = None,
    kept: Sequence[int] = (),
    devices: str | None = None,
) -> Callable[[Any], Any]:
    """Register an operator and return the function that calls it.

    Args:
        name: "lowline::...", unique.
        Call: the NamedTuple of its arguments.
        forward: computes the outputs from a Call.
        outputs: allocates tensors like the outputs, without values; runs without data, too.
        backward: from the gradients of the differentiable outputs, the kept outputs and the Call,
            the gradient of each of the first `gradients` arguments; anything where that is None.
            They are cast to their arguments' types.
        gradients: how many arguments have a gradient.
        returns: how many outputs there are; one is returned as a tensor.
        differentiable: how many of them, the first, have a gradient; all where None.
        kept: the indices of the outputs that backward takes.
        devices: the device type that it is restricted to; None for any.
    """
    flowing = returns if differentiable is None else differentiable
    hints = get_type_hints(Call)
    defaults = {f: f"={value}" for f, value in Call._field_defaults.items()}
    arguments = [
        f"{_TYPES[hints[field]]} {field}{defaults.get(field, '')}" for field in Call._fields
    ]
    before = [f"Tensor grad_{i}" for i in range(flowing)] + [f"Tensor kept_{i}" for i in kept]
    results = ", ".join(["Tensor"] * returns)

    def run(*given: Any) -> Any:
        return _result(forward(Call(*given)))

    def shapes(*given: Any) -> Any:
        return _result(outputs(Call(*given)))

    def run_backward(*given: Any) -> list[Tensor]:
        grads, saved = given[:flowing], given[flowing : len(before)]
        call = Call(*given[len(before) :])
        found = backward(grads, saved, call)
        assert len(found) == gradients
        return [
            _nothing(given[0]) if x is None or d is None else d.to(x.dtype).contiguous()
            for d, x in zip(found, call, strict=False)
        ]

    def backward_shapes(*given: Any) -> list[Tensor]:
        inputs = given[len(before) : len(before) + gradients]
        return [_nothing(given[0]) if x is None else x.new_empty(x.shape) for x in inputs]

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        made = output if returns > 1 else (output,)
        ctx.save_for_backward(
            *(made[i] for i in kept), *(x for x in inputs if x is None or isinstance(x, Tensor))
        )
        ctx.constants = {
            i: x for i, x in enumerate(inputs) if not (x is None or isinstance(x, Tensor))
        }
        ctx.mark_non_differentiable(*made[flowing:])

    def differentiate(
        ctx: Any, *grads: Tensor, by: Callable[..., Any] | None = None
    ) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        tensors = iter(saved[len(kept) :])
        inputs = [
            ctx.constants[i] if i in ctx.constants else next(tensors)
            for i in range(len(Call._fields))
        ]
        found = (by or op_backward)(*grads[:flowing], *saved[: len(kept)], *inputs)
        wanted = [None if x is None else d for d, x in zip(found, inputs, strict=False)]
        return (*wanted, *[None] * (len(inputs) - gradients))

    op = torch.library.custom_op(
        name, run, mutates_args=(), device_types=devices,
        schema=f"({', '.join(arguments)}) -> ({results})",
    )  # fmt: skip
    op_backward = torch.library.custom_op(
        f"{name}_backward", run_backward, mutates_args=(), device_types=devices,
        schema=f"({', '.join(before + arguments)}) -> Tensor[]",
    )  # fmt: skip
    op.register_fake(shapes)
    op_backward.register_fake(backward_shapes)
    op.register_autograd(differentiate, setup_context=set_up)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> Any:
            made = run(*given)
            set_up(ctx, given, made)
            return made

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            return differentiate(ctx, *grads, by=run_backward)

    def call_op(call: Any) -> Any:
        if devices != "cpu" or torch.compiler.is_compiling():
            return op(*call)
        return Direct.apply(*call) if records(*call) else run(*call)

    return call_op


def _result(made: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return tuple(made) if len(made) > 1 else made[0]


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)
