"""The part "llama" of `lowline bench decode`: a converted model beside llama.cpp on a CPU.

    lowline bench decode converted/ --weights int8 --part llama --gguf teacher.gguf

llama.cpp's cases are the teacher's GGUF file as it is and in Q8_0, which llama.cpp makes of it. A
context's first `READ` tokens are read and the rest of the cache is copies of them, which cost what
any other keys and values do. It runs in this process, from the package llama-cpp-py-sync.
"""

from __future__ import annotations

import copy
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

READ = 512  # tokens
Q8_0 = 7  # llama_ftype of that
OURS, Q8 = "lowline", "llama.cpp, Q8_0"


def check_gguf(gguf: Path | None) -> None:
    """Raise LowlineError where llama.cpp is missing, or the model it is to run."""
    if gguf is None or not gguf.is_file():
        raise LowlineError(
            f"gguf = {gguf}: part llama compares with llama.cpp on a GGUF file of the teacher; "
            "give it as --gguf FILE"
        )
    try:
        import llama_cpp_py_sync  # noqa: F401
    except ImportError:
        raise LowlineError(
            "part llama needs llama.cpp: pip install llama-cpp-py-sync, which brings it built"
        ) from None


def llama(setup: Setup, contexts: tuple[int, ...], gguf: Path, threads: int) -> dict[str, Any]:
    """Measure seconds per token after each context, and ratios of llama.cpp's to ours."""
    from lowline.tools.bench.decode import decode_case, read_contexts

    states = read_contexts(setup, contexts)
    found: dict[str, Any] = {"gguf": gguf.name, "contexts": {}}
    with tempfile.TemporaryDirectory() as folder:
        setup.tell("llama.cpp makes Q8_0")
        models = {
            Q8: _Model(_quantized(gguf, Path(folder))),
            f"llama.cpp, {gguf.name}": _Model(gguf),
        }
        for context in contexts:
            cases: dict[str, Callable[[], object]] = {
                OURS: decode_case(setup, copy.deepcopy(states[context]), 1)
            }
            for name, model in models.items():
                cases[name] = model.after(context, setup.new, threads)
            timings = setup.run(f"context {context}", cases)
            found["contexts"][str(context)] = {
                "seconds": {name: asdict(a_token(t, setup.new)) for name, t in timings.items()},
                "speedup": {name: ratio(timings[name], timings[OURS]) for name in models},
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
    for name in [name for name in names if name != OURS]:
        rows[f"{OURS}, times as fast as {name}"] = [
            f"{x['speedup'][name][clock]:.2f}x" for x in contexts.values()
        ]
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
    global _silent  # llama.cpp keeps the pointer
    _silent = ffi.callback("void(enum ggml_log_level, const char *, void *)", lambda *args: None)
    lib.llama_log_set(_silent, ffi.NULL)
    return ffi, lib


def _quantized(gguf: Path, folder: Path) -> Path:
    ffi, lib = _library()
    how = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    how.ftype, how.allow_requantize, how.nthread = Q8_0, True, 1
    made = folder / f"{gguf.stem}.Q8_0.gguf"
    if lib.llama_model_quantize(str(gguf).encode(), str(made).encode(), how):
        raise LowlineError(f"{gguf}: llama.cpp cannot make Q8_0 of it")
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
        how.n_ctx, how.n_batch, how.n_ubatch = context + READ + new, READ, READ
        how.n_threads = how.n_threads_batch = threads
        how.n_seq_max, how.kv_unified = 2, True
        state = lib.llama_init_from_model(self.model, how)
        memory, read = lib.llama_get_memory(state), min(context, READ)

        def feed(ids: list[int]) -> None:
            tokens = ffi.new("llama_token[]", ids)
            if code := lib.llama_decode(state, lib.llama_batch_get_one(tokens, len(ids))):
                raise RuntimeError(f"llama_decode: {code}")

        rng = np.random.default_rng(0)
        feed(rng.integers(self.vocabulary, size=read).tolist())
        size = lib.llama_state_seq_get_size(state, 0)
        held = ffi.new("uint8_t[]", size)
        lib.llama_state_seq_get_data(state, held, size, 0)
        for left in range(context - read, 0, -read):  # of the same positions, in other cells
            if not lib.llama_state_seq_set_data(state, held, size, 1):
                raise RuntimeError(f"llama.cpp has no room for {context} tokens")
            if left < read:
                lib.llama_memory_seq_rm(memory, 1, left, -1)
            lib.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            lib.llama_memory_seq_rm(memory, 1, -1, -1)

        def call() -> None:
            token = 1
            for _ in range(new):
                feed([token])
                logits = ffi.buffer(lib.llama_get_logits_ith(state, -1), 4 * self.vocabulary)
                token = int(np.frombuffer(logits, np.float32).argmax())
            lib.llama_memory_seq_rm(memory, 0, read, -1)

        return call
