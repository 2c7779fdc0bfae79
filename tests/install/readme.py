"""The README's example, taken out of the README and run as it stands: the same files, the same commands, other ports."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.postgres import Server
from txrpc.testing.processes import Child, free_port

__all__ = ["blocks", "play"]

ROOT = Path(__file__).resolve().parents[2]
READY = {"coordinator": "listening", "bank.py": "is serving"}
"""What a command that runs in the background writes when it is ready."""


def blocks() -> dict[str, str]:
    """The named blocks of code in the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- example: ([\w.]+) -->\n```\w+\n(.*?)```", text, re.DOTALL))


def play(folder: Path, python: Path, servers: Mapping[str, Server], driver: str, number: int) -> list[str]:
    """Run the example in *folder* with *python*; returns what its commands wrote, and drops its databases.

    The accounts are checked in the databases themselves: a transfer that fails moves nothing.
    """
    replaced = {f"127.0.0.1:{port}": f"127.0.0.1:{free_port()}" for port in (7400, 7501, 7502)}
    databases = {name: f"readme{number}{name[-1]}" for name in servers}
    for name, server in servers.items():
        server.create_database(databases[name])
        replaced[f"postgresql+psycopg:///{name.replace('-', '_')}"] = server.url(databases[name], driver)
    named = blocks()
    for name in ("bank.proto", "bank.py", "transfer.py"):
        (folder / name).write_text(_replace(named[name], replaced))
    try:
        said = _run(folder, python, _replace(named["run"], replaced))
        assert [_accounts(server, databases[name]) for name, server in servers.items()] == [
            "ada 900, ben 1000",
            "ada 1000, ben 1100",
        ]
    finally:
        for name, server in servers.items():
            server.execute(f"DROP DATABASE {databases[name]} WITH (FORCE)")
    return said


def _replace(text: str, replaced: Mapping[str, str]) -> str:
    for old, new in replaced.items():
        text = text.replace(old, new)
    return text


def _accounts(server: Server, database: str) -> object:
    return server.execute("SELECT string_agg(name || ' ' || cents, ', ' ORDER BY name) FROM account", database)[0][0]


def _run(folder: Path, python: Path, script: str) -> list[str]:
    """Run each line that begins with $; the lines below it are what it must write."""
    said: list[str] = []
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TXRPC_FAILPOINTS")}
    environment = {**ours, "PATH": f"{python.parent}{os.pathsep}{ours['PATH']}", "PYTHONUNBUFFERED": "1"}
    with ExitStack() as started:
        for command, expected in re.findall(r"^\$ (.+)\n((?:[^$].*\n)*)", script, re.MULTILINE):
            words = shlex.split(command, comments=True)
            if words[-1] == "&":
                name = f"background{len(said)}"
                ready = next(text for word, text in READY.items() if word in words)
                words = ["env", f"--chdir={folder}", *words[:-1]]
                child = Child(words, name=name, output=folder / f"{name}.log", ready=ready, env=environment)
                child.environment.pop("PYTHONPATH", None)
                started.enter_context(child)
                said.append(child.text())
                continue
            done = subprocess.run(
                words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
            )
            said.append(done.stdout + done.stderr)
            if "# raises" in command:
                assert done.returncode != 0, said
                assert re.search(command.partition("# raises ")[2].partition(":")[0], done.stderr), said
            else:
                assert (done.returncode, done.stdout) == (0, expected), said
    return said
