"""For tests, ours and yours: private databases, real processes, and what can happen to them."""

from txrpc._failpoints import FailpointError
from txrpc.testing.failpoints import failpoint

__all__ = ["FailpointError", "failpoint"]
