"""Names of models: a path that must be there, or an id of the Hugging Face hub that answers.

transformers takes what is no directory for a hub id, and asks the hub for every file of it, several
times over: without a network a mistyped path took more than a minute to be refused.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from lowline.errors import LowlineError, MissingFileError

SUFFIXES = (".gguf", ".toml", ".json", ".jsonl", ".parquet", ".safetensors")
PATIENCE = 10.0  # seconds in which the hub must answer
CACHED = ("config.json", "tokenizer_config.json", "tokenizer.json")


def looks_like_a_path(name: str) -> bool:
    """Return whether a name can be no hub id, which is NAME or OWNER/NAME."""
    if name.startswith((".", "/", "~")) or name.endswith(SUFFIXES) or name.count("/") > 1:
        return True
    return "/" in name and Path(name).parent.is_dir()


def check_source(name: str | Path) -> None:
    """Raise LowlineError for a model that cannot be loaded, before a library looks for it.

    Raises:
        MissingFileError: a path that is not there, or an id that the hub does not know.
        LowlineError: a training run, or an id that is not in the hub's cache while the hub cannot
            be reached.
    """
    path = Path(name)
    if path.exists():
        run = (path / "checkpoint").is_dir() or (path / ".metadata").is_file()
        if run and not (path / "config.json").exists():
            raise LowlineError(
                f"{name} is a training run, not a model; `lowline export {quote(str(name))} MODEL` "
                "makes a model of its newest checkpoint"
            )
        return
    name, here = str(name), f"working directory {Path.cwd()}"
    if looks_like_a_path(name):
        raise MissingFileError(f"{name}: no such file or directory ({here})")
    import httpx
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in CACHED):
            return
        if constants.HF_HUB_OFFLINE:
            raise MissingFileError(
                f"{name}: no such file or directory ({here}), and with HF_HUB_OFFLINE=1 only "
                "models in the hub's cache are found"
            )
        HfApi().model_info(name, timeout=PATIENCE)
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingFileError(
            f"{name}: no such file or directory ({here}), and the Hugging Face hub gives no such "
            f"model: {reason}"
        ) from None
    except (httpx.HTTPError, OSError) as error:
        if isinstance(error, LowlineError):
            raise
        raise LowlineError(
            f"{name}: no such file or directory ({here}), and the Hugging Face hub cannot be "
            f"reached: {error}"
        ) from None
