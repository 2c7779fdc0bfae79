"""Fetch a MySQL server for the tests into build/mysql, out of Debian unstable: releases of Debian have MariaDB alone.

It is unpacked into a folder together with the libraries that it needs, and installed nowhere: run it as build/mysql/mysqld.
Needs apt-get and dpkg-deb, no rights, and some 60 MB from the mirror that this machine's apt uses.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "build" / "mysql"
SOURCES = Path("/etc/apt")
PATIENCE_S = 120
WRAPPER = """#!/bin/sh
# Written by scripts/mysql.py.
exec '{root}/usr/lib64/ld-linux-x86-64.so.2' --library-path '{libraries}' '{root}/usr/sbin/mysqld' "$@"
"""


def main() -> None:
    """Fetch it, unless it is there."""
    program = FOLDER / "mysqld"
    if program.exists():
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    root = FOLDER / "root"
    root.mkdir(parents=True)
    for package in sorted(_download(FOLDER / "apt")):
        _run("dpkg-deb", "-x", str(package), str(root))
    shutil.rmtree(FOLDER / "apt")
    libraries = ":".join(str(each) for each in sorted(root.glob("usr/lib/*-linux-gnu")))
    written = FOLDER / "mysqld.new"
    written.write_text(WRAPPER.format(root=root, libraries=libraries))
    written.chmod(0o755)
    print(_run(str(written), "--version").strip())
    written.rename(program)


def _download(folder: Path) -> list[Path]:
    """Let apt find out, beside what it knows of this machine, what the server needs."""
    lists, cache, status = folder / "lists", folder / "cache", folder / "status"
    for each in (lists / "partial", cache / "archives" / "partial"):
        each.mkdir(parents=True)
    status.touch()
    source = folder / "sources.list"
    source.write_text(f"deb {_mirror()} sid main\n")
    options = {
        "Dir::Etc::SourceList": source,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::State::Lists": lists,
        "Dir::State::Status": status,
        "Dir::Cache": cache,
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
        "Acquire::http::Timeout": 20,
        "Acquire::https::Timeout": 20,
    }
    settings = [f"-o{key}={value}" for key, value in options.items()]
    _run("apt-get", *settings, "-qq", "update")
    _run(
        "apt-get", *settings, "-qq", "-y", "--no-install-recommends", "--download-only", "install", "mysql-server-core"
    )
    return list((cache / "archives").glob("*.deb"))


def _mirror() -> str:
    for path in [SOURCES / "sources.list", *sorted(SOURCES.glob("sources.list.d/*"))]:
        text = path.read_text() if path.is_file() else ""
        found = re.search(r"^(?!\s*#).*?(https?://\S+/debian/?)(?=\s|$)", text, re.MULTILINE)
        if found is not None:
            return found[1]
    sys.exit("this machine's apt has no mirror of Debian's")


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        sys.exit(f"{command[0]} failed: {error}")
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed: {(done.stdout + done.stderr).strip()}")
    return done.stdout


if __name__ == "__main__":
    main()
