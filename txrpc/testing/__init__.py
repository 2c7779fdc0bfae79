"""For tests, ours and yours: private databases and real processes."""
