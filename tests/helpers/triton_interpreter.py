"""Triton's interpreter (`TRITON_INTERPRET=1`), corrected for bfloat16.

The interpreter runs a kernel in numpy, without a GPU, program by program. It keeps a bfloat16 as
the uint16 of its bits and, as shipped in Triton 3.7 and 3.9, computes with those integers: sums,
products and comparisons of bfloat16 are silently wrong, and fp32 is truncated to bfloat16 where a
GPU rounds. `install()` widens bfloat16 operands to fp32, exactly, and rounds results to nearest
even, which is what the hardware does. Reductions and atomics of bfloat16 raise: a GPU's order of
rounding differs, so kernels reduce in fp32. Also fixed: `minimum` and `maximum` of NaN, and
associative scans, which become a hundred times faster. Left out, since no kernel here uses them:
libdevice's functions, which return None, and the autotuner.

The interpreter is more permissive than a GPU: races, misaligned loads and too much shared memory
go unnoticed (`aot` finds the last). It multiplies fp32 in full precision whatever `input_precision`
is. In Triton 3.7 it evaluates `a < b < c` as `b < c`: write two comparisons.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from lowline.kernels.backends import interpreting


@functools.cache
def install() -> None:
    """Correct the interpreter of this process. A second call does nothing.

    Raises:
        RuntimeError: `TRITON_INTERPRET=1` is not set; it has to be, before kernels are imported.
    """
    if not interpreting():
        raise RuntimeError("set TRITON_INTERPRET=1 before importing any kernel, then install()")
    _fix_arithmetic()
    _fix_reductions()


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """Convert uint16 bit patterns to the fp32 they stand for, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round fp32 to bfloat16 bit patterns, to nearest, ties to even; every NaN becomes one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    rounded = ((bits + odd + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    from triton import language as tl

    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle: Any) -> Any:
    """Round to bfloat16; comparisons stay as they are."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    if handle.data.dtype == np.bool_:
        return handle
    return TensorHandle(fp32_to_bf16(handle.data), tl.bfloat16)


def _fix_arithmetic() -> None:
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    def in_fp32(method: Any, operands: int) -> Any:
        @functools.wraps(method)
        def fixed(self: Any, *args: Any) -> Any:
            values = args[:operands]
            if not any(_is_bf16(value) for value in values):
                return method(self, *args)
            return _narrow(method(self, *map(_widen, values), *args[operands:]))

        return fixed

    Builder.unary_op = in_fp32(Builder.unary_op, 1)
    Builder.binary_op = in_fp32(Builder.binary_op, 2)
    Builder.create_fma = in_fp32(Builder.create_fma, 3)
    Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)

    shipped_dot, shipped_cast = Builder.create_dot, Builder.cast_impl
    shipped_fp_to_fp, shipped_atomic = Builder.create_fp_to_fp, Builder.create_atomic_rmw

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return shipped_dot(self, _widen(a), _widen(b), *rest)

    def convert(shipped: Any, self: Any, source: Any, target: Any, *rest: Any) -> Any:
        if target.scalar == tl.bfloat16:
            return source if _is_bf16(source) else _narrow(_to_fp32(source))
        if not _is_bf16(source):
            return shipped(self, source, target, *rest)
        wide = _widen(source)
        return wide if target.scalar == tl.float32 else shipped(self, wide, target, *rest)

    def _to_fp32(handle: Any) -> Any:
        return TensorHandle(handle.data.astype(np.float32), tl.float32)

    def atomic(self: Any, operation: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        if _is_bf16(value):
            raise TypeError("atomics of bfloat16 are not interpreted: accumulate in fp32")
        return shipped_atomic(self, operation, pointer, value, *rest)

    Builder.create_dot = dot
    Builder.cast_impl = lambda self, *args: convert(shipped_cast, self, *args)
    Builder.create_fp_to_fp = lambda self, *args: convert(shipped_fp_to_fp, self, *args)
    Builder.create_atomic_rmw = atomic
    if not hasattr(Builder, "get_bf16"):  # Triton 3.7
        Builder.get_bf16 = lambda self, value: _narrow(self.get_fp32(value))


def _fix_reductions() -> None:
    from triton.runtime.interpreter import ReduceScanOpInterface, ScanOps

    shipped = ReduceScanOpInterface.check_tensor

    def check_tensor(self: Any, inputs: Any) -> None:
        shipped(self, inputs)
        if any(_is_bf16(tensor.handle) for tensor in inputs):
            raise TypeError("reductions of bfloat16 are not interpreted: cast to fp32 first")

    def scan(self: Any, inputs: Any) -> list[Any]:
        """Scan rows: a step combines all elements of a row; the shipped one combines one element,
        in thousands of steps.
        """
        axis = self.axis % inputs[0].handle.data.ndim
        rows = [
            [self.to_tensor(part, x.dtype) for part in np.split(data, data.shape[axis], axis)]
            for x in inputs
            for data in [x.handle.data]
        ]
        out = [list(step) for step in zip(*rows, strict=True)]
        for i in range(1, len(out)):
            new = self.combine_fn.fn(*out[i - 1], *out[i])
            out[i] = list(new) if isinstance(new, tuple) else [new]
        return [
            self.to_tensor(np.concatenate([r.handle.data for r in column], axis), x.dtype)
            for column, x in zip(zip(*out, strict=True), inputs, strict=True)
        ]

    ReduceScanOpInterface.check_tensor = check_tensor
    ScanOps.generic_scan = scan
