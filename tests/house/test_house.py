"""The house keeps its own rules: what is imported, what is exported, how long things are, and what must not be said."""

from __future__ import annotations

import ast
import enum
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import txrpc
import txrpc.aio
import txrpc.sql
from txrpc._coordinator.config import load
from txrpc._failpoints import POINTS
from txrpc._grpc.session import Session
from txrpc._grpc.session_async import AsyncSession

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [p for p in sorted((ROOT / "txrpc").rglob("*.py")) if "_wire/v1" not in p.as_posix()]
AROUND = [
    p
    for folder in ("examples", "scripts", "tests", "verification")
    for p in sorted((ROOT / folder).rglob("*.py"))
    if "_pb2" not in p.name
]
FUNCTION_LINES, FILE_LINES, LINE_CHARACTERS = 50, 400, 132
FUNCTION_LINES_AROUND, FILE_LINES_AROUND = 80, 700

# What is longer today, and how long: it may only shrink.
LONG_FUNCTIONS: dict[str, int] = {}
LONG_FILES: dict[str, int] = {}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code_lines(node: ast.AST) -> int:
    """Lines of a function without its docstring."""
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    first = node.body[0]
    has_docstring = ast.get_docstring(node) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


def functions(paths: list[Path]) -> Iterator[tuple[str, int]]:
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name_of(path)}:{node.name}", code_lines(node)


def test_functions_are_short() -> None:
    long = {name: lines for name, lines in functions(SOURCES) if lines > FUNCTION_LINES}
    assert {name for name in long if long[name] > LONG_FUNCTIONS.get(name, 0)} == set()
    assert set(LONG_FUNCTIONS) <= set(long), "take what is short now off the list"


def test_files_are_short() -> None:
    long = {name_of(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > FILE_LINES}
    assert {name for name in long if long[name] > LONG_FILES.get(name, 0)} == set()
    assert set(LONG_FILES) <= set(long), "take what is short now off the list"


def test_most_functions_are_very_short() -> None:
    lengths = sorted(lines for _, lines in functions(SOURCES))
    assert lengths[len(lengths) // 2] <= 10
    assert lengths[len(lengths) * 9 // 10] <= 30


def test_tests_and_examples_are_short_too() -> None:
    assert [name for name, lines in functions(AROUND) if lines > FUNCTION_LINES_AROUND] == []
    assert [name_of(p) for p in AROUND if len(p.read_text().splitlines()) > FILE_LINES_AROUND] == []


def test_lines_are_short() -> None:
    assert [
        f"{name_of(path)}:{number}"
        for path in [*SOURCES, *AROUND]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > LINE_CHARACTERS
    ] == []


def test_every_module_opens_with_what_it_is() -> None:
    assert [name_of(p) for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text()))] == []


def test_import_txrpc_loads_neither_sqlalchemy_nor_the_coordinator() -> None:
    code = (
        "import sys, txrpc, txrpc.aio; "
        "print([m for m in sys.modules if m.split('.')[0] in ('sqlalchemy', 'structlog', 'click', 'rich') "
        "or m.startswith(('txrpc._coordinator', 'txrpc.sql', 'txrpc.testing', 'txrpc._decision_log'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def modules() -> list[str]:
    dotted = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in SOURCES]
    return [name for name in dotted if not name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_all_is_sorted_and_true(name: str) -> None:
    module = __import__(name, fromlist=["x"])
    exported = getattr(module, "__all__", None)
    if exported is None:
        return
    assert len(set(exported)) == len(exported)
    assert [x for x in exported if not hasattr(module, x)] == []


@pytest.mark.parametrize("module", [txrpc, txrpc.aio, txrpc.sql])
def test_the_front_doors_are_frozen(module: ModuleType) -> None:
    """A change of what users import is a decision: change tests/house/exports.json in the same commit."""
    frozen = json.loads((ROOT / "tests" / "house" / "exports.json").read_text())
    assert sorted(module.__all__) == frozen[module.__name__]


def test_public_objects_say_where_users_import_them_from() -> None:
    for module in (txrpc, txrpc.aio, txrpc.sql):
        for name in module.__all__:
            said = getattr(getattr(module, name), "__module__", module.__name__)
            assert said in ("txrpc", "txrpc.aio", "txrpc.sql"), name


def test_public_enumerations_print_as_their_names() -> None:
    public = [getattr(txrpc, name) for name in txrpc.__all__]
    enums = [value for value in public if inspect.isclass(value) and issubclass(value, enum.Enum)]
    assert {txrpc.AbortCode, txrpc.Outcome, txrpc.Status, txrpc.Wait} <= set(enums)
    for member in (member for each in enums for member in each):
        assert str(member) == f"{member}" == f"{type(member).__name__}.{member.name}"


def test_the_asyncio_half_of_sql_is_imported_where_it_is_used() -> None:
    """B1: without greenlet `import txrpc.sql` works, and asking for the asyncio half says what to install."""
    code = (
        "import sys; sys.modules['sqlalchemy.ext.asyncio'] = None\n"
        "import txrpc.sql; print(txrpc.sql.ResourceManager)\n"
        "try: txrpc.sql.AsyncResourceManager\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    first, second = done.stdout.splitlines()
    assert first == "<class 'txrpc.sql.ResourceManager'>"
    assert "pip install 'sqlalchemy[asyncio]'" in second


def members(value: object) -> dict[str, inspect.Signature]:
    """What users call, by name, and their properties as calls without parameters."""
    if inspect.isclass(value):
        found = [(name, member) for name, member in inspect.getmembers(value) if not name.startswith("_")]
        methods = {name: inspect.signature(member) for name, member in found if inspect.isfunction(member)}
        return {**methods, **{name: inspect.Signature() for name, member in found if isinstance(member, property)}}
    return {"": inspect.signature(value)} if callable(value) else {}


SYNC_ONLY = {"intercept_channel"}  # a channel of grpc.aio takes its interceptors when it is made, and never later
PAIRS = {
    **{name: (getattr(txrpc, name), getattr(txrpc.aio, name, None)) for name in txrpc.__all__ if name not in SYNC_ONLY},
    "ResourceManager": (txrpc.sql.ResourceManager, txrpc.sql.AsyncResourceManager),
    "Session": (Session, AsyncSession),
}


def test_both_front_doors_have_the_same_names() -> None:
    assert [name for name in txrpc.__all__ if name not in SYNC_ONLY] == txrpc.aio.__all__


@pytest.mark.parametrize("name", PAIRS)
def test_both_colours_have_the_same_names_parameters_and_defaults(name: str) -> None:
    sync, asynchronous = (members(value) for value in PAIRS[name])
    assert sync.keys() == asynchronous.keys()
    for member, signature in sync.items():
        ours = [(p.name, p.kind, p.default) for p in signature.parameters.values()]
        theirs = [(p.name, p.kind, p.default) for p in asynchronous[member].parameters.values()]
        assert ours == theirs, f"{name}.{member}"


# Folders of one machine; and hosts: a document may cite these, everything else would be somebody's own.
MACHINE_PATHS = re.compile(r"(?<![\w.-])/(?:home|mnt|opt/wheels|root|srv|Users|work)/\w*")
HOSTS = re.compile(r"(?:https?|ftp)://([\w-]+(?:\.[\w-]+)+)")
CITED = {"bford.info", "docs.pytest.org", "www.apache.org", "127.0.0.1"}


def tracked() -> list[Path]:
    """Every file of the project that is text."""
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=False)
    names = [name for name in listed.stdout.split("\0") if name] if listed.returncode == 0 else []
    paths = [ROOT / name for name in names] or [p for p in ROOT.rglob("*") if not {".venv", ".git"} & set(p.parts)]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


def test_the_project_speaks_of_itself_alone() -> None:
    paths = tracked()
    assert ROOT / "pyproject.toml" in paths
    assert [
        f"{name_of(path)}: {found}"
        for path in paths
        for text in [path.read_text(errors="replace")]
        for found in [*MACHINE_PATHS.findall(text), *(host for host in HOSTS.findall(text) if host not in CITED)]
    ] == []


def test_the_changelog_has_an_unreleased_section() -> None:
    assert "\n## Unreleased\n" in (ROOT / "CHANGELOG.md").read_text()


def test_documents_point_at_what_is_there() -> None:
    missing = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        targets = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
        missing += [f"{name_of(path)} -> {target}" for target in targets if not (path.parent / target).exists()]
    assert missing == []


def test_the_guide_to_testing_shows_code_that_is_tested_and_every_point() -> None:
    text = (ROOT / "docs/testing-your-services.md").read_text()
    example = (ROOT / "examples/testing/test_transfer.py").read_text()
    shown = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(shown) == 2
    assert [code for code in shown if code not in example] == []
    named = set(re.findall(r"`([a-z_]+)`", text))
    assert {point.partition(".")[2].partition("_")[2] for point in POINTS} <= named


def test_the_packages_version_is_the_modules() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == txrpc.__version__
    assert (ROOT / "txrpc" / "py.typed").exists()


def test_compose_runs_commands_that_exist() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    services = compose["services"]
    coordinators = {"c1", "c2", "c3"}
    assert {*coordinators, "database-a", "database-b", "bank-a", "bank-b", "teller"} == set(services)
    for name in coordinators:
        words = services[name]["command"].split()
        assert words[:2] == ["txrpc", "coordinator"]
        flags = {flag.removeprefix("--"): value for flag, value in zip(words[2::2], words[3::2], strict=True)}
        config = load(flags, {}, None)
        assert config.node == name
        assert {f"{node}:7400" for node in coordinators} == set(config.group_members().addresses.values())
    for name, service in services.items():
        for needed in service.get("depends_on", {}):
            assert needed in services
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in compose["volumes"]
        command = service.get("command", "")
        if isinstance(command, str) and command.startswith("python -m "):
            words = command.split()
            module = ROOT / (words[2].replace(".", "/") + ".py")
            assert module.exists(), name
            for flag in (word for word in words if word.startswith("--")):
                assert f'"{flag}"' in module.read_text(), f"{name}: {flag}"
        if name.startswith("database"):
            assert any(word.startswith("max_prepared_transactions=") for word in command)


def test_the_container_file_copies_what_is_there() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    assert "USER txrpc" in text
