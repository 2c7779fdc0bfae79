"""Generated from `protos/txrpc/v1`; never edited (see `scripts/generate.py`)."""
