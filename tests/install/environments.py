"""New environments for tests of what users install.  They need the package registry."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

__all__ = ["Environment", "build_wheel", "constraints_of_the_oldest"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """A virtual environment that has nothing of the clone in it."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, python: Path) -> Self:
        """A new one, of *python*."""
        _run([str(python), "-m", "venv", str(folder)])
        return cls(folder)

    @staticmethod
    def other_python(version: str) -> Path | None:
        """A Python of this version on this machine, also one of pyenv's, or None."""
        pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
        candidates = [*pyenv.glob(f"versions/{version}.*/bin/python3")]
        candidates += [Path(found)] if (found := shutil.which(f"python{version}")) else []
        works = [each for each in candidates if subprocess.run([each, "-c", ""], capture_output=True).returncode == 0]
        return works[0] if works else None

    @property
    def python(self) -> Path:
        """Its Python."""
        return self.folder / "bin" / "python"

    def install(self, *wanted: str) -> None:
        """Install with pip; wheels alone, as on a machine without a compiler."""
        _run([str(self.python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *wanted])

    def run(self, code: str, *arguments: str) -> str:
        """What *code* prints, in a folder that has nothing to import."""
        return _run([str(self.python), "-I", "-c", code, *arguments], self.folder)

    def command(self, name: str, *arguments: str) -> str:
        """What a command of the environment prints."""
        return _run([str(self.folder / "bin" / name), *arguments], self.folder)

    def versions(self) -> str:
        """What is installed."""
        return _run([str(self.python), "-m", "pip", "list", "--disable-pip-version-check", "--format", "freeze"])


def build_wheel(folder: Path) -> Path:
    """Build the wheel from the files that the repository tracks, so that nothing else can be in it."""
    source = folder / "source"
    listed = _run(["git", "ls-files", "-z"], ROOT).split("\0")
    for name in filter(None, listed):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*pip, "--wheel-dir", str(folder), str(source)])
    (wheel,) = folder.glob("*.whl")
    return wheel


def constraints_of_the_oldest(pyproject: Path) -> str:
    """Constraints that hold every dependency, also of the extras that users install, at its lower bound."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = [each for name, extra in project["optional-dependencies"].items() if name != "dev" for each in extra]
    found = [re.fullmatch(r"([\w-]+)(?:\[.*\])?>=([\w.]+)", each) for each in [*project["dependencies"], *extras]]
    return "\n".join(sorted({f"{each[1]}=={each[2]}" for each in found if each}))


def _run(command: list[str], folder: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout
