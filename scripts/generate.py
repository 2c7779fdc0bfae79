"""Generate the protobuf modules from their sources, or with --check say whether the committed ones are what would come out.

Sources and results:

    protos/txrpc/v1/*.proto   ->  txrpc/wire/v1/
    examples/*/*.proto        ->  beside their source
"""

from __future__ import annotations

import argparse
import filecmp
import re
import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
INCLUDES = Path(grpc_tools.__file__).parent / "_proto"


def main() -> int:
    """See the module's docstring; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if anything would change")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        wanted = [*_library(out / "library"), *_examples(out / "examples")]
        stale = [
            target for source, target in wanted if not target.exists() or not filecmp.cmp(source, target, shallow=False)
        ]
        for target in stale:
            print(f"{'stale' if check else 'wrote'}: {target.relative_to(ROOT)}")
        if not check:
            for source, target in wanted:
                shutil.copyfile(source, target)
    return int(check and bool(stale))


def _library(out: Path) -> list[tuple[Path, Path]]:
    """The descriptors keep the names txrpc/v1/*.proto; only the modules live elsewhere, so their imports are moved."""
    _protoc(out, ROOT / "protos", sorted((ROOT / "protos").rglob("*.proto")))
    results = []
    for source in sorted((out / "txrpc" / "v1").iterdir()):
        text = source.read_text()
        text = re.sub(r"^from txrpc\.v1 import", "from txrpc.wire.v1 import", text, flags=re.MULTILINE)
        text = re.sub(r"^import txrpc\.v1\.", "import txrpc.wire.v1.", text, flags=re.MULTILINE).replace(
            " txrpc.v1.", " txrpc.wire.v1."
        )
        source.write_text(text)
        results.append((source, ROOT / "txrpc" / "wire" / "v1" / source.name))
    return results


def _examples(out: Path) -> list[tuple[Path, Path]]:
    _protoc(out, ROOT, sorted((ROOT / "examples").glob("*/*.proto")))
    return [(source, ROOT / source.relative_to(out)) for source in sorted(out.rglob("*_pb2*"))]


def _protoc(out: Path, base: Path, sources: list[Path]) -> None:
    out.mkdir(parents=True)
    flags = [f"--{plugin}={out}" for plugin in ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")]
    arguments = ["protoc", f"-I{base}", f"-I{INCLUDES}", *flags, *map(str, sources)]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed")


if __name__ == "__main__":
    sys.exit(main())
