"""The Triton kernels compile for GPUs, without spills, within the chip, and as the table says."""

import dataclasses
from itertools import cycle
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from lowline.kernels.triton_tools import aot
from lowline.kernels.triton_tools.aot import Case
from lowline.kernels.triton_tools.launch import launch, recording

TABLE = Path(__file__).parents[2] / "docs" / "dev" / "triton_aot.md"
QUICK = {  # one or two kernels of every module: with and without products, forward and backward
    *("conv._forward_kernel", "feature_map._backward_kernel", "scan._backward_kernel"),
    *("recurrence.scores_kernel", "recurrence.states_backward_kernel", "recurrence.step_kernel"),
    *("window.forward_kernel", "window.reverse_states_kernel"),
    *("memory.step_kernel", "slots.step_kernel"),
}


@triton.jit
def _copy(x_ptr, o_ptr, n: tl.constexpr, TIMES: tl.constexpr):
    """Holds TIMES blocks at once: more than the registers, where that is much."""
    at = tl.arange(0, n)
    x = tl.load(x_ptr + at[None, :] + n * tl.arange(0, TIMES)[:, None])
    tl.debug_barrier()
    tl.store(o_ptr + at[None, :] + n * tl.arange(0, TIMES)[:, None], x + tl.sum(x))


@triton.jit
def _square(x_ptr, o_ptr, n: tl.constexpr):
    at = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(o_ptr + at, tl.dot(x, x).to(o_ptr.dtype.element_ty))


def _copy_case(times: int) -> Case:
    types = dict(x_ptr="*fp32", o_ptr="*fp32")
    constants = dict(n=128, TIMES=times)
    return Case(kernel=_copy, shape="test", types=types, constants=constants)


def _square_case(n: int, dtype: str) -> Case:
    types = dict(x_ptr=f"*{dtype}", o_ptr=f"*{dtype}")
    return Case(kernel=_square, shape="test", types=types, constants=dict(n=n))


def test_a_small_kernel_has_no_fault() -> None:
    assert aot.compile_case(_copy_case(4), 90).faults == []


def test_spills_are_found() -> None:
    faults = aot.compile_case(_copy_case(512), 90).faults
    assert len(faults) == 1 and "spill" in faults[0]


def test_tensor_cores_are_counted_for_each_chip() -> None:
    case = _square_case(64, "bf16")
    kinds = {chip: aot.compile_case(case, chip) for chip in aot.CHIPS}
    assert kinds[80].mma and kinds[90].wgmma and kinds[100].tcgen05
    assert not any(made.faults for made in kinds.values())


def test_a_product_without_tensor_cores_is_a_fault() -> None:
    made = aot.compile_case(_square_case(64, "bf16"), 90)
    assert made.tensor_cores and not aot.compile_case(_square_case(64, "fp32"), 90).tensor_cores
    faults = dataclasses.replace(made, mma=0, wgmma=0).faults
    assert len(faults) == 1 and "no tensor-core" in faults[0]


def test_too_much_shared_memory_is_a_fault() -> None:
    made = aot.compile_case(_square_case(64, "bf16"), 90)
    limit = 227 * 1024
    assert dataclasses.replace(made, shared=limit).faults == []
    assert "shared memory" in dataclasses.replace(made, shared=limit + 1).faults[0]


@triton.jit(do_not_specialize=["T"])
def _recorded(x, bias, T, stride, one, scale, BLOCK: tl.constexpr):
    tl.store(x + T * stride + one, scale)


def test_a_case_is_what_the_launcher_would_compile() -> None:
    """Constants, types, and divisibility by 16 where Triton looks for it, as Triton itself says."""
    x = torch.empty(4, dtype=torch.bfloat16, device="meta")
    with recording() as launches:
        launch(_recorded, (1,), x=x, bias=None, T=64, stride=64, one=1, scale=0.5, BLOCK=16, more=3)
    case = Case.of(launches[0], "test")
    assert case.types == {"x": "*bf16", "T": "i32", "stride": "i32", "scale": "fp32"}
    assert case.constants == {"bias": None, "one": 1, "BLOCK": 16}
    assert case.div16 == ("stride",)


def test_a_changed_row_is_a_difference() -> None:
    made = [aot.compile_case(_copy_case(4), chip) for chip in (80, 90)]
    page = aot.table(made)
    assert aot.differences(page, made) == []
    assert aot.differences(page, made[:1]) == []
    stale = page.replace("| 8 |", "| 4 |")
    assert len(aot.differences(stale, made)) == 4
    assert len(aot.differences(aot.table(made[:1]), made)) == 2
    assert aot.differences(stale.replace(triton.__version__, "0.0.0"), made) == []


def test_every_kernel_has_a_case() -> None:
    """A kernel is a function of Triton's called ..._kernel; the others are parts of kernels."""
    kernels = {
        function
        for module in aot.kernel_modules()
        for name, function in vars(module).items()
        if isinstance(function, triton.JITFunction) and name.endswith("_kernel")
    }
    assert kernels == {case.kernel for case in aot.find_cases()}
    assert len(kernels) >= 20


def test_the_table_has_a_row_for_every_case_and_chip() -> None:
    rows = [line.split(" | ")[:3] for line in TABLE.read_text().splitlines() if " | sm_" in line]
    expected = [
        [f"| {aot.kernel_name(case.kernel)}", case.shape, f"sm_{chip}"]
        for case in aot.find_cases()
        for chip in aot.CHIPS
    ]
    assert sorted(rows) == sorted(expected)


def test_kernels_of_every_module_compile_as_the_table_says() -> None:
    """At the first shape of each, for the chips in turn; all kernels, shapes and chips are slow."""
    found = {aot.kernel_name(case.kernel): case for case in reversed(aot.find_cases())}
    assert {name.partition(".")[0] for name in QUICK} == {n.partition(".")[0] for n in found}
    first = {name: found[name] for name in sorted(QUICK)}
    turns = zip(first.values(), cycle(aot.CHIPS), strict=False)
    made = [aot.compile_case(case, chip) for case, chip in turns]
    assert {result.chip for result in made} == set(aot.CHIPS)
    assert [fault for result in made for fault in result.faults] == []
    assert aot.differences(TABLE.read_text(), made) == []


@pytest.mark.slow
@pytest.mark.parametrize("chip", aot.CHIPS)
def test_every_shape_compiles_as_the_table_says(chip: int) -> None:
    made = list(aot.compile_all([chip]))
    assert [fault for result in made for fault in result.faults] == []
    assert aot.differences(TABLE.read_text(), made) == []
