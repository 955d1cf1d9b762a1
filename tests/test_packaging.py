"""The wheel holds what a user needs, and our folders hide nobody else's packages."""

import ast
import graphlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from workers.import_first import modules

ROOT = Path(__file__).parents[1]
ORDER = ("kernels", "cola", "linearize", "train", "tools")  # each may import those before it
TRAIN = {  # folders of train/: each may import those of a lower number
    **{"config": 0, "data": 1, "model": 1, "hf": 2},
    **{"objectives": 3, "cost": 4, "engine": 5, "blockwise": 6},
}
NOT_YET = "lowline.train.data.sources"  # [data] is read by config/run.py from there


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files beside what it reads
    skip = shutil.ignore_patterns(".*", "build", "dist", "outputs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skip)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--quiet", "--wheel-dir", str(folder), str(source)],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    return next(folder.glob("lowline-*.whl"))


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("kernels", "cola", "linearize", "train", "configs", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.relative_to(ROOT).as_posix()
            assert f"lowline/{inner.removeprefix('tools/lowline/')}" in inside, path
    for path in (ROOT / "configs").rglob("*.toml"):
        assert f"lowline/{path.relative_to(ROOT)}" in inside
    for path in (ROOT / "kernels" / "cpu").glob("*.[ch]*"):
        assert f"lowline/kernels/cpu/{path.name}" in inside
    assert "lowline/train/data/tokenizer/tokenizer.json" in inside
    assert {name.split("/")[0].split("-")[0] for name in inside} == {"lowline"}


def test_installed_wheel_imports_and_lists_its_configs(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import lowline, lowline.train.config.load as c, importlib.resources as r;"
        "print(lowline.__file__);"
        "print(c.load_config(str(r.files('lowline.configs') / 'demo_cola.toml')).cola.rank)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    location, rank = done.stdout.split()
    assert Path(location).is_relative_to(tmp_path)
    assert rank.isdigit()


@pytest.mark.parametrize("name", [*ORDER, "configs"])
def test_no_folder_is_importable_under_its_bare_name(name: str) -> None:
    """transformers asks for a top-level `kernels`; under our launchers it must not find ours."""
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s and s.origin)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert str(ROOT) not in done.stdout
    spec = importlib.util.find_spec(name)  # and so it is under pytest
    assert spec is None or str(ROOT) not in str(spec.origin)


def imported(path: Path) -> set[str]:
    """Return what a file imports anywhere in it, but for what only type checkers read."""
    tree, skipped = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", ORDER)
def test_imports_point_one_way(folder: str) -> None:
    """Modules of the root package (`lowline.files`, `lowline.errors`) may be imported by all."""
    later = {f"lowline.{name}" for name in ORDER[ORDER.index(folder) + 1 :]}
    for path in (ROOT / folder).rglob("*.py"):
        wrong = [n for n in imported(path) if any(n == x or n.startswith(x + ".") for x in later)]
        assert not wrong, f"{path}: {wrong}"


@pytest.mark.parametrize("folder", TRAIN)
def test_imports_inside_train_point_one_way(folder: str) -> None:
    others = {f"lowline.train.{n}" for n, r in TRAIN.items() if n != folder and r >= TRAIN[folder]}
    for path in (ROOT / "train" / folder).rglob("*.py"):
        names = {n for n in imported(path) if not n.startswith(NOT_YET)}
        wrong = [n for n in names if any(n == x or n.startswith(x + ".") for x in others)]
        assert not wrong, f"{path}: {wrong}"


def test_train_has_no_other_folders() -> None:
    found = {path.parent.name for path in (ROOT / "train").glob("*/__init__.py")}
    assert found == set(TRAIN)


def imported_at_once(body: Iterable[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that importing a module runs: those of functions wait."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.expr) and not (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            yield from imported_at_once(ast.iter_child_nodes(node))


def parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def test_imports_have_no_circle() -> None:
    """A module comes after those it imports and their packages, but for packages around itself."""
    paths, graph = modules(), {}
    for name, path in paths.items():
        named = set()
        for node in imported_at_once(ast.parse(path.read_text()).body):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif node.level == 0:
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                named |= {x if x in paths else str(node.module) for x in inner}
        around = set().union(*map(parents, named)) - parents(name)
        graph[name] = (named | around) & paths.keys() - {name}
    assert sum(map(len, graph.values())) > 2 * len(graph)  # imports were found
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("which", ["packages", pytest.param("", marks=pytest.mark.slow)])
def test_every_module_can_be_the_first_one(which: str) -> None:
    """So it is for every package, whichever an interpreter begins with; all modules are slow."""
    worker = ROOT / "tests" / "workers" / "import_first.py"
    line = [sys.executable, str(worker), *which.split()]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stdout + done.stderr


@pytest.mark.parametrize("name", ["files", "errors", "fingerprint", "weight_files"])
def test_what_all_folders_import_imports_no_torch(name: str) -> None:
    code = f"import sys, lowline.{name}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_torchtitan_stays_in_train_and_a_file_each_of_cola_and_linearize() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for folder in ORDER
        for path in (ROOT / folder).rglob("*.py")
        if any(
            line.lstrip().startswith(("import torchtitan", "from torchtitan"))
            for line in path.read_text().splitlines()
        )
    }
    outside = {user for user in users if not user.startswith("train/")}
    assert outside == {"cola/block.py", "cola/parallel.py", "linearize/titan.py"}


def test_the_page_of_additions_names_files_that_are_there() -> None:
    """All but the italic ones, which the additions would make."""
    text = (ROOT / "docs" / "dev" / "additions.md").read_text()
    named = re.findall(r"(?<!\*)`((?:cola|kernels|linearize|tools|train)/[\w/]+\.py)`", text)
    assert len(set(named)) >= 12
    assert [name for name in named if not (ROOT / name).is_file()] == []
