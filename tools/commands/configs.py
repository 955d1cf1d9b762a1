"""`lowline configs`: what comes with the package."""

from __future__ import annotations

from importlib.resources import files


def configs() -> None:
    """Print the path and the first line of every configuration that comes with lowline."""
    folder = files("lowline.configs")
    for directory in (folder, folder / "linearize"):
        for path in sorted(directory.iterdir(), key=lambda p: p.name):
            if path.name.endswith(".toml"):
                first = path.read_text().partition("\n")[0].removeprefix("#").strip()
                print(f"{path}  {first}")
