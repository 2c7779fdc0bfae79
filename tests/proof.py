"""Where tests leave the counts that `docs/testing.md` shows: in the folder that TXRPC_PROOF_DIR names, if it does."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

__all__ = ["note_proof"]


def note_proof(kind: str, **counts: Any) -> None:
    """Write down that this much was shown by tests of *kind*."""
    folder = os.environ.get("TXRPC_PROOF_DIR")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"{kind}-{uuid.uuid4().hex}.json"
        path.write_text(json.dumps({"kind": kind, **counts}), encoding="utf-8")
