from __future__ import annotations

from tests.system.conftest import servers

__all__ = ["servers"]
