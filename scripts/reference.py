"""Write docs/reference.md from the code; with --check say whether it is up to date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from txrpc._coordinator.config import PREFIX, CoordinatorConfig
from txrpc._coordinator.server import EXIT_CODES
from txrpc._wire.status import CODES
from txrpc.errors import AbortCode

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    """The whole page."""
    codes = [(f"`{code.name}`", *code.meaning, "yes" if code.retryable else "no") for code in AbortCode]
    errors = [(f"`{kind.__name__}`", status.name) for kind, status in CODES.items()]
    options = [
        (
            f"`--{f.name.replace('_', '-')}`",
            f"`{PREFIX}{f.name.upper()}`",
            f"`{f.default}`" if f.default != "" else "none",
            str(f.metadata["text"]),
        )
        for f in fields(CoordinatorConfig)
    ]
    variables = [
        ("`TXRPC_COORDINATOR`", "`host:port` of the coordinator, for `connect()` and the command line"),
        ("`TXRPC_TLS_CA`", "file with the coordinator's CA, as PEM, for `txrpc status`, `close` and `rebind`: use TLS"),
        (
            "`TXRPC_TLS_CERTIFICATE`, `TXRPC_TLS_KEY`",
            "files with a certificate and its key: of the coordinator, or of who asks it",
        ),
        ("`TXRPC_FAILPOINTS`", "for tests: see [testing-your-services.md](testing-your-services.md)"),
    ]
    return (
        "\n\n".join(
            [
                "# Reference",
                "Made from the code by `scripts/reference.py`.",
                "## Why a transaction was aborted",
                "`TransactionAborted.reason.code`. Where the last column says yes, `retry=` runs the whole transaction again.",
                table(("code", "what has happened", "what to do", "retryable"), codes),
                "## Errors and their gRPC status",
                table(("error", "status"), errors),
                "## `txrpc coordinator`",
                "A flag wins over the environment, and that over the TOML file (`--config`), whose keys are these with `_`.",
                table(("flag", "environment", "default", "what it is"), options),
                table(("exit code", "why it ended"), ((str(code), text) for code, text in EXIT_CODES.items())),
                "## Environment of every process",
                table(("variable", "what it is"), variables),
            ]
        )
        + "\n"
    )


def main() -> int:
    """See the module's docstring; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/reference.md from the code.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if anything would change")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        print("docs/reference.md is stale: run python scripts/reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
