"""Decision logs: the port, and what implements it."""
