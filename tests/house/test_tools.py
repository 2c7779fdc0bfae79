"""What runs the house does what it says: packaging, make, continuous integration, import rules, generated code."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in sorted((ROOT / "txrpc").rglob("*.py"))
    if "_wire/v1" not in path.as_posix()
}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """*environment* is added to ours, which loses what makes a make or a CI within a make or a CI different."""
    ours = {name: value for name, value in os.environ.items() if name not in ("CI", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=60, env={**ours, **environment}, check=False
    )


# ---------------------------------------------------------------------------------------------------------- modules


def exported(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return [str(name) for name in ast.literal_eval(node.value)]
    return None


def test_a_module_with_public_names_says_which() -> None:
    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    silent = [
        name
        for name, tree in MODULES.items()
        if exported(tree) is None
        and any(isinstance(node, definitions) and not node.name.startswith("_") for node in tree.body)
    ]
    assert silent == []


def test_modules_take_from_each_other_only_what_is_exported() -> None:
    taken = [
        (name, node.module, alias.name)
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in MODULES
        for alias in node.names
    ]
    assert len(taken) > 100
    assert [
        f"{name} takes {wanted} from {source}"
        for name, source, wanted in taken
        if f"{source}.{wanted}" not in MODULES and wanted not in (exported(MODULES[source]) or ())
    ] == []


def distribution(requirement: str) -> str:
    """``SQLAlchemy[asyncio]>=2`` is ``sqlalchemy``."""
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


def third_party(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] not in {*sys.stdlib_module_names, "txrpc"}}


def test_what_is_imported_is_declared() -> None:
    """Also what only an extra brings: it is imported where it is asked for."""
    project = pyproject()["project"]
    extras = [each for name, extra in project["optional-dependencies"].items() if name != "dev" for each in extra]
    declared = {distribution(requirement) for requirement in [*project["dependencies"], *extras]}
    owners = importlib.metadata.packages_distributions()
    # Several distributions share the package google.
    shared = {"google.protobuf": "protobuf", "google.rpc": "googleapis-common-protos"}
    undeclared = set()
    for name, tree in MODULES.items():
        for imported in third_party(tree):
            owner = [dist for prefix, dist in shared.items() if imported.startswith(prefix)]
            owner = owner or owners.get(imported.split(".")[0], ["?"])
            if not declared & {distribution(one) for one in owner}:
                undeclared.add(f"{name}: {imported}")
    assert undeclared == set()


# -------------------------------------------------------------------------------------------- packaging and generation


def test_the_generated_modules_serve_every_grpcio_and_protobuf_that_is_allowed() -> None:
    """The generator's version is the lower bound, and what it writes refuses nothing newer and nothing older."""
    generator = re.findall(r'^GENERATOR = "(.+)"$', (ROOT / "scripts" / "generate.py").read_text(), re.MULTILINE)
    bounds = dict(re.findall(r'"(grpcio|grpcio-health-checking|grpcio-reflection)>=([\d.]+)"', json.dumps(pyproject())))
    assert len(bounds) == 3
    assert {*bounds.values()} == {*generator}
    generated = [path.read_text() for folder in ("txrpc", "examples") for path in (ROOT / folder).rglob("*_pb2*.py")]
    assert len(generated) > 8
    assert [text for text in generated if re.search("GENERATED_VERSION|ValidateProtobufRuntimeVersion", text)] == []


def test_the_descriptors_keep_the_names_of_their_sources() -> None:
    from txrpc._wire.v1 import admin_pb2, context_pb2, session_pb2

    for module in (admin_pb2, context_pb2, session_pb2):
        name = module.DESCRIPTOR.name
        assert name.startswith("txrpc/v1/")
        assert (ROOT / "protos" / name).exists()


def test_the_command_is_where_packaging_says() -> None:
    module, _, function = pyproject()["project"]["scripts"]["txrpc"].partition(":")
    assert callable(getattr(__import__(module, fromlist=["x"]), function))


def test_every_package_is_under_the_rule_about_testing_and_verification() -> None:
    """The other import rules name all packages by themselves."""
    contracts = {contract["name"]: contract for contract in pyproject()["tool"]["importlinter"]["contracts"]}
    named = set(
        contracts["Nothing in the library uses txrpc.testing, and nothing installed uses verification"][
            "source_modules"
        ]
    )
    packages = {".".join(name.split(".")[:2]) for name in MODULES} - {"txrpc", "txrpc.testing"}
    assert named == packages


# ------------------------------------------------------------------------------------------------------ make and CI


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_alone_lists_every_target() -> None:
    shown = run("make", "--no-print-directory")
    assert shown.returncode == 0, shown.stderr
    assert {line.split()[0] for line in shown.stdout.splitlines()} == targets()
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == targets()


def test_documents_name_targets_that_exist() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / ".ci" / "run"]
    named = {
        target
        for path in documents
        for target in re.findall(r"^(?:\$ )?make ([a-z-]+)|`make ([a-z-]+)`", path.read_text(), re.MULTILINE)
        for target in target
        if target
    }
    assert {"test", "demo", "lint"} <= named
    assert named <= targets()


@pytest.mark.parametrize(
    ("python", "sentence"),
    [
        ("", "txrpc needs Python 3.11 or later"),
        ("/bin/false", "/bin/false is too old"),
        ("nothing-here", "nothing-here is"),
    ],
)
def test_without_a_python_make_says_so(tmp_path: Path, python: str, sentence: str) -> None:
    """In a folder of its own: nothing of this checkout is touched."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = run("make", "-C", str(tmp_path), "venv", f"PYTHON={python}")
    assert done.returncode != 0
    assert sentence in done.stdout + done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_ci_script_is_a_script() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", str(script)).returncode == 0
    assert "set -euo pipefail" in script.read_text()


SKIPS = {
    "marked": "import pytest\n@pytest.mark.skip(reason='REASON')\ndef test_it() -> None: ...\n",
    "inside": "import pytest\ndef test_it() -> None: pytest.skip('REASON')\n",
    "module": "import pytest\npytest.skip('REASON', allow_module_level=True)\n",
}


@pytest.mark.parametrize("processes", ["0", "1"])
@pytest.mark.parametrize(
    ("ci", "reason", "refused"),
    [("1", "later", True), ("1", "no embedded PostgreSQL here", False), ("", "later", False)],
)
def test_ci_accepts_only_known_reasons_for_a_skip(
    tmp_path: Path, ci: str, reason: str, *, refused: bool, processes: str
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name, text in SKIPS.items():
        (tmp_path / f"test_{name}.py").write_text(text.replace("REASON", reason))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-n",
        processes,
        "--rootdir",
        str(tmp_path),
    ]
    command += ["--continue-on-collection-errors", str(tmp_path)]
    done = run(*command, PYTHONPATH=str(ROOT), CI=ci)
    said = len(re.findall(r"^E? *skipped without a reason that CI accepts: .*later", done.stdout, re.MULTILINE))
    assert said == (3 if refused else 0), done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 failed, 2 errors" if refused else "3 skipped"), done.stdout


# ------------------------------------------------------------------------------------------------------- containers


def test_published_ports_are_on_loopback() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_who_is_waited_for_to_be_healthy_has_a_health_check() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    from_image = "HEALTHCHECK" in (ROOT / "Dockerfile").read_text()
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}, name
            checked = services[needed].get("healthcheck", {"disable": not (from_image and "build" in services[needed])})
            assert not checked.get("disable"), f"{name} waits for {needed}"


def test_the_containers_commands_have_the_options_that_are_given() -> None:
    commands = [
        json.loads(found) for found in re.findall(r"CMD (\[.+\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    ]
    assert [command[:2] for command in commands] == [["txrpc", "status"], ["txrpc", "coordinator"]]
    for _, subcommand, *words in commands:
        asked = run(sys.executable, "-m", "txrpc.cli", subcommand, "--help", COLUMNS="200")
        assert asked.returncode == 0, asked.stderr
        assert [word for word in words if word.startswith("--") and word not in asked.stdout] == []


def test_nothing_that_the_image_needs_is_ignored() -> None:
    ignored = {line.rstrip("/") for line in (ROOT / ".dockerignore").read_text().split()}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert copied
    assert ignored.isdisjoint(source for line in copied for source in line.split())
