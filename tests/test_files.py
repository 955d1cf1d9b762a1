"""Writing is complete or absent; what a killed writer left goes with the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowline.files import write_file, write_folder, write_tensors, write_text


def age(path: Path, seconds: float = 60.0) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def killed_writer(code: str, folder: Path) -> None:
    """Run `code`, which prints a line once its temporary is there, and kill it then."""
    source = f"import sys, time\nfrom pathlib import Path\nfrom lowline.files import *\n{code}"
    with subprocess.Popen(
        [sys.executable, "-c", source, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield_alive(folder)
        process.send_signal(signal.SIGKILL)


def yield_alive(folder: Path) -> None:
    """While the writer lives, another one leaves its temporary alone, however old it looks."""
    (temporary,) = (folder / name for name in hidden(folder))
    age(temporary)
    if temporary.is_dir():
        with write_folder(folder / "out") as new:
            (new / "a").write_text("second")
    else:
        write_text(folder / "out", "second")
    assert hidden(folder) == [temporary.name]


WAITS = {
    "file": "write_file(Path(sys.argv[1]) / 'out', "
    "lambda t: (t.write_text('half'), print('ready', flush=True), time.sleep(60)))",
    "folder": "with write_folder(Path(sys.argv[1]) / 'out') as new:\n"
    "    (new / 'a').write_text('half'); print('ready', flush=True); time.sleep(60)",
}


@pytest.mark.parametrize("kind", WAITS)
def test_what_a_killed_writer_left_goes_with_the_next(kind: str, tmp_path: Path) -> None:
    killed_writer(WAITS[kind], tmp_path)
    (left,) = hidden(tmp_path)
    age(tmp_path / left)
    (tmp_path / ".out.notes.partial").write_text("somebody else's name")
    if kind == "file":
        write_text(tmp_path / "out", "third")
        assert (tmp_path / "out").read_text() == "third"
    else:
        with write_folder(tmp_path / "out", replace=True) as new:
            (new / "b").write_text("third")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]
    assert hidden(tmp_path) == [".out.notes.partial"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "out", "before")

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "deep" / "out", fails)
    assert (tmp_path / "deep" / "out").read_text() == "before"
    with write_folder(tmp_path / "folder") as new:
        (new / "a").write_text("before")
    with (
        pytest.raises(RuntimeError, match="stop"),
        write_folder(tmp_path / "folder", replace=True) as new,
    ):
        (new / "a").write_text("half")
        raise RuntimeError("stop")
    assert (tmp_path / "folder" / "a").read_text() == "before"
    assert hidden(tmp_path) == hidden(tmp_path / "deep") == []


def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    """A writer was killed between its two renames."""
    aside = tmp_path / ".out.0123abcd.old"
    aside.mkdir()
    (aside / "a").write_text("before")
    with (
        pytest.raises(RuntimeError, match="stop"),
        write_folder(tmp_path / "out", replace=True),
    ):
        raise RuntimeError("stop")
    assert (tmp_path / "out" / "a").read_text() == "before" and hidden(tmp_path) == []


def test_files_have_the_permissions_that_others_get(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tensors_are_what_was_written(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0).view(2, 3)}
    write_tensors(tmp_path / "a" / "x.safetensors", tensors, metadata={"k": "v"})
    assert torch.equal(load_file(tmp_path / "a" / "x.safetensors")["w"], tensors["w"])


def test_importing_it_imports_neither_torch_nor_the_rest_of_lowline() -> None:
    code = (
        "import sys, lowline.files\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'lowline')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    light = ["lowline", "lowline._lazy", "lowline._register", "lowline.errors", "lowline.files"]
    assert done.stdout == f"{light}\n"
