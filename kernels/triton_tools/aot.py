"""Compiles every Triton kernel for GPUs that this machine lacks, and reads the compiler's output.

    python -m lowline.kernels.triton_tools.aot --write docs/dev/triton_aot.md  # the committed table
    python -m lowline.kernels.triton_tools.aot --check docs/dev/triton_aot.md  # what CI runs

A kernel that spills registers, asks for more shared memory than the chip has, or multiplies without
tensor cores compiles without a message: the first two are slow or fail at launch, the third is
slow. Here these are errors. ptxas, cuobjdump and nvdisasm come with Triton's wheel; no GPU, driver
or CUDA toolkit is needed. Triton caches what it compiled.

The cases are recorded launches: each op's Triton module has `aot_calls`, the calls at the shapes
that it is meant to run well, which run on tensors without data while `launch` records what they
launch. The numbers hold for the version of Triton in the table's heading: under another one
`--check` tests the limits and skips the comparison.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import lowline.kernels
from lowline.kernels.backends import interpreting
from lowline.kernels.triton_tools.launch import (
    Launch,
    Options,
    candidates,
    kernel_name,
    recording,
)

# Compute capability -> bytes of shared memory a block may ask for (CUDA C++ Programming Guide,
# table of technical specifications: 164 KiB, 228 KiB and 228 KiB an SM, 1 KiB of it the system's).
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
CHIPS = tuple(SHARED_MEMORY)
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_HEADING = f"Compiled by Triton {triton.__version__}"
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    int: "i32",
    float: "fp32",
}


# A few registers each; only a run on a GPU can show whether smaller blocks are faster.
KNOWN_SPILLS = {
    ("window.backward_key_kernel", 90): 4,
    ("conv._sum_gradient_kernel", 100): 4,
    ("recurrence.states_kernel", 100): 2,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One specialization of a kernel.

    Args:
        kernel: the `@triton.jit` function.
        shape: what the table calls this case ("bf16, D 128, w 64").
        types: the type of each argument that is no constant: "*bf16", "*fp32", "i32", "fp32".
        constants: the value of each `tl.constexpr` argument, and of each argument launched as
            None or 1, which Triton makes constant too.
        div16: the integer arguments that are multiples of 16 in this case. Pointers always are.
            A launch detects this by itself; compiled without it, loads are scalar and spill.
    """

    kernel: Any
    shape: str
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    div16: tuple[str, ...] = ()

    @classmethod
    def of(cls, launch: Launch, shape: str) -> Case:
        """Return what Triton would compile for a recorded launch, by the rules of its launcher."""
        kernel, types, constants, aligned = launch.kernel, {}, {}, []
        for parameter in kernel.params:
            name, value = parameter.name, launch.arguments[parameter.name]
            fixed = parameter.do_not_specialize
            if (
                parameter.is_constexpr
                or value is None
                or (type(value) is int and value == 1 and not fixed)
            ):
                constants[name] = value
                continue
            types[name] = _TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)]
            if types[name] == "i32" and value % 16 == 0 and not fixed:
                aligned.append(name)
        return cls(
            kernel=kernel, shape=shape, types=types, constants=constants, div16=tuple(aligned)
        )


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The compiler's output of a case, for one chip."""

    kernel: str
    shape: str
    chip: int
    warps: int
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # loads from and stores to local memory in the machine code
    shared: int  # bytes per block
    mma: int  # tensor-core instructions in the PTX, by kind
    wgmma: int
    tcgen05: int
    tma: int  # asynchronous copies, by kind
    cp_async: int
    tensor_cores: bool  # wanted: there is a product of 16-bit numbers

    @property
    def faults(self) -> list[str]:
        """Return why this kernel must not be shipped."""
        found = []
        if self.spills > KNOWN_SPILLS.get((self.kernel, self.chip), 0):
            found.append(f"{self.spills} spill instructions, {self.stack} bytes of stack")
        if self.shared > SHARED_MEMORY[self.chip]:
            found.append(f"{self.shared} bytes of shared memory of {SHARED_MEMORY[self.chip]}")
        if self.tensor_cores and not self.mma + self.wgmma + self.tcgen05:
            found.append("no tensor-core instruction")
        return [f"{self.kernel} [{self.shape}] sm_{self.chip}: {fault}" for fault in found]


def kernel_modules() -> list[ModuleType]:
    """Return the modules of Triton kernels and of their launches."""
    prefix = lowline.kernels.__name__ + "."
    found = pkgutil.walk_packages(lowline.kernels.__path__, prefix)
    return [
        importlib.import_module(m.name)
        for m in found
        if re.search(r"\.triton\b|\.triton_k", m.name)
    ]


@functools.cache
def find_cases() -> list[Case]:
    """Return what every op's `aot_calls` launch; of launches of the same code, the first."""
    cases: dict[Any, Case] = {}
    for module in kernel_modules():
        for shape, call in getattr(module, "aot_calls", tuple)():
            with recording() as launches:
                call()
            for launch in launches:
                case = Case.of(launch, shape)
                code = (kernel_name(case.kernel), str((case.types, case.constants, case.div16)))
                cases.setdefault(code, case)
    return list(cases.values())


def compile_case(case: Case, chip: int, options: Options | None = None) -> Compiled:
    """Compile one case for one compute capability (80, 90, 100), with the options it runs with.

    Raises:
        RuntimeError: under `TRITON_INTERPRET=1`, which leaves nothing to compile.
    """
    if interpreting():
        raise RuntimeError("interpreted kernels have no code to compile; unset TRITON_INTERPRET")
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in case.div16
    }
    made = triton.compile(
        ASTSource(case.kernel, signature, constants, aligned),
        target=GPUTarget("cuda", chip, 32),
        options=(options or _candidates(case, chip)[0])._asdict(),
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = _output("cuobjdump", "--dump-resource-usage", cubin)
        machine_code = _output("nvdisasm", "-c", cubin)
    resources = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    ptx = made.asm["ptx"]
    return Compiled(
        kernel=kernel_name(case.kernel),
        shape=case.shape,
        chip=chip,
        warps=made.metadata.num_warps,
        registers=int(resources["REG"]),
        stack=int(resources["STACK"]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", machine_code)),
        shared=made.metadata.shared,
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        wgmma=len(re.findall(r"\bwgmma\.mma_async", ptx)),
        tcgen05=len(re.findall(r"\btcgen05\.mma", ptx)),
        tma=len(re.findall(r"\bcp\.async\.bulk\.tensor", ptx)),
        cp_async=len(re.findall(r"\bcp\.async\.c[ag]\.", ptx)),
        tensor_cores=bool(re.search(r"tt\.dot .*x(bf|f)16", made.asm["ttir"])),
    )


def compile_all(chips: Sequence[int] = CHIPS, jobs: int = 1, only: str = "") -> Iterator[Compiled]:
    """Compile the cases (those with `only` in the kernel's name), `jobs` at a time."""
    mine = [index for index, case in enumerate(find_cases()) if only in kernel_name(case.kernel)]
    work = [(index, chip) for chip in chips for index in mine]
    if jobs == 1:
        yield from map(_compile_one, work)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(_compile_one, work)


def table(compiled: Sequence[Compiled]) -> str:
    """Return the Markdown page of these results."""
    rows = [
        "# What the compiler makes of the Triton kernels",
        "",
        "`python -m lowline.kernels.triton_tools.aot --write docs/dev/triton_aot.md`",
        "",
        f"{_HEADING}, without a GPU. Registers per thread, shared memory per block; tensor-core"
        " instructions and asynchronous copies counted in the PTX. Three"
        " kernels spill on one chip each, by up to 4 instructions (`aot.KNOWN_SPILLS`).",
        "",
        "| kernel | shape | chip | warps | registers | shared KiB | tensor cores | copies |",
        "|---|---|---|---:|---:|---:|---|---|",
    ]
    for c in sorted(compiled, key=lambda c: (c.kernel, c.shape, c.chip)):
        products = {"mma.sync": c.mma, "wgmma": c.wgmma, "tcgen05": c.tcgen05}
        copies = {"TMA": c.tma, "cp.async": c.cp_async}
        rows.append(
            f"| {c.kernel} | {c.shape} | sm_{c.chip} | {c.warps} | {c.registers}"
            f" | {c.shared / 1024:.1f} | {_counts(products)} | {_counts(copies)} |"
        )
    return "\n".join(rows) + "\n"


def differences(page: str, compiled: Sequence[Compiled]) -> list[str]:
    """Return rows of a committed table that these results contradict; none under another Triton."""
    if _HEADING not in page:
        return []

    def rows(text: str) -> dict[str, str]:
        cells = {line: line.split(" | ") for line in text.splitlines() if " | sm_" in line}
        return {" | ".join(c[:3]): line for line, c in cells.items()}

    committed, found = rows(page), rows(table(compiled))
    wrong = [key for key, line in found.items() if committed.get(key) != line]
    return [line for key in wrong for line in (f"- {committed.get(key)}", f"+ {found[key]}")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels without a GPU.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table here")
    parser.add_argument("--check", type=Path, metavar="FILE", help="fail where this table differs")
    parser.add_argument("--chips", type=int, nargs="+", choices=CHIPS, default=CHIPS)
    parser.add_argument("--only", default="", metavar="NAME", help="kernels with this in the name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    if options.write and (options.only or set(options.chips) != set(CHIPS)):
        parser.error("--write writes the complete table: leave out --only and --chips")
    compiled = []
    for result in compile_all(options.chips, options.jobs, options.only):
        compiled.append(result)
        print(table([result]).splitlines()[-1], file=sys.stderr)
    complaints = [fault for result in compiled for fault in result.faults]
    if options.check:
        complaints += differences(options.check.read_text(), compiled)
    if options.write:
        options.write.write_text(table(compiled))
    print("\n".join(complaints) or f"{len(compiled)} compiled, no fault")
    return bool(complaints)


def _candidates(case: Case, chip: int) -> tuple[Options, ...]:
    half = bool({"*bf16", "*fp16"} & set(case.types.values()))
    return candidates(kernel_name(case.kernel), chip, half)


def _compile_one(work: tuple[int, int]) -> Compiled:
    index, chip = work
    return compile_case(find_cases()[index], chip)


def _output(tool: str, *arguments: str | Path) -> str:
    command = [str(_BIN / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count) or "–"


if __name__ == "__main__":
    sys.exit(main())
