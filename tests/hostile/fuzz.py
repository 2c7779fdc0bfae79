"""Coverage-guided fuzzing, by Google's atheris (libFuzzer): python -m tests.hostile.fuzz TARGET [libFuzzer's options]

    python -m tests.hostile.fuzz core -max_total_time=600 -jobs=2

A failure is printed with its bytes, and ends with a code that is not 0.
"""

from __future__ import annotations

import sys

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(
    include=["txrpc.ids", "txrpc._decision_log.schema", "txrpc._protocol", "txrpc._wire", "tests.hostile"]
):
    from tests.hostile.targets import TARGETS


def main() -> None:
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], lambda data: target(data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
