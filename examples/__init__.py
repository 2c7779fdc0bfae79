"""Complete programs that use txrpc."""
