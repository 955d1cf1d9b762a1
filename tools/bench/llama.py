"""The part "llama" of `lowline bench decode`: a converted model beside llama.cpp on a CPU.

    lowline bench decode converted/ --weights int8 --part llama --gguf teacher.gguf

llama.cpp runs the teacher with its matrices in Q8_0, made of the GGUF file, and reads every
context; a converted model without softmax layers reads at most `FILLED` tokens. llama.cpp runs in
this process, from the package llama-cpp-py-sync, or from another build that LLAMA_CPP_LIB names.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.errors import LowlineError
from lowline.tools.bench.timing import a_token, ratio
from lowline.tools.show import print_table

if TYPE_CHECKING:
    from rich.console import Console

    from lowline.tools.bench.decode import Setup

READ = 512  # tokens that llama.cpp reads together
FILLED = 2048  # tokens after which mixers' states are full
OURS, Q8 = "lowline", "llama.cpp, Q8_0"
_silent: Any = None  # llama.cpp's log; it keeps the pointer


def check_gguf(gguf: Path | None) -> None:
    """Raise LowlineError where llama.cpp is missing, or the model it is to run."""
    if gguf is None or not gguf.is_file():
        raise LowlineError(
            f"gguf = {gguf}: part llama compares with llama.cpp on a GGUF file of the teacher; "
            "give it as --gguf FILE"
        )
    try:
        for name in ("gguf", "llama_cpp_py_sync"):
            importlib.import_module(name)
    except ImportError as error:
        raise LowlineError(
            f"part llama needs {error.name}: pip install gguf llama-cpp-py-sync, which brings "
            "llama.cpp built"
        ) from None


def llama(setup: Setup, contexts: tuple[int, ...], gguf: Path, threads: int) -> dict[str, Any]:
    """Measure seconds per token after each context, and ratios of llama.cpp's to ours."""
    from lowline.tools.bench.decode import decode_case, read_contexts

    # What a mixer does does not depend on what it has read; softmax layers read all.
    most = contexts[-1] if "softmax" in str(getattr(setup.model.config, "mixers", ())) else FILLED
    states = read_contexts(setup, tuple(sorted({min(context, most) for context in contexts})))
    found: dict[str, Any] = {"gguf": gguf.name, "contexts": {}}
    with tempfile.TemporaryDirectory() as folder:
        setup.tell("making Q8_0")
        model = _Model(as_q8_0(gguf, Path(folder)))
        for context in contexts:
            cases: dict[str, Callable[[], object]] = {
                OURS: decode_case(setup, copy.deepcopy(states[min(context, most)]), 1)
            }
            cases[Q8] = model.after(context, setup.new, threads)
            timings = setup.run(f"context {context}", cases)
            found["contexts"][str(context)] = {
                "seconds": {name: asdict(a_token(t, setup.new)) for name, t in timings.items()},
                "speedup": ratio(timings[Q8], timings[OURS]),
            }
    return found


def print_llama(console: Console, report: dict[str, Any]) -> None:
    """Print milliseconds per token and ratios, one column for each context."""
    clock, contexts = report["setup"]["clock"], report["llama"]["contexts"]
    names = next(iter(contexts.values()))["seconds"]
    rows = {
        f"{name}, ms": [f"{1e3 * x['seconds'][name][clock]:.1f}" for x in contexts.values()]
        for name in names
    }
    rows["times as fast"] = [f"{x['speedup'][clock]:.2f}x" for x in contexts.values()]
    title = (
        f"decode beside llama.cpp: weights {report['setup']['weights']}, "
        f"{report['machine']['threads']} thread(s), medians of {report['setup']['repeats']}, "
        f"{clock} time"
    )
    console.print()
    print_table(console, title, ["context", *contexts], rows)


def _library() -> tuple[Any, Any]:
    from llama_cpp_py_sync import _cffi_bindings as bindings

    ffi, lib = bindings.get_ffi(), bindings.get_lib()
    global _silent
    _silent = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *args: None)
    lib.llama_log_set(_silent, ffi.NULL)
    return ffi, lib


def as_q8_0(gguf: Path, folder: Path) -> Path:
    """Write a GGUF file's matrices as Q8_0, whatever they were, and return the new file."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader, made = GGUFReader(gguf), folder / f"{gguf.stem}.Q8_0.gguf"
    writer = GGUFWriter(made, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    q8 = GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim > 1:
            writer.add_tensor(tensor.name, quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


class _Model:
    def __init__(self, path: Path) -> None:
        self.ffi, self.lib = _library()
        how = self.lib.llama_model_default_params()
        how.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), how)
        if self.model == self.ffi.NULL:
            raise LowlineError(f"{path}: llama.cpp cannot load it")
        self.vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def after(self, context: int, new: int, threads: int) -> Callable[[], object]:
        """Return a call that decodes `new` tokens greedily after so many others."""
        import numpy as np

        ffi, lib = self.ffi, self.lib
        how = lib.llama_context_default_params()
        how.n_ctx, how.n_batch, how.n_ubatch = context + new, READ, READ
        how.n_threads = how.n_threads_batch = threads
        state = lib.llama_init_from_model(self.model, how)
        memory = lib.llama_get_memory(state)

        def feed(ids: list[int]) -> None:
            tokens = ffi.new("llama_token[]", ids)
            if code := lib.llama_decode(state, lib.llama_batch_get_one(tokens, len(ids))):
                raise RuntimeError(f"llama_decode: {code}")

        ids = np.random.default_rng(0).integers(self.vocabulary, size=context).tolist()
        for at in range(0, context, READ):
            feed(ids[at : at + READ])

        def call() -> None:
            token = 1
            for _ in range(new):
                feed([token])
                logits = ffi.buffer(lib.llama_get_logits_ith(state, -1), 4 * self.vocabulary)
                token = int(np.frombuffer(logits, np.float32).argmax())
            lib.llama_memory_seq_rm(memory, 0, context, -1)

        return call
