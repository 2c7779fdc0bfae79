"""Generate the protobuf modules from their sources, or with --check say whether the committed ones are what would come out.

Sources and results:

    protos/txrpc/v1/*.proto   ->  txrpc/_wire/v1/
    examples/*/*.proto        ->  beside their source

The generator is the oldest that has a build for the oldest Python that txrpc supports: what it writes works with every grpcio and
protobuf since then, where newer ones write modules that refuse all libraries older than themselves.  It is only unpacked into
build/, not installed, because it would ask for a protobuf of its own time.  Run with the Python of the virtual environment,
which brings the plugins that write type stubs.
"""

from __future__ import annotations

import argparse
import filecmp
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GENERATOR = "1.49.1"
"""Of grpcio-tools; the lower bound of grpcio in pyproject.toml is the same."""
PYTHON = (3, 11)
"""The only Python that this generator has a build for and that txrpc supports."""
LIBRARY = ROOT / "txrpc" / "_wire" / "v1"
EXAMPLES = ROOT / "examples"


def main() -> int:
    """See the module's docstring; returns the exit code."""
    parser = argparse.ArgumentParser(description="Generate the protobuf modules from their sources.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if anything would change")
    check = parser.parse_args().check
    if sys.version_info[:2] != PYTHON:
        print(f"generated code is {'not checked' if check else 'not written'}: its generator needs Python 3.11")
        return int(not check)
    with tempfile.TemporaryDirectory() as folder:
        results = {**_library(Path(folder, "library")), **_examples(Path(folder, "examples"))}
        stale = [target for target, source in results.items() if not _same(source, target)]
        left = sorted({*LIBRARY.glob("*_pb2*.py*"), *EXAMPLES.glob("*/*_pb2*.py*")} - results.keys())
        if not check:
            for target in stale:
                shutil.copyfile(results[target], target)
            for path in left:
                path.unlink()
    for path in stale:
        print(f"{'stale, run make proto' if check else 'wrote'}: {path.relative_to(ROOT)}")
    for path in left:
        print(f"{'has no source, run make proto' if check else 'deleted'}: {path.relative_to(ROOT)}")
    return int(check and bool(stale or left))


def _library(out: Path) -> dict[Path, Path]:
    """The descriptors keep the names txrpc/v1/*.proto; only the modules live elsewhere, so their imports are moved."""
    _protoc(out, ROOT / "protos", sorted((ROOT / "protos").rglob("*.proto")))
    results = {}
    for source in sorted((out / "txrpc" / "v1").iterdir()):
        text = source.read_text()
        text = re.sub(r"^from txrpc\.v1 import", "from txrpc._wire.v1 import", text, flags=re.MULTILINE)
        text = re.sub(r"^import txrpc\.v1\.", "import txrpc._wire.v1.", text, flags=re.MULTILINE).replace(
            " txrpc.v1.", " txrpc._wire.v1."
        )
        source.write_text(text)
        results[LIBRARY / source.name] = source
    return results


def _examples(out: Path) -> dict[Path, Path]:
    _protoc(out, ROOT, sorted(EXAMPLES.glob("*/*.proto")))
    return {ROOT / source.relative_to(out): source for source in sorted(out.rglob("*_pb2*"))}


def _protoc(out: Path, base: Path, sources: list[Path]) -> None:
    out.mkdir(parents=True)
    plugins = [f"--plugin={name}={_beside_python(name)}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    outputs = [
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
    ]
    command = ["protoc", f"-I{base}", *plugins, *outputs, *map(str, sources)]
    if _generator().run_main([argument.encode() for argument in command]) != 0:
        sys.exit("protoc failed")


@functools.cache
def _generator() -> Any:
    """The generator's extension module: protoc with gRPC's plugin, and nothing that must be installed."""
    folder = ROOT / "build" / f"grpcio-tools-{GENERATOR}"
    if not folder.exists():
        _unpack(folder)
    (path,) = (folder / "grpc_tools").glob("_protoc_compiler*.so")
    spec = importlib.util.spec_from_file_location("_protoc_compiler", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _unpack(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command = [*pip, "--only-binary", ":all:", "--dest", download, f"grpcio-tools=={GENERATOR}"]
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit(f"cannot get grpcio-tools {GENERATOR}, which generates the code: is there a network?")
        (wheel,) = Path(download).glob("*.whl")
        unpacked = Path(download) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        folder.parent.mkdir(exist_ok=True)
        shutil.move(unpacked, folder)


def _beside_python(name: str) -> Path:
    """A program of the environment that this Python belongs to, whatever PATH says."""
    program = Path(sys.executable).parent / name
    if not program.exists():
        sys.exit(f"{name} is not installed beside {sys.executable}: run make proto, or make lint")
    return program


def _same(source: Path, target: Path) -> bool:
    return target.exists() and filecmp.cmp(source, target, shallow=False)


if __name__ == "__main__":
    sys.exit(main())
