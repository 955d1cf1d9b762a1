"""Files that would run: Python, pickles and a library, which leave a proof where one did."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

PYTHON = ("evil.py", "modeling_llama.py", "tokenization_llama.py", "modeling_lowline.py",
          "configuration_llama.py", "setup.py", "conftest.py", "sitecustomize.py", "torch.py",
          "saved.py", "planted.py")  # fmt: skip
PICKLES = ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "consolidated.pth",
           "adapter_model.bin", "rng_state.pth", "model.ckpt", "data.pkl", "00000.pt")  # fmt: skip
LIBRARY = 'void __attribute__((constructor)) run(void) {{ fclose(fopen("{}", "w")); }}'
AUTOS = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")


class Runs:
    """Makes a file where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self._proof,)


@cache
def _library(proof: Path) -> bytes:
    """Return a shared library that makes a file where it is loaded; nothing of one without cc."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return b"\x7fELF" + bytes(100)
    source, built = proof.with_suffix(".c"), proof.with_suffix(".so")
    source.write_text("#include <stdio.h>\n" + LIBRARY.format(proof))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(built), str(source)], check=True)
    return built.read_bytes()


def plant(folder: Path, proof: Path) -> None:
    """Put files that would run beside those of a folder, and replace none."""
    program = f"from pathlib import Path\nPath({str(proof)!r}).touch()\nclass Evil: pass\n"
    contents = {name: program.encode() for name in PYTHON}
    contents |= {name: pickle.dumps(Runs(proof)) for name in PICKLES}
    contents |= {name: _library(proof) for name in ("evil.so", "_evil.cpython-311.so")}
    for name, content in contents.items():
        if not (folder / name).exists():
            (folder / name).write_bytes(content)


def name_them(folder: Path) -> None:
    """Let a Hugging Face directory's configurations ask for the planted classes."""
    _edit(folder / "config.json", auto_map=dict.fromkeys(AUTOS, "evil.Evil"))
    tokenizers = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    _edit(folder / "tokenizer_config.json", auto_map=tokenizers, tokenizer_class="Evil")


def weights_as_pickle(folder: Path, proof: Path) -> None:
    """Leave a Hugging Face directory with the weights of pytorch_model.bin alone."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    plant(folder, proof)


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
