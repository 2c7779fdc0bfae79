"""``python -m txrpc.cli``."""

from txrpc.cli import main

main(prog_name="txrpc")
